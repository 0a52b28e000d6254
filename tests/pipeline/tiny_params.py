"""Parameters with which the whole pipeline takes seconds instead of minutes."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml


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
        "register": {**params["register"], "formats": []},  # tracing a network takes longer than all the rest
        "run": ["none", "kd"],
        "seeds": [0],
        "experiments": experiments,
    }


def tuning_project(root: Path, params: dict[str, Any], prepared: Path) -> Path:
    """Makes a folder with prepared data and a teacher, in which two trials an experiment can be tuned."""
    from segdistill.__main__ import main

    params = json.loads(json.dumps(tiny(params)))  # nothing in it is shared
    params["tune"] |= {"trials": 2, "round": 2}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (root / "artifacts").mkdir()
    shutil.copytree(prepared, root / "artifacts/prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage in ("plan", "train_teacher"):
            assert main([stage, "--tracker", "none"]) == 0
    return root
