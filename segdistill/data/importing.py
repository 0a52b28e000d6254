"""Any known layout -> the layout "folder"."""

import functools
import json
from collections import Counter
from pathlib import Path

from PIL import Image

from segdistill.data.checks import load_sample
from segdistill.data.decoding import BadFile, encode_png, image_format
from segdistill.data.layouts import IGNORE_INDEX, WITHOUT_MASKS, Legend, Sample, open_layout
from segdistill.data.parallel import ordered_map, progress
from segdistill.errors import UserError
from segdistill.files import new_folder, require_free


def import_dataset(layout: str, source: Path, out: Path, *, workers: int = 0) -> dict[str, int]:
    """Writes a data set of any layout in the layout "folder".

    JPEG and PNG images are copied byte for byte; masks are written again with train ids, IGNORE_INDEX where ignored.

    Args:
        layout: how ``source`` is laid out.
        source: the data set to read.
        out: the folder to make; an empty one may be there.
        workers: processes; 0 = all cores.

    Returns:
        The number of samples in each split.

    Raises:
        UserError: ``out`` has content, or a file of the source is missing or broken.
    """
    require_free(out)
    dataset = open_layout(layout, source)
    samples = [sample for split in dataset.splits for sample in dataset.samples(split)]
    if not samples:
        raise dataset.without_samples()
    for (split, name), count in Counter((sample.split, sample.id) for sample in samples).items():
        if count > 1:
            raise UserError(f"{source}: {count} images of {split} are called '{name}'; a name may stand there once")
    with new_folder(out) as partial:
        for split in dataset.splits:
            for kind in ("images", "masks") if split != WITHOUT_MASKS else ("images",):
                (partial / kind / split).mkdir(parents=True)
        task = functools.partial(_import_sample, legend=dataset.legend, out=partial)
        done = progress(ordered_map(task, samples, workers=workers), "import", len(samples))
        problems = [problem for problem in done if problem]
        if problems:
            more = f"; {len(problems) - 1} more samples cannot be used" if len(problems) > 1 else ""
            raise UserError(problems[0] + more)
        classes = [{"name": info.name, "color": list(info.color)} for info in dataset.classes]
        text = json.dumps({"classes": classes, "ignore_index": IGNORE_INDEX}, indent=2)
        (partial / "classes.json").write_text(text + "\n", encoding="utf-8")
    return dict(Counter(sample.split for sample in samples))


def _import_sample(sample: Sample, *, legend: Legend, out: Path) -> str | None:
    """Writes both files of a sample, or tells why it cannot."""
    try:
        content, _, labels = load_sample(sample, legend)
    except BadFile as problem:
        return str(problem)
    suffix = ".png" if image_format(content) == "png" else ".jpg"
    (out / "images" / sample.split / f"{sample.id}{suffix}").write_bytes(content)
    if sample.mask is None:
        return None
    # Encoded first: where the disk is full, Pillow would not say so.
    (out / "masks" / sample.split / f"{sample.id}.png").write_bytes(encode_png(Image.fromarray(labels)))
    return None
