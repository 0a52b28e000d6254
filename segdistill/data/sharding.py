"""Writing the prepared data: shards in parallel, each complete or absent, and what was done is not done again."""

import functools
import hashlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from segdistill.data.checks import BadFile, load_sample
from segdistill.data.layouts import IGNORE_INDEX, SPLITS, Layout, Sample
from segdistill.data.parallel import ordered_map
from segdistill.data.shards import INFO_FILE, MANIFEST_FILE, SHARD_FOLDER, open_shard, sample_hash, shard_schema
from segdistill.errors import UserError
from segdistill.files import write_file


@dataclass(frozen=True)
class Shard:
    """A file to write, and what goes into it."""

    name: str
    split: str
    samples: tuple[Sample, ...]


def plan_shards(layout: Layout, shard_samples: int) -> list[Shard]:
    """Cuts every split into shards of equal length; the last one of a split may be shorter."""
    shards = []
    for split in SPLITS:
        samples = tuple(layout.samples(split))
        for number, start in enumerate(range(0, len(samples), shard_samples)):
            shards.append(Shard(f"{split}-{number:05d}.arrow", split, samples[start : start + shard_samples]))
    return shards


def write_shards(
    layout: Layout, shards: list[Shard], folder: Path, *, max_side: int | None, workers: int
) -> Iterator[Shard]:
    """Writes the shards that ``folder`` does not hold yet, and yields each as soon as it is there.

    Args:
        layout: where the samples come from.
        shards: the plan.
        folder: the unfinished folder; a shard counts as there if it was made from the same files in the same way.
        max_side: shrink larger images to this longer side; None keeps them.
        workers: processes; 0 = all cores.
    """
    keys = {shard.name: _key(shard, layout, max_side) for shard in shards}
    _forget_others(folder, keys)
    todo = []
    for shard in shards:
        if (folder / "keys" / shard.name).exists():
            yield shard
        else:
            todo.append(shard)
    task = functools.partial(
        write_shard, folder=folder, root=layout.root, label_map=layout.label_map, max_side=max_side
    )
    for shard, _ in zip(todo, ordered_map(task, todo, workers=workers), strict=True):
        write_file(folder / "keys" / shard.name, keys[shard.name].encode())
        yield shard


def write_shard(shard: Shard, *, folder: Path, root: Path, label_map: np.ndarray, max_side: int | None) -> None:
    """Writes one shard, with one sample in memory at a time.

    Raises:
        UserError: a sample that cannot be used, by its file's name.
    """
    import pyarrow

    path = folder / SHARD_FOLDER / shard.name
    partial = path.with_suffix(f".{os.getpid()}.partial")
    schema = shard_schema()
    try:
        with partial.open("wb") as file, pyarrow.ipc.new_file(file, schema) as writer:
            for sample in shard.samples:
                row = _encode(sample, root, label_map, max_side)
                writer.write_batch(pyarrow.record_batch([[row[name]] for name in schema.names], schema=schema))
        partial.replace(path)
    except BadFile as problem:
        raise UserError(str(problem)) from None
    finally:
        partial.unlink(missing_ok=True)


def write_index(layout: Layout, shards: list[Shard], folder: Path) -> None:
    """Writes the manifest, one row a sample, and ``dataset.json``; both follow from the shards."""
    import pyarrow
    import pyarrow.parquet

    small = [name for name in shard_schema().names if name not in ("image", "label")]
    rows: dict[str, list[Any]] = {name: [] for name in ("split", "shard", "row", *small, "image_bytes", "label_bytes")}
    for shard in shards:
        reader = open_shard(folder / SHARD_FOLDER / shard.name)
        for number in range(reader.num_record_batches):
            record = reader.get_batch(number)
            values = {name: record[name][0].as_py() for name in small}
            values |= {"split": shard.split, "shard": shard.name, "row": number}
            values |= {f"{name}_bytes": record[name][0].as_buffer().size for name in ("image", "label")}
            for name, value in values.items():
                rows[name].append(value)
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / MANIFEST_FILE)
    info = {
        "classes": [{"name": entry.name, "color": list(entry.color)} for entry in layout.classes],
        "ignore_index": IGNORE_INDEX,
        "content_hash": _content_hash(layout, rows),
        "splits": {split: _describe([shard for shard in shards if shard.split == split]) for split in SPLITS},
    }
    (folder / INFO_FILE).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")


def _content_hash(layout: Layout, rows: dict[str, list[Any]]) -> str:
    """What the data is, however it is cut into shards: the classes' names, and every sample in order."""
    samples = list(zip(rows["split"], rows["id"], rows["sha256"], strict=True))
    return hashlib.sha256(json.dumps([[entry.name for entry in layout.classes], samples]).encode()).hexdigest()


def _describe(shards: list[Shard]) -> dict[str, Any]:
    files = [{"file": f"{SHARD_FOLDER}/{shard.name}", "samples": len(shard.samples)} for shard in shards]
    return {"samples": sum(len(shard.samples) for shard in shards), "shards": files}


def _encode(sample: Sample, root: Path, label_map: np.ndarray, max_side: int | None) -> dict[str, Any]:
    content, image, labels = load_sample(sample, label_map)
    image_format = "png" if image.format == "PNG" else "jpeg"
    if max_side and max(image.size) > max_side:
        factor = max_side / max(image.size)
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        # Without loss from here on: a second JPEG generation would add its own artefacts.
        content, image_format = _png(image.convert("RGB").resize(size, Image.Resampling.BILINEAR)), "png"
        labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    label = _png(Image.fromarray(labels))
    return {
        "id": sample.id,
        "image": content,
        "image_format": image_format,
        "label": label,
        "height": labels.shape[0],
        "width": labels.shape[1],
        "sha256": sample_hash(content, label),
        "image_file": sample.image.relative_to(root).as_posix(),
        "mask_file": sample.mask.relative_to(root).as_posix(),
    }


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def _key(shard: Shard, layout: Layout, max_side: int | None) -> str:
    """A digest of all that decides a shard's bytes; a file counts as the same if size and time of change are."""
    import pyarrow

    files: list[Any] = []
    for sample in shard.samples:
        for path in (sample.image, sample.mask):
            try:
                state = path.stat()
            except OSError:
                raise UserError(f"{path}: missing") from None
            files.append([sample.id, path.relative_to(layout.root).as_posix(), state.st_size, state.st_mtime_ns])
    made_by = [pillow_version, pyarrow.__version__, layout.label_map.tolist(), max_side]
    return hashlib.sha256(json.dumps([made_by, files]).encode()).hexdigest()


def _forget_others(folder: Path, keys: dict[str, str]) -> None:
    """Removes what an earlier attempt left and this one cannot use."""
    for name in (SHARD_FOLDER, "keys"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for path in (folder / "keys").iterdir():
        if not (folder / SHARD_FOLDER / path.name).exists() or path.read_text() != keys.get(path.name):
            path.unlink()
    for path in (folder / SHARD_FOLDER).iterdir():
        if not (folder / "keys" / path.name).exists():
            path.unlink()
