"""PASCAL VOC 2012: 20 objects and background; with the labels of SBD as a layout of its own."""

from collections.abc import Iterator
from pathlib import Path

from segdistill.data.layouts.benchmark import Benchmark, class_table, list_images, read_names
from segdistill.data.layouts.layout import IGNORE_INDEX, WITHOUT_MASKS, Sample

CLASSES = class_table("""
    background 000000, aeroplane 800000, bicycle 008000, bird 808000, boat 000080, bottle 800080, bus 008080,
    car 808080, cat 400000, chair c00000, cow 408000, diningtable c08000, dog 400080, horse c00080, motorbike 408080,
    person c08080, pottedplant 004000, sheep 804000, sofa 00c000, train 80c000, tvmonitor 004080
""")
LABELS = {**{value: value for value in range(len(CLASSES))}, 255: IGNORE_INDEX}
IMAGES = 17125  # in JPEGImages, of all tasks
OFFICIAL_SAMPLES = {"train": 1464, "val": 1449, WITHOUT_MASKS: IMAGES - 1464 - 1449}
WITH_AUGMENTED = {"train": 10582, "val": 1449, WITHOUT_MASKS: IMAGES - 10582 - 1449}


class Voc(Benchmark):
    """``JPEGImages/NAME.jpg`` beside ``SegmentationClass/NAME.png``; splits: ``ImageSets/Segmentation/SPLIT.txt``.

    255, the border of objects, is ignored. The official test split has no public labels: ``val`` is the test split
    too. Every other image of ``JPEGImages`` is of the split without labels, those of an official test list aside.

    Reference:
        Everingham et al., IJCV 111(1), 2015; classes and colours: the development kit, ``VOClabelcolormap.m``.
    """

    name = "voc"
    published_classes = CLASSES
    labels = LABELS
    archives = "VOCtrainval_11-May-2012.tar"
    tops = ("", "VOC2012", "VOCdevkit/VOC2012")
    required = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
    official_samples = OFFICIAL_SAMPLES
    tested_on = "val"
    shared_folders = True

    def folders(self, split: str) -> tuple[Path, Path]:
        return self.top / "JPEGImages", self.top / "SegmentationClass"

    def list_samples(self, split: str) -> Iterator[Sample]:
        if split == WITHOUT_MASKS:
            labelled = {sample.id for part in ("train", "val") for sample in self.samples(part)}
            tests = (self.top / "ImageSets" / task / "test.txt" for task in ("Main", "Segmentation"))
            others = labelled.union(*(read_names(path) for path in tests if path.exists()))
            for image in list_images(self.top / "JPEGImages"):
                if image.stem not in others:
                    yield Sample(image.stem, split, image, None)
            return
        masks = self.folders(split)[1]
        for name in self.names(split):
            yield Sample(name, split, self.top / "JPEGImages" / f"{name}.jpg", masks / f"{name}.png")

    def names(self, split: str) -> list[str]:
        """The names of the images of a split with masks."""
        return read_names(self.top / "ImageSets/Segmentation" / f"{split}.txt")


class VocAugmented(Voc):
    """As ``voc``, with the 10,582 training masks of ``SegmentationClassAug/NAME.png``: those of VOC and of SBD.

    Their list is ``ImageSets/Segmentation/trainaug.txt`` or ``train_aug.txt`` (or in ``ImageSets/SegmentationAug``);
    without one, train is every mask of ``SegmentationClassAug`` that is not in ``val.txt``, which is the same.

    Reference:
        Hariharan et al., ICCV 2011; as index masks: Chen et al., PAMI 40(4), 2018.
    """

    name = "voc_aug"
    archives = "VOCtrainval_11-May-2012.tar and SegmentationClassAug.zip"
    official_samples = WITH_AUGMENTED

    @classmethod
    def recognises(cls, root: Path) -> bool:
        return False  # looks like "voc" with one folder more: whoever wants it says so

    def folders(self, split: str) -> tuple[Path, Path]:
        images, masks = super().folders(split)
        return images, self.first_folder("SegmentationClassAug") if split == "train" else masks

    def names(self, split: str) -> list[str]:
        if split != "train":
            return super().names(split)
        lists = self.top / "ImageSets"
        for place in ("Segmentation/trainaug.txt", "Segmentation/train_aug.txt", "SegmentationAug/train_aug.txt"):
            if (lists / place).exists():
                return read_names(lists / place)
        val = set(super().names("val"))
        return [mask.stem for mask in list_images(self.folders(split)[1]) if mask.stem not in val]
