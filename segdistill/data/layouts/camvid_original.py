"""CamVid as its authors publish it: masks in the colours of 32 classes, read as the 11 of SegNet."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from segdistill.data.decoding import COLOUR_MASKS
from segdistill.data.layouts.benchmark import Benchmark, class_table, list_images
from segdistill.data.layouts.camvid import CLASSES, OFFICIAL_SAMPLES, sequence_of
from segdistill.data.layouts.layout import IGNORE_INDEX, WITHOUT_MASKS, Color, Sample

COLORS = class_table("""
    Animal 408040, Archway c00080, Bicyclist 0080c0, Bridge 008040, Building 800000, Car 400080, CartLuggagePram 4000c0,
    Child c08040, Column_Pole c0c080, Fence 404080, LaneMkgsDriv 8000c0, LaneMkgsNonDriv c00040, Misc_Text 808040,
    MotorcycleScooter c000c0, OtherMoving 804040, ParkingBlock 40c080, Pedestrian 404000, Road 804080,
    RoadShoulder 8080c0, Sidewalk 0000c0, SignSymbol c08080, Sky 808080, SUVPickupTruck 4080c0, TrafficCone 000040,
    TrafficLight 004040, Train c04080, Tree 808000, Truck_Bus c080c0, Tunnel 400040, VegetationMisc c0c000,
    Void 000000, Wall 40c000
""")  # label_colors.txt; a colour's place here is the value that stands for it
GROUPS = {
    "sky": ("Sky",),
    "building": ("Building", "Archway", "Bridge", "Tunnel", "Wall"),
    "pole": ("Column_Pole", "TrafficCone"),
    "road": ("Road", "LaneMkgsDriv", "LaneMkgsNonDriv"),
    "pavement": ("Sidewalk", "ParkingBlock", "RoadShoulder"),
    "tree": ("Tree", "VegetationMisc"),
    "sign_symbol": ("SignSymbol", "Misc_Text", "TrafficLight"),
    "fence": ("Fence",),
    "car": ("Car", "OtherMoving", "SUVPickupTruck", "Train", "Truck_Bus"),
    "pedestrian": ("Pedestrian", "Animal", "CartLuggagePram", "Child"),
    "bicyclist": ("Bicyclist", "MotorcycleScooter"),
}  # as MathWorks' example "Semantic Segmentation Using Deep Learning" groups them for SegNet

_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
_TRAIN_ID = {entry.name: train_id for train_id, entry in enumerate(CLASSES)}
LABELS = {
    value: _TRAIN_ID[_GROUP_OF[entry.name]] if entry.name in _GROUP_OF else IGNORE_INDEX
    for value, entry in enumerate(COLORS)
}


class CamVidOriginal(Benchmark):
    """``701_StillsRaw_full/NAME.png`` beside ``LabeledApproved_full/NAME_L.png``, or with the masks in ``labels`` or
    loose beside that folder, since their archive has none.

    The authors publish no split; this is SegNet's, by drive and frame. A sequence is a drive.

    Reference:
        Brostow et al., Pattern Recognition Letters 30(2), 2009; split and classes: Badrinarayanan et al., PAMI 2017.
    """

    name = "camvid_original"
    published_classes = CLASSES
    labels = LABELS
    archives = "701_StillsRaw_full.zip and LabeledApproved_full.zip"
    tops = ("", "images")
    required = ("701_StillsRaw_full",)
    official_samples = OFFICIAL_SAMPLES
    shared_folders = True
    mask_kinds = COLOUR_MASKS

    @property
    def mask_colors(self) -> Mapping[Color, int]:
        return {entry.color: value for value, entry in enumerate(COLORS)}

    def folders(self, split: str) -> tuple[Path, Path]:
        return self.top / "701_StillsRaw_full", self.first_folder("LabeledApproved_full", "labels", "")

    def list_samples(self, split: str) -> Iterator[Sample]:
        images, masks = self.folders(split)
        for image in list_images(images):
            if split != WITHOUT_MASKS and _split_of(image.stem) == split:
                yield Sample(image.stem, split, image, masks / f"{image.stem}_L.png", sequence_of(image.stem))


def _split_of(name: str) -> str | None:
    """SegNet's split of ``DRIVE_FRAME``; None of a frame that is in none."""
    drive, _, frame = name.partition("_")
    number = int(frame.lstrip("f")) if frame.lstrip("f").isdecimal() else -1
    if drive == "0001TP":
        return "train" if number <= 8520 else "test"
    if drive == "0016E5":
        return "val" if 7959 <= number <= 8159 else "train"
    return {"0006R0": "train", "Seq05VD": "test"}.get(drive)
