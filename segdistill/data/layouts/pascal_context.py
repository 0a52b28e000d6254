"""PASCAL-Context: whole scenes of VOC 2010 images, 59 classes, or 60 with background."""

from collections.abc import Iterator
from pathlib import Path

from segdistill.data.decoding import MATRIX_MASKS
from segdistill.data.layouts.benchmark import Benchmark, read_names
from segdistill.data.layouts.layout import IGNORE_INDEX, WITHOUT_MASKS, ClassInfo, Sample, hue

NAMES = """
    aeroplane:2 bag:9 bed:18 bedclothes:19 bench:22 bicycle:23 bird:25 boat:31 book:33 bottle:34 building:44 bus:45
    cabinet:46 car:59 cat:65 ceiling:68 chair:72 cloth:80 computer:85 cow:98 cup:104 curtain:105 dog:113 door:115
    fence:144 floor:158 flower:159 food:162 grass:187 ground:189 horse:207 keyboard:220 light:232 motorbike:258
    mountain:259 mouse:260 person:284 plate:295 platform:296 pottedplant:308 road:324 rock:326 sheep:347 shelves:349
    sidewalk:354 sign:355 sky:360 snow:366 sofa:368 table:397 track:415 train:416 tree:420 truck:424 tvmonitor:427
    wall:440 water:445 window:454 wood:458
""".split()  # noqa: SIM905  # with the numbers that labels.txt gives them
ALL_LABELS = 459  # of labels.txt; 0 is no label
STORED = tuple(int(entry.partition(":")[2]) for entry in NAMES)
CLASSES = tuple(ClassInfo(entry.partition(":")[0], hue(number)) for number, entry in enumerate(NAMES))
OFFICIAL_SAMPLES = {"train": 4998, "val": 5105}


class PascalContext59(Benchmark):
    """``VOC2010/JPEGImages/NAME.jpg`` with ``trainval/NAME.mat``; splits: ``VOC2010/ImageSets/Main/SPLIT.txt``.

    Of a label file the matrix ``LabelMap`` is read, with one of 459 labels a pixel, of which the 59 most frequent are
    classes, and the others, and 0, are ignored. ``labels.txt``, ``59_labels.txt`` and the masks of
    ``59_context_labels.tar.gz`` are not read. The test split of VOC 2010 has no labels: ``val`` is the test split too.
    The colours are ours.

    Reference:
        Mottaghi et al., CVPR 2014; files: as FCN's ``pascalcontext_layers.py`` reads them; numbers and order of the
        59: the converter ``pascal_context.py`` of MMSegmentation (of the names, sorted).
    """

    name = "pascal_context_59"
    published_classes = CLASSES
    labels = dict.fromkeys(range(ALL_LABELS + 1), IGNORE_INDEX) | {value: n for n, value in enumerate(STORED)}
    archives = "VOCtrainval_03-May-2010.tar and PASCAL-Context's trainval.tar.gz"
    tops = ("", "VOC2010", "VOCdevkit/VOC2010")
    required = ("JPEGImages", "ImageSets/Main")
    official_samples = OFFICIAL_SAMPLES
    tested_on = "val"
    shared_folders = True
    mask_kinds = MATRIX_MASKS

    @classmethod
    def recognises(cls, root: Path) -> bool:
        top = cls._top(root)
        return top is not None and any((place / "trainval").is_dir() for place in (top, root))

    def folders(self, split: str) -> tuple[Path, Path]:
        return self.top / "JPEGImages", self.first_folder("trainval/trainval", "trainval")

    def list_samples(self, split: str) -> Iterator[Sample]:
        if split == WITHOUT_MASKS:
            return
        images, masks = self.folders(split)
        for name in read_names(self.top / "ImageSets/Main" / f"{split}.txt"):
            yield Sample(name, split, images / f"{name}.jpg", masks / f"{name}.mat")


class PascalContext60(PascalContext59):
    """As ``pascal_context_59``, with "background" as the first class for what is none of the 59: nothing is ignored."""

    name = "pascal_context_60"
    published_classes = (ClassInfo("background", (0, 0, 0)), *CLASSES)
    labels = dict.fromkeys(range(ALL_LABELS + 1), 0) | {value: n for n, value in enumerate(STORED, start=1)}
