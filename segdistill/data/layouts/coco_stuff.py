"""COCO-Stuff (164k images): 80 things and 91 kinds of stuff."""

from collections.abc import Iterator
from pathlib import Path

from segdistill.data.layouts.benchmark import Benchmark, list_pairs
from segdistill.data.layouts.layout import IGNORE_INDEX, WITHOUT_MASKS, ClassInfo, Sample, hue

# Of value 0 on, which is one less than the number in labels.txt; a hyphen is a thing that COCO never labelled.
NAMES = tuple(map(str.strip, """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, -, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, -, backpack, umbrella, -,
    -, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, -, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, -, dining table, -, -, toilet, -,
    tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, -, book, clock,
    vase, scissors, teddy bear, hair drier, toothbrush, -,
    banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other,
    ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence,
    floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other,
    grass, gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin,
    net, paper, pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock,
    roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
    structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other,
    wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
""".split(",")))  # noqa: SIM905  # fmt: skip
VALUES = tuple(value for value, name in enumerate(NAMES) if name != "-")
CLASSES = tuple(ClassInfo(NAMES[value], hue(number)) for number, value in enumerate(VALUES))
LABELS = {**{value: number for number, value in enumerate(VALUES)}, 255: IGNORE_INDEX}
OFFICIAL_SAMPLES = {"train": 118287, "val": 5000, WITHOUT_MASKS: 123403}


class CocoStuff(Benchmark):
    """``images/SPLIT2017/NAME.jpg`` with the pixel map ``annotations/SPLIT2017/NAME.png`` (also ``stuffthingmaps/``).

    A pixel map stores 0-181, of which eleven never occur, and 255, which is ignored. COCO's test images have no
    labels: ``val`` is the test split too. ``images/unlabeled2017``, if it is there, is the split without labels.
    The colours are ours.

    Reference:
        Caesar et al., CVPR 2018; values, names and folders: ``labels.txt`` and the setup in ``README.md`` of the
        repository nightrome/cocostuff.
    """

    name = "coco_stuff"
    published_classes = CLASSES
    labels = LABELS
    archives = "train2017.zip, val2017.zip (to images/) and stuffthingmaps_trainval2017.zip (to annotations/)"
    tops = ("", "dataset")
    required = ("images/train2017", "images/val2017")
    official_samples = OFFICIAL_SAMPLES
    tested_on = "val"

    def folders(self, split: str) -> tuple[Path, Path]:
        place = {WITHOUT_MASKS: "unlabeled2017", "test": "val2017"}.get(split, f"{split}2017")
        return self.top / "images" / place, self.first_folder(f"annotations/{place}", f"stuffthingmaps/{place}")

    def list_samples(self, split: str) -> Iterator[Sample]:
        return list_pairs(split, *self.folders(split))
