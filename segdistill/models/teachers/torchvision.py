"""A torchvision segmenter: ``model.safetensors`` with torchvision's own keys, and ``torchvision.json`` beside it.

The JSON is ``{"model": "deeplabv3_resnet50", "classes": ["background", ...]}``: the function of
torchvision.models.segmentation, and the names of what it tells apart. Keys of an auxiliary classifier are not read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from segdistill.config import config, parse
from segdistill.errors import UserError
from segdistill.files import read_json
from segdistill.models.outputs import ModelInfo, SegmentationNetwork
from segdistill.models.teachers.foreign import ForeignConfig, ForeignNetwork, sources_of
from segdistill.models.weights import read_safetensors

DOCUMENT, WEIGHTS = "torchvision.json", "model.safetensors"


@config
class Document:
    """What ``torchvision.json`` says."""

    model: Literal[
        "deeplabv3_resnet50", "deeplabv3_resnet101", "deeplabv3_mobilenet_v3_large", "fcn_resnet50", "fcn_resnet101",
        "lraspp_mobilenet_v3_large",
    ]  # fmt: skip
    """The function of torchvision.models.segmentation."""

    classes: Annotated[list[str], Field(min_length=1)]
    """The names of its classes, in order."""


class Torchvision(ForeignNetwork):
    """Features where the encoder is a ResNet; a last feature but for LR-ASPP, which adds two classifiers' logits."""

    def __init__(self, config: ForeignConfig) -> None:
        super().__init__(config)
        from torchvision.models import segmentation

        function = getattr(segmentation, config.architecture)
        self.network = function(weights=None, weights_backbone=None, num_classes=len(config.names))
        self.network.aux_classifier = None
        self.info = self.measure()

    def run(self, images: Tensor) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
        if self.config.architecture.startswith("lraspp"):
            return self.network.classifier(self.network.backbone(images)), (), None
        stages, feature = [], images
        for name, part in self.network.backbone.items():
            feature = part(feature)
            if name.startswith("layer"):
                stages.append(feature)
        *head, classifier = self.network.classifier
        for part in head:
            feature = part(feature)
        return classifier(feature), stages, feature


def names(folder: Path) -> list[str]:
    """Its classes, in order."""
    return _document(folder).classes


def outline(folder: Path) -> ModelInfo:
    """What is known of it without its weights."""
    return build_from(_config(folder, [[index] for index in range(len(names(folder)))])).info


def read(folder: Path, classes: Sequence[str], labels: Mapping[str, str]) -> SegmentationNetwork:
    """The network with its weights.

    Raises:
        UserError: a file that is absent or damaged, a key that is missing or of another shape, a class without source.
    """
    path = folder / WEIGHTS
    network = build_from(_config(folder, sources_of(folder, names(folder), classes, labels)))
    given = read_safetensors(path)
    for key, tensor in network.network.state_dict().items():
        if key not in given:
            raise UserError(f"{path}: key '{key}' of {network.config.architecture} is missing: wrong weights")
        if given[key].shape != tensor.shape:
            shapes = f"{list(given[key].shape)}, not {list(tensor.shape)}"
            raise UserError(f"{path}: key '{key}' of {network.config.architecture} has shape {shapes}: wrong weights")
    network.network.load_state_dict(given, strict=False)
    return network.eval()


def build(description: dict[str, Any], num_classes: int, where: str) -> SegmentationNetwork:
    """The network without weights."""
    return build_from(parse(ForeignConfig, description, where))


def build_from(config: ForeignConfig) -> Torchvision:
    """Likewise; random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        return Torchvision(config)


def _document(folder: Path) -> Document:
    return parse(Document, read_json(folder / DOCUMENT), str(folder / DOCUMENT))


def _config(folder: Path, sources: list[list[int]]) -> ForeignConfig:
    document = _document(folder)
    return ForeignConfig(
        family="torchvision", architecture=document.model, origin=folder.name, settings={}, names=document.classes,
        sources=sources, mean=list(IMAGENET_DEFAULT_MEAN), std=list(IMAGENET_DEFAULT_STD),
    )  # fmt: skip
