"""benchmarks/camvid.py: stopped and continued, and carried to another machine, without the orchestration."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from test_without_orchestration import BLOCKED, ROOT, tiny_params

from segdistill.errors import UserError

# The commands of a study in one process, which spares a start for each; a call has time for so many of them.
STUDY = f"""
{BLOCKED.partition("for command")[0]}
import os
sys.path.insert(0, "benchmarks")
import camvid

def command(self, words, clock):
    if camvid.most == 0:
        raise camvid.Interrupted("the budget is spent")
    camvid.most -= 1
    camvid.ran.append(words[0])
    here = os.getcwd()
    os.chdir(self.folder)
    try:
        assert main([*words, "--tracker", "none"]) == 0
    finally:
        os.chdir(here)

camvid.Arm._command = command
preset, *folders = sys.argv[1:]
for folder, parts in zip(folders, ([99], [2, 2, 99]), strict=True):
    camvid.ran = []
    for part in parts:
        camvid.most = part
        try:
            camvid.main(["run", "--folder", folder, "--preset", preset, "--arm", "all", "--no-tune",
                         "--device", "cpu", "--cohort", "1"])
        except SystemExit as end:
            assert end.code == 75, end.code
    print(*camvid.ran)
"""


def camvid() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("camvid", ROOT / "benchmarks/camvid.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["camvid"] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


def given(folder: Path, **changes: Any) -> Namespace:
    settings = {
        "folder": folder, "preset": ROOT / "presets/camvid.yaml", "weights": None, "seeds": None, "iterations": None,
        "scale": 1.0,
    }  # fmt: skip
    return Namespace(**settings | changes)


def scores(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "all/reports/comparison/results.json").read_text())
    return {f"{row['experiment']}.{row['student']}": row["per_class_iou"] for row in results["rows"]}


def test_a_study_stopped_twice_equals_one_that_was_not_with_the_orchestration_unimportable(
    tmp_path: Path, tiny_prepared: Path
) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(yaml.safe_dump(tiny_params()))
    folders = [tmp_path / "whole", tmp_path / "stopped"]
    for folder in folders:
        (folder / "all/artifacts").mkdir(parents=True)
        (folder / "all/artifacts/prepared").symlink_to(tiny_prepared)
    done = subprocess.run(
        [sys.executable, "-c", STUDY, str(preset), *map(str, folders)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, stopped = (scores(folder) for folder in folders)
    assert whole and whole == stopped
    ran = [line for line in done.stdout.splitlines() if line.startswith("plan ")]
    assert ran[0] == " ".join(["plan train_teacher evaluate_teacher", *["plan distill evaluate"] * 2])
    assert ran[1].split().count("distill") == 2, "a finished cohort is not trained again"
    assert "1 of 1 seeds are done" in (folders[1] / "camvid.md").read_text()


def test_weights_that_are_not_there_are_asked_for_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tf_efficientnet_lite2.safetensors: no such file; docs/datasets.md"):
        camvid().arm_params("all", given(tmp_path, weights=tmp_path / "nowhere"))
    assert not list(tmp_path.iterdir())


def test_the_arm_with_an_eighth_of_the_labels_sees_the_other_images_and_has_pseudo_labels(tmp_path: Path) -> None:
    module = camvid()
    (tmp_path / "weights").mkdir()
    for name in ("tf_efficientnet_lite0", "tf_efficientnet_lite2"):
        (tmp_path / "weights" / f"{name}.safetensors").touch()
    everything, eighth = (
        module.arm_params(name, given(tmp_path, iterations=3, scale=0.2)) for name in ("all", "eighth")
    )
    assert (eighth["prepare"]["labelled"], eighth["distill"]["train"]["unlabelled"]) == (0.125, 8)
    assert set(eighth["run"]) - set(everything["run"]) == {"pseudo", "pseudo_lite", "pseudo_vit"}
    assert eighth["distill"]["train"]["iterations"] == eighth["train_teacher"]["train"]["checkpoint_every"] == 3
    assert eighth["distill"]["train"]["augmentation"]["crop_size"] == [72, 96]
    assert eighth["train_teacher"]["model"]["encoder_weights"] == "../weights/tf_efficientnet_lite2.safetensors"


def test_an_archive_has_scores_and_teacher_but_no_evaluated_student_and_no_scratch(tmp_path: Path) -> None:
    files = {
        "all/artifacts/prepared/dataset.json": True,
        "all/artifacts/teacher/teacher.safetensors": True,
        "all/cohorts/s0-0/done.json": True,
        "all/cohorts/s0-0/students/kd/metrics.json": True,
        "all/cohorts/s0-0/students/kd/cnn.safetensors": False,
        "all/cohorts/s0-1/students.work/kd/resume.safetensors": False,
        "all/cohorts/s0-1/students/kd/cnn.safetensors": False,
        "all/artifacts/prepared.partial/shards/0": False,
    }
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    travels = camvid().travels
    assert {name: travels(tmp_path, Path(name), checkpoints=False) for name in files} == files
    assert travels(tmp_path, Path("all/cohorts/s0-1/students.work/kd/resume.safetensors"), checkpoints=True)
