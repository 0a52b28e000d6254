"""Any known layout, and loose pairs of photos and masks -> the layout "folder"."""

import functools
import json
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from segdistill.data.checks import load_sample
from segdistill.data.decoding import BadFile, encode_png, image_format
from segdistill.data.layouts import IGNORE_INDEX, LAYOUTS, SPLITS, WITHOUT_MASKS, Legend, Sample, open_layout
from segdistill.data.layouts.folder import Folder
from segdistill.data.pairing import pair_list, pair_tree
from segdistill.data.parallel import ordered_map, progress, workers_for
from segdistill.data.sorting import Sorted, Wishes, sort_samples
from segdistill.data.unpacking import find_archives, unpack
from segdistill.errors import UserError
from segdistill.files import disk_errors, folder_place, new_folder, replace_folder, require_free

LIST = "csv"  # instead of a layout: a list of pairs


@dataclass(frozen=True)
class Imported:
    """What was written."""

    samples: dict[str, int]  # by split
    classes: tuple[str, ...]
    layout: str
    notes: tuple[str, ...]  # what was decided without being asked, in words


def import_dataset(
    layout: str, source: Path, out: Path, *, wishes: Wishes | None = None, workers: int | None = None
) -> Imported:
    """Writes a data set of any layout, or loose pairs of photos and masks, in the layout "folder".

    Images are copied byte for byte; masks are written again with train ids, IGNORE_INDEX where ignored.
    A published data set whose test split is val is no such folder: its archives are unpacked, and it keeps its layout.

    Args:
        layout: how ``source`` is laid out: a known layout, or LIST for a CSV file of pairs. A source of the layout
            "folder" that has no class list or no splits is taken for loose pairs.
        source: the data set to read: a folder, or an archive; of a published data set also a folder with its archives.
        out: the folder to make; an empty one may be there.
        wishes: of loose pairs: what they do not say themselves.
        workers: processes; 0 = all cores; None goes by the number of files.

    Raises:
        UserError: ``out`` has content, or a file of the source is missing or broken, or an archive is not safe.
    """
    require_free(out)
    wishes = wishes or Wishes()
    stays = layout in LAYOUTS and LAYOUTS[layout].tested_on != "test"
    archives = find_archives(source) if stays or source.is_file() else []
    if not archives:
        return _write(layout, source, out, wishes, workers)
    if stays:
        _require_no_wishes(wishes, layout, source)
    place = folder_place(out)
    with disk_errors(out):
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{place.name}.", suffix=".partial", dir=place.parent) as name:
            unpacked = Path(name) / source.name
            try:
                for archive in archives:
                    folder = unpacked / archive.parent.relative_to(source) if source.is_dir() else unpacked
                    folder.mkdir(parents=True, exist_ok=True)
                    unpack(archive, folder)
                if not stays:
                    return _write(layout, unpacked, out, wishes, workers)
                dataset = open_layout(layout, unpacked)
                samples = {split: sum(1 for _ in dataset.samples(split)) for split in dataset.splits}
            except UserError as error:
                raise UserError(str(error).replace(str(unpacked), str(source))) from None
            replace_folder(unpacked, place)
    notes = (f"unpacked {', '.join(archive.name for archive in archives)}; the layout is '{layout}'",)
    return Imported(samples, tuple(info.name for info in dataset.classes), layout, notes)


def _write(layout: str, source: Path, out: Path, wishes: Wishes, workers: int | None) -> Imported:
    """Writes the layout "folder"."""
    dataset = _read(layout, source, wishes, workers)
    workers = workers_for(len(dataset.samples)) if workers is None else workers
    counts = Counter((sample.split, sample.id) for sample in dataset.samples)
    for (split, name), count in counts.items():
        if count > 1:
            raise UserError(f"{source}: {count} images of {split} are called '{name}'; a name may stand there once")
    splits = [split for split in (*SPLITS, WITHOUT_MASKS) if any(split == place for place, _ in counts)]
    with new_folder(out) as partial:
        for split in dict.fromkeys((*SPLITS, *splits)):
            for kind in ("images", "masks") if split != WITHOUT_MASKS else ("images",):
                (partial / kind / split).mkdir(parents=True)
        task = functools.partial(_import_sample, legend=dataset.legend, out=partial)
        done = progress(ordered_map(task, dataset.samples, workers=workers), "import", len(dataset.samples))
        problems = [problem for problem in done if problem]
        if problems:
            more = f"; {len(problems) - 1} more samples cannot be used" if len(problems) > 1 else ""
            raise UserError(problems[0] + more)
        classes = [{"name": info.name, "color": list(info.color)} for info in dataset.classes]
        text = json.dumps({"classes": classes, "ignore_index": IGNORE_INDEX}, indent=2)
        (partial / "classes.json").write_text(text + "\n", encoding="utf-8")
    samples = {split: sum(place == split for place, _ in counts) for split in splits}
    return Imported(samples, tuple(info.name for info in dataset.classes), Folder.name, dataset.notes)


def is_layout(layout: str, source: Path) -> bool:
    """Whether a folder can be opened as a layout: a folder of images and masks without more is none."""
    if layout != Folder.name:
        return True
    described = (source / "classes.json").is_file() and (source / "masks").is_dir()
    return described and any((source / "images" / split).is_dir() for split in SPLITS)


def _read(layout: str, source: Path, wishes: Wishes, workers: int | None) -> Sorted:
    if layout == LIST:
        return sort_samples(pair_list(source), source.parent, wishes, workers=workers)
    if not source.is_dir():
        open_layout(layout, source)  # says what is wrong
    if not is_layout(layout, source) or (layout == Folder.name and wishes.shares):
        return sort_samples(pair_tree(source), source, wishes, workers=workers)
    _require_no_wishes(wishes, layout, source)
    dataset = open_layout(layout, source)
    if "test" not in dataset.own_splits:
        raise UserError(
            f"{source}: the layout '{layout}' is read as it lies and needs no import; move it to data/, and: "
            f"segdistill init --layout {layout}"
        )
    samples = [sample for split in dataset.splits for sample in dataset.samples(split)]
    if not samples:
        raise dataset.without_samples()
    return Sorted(samples, dataset.classes, dataset.legend, ())


def _require_no_wishes(wishes: Wishes, layout: str, source: Path) -> None:
    if wishes != Wishes():
        raise UserError(f"{source}: its layout '{layout}' says its classes and splits; leave the options out")


def _import_sample(sample: Sample, *, legend: Legend, out: Path) -> str | None:
    """Writes both files of a sample, or tells why it cannot."""
    try:
        content, _, labels = load_sample(sample, legend)
    except BadFile as problem:
        return str(problem)
    suffix = {"jpeg": "jpg", "tiff": "tif"}.get(image_format(content), image_format(content))
    (out / "images" / sample.split / f"{sample.id}.{suffix}").write_bytes(content)
    if sample.mask is None:
        return None
    # Encoded first: where the disk is full, Pillow would not say so.
    (out / "masks" / sample.split / f"{sample.id}.png").write_bytes(encode_png(Image.fromarray(labels)))
    return None
