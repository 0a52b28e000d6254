"""CamVid in the split of SegNet: 11 classes and void, with a list of pairs for each split."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from segdistill.data.layouts.layout import IGNORE_INDEX, SPLITS, WITHOUT_MASKS, ClassInfo, Layout, Sample
from segdistill.errors import UserError
from segdistill.files import read_text

VOID = 11

CLASSES = (
    ClassInfo("sky", (128, 128, 128)),
    ClassInfo("building", (128, 0, 0)),
    ClassInfo("pole", (192, 192, 128)),
    ClassInfo("road", (128, 64, 128)),
    ClassInfo("pavement", (60, 40, 222)),
    ClassInfo("tree", (128, 128, 0)),
    ClassInfo("sign_symbol", (192, 128, 128)),
    ClassInfo("fence", (64, 64, 128)),
    ClassInfo("car", (64, 0, 128)),
    ClassInfo("pedestrian", (64, 64, 0)),
    ClassInfo("bicyclist", (0, 128, 192)),
)
OFFICIAL_SAMPLES = {"train": 367, "val": 101, "test": 233}


def sequence_of(name: str) -> str | None:
    """The drive of a frame called ``DRIVE_FRAME``."""
    drive, separator, _ = name.partition("_")
    return drive if separator else None


class CamVid(Layout):
    """``train/x.png`` beside ``trainannot/x.png``; ``train.txt`` holds one ``IMAGE MASK`` pair a line.

    SegNet's own lists name files as ``/SegNet/CamVid/train/x.png``, so only the last two parts of a path count. Names
    may hold spaces, stand in quotes, and have backslashes between their parts. ``unlabelled.txt``, which need not be
    there, holds one ``IMAGE`` a line. A sequence is a drive.

    Reference:
        Brostow et al., Pattern Recognition Letters 30(2), 2009; split and classes: Badrinarayanan et al., PAMI 2017.
    """

    name = "camvid"
    official_samples = OFFICIAL_SAMPLES

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return (root / "train.txt").is_file() and (root / "trainannot").is_dir()

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._samples = {split: _read_list(root, split) for split in (*SPLITS, WITHOUT_MASKS)}

    @property
    def classes(self) -> tuple[ClassInfo, ...]:
        return CLASSES

    @property
    def raw_labels(self) -> Mapping[int, int]:
        return {**{index: index for index in range(len(CLASSES))}, VOID: IGNORE_INDEX}

    def folders(self, split: str) -> tuple[Path, Path]:
        return self.root / split, self.root / f"{split}annot"

    def samples(self, split: str) -> Iterator[Sample]:
        yield from self._samples[split]


MOST_OF_A_LINE = 4096  # characters: two paths
_IMAGE = r"(\S.*?\.(?:png|jpe?g))"
_PAIR = re.compile(rf"""(["']?){_IMAGE}\1\s+(["']?){_IMAGE}\3""", re.IGNORECASE)
_SINGLE = re.compile(rf"""(["']?){_IMAGE}\1""", re.IGNORECASE)


def _read_list(root: Path, split: str) -> list[Sample]:
    path, labelled = root / f"{split}.txt", split != WITHOUT_MASKS
    if not path.exists():
        if not labelled:
            return []
        raise UserError(f"{path}: no such file; the layout 'camvid' needs a list of pairs for each split")
    samples = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        form, expected = (_PAIR, "FOLDER/IMAGE FOLDER/MASK") if labelled else (_SINGLE, "FOLDER/IMAGE")
        match = form.fullmatch(line.strip().replace("\\", "/")) if len(line) <= MOST_OF_A_LINE else None
        parts = [PurePosixPath(name).parts[-2:] for name in match.groups()[1::2]] if match else []
        if not match or any(len(part) != 2 or {"..", "/", "//"} & set(part) for part in parts):
            raise UserError(f"{path}, line {number}: expected '{expected}', found '{line.strip()[:200]}'")
        image, *masks = (root.joinpath(*part) for part in parts)
        samples.append(Sample(image.stem, split, image, masks[0] if labelled else None, sequence_of(image.stem)))
    return samples
