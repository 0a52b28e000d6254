"""Writing the prepared data: shards in parallel, each complete or absent, and what was done is not done again."""

import functools
import hashlib
import json
import os
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from segdistill.config import to_dict
from segdistill.data.checks import format_of, load_sample
from segdistill.data.decoding import (
    FILE_LIMIT,
    BadFile,
    encode_jpeg,
    encode_pixels,
    encode_png,
    image_format,
    resize_pixels,
)
from segdistill.data.layouts import IGNORE_INDEX, UNLABELLED, Layout, Legend, Sample
from segdistill.data.parallel import ordered_map
from segdistill.data.rows import encode_rows
from segdistill.data.shards import (
    INFO_FILE,
    MANIFEST_FILE,
    PARTS,
    SHARD_FOLDER,
    Place,
    content_hash,
    read_encoded,
    sample_hash,
    shard_schema,
)
from segdistill.data.statistics import data_format, pixel_facts
from segdistill.errors import UserError
from segdistill.files import read_text, regular_status, require_regular, seal, write_file

Row = dict[str, Any]  # what the manifest says of a sample
File = tuple[Path, int, int]  # its name, its bytes, and when it was changed, in nanoseconds

KEYS = "keys"  # the folder that says of what finished shards were made, until all are


@dataclass(frozen=True)
class Storage:
    """In which form samples are stored; see the section ``prepare`` of params.yaml."""

    images: Literal["original", "jpeg", "decoded"]
    jpeg_quality: int
    max_side: int | None


@dataclass(frozen=True)
class Shard:
    """A file to write, and what goes into it."""

    name: str
    split: str
    samples: tuple[Sample, ...]
    files: tuple[tuple[File, ...], ...]  # of each sample
    size: int  # bytes, about; see sample_size


def plan_shards(
    splits: Mapping[str, Sequence[Sample]], shard_samples: int, shard_bytes: int, storage: Storage
) -> list[Shard]:
    """Cuts every split into shards, each as long as both limits allow."""
    shards: list[Shard] = []
    for split, samples in splits.items():
        files = [_files(sample) for sample in samples]
        sizes = [sample_size(*both, storage) for both in zip(samples, files, strict=True)]
        number = start = 0
        while start < len(samples):
            end, filled = start + 1, sizes[start]
            while end < min(start + shard_samples, len(samples)) and filled + sizes[end] <= shard_bytes:
                filled += sizes[end]
                end += 1
            parts = tuple(samples[start:end]), tuple(files[start:end])
            shards.append(Shard(f"{split}-{number:05d}.arrow", split, *parts, filled))
            number, start = number + 1, end
    return shards


def _files(sample: Sample) -> tuple[File, ...]:
    states = {path: regular_status(path, limit=FILE_LIMIT) for path in (sample.image, sample.mask) if path}
    return tuple((path, state.st_size, state.st_mtime_ns) for path, state in states.items())


def sample_size(sample: Sample, files: Sequence[File], storage: Storage) -> int:
    """Bytes that a sample takes, before it is read: those of its files, or, to be decoded, of its pixels.

    JPEG will take less than the files, TIFF and .npy files about as much as their pixels.
    """
    size = sum(size for _, size, _ in files)
    if storage.images != "decoded":
        return size
    try:
        with sample.image.open("rb") as file, Image.open(file) as image:  # reads the header alone
            factor = min(1, storage.max_side / max(image.size)) if storage.max_side else 1
            return int(image.width * image.height * 4 * factor**2)
    except (OSError, ValueError, Image.DecompressionBombError):  # said of what is no image when it is read
        return size


def write_shards(
    layout: Layout, shards: list[Shard], folder: Path, *, storage: Storage, workers: int
) -> Iterator[tuple[Shard, list[Row], int]]:
    """Writes the shards that ``folder`` does not hold yet, and yields each as soon as it is there.

    Args:
        layout: where the samples come from.
        shards: the plan.
        folder: the unfinished folder; a shard counts as there if it was made from the same files in the same way, and
            every sample in it is still what was written.
        storage: in which form.
        workers: processes; 0 = all cores.

    Yields:
        A shard, what the manifest says of its samples, and the most memory that the process which wrote it has had
        until then, in bytes; 0 where the shard was there.
    """
    keys = {shard.name: _key(shard, layout, storage) for shard in shards}
    done = {name: rows for name, key in keys.items() if (rows := _finished(folder, name, key))}
    for name in (SHARD_FOLDER, KEYS):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for path in (folder / name).iterdir():
            if path.name not in done:
                path.unlink()
    missing = [shard for shard in shards if shard.name not in done]
    for shard in shards:
        if shard.name in done:
            yield shard, done[shard.name], 0
    task = functools.partial(_write, folder=folder, root=layout.root, legend=layout.legend, storage=storage)
    jobs = [(shard, keys[shard.name]) for shard in missing]
    for shard, (rows, peak) in zip(missing, ordered_map(task, jobs, workers=workers), strict=True):
        yield shard, rows, peak


def peak_memory() -> int:
    """The most memory that this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _write(job: tuple[Shard, str], *, folder: Path, **settings: Any) -> tuple[list[Row], int]:
    """Writes a shard, and, once it is whole, of what it was made: it is done, whatever becomes of the others."""
    shard, key = job
    rows = write_shard(shard, folder=folder, **settings)
    text = json.dumps(rows)
    write_file(folder / KEYS / shard.name, f"{_digest(key, text)}\n{text}".encode())
    return rows, peak_memory()


def write_shard(shard: Shard, *, folder: Path, root: Path, legend: Legend, storage: Storage) -> list[Row]:
    """Writes one shard, with one sample in memory at a time; returns what the manifest says of its samples.

    Raises:
        UserError: a sample that cannot be used, by its file's name.
    """
    import pyarrow

    path = folder / SHARD_FOLDER / shard.name
    partial = path.with_suffix(f".{os.getpid()}.partial")
    schema = shard_schema()
    rows: list[Row] = []
    try:
        with partial.open("wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
            for sample in shard.samples:
                row = _encode(sample, root, legend, storage)
                writer.write_batch(pyarrow.record_batch([[row[name]] for name in schema.names], schema=schema))
                sizes = {f"{name}_bytes": len(row.pop(name)) for name in PARTS}
                rows.append({"split": shard.split, "shard": shard.name, "row": len(rows), **row, **sizes})
        for row, place in zip(rows, _places(partial), strict=True):
            row.update(place)
        partial.replace(path)
    except BadFile as problem:
        raise UserError(str(problem)) from None
    finally:
        partial.unlink(missing_ok=True)
    return rows


def write_index(layout: Layout, splits: Iterable[str], shards: list[Shard], rows: list[Row], folder: Path) -> None:
    """Writes the manifest, one row a sample, and ``dataset.json``, and seals both.

    A split that has another's samples has rows of its own, in the shards of the other.
    """
    import pyarrow
    import pyarrow.parquet

    images = data_format(rows)
    source = {split: layout.tested_on if split == "test" else split for split in splits}
    rows = [{**row, "split": split} for split, place in source.items() for row in rows if row["split"] == place]
    for row in rows:
        del row["facts"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / MANIFEST_FILE)
    names = [entry.name for entry in layout.classes]
    info = {
        "classes": [{"name": entry.name, "color": list(entry.color)} for entry in layout.classes],
        "ignore_index": IGNORE_INDEX,
        "images": to_dict(images),
        "content_hash": content_hash(names, ((row["split"], row["id"], row["sha256"]) for row in rows)),
        "splits": {
            split: _describe([shard for shard in shards if shard.split == place]) for split, place in source.items()
        },
    }
    (folder / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    seal(folder, leave=[SHARD_FOLDER, KEYS])


def _places(shard: Path) -> Iterator[dict[str, int]]:
    """Where in the file the image and the label of each sample begin."""
    import pyarrow

    with pyarrow.memory_map(str(shard)) as file:
        whole = file.read_buffer()  # maps, and copies nothing
        reader = pyarrow.ipc.open_file(whole)
        for number in range(reader.num_record_batches):
            record = reader.get_batch(number)
            values = {name: record[name].buffers()[2] for name in PARTS}  # of one value, it begins there
            yield {f"{name}_offset": buffer.address - whole.address for name, buffer in values.items()}


def _describe(shards: list[Shard]) -> dict[str, Any]:
    files = [{"file": f"{SHARD_FOLDER}/{shard.name}", "samples": len(shard.samples)} for shard in shards]
    return {"samples": sum(len(shard.samples) for shard in shards), "shards": files}


def _encode(sample: Sample, root: Path, legend: Legend, storage: Storage) -> Row:
    content, pixels, labels = load_sample(sample, legend)
    factor = min(1.0, (storage.max_side or max(labels.shape)) / max(labels.shape))
    if factor < 1:
        size = (max(1, round(labels.shape[1] * factor)), max(1, round(labels.shape[0] * factor)))
        pixels = resize_pixels(pixels, size)
        labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    checksums = {}
    if storage.images == "decoded":
        content, checksums["image_checksums"] = encode_rows(pixels)
        label, checksums["label_checksums"] = encode_rows(labels)
    else:
        if storage.images == "jpeg" and (factor < 1 or image_format(content) != "jpeg"):
            if not format_of(pixels).is_rgb:
                raise BadFile(
                    f"{sample.image}: {format_of(pixels)}, and a JPEG holds 3 of 8; choose another prepare.images"
                )
            content = encode_jpeg(Image.fromarray(pixels), storage.jpeg_quality)
        elif factor < 1:  # without loss: a second JPEG generation would add its own artefacts
            content = encode_pixels(pixels)
        label = encode_png(Image.fromarray(labels))
    return {
        "id": sample.id,
        "image": content,
        "image_format": image_format(content),
        "label": label,
        "height": labels.shape[0],
        "width": labels.shape[1],
        "sha256": sample_hash(content, label),
        "image_file": sample.image.relative_to(root).as_posix(),
        "mask_file": sample.mask.relative_to(root).as_posix() if sample.mask else None,
        "class_pixels": np.trim_zeros(np.bincount(labels.ravel())[:UNLABELLED], "b").tolist(),
        "sequence": sample.sequence,
        "facts": pixel_facts(pixels),
        **checksums,
    }


def _key(shard: Shard, layout: Layout, storage: Storage) -> str:
    """A digest of all that decides a shard's bytes; a file counts as the same if size and time of change are."""
    import pyarrow

    files = [
        [sample.id, path.relative_to(layout.root).as_posix(), *state]
        for sample, own in zip(shard.samples, shard.files, strict=True) for path, *state in own
    ]  # fmt: skip
    layout_facts = [layout.legend.label_map.tolist(), layout.legend.colors, list(vars(storage).values())]
    made_by = ["class_pixels", "facts", pillow_version, pyarrow.__version__, *layout_facts]
    return hashlib.sha256(json.dumps([made_by, files]).encode()).hexdigest()


def _finished(folder: Path, name: str, key: str) -> list[Row] | None:
    """What the manifest says of a shard that an earlier attempt finished, if it is whole and made for this key."""
    path = folder / SHARD_FOLDER / name
    try:
        digest, text = read_text(folder / KEYS / name).split("\n", 1)
        require_regular(path)
        if digest != _digest(key, text):
            return None
        rows: list[Row] = json.loads(text)
        with path.open("rb") as file:
            for row in rows:
                read_encoded(file.fileno(), Place.of(row.__getitem__))
    except (UserError, OSError, ValueError):
        return None
    return rows


def _digest(key: str, text: str) -> str:
    return hashlib.sha256(f"{key}\n{text}".encode()).hexdigest()
