"""Parameters with which the whole pipeline takes seconds instead of minutes."""

from collections.abc import Mapping
from typing import Any


def tiny(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the project, for seconds instead of minutes: two steps, two experiments, one seed."""

    def shrink(section: Mapping[str, Any]) -> dict[str, Any]:
        train = {**section["train"], "iterations": 2, "batch_size": 2, "validate_every": 2, "checkpoint_every": 2}
        train |= {"log_every": 1, "augmentation": {**train["augmentation"], "crop_size": [32, 32]}}
        return {**section, "train": train, "inference": {**section["inference"], "batch_size": 2}}

    student = {
        "model": {
            "architecture": "DeepLabV3Plus",
            "encoder": "mobilenetv3_small_050",
            "encoder_weights": "none",
            "output_stride": 16,
            "decoder": {"decoder_channels": 16},
        },
        "optimizer": params["experiments"]["none"]["students"]["cnn"]["optimizer"],
    }
    teacher = shrink(params["train_teacher"])
    experiments = {
        "none": {"students": {"cnn": student}, "methods": []},
        "kd": {"students": {"cnn": student}, "methods": [{"name": "kd"}]},
    }
    return {
        **params,
        "train_teacher": {**teacher, "model": {**student["model"], "encoder": "resnet18"}},
        # An untrained teacher's score says nothing; here it must only be reached.
        "distill": {**shrink(params["distill"]), "teacher_tolerance": 100.0},
        "evaluate": {**params["evaluate"], "overlays": 1, "latency_repeats": 1},
        "compare": {**params["compare"], "overlays": 1},
        "register": {**params["register"], "onnx": False},  # tracing a network takes longer than all the rest
        "run": ["none", "kd"],
        "seeds": [0],
        "experiments": experiments,
    }
