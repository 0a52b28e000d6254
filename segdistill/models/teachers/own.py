"""A teacher that this package trained, or imported: ``teacher.safetensors`` and ``teacher.json``."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from segdistill.config import parse
from segdistill.models.config import ModelConfig, NetworkConfig
from segdistill.models.export import load_model, read_document
from segdistill.models.outputs import ModelInfo, SegmentationNetwork
from segdistill.models.segmenter import build_segmenter
from segdistill.models.teachers import build_network

NAME = "teacher"


def names(folder: Path) -> list[str]:
    """Its classes, in order."""
    return [str(entry["name"]) for entry in read_document(folder / f"{NAME}.json").get("classes") or ()]


def outline(folder: Path) -> ModelInfo:
    """What is known of it without its weights."""
    path = folder / f"{NAME}.json"
    document = read_document(path)
    return build_network(document["model"], document["num_classes"], f"{path}: model").info


def read(folder: Path, classes: Sequence[str], labels: Mapping[str, str]) -> SegmentationNetwork:
    """The network, whose classes must be the data set's: what we train gives no others."""
    return load_model(folder, NAME, classes=classes)[0]


def build(description: dict[str, Any], num_classes: int, where: str) -> SegmentationNetwork:
    """Our own segmenter."""
    config = parse(NetworkConfig if "images" in description else ModelConfig, description, where)
    with torch.random.fork_rng(devices=[]):  # a loaded teacher must not change the student's initialisation
        segmenter = build_segmenter(dataclasses.replace(config, encoder_weights="none"), num_classes)
    segmenter.config = config  # what the weights began from stays known
    return segmenter
