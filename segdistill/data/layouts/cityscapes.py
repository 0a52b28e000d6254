"""Cityscapes: 19 classes in streets of 50 cities, finely labelled; with the coarse part as a layout of its own."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from segdistill.data.decoding import COLOUR_MASKS, INDEX_MASKS
from segdistill.data.layouts.benchmark import Benchmark, class_table
from segdistill.data.layouts.layout import IGNORE_INDEX, WITHOUT_MASKS, Color, Sample, list_folder

CLASSES = class_table("""
    road 804080, sidewalk f423e8, building 464646, wall 66669c, fence be9999, pole 999999, traffic light faaa1e,
    traffic sign dcdc00, vegetation 6b8e23, terrain 98fb98, sky 4682b4, person dc143c, rider ff0000, car 00008e,
    truck 000046, bus 003c64, train 005064, motorcycle 0000e6, bicycle 770b20
""")
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # by train id
NOT_EVALUATED = class_table("""
    void 000000, dynamic 6f4a00, ground 510051, parking faaaa0, rail track e6968c, guard rail b4a5b4, bridge 966464,
    tunnel 96785a, caravan 00005a, trailer 00006e
""")  # what of colours has no class; pole group and licence plate have the colours of pole and car
OFFICIAL_SAMPLES = {"train": 2975, "val": 500, WITHOUT_MASKS: 19998}
WITH_COARSE = {"train": 2975 + 19998, "val": 500}

_TRAIN_IDS = {**{train_id: train_id for train_id in range(len(CLASSES))}, IGNORE_INDEX: IGNORE_INDEX}
# By the end of a mask's name, the first that is there: what it stores.
_FORMS: dict[str, Mapping[int, int]] = {
    "labelIds": dict.fromkeys((*range(34), IGNORE_INDEX), IGNORE_INDEX)
    | {label_id: train_id for train_id, label_id in enumerate(LABEL_IDS)},
    "labelTrainIds": _TRAIN_IDS,
    "color": _TRAIN_IDS,
}


class Cityscapes(Benchmark):
    """``leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png`` beside ``gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png``.

    Without ``labelIds``, ``labelTrainIds`` are read, and without those the ``color`` pictures, in which pole group
    and pole look alike (both are read as pole, where the ids say "not evaluated" of the group). The official test
    split has no public labels: ``val`` is the test split too. ``leftImg8bit/train_extra``, if it is there, is the
    split of images without labels. A sequence is a city and the number that follows it in the name.

    Reference:
        Cordts et al., CVPR 2016; ids, classes and colours: ``cityscapesscripts/helpers/labels.py``.
    """

    name = "cityscapes"
    published_classes = CLASSES
    archives = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip"
    required: ClassVar[tuple[str, ...]] = ("leftImg8bit/train", "gtFine/train")
    official_samples = OFFICIAL_SAMPLES
    tested_on = "val"
    shared_folders = True  # polygons, instances and other forms of the same labels

    @cached_property
    def form(self) -> str:
        """Which of a mask's forms is read: that of the first training image."""
        first = next(self._images("train"), None)
        masks = {form: self._mask(first, "gtFine", "train", form) for form in _FORMS} if first else {}
        return next((form for form, mask in masks.items() if mask.exists()), "labelIds")

    @property
    def raw_labels(self) -> Mapping[int, int]:
        return _FORMS[self.form]

    @property
    def mask_kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        return COLOUR_MASKS if self.form == "color" else INDEX_MASKS

    @property
    def mask_colors(self) -> Mapping[Color, int]:
        if self.form != "color":
            return {}
        ignored = {entry.color: IGNORE_INDEX for entry in NOT_EVALUATED}
        return ignored | {entry.color: train_id for train_id, entry in enumerate(CLASSES)}

    def folders(self, split: str) -> tuple[Path, Path]:
        place = {WITHOUT_MASKS: "train_extra", "test": "val"}.get(split, split)
        return self.top / "leftImg8bit" / place, self.top / "gtFine" / place

    def list_samples(self, split: str) -> Iterator[Sample]:
        if split == WITHOUT_MASKS:
            return self._part("train_extra", split, None)
        return self._part(split, split, "gtFine")

    def _part(self, part: str, split: str, labels: str | None) -> Iterator[Sample]:
        """The samples of a folder below ``leftImg8bit``, with masks of one kind of label, or without."""
        for image in self._images(part):
            name = image.name.removesuffix("_leftImg8bit.png")
            mask = self._mask(image, labels, part, self.form) if labels else None
            yield Sample(name, split, image, mask, sequence="_".join(name.split("_")[:2]))

    def _images(self, part: str) -> Iterator[Path]:
        cities = list_folder(self.top / "leftImg8bit" / part)
        return (path for city in cities for path in list_folder(city) if path.name.endswith("_leftImg8bit.png"))

    def _mask(self, image: Path, labels: str, part: str, form: str) -> Path:
        name = image.name.removesuffix("_leftImg8bit.png")
        return self.top / labels / part / image.parent.name / f"{name}_{labels}_{form}.png"


class CityscapesCoarse(Cityscapes):
    """As ``cityscapes``, with ``leftImg8bit/train_extra`` and its masks of ``gtCoarse/train_extra`` in ``train``."""

    name = "cityscapes_coarse"
    archives = f"{Cityscapes.archives}, leftImg8bit_trainextra.zip and gtCoarse.zip"
    required = (*Cityscapes.required, "leftImg8bit/train_extra", "gtCoarse/train_extra")
    official_samples = WITH_COARSE

    def list_samples(self, split: str) -> Iterator[Sample]:
        if split != WITHOUT_MASKS:
            yield from super().list_samples(split)
        if split == "train":
            yield from self._part("train_extra", split, "gtCoarse")
