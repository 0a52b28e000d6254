"""The stage ``prepare``: a checked data set of any layout -> Arrow shards with train ids, and a manifest."""

import logging
import shutil
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from segdistill.config import config
from segdistill.data.settings import Workers
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.files import MIB, disk_errors, folder_place, read_json, replace_folder


@config
class Config:
    """Section ``prepare`` of params.yaml."""

    layout: str
    """How the data set is laid out: folder, or a published data set's own layout, such as cityscapes."""

    shard_samples: Annotated[int, Field(ge=1, le=1_000_000)]
    """Samples in one shard file, at most; a killed run continues after the last finished shard."""

    max_side: Annotated[int, Field(ge=16, le=65536)] | None
    """Shrink larger images to this longer side, with their masks; null keeps every image as it is."""

    workers: Workers
    """Processes; 0 uses all cores. The result does not depend on it."""

    shard_mib: Annotated[int, Field(ge=1, le=16384)] = 128
    """MiB of one shard file, about and at most, by the size of the files that go into it, or of their pixels where they
    are stored decoded: of a size that one request to S3 is worth."""

    images: Literal["original", "jpeg", "decoded"] = "original"
    """How images are stored. original: the bytes as they are; each crop decodes a whole image. jpeg: what is no JPEG
    becomes one, which is smaller and decoded sooner, but has other pixels: brightness is rounded in squares of
    8x8 pixels, and colour, at half the resolution, too. decoded: pixels and labels uncompressed, 4 bytes a pixel of
    RGB, so that a crop reads its rows alone. Labels are never changed."""

    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Of images: jpeg; the smaller, the smaller the file and the larger the change."""

    labelled: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The part of the training images that keeps its masks, in every class about its share of images; the others join
    the split 'unlabelled', as if nobody had drawn theirs. A smaller part is always a part of a larger one."""


def run(config: Config, *, data: Path, report: Path, prepared: Path, tracker: Tracker) -> None:
    """Writes ``prepared``; until that is complete the work lies in ``<prepared>.partial``, from where it continues.

    Args:
        config: the stage's parameters.
        data: the data set.
        report: what the stage ``validate`` wrote about it.
        prepared: the folder to write.
        tracker: gets the number of samples and bytes.

    Raises:
        UserError: the report says that the data set must not be used, or a sample cannot be.
    """
    from segdistill.data.labelled import samples_by_split
    from segdistill.data.layouts import open_layout
    from segdistill.data.parallel import progress
    from segdistill.data.sharding import KEYS, Storage, peak_memory, plan_shards, write_index, write_shards

    _check_report(report, config.layout)
    layout = open_layout(config.layout, data)
    target = folder_place(prepared)
    partial = target.with_name(f"{target.name}.partial")
    storage = Storage(config.images, config.jpeg_quality, config.max_side)
    kept = f"finished shards wait in {partial}, and the same command continues from there"
    with disk_errors(prepared, kept):
        splits = samples_by_split(layout, config.labelled, workers=config.workers)
        repeated = () if layout.tested_on == "test" else ("test",)  # its rows name the shards of another split
        own = {split: samples for split, samples in splits.items() if split not in repeated}
        shards = plan_shards(own, config.shard_samples, config.shard_mib * MIB, storage)
        if config.images == "decoded":
            _check_disk(sum(shard.size for shard in shards), partial)
        written = write_shards(layout, shards, partial, storage=storage, workers=config.workers)
        total = sum(len(shard.samples) for shard in shards)
        rows, peaks = {}, [0]
        for shard, shard_rows, peak in progress(written, "prepare", total, lambda done: len(done[1])):
            rows[shard.name] = shard_rows
            peaks.append(peak)
        write_index(layout, splits, shards, [row for shard in shards for row in rows[shard.name]], partial)
        size = sum(path.stat().st_size for path in (partial / "shards").iterdir())
        shutil.rmtree(partial / KEYS)
        replace_folder(partial, target)
    logging.getLogger(__name__).info(
        "%s samples, %.1f MiB in %d shards; at most %.0f MiB of memory here, %.0f MiB in a process that wrote",
        f"{total:,}", size / MIB, len(shards), peak_memory() / MIB, max(peaks) / MIB,
    )  # fmt: skip
    counts = {f"data/samples/{split}": len(samples) for split, samples in splits.items()}
    tracker.metrics({"data/bytes": size, **counts})


def _check_disk(size: int, partial: Path) -> None:
    """Refuses to begin what the disk has no room for; what an earlier attempt wrote is room that is taken already."""
    there = next(path for path in (partial, *partial.parents) if path.is_dir())
    free = shutil.disk_usage(there).free + sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    logging.getLogger(__name__).info("decoded samples will take %.1f MiB of %.1f MiB", size / MIB, free / MIB)
    if size > free:
        raise UserError(
            f"prepare.images: decoded needs {size / MIB:.0f} MiB in {there}, and {free / MIB:.0f} MiB are free; "
            "choose 'original' or 'jpeg', shrink images by prepare.max_side, or take a larger disk"
        )


def _check_report(report: Path, layout: str) -> None:
    path = report / "summary.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; run the stage 'validate' first")
    again = "run the stage 'validate' again"
    try:
        summary = read_json(path, mend=again)
        success, checked = summary["success"], summary["layout"]
    except (KeyError, TypeError):
        raise UserError(f"{path}: damaged; {again}") from None
    if not success:
        raise UserError(f"{path}: the data set failed its validation; mend the files named there, then validate again")
    if checked != layout:
        raise UserError(f"prepare.layout: '{layout}', but {path} is about the layout '{checked}'; make them equal")
