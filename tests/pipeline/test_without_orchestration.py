"""The machine-learning half needs torch and a file system: MLflow, KFP, DVC, GX, boto3 and kubernetes may be absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]

BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"mlflow", "kfp", "dvc", "great_expectations", "boto3", "kubernetes",
                                  "optuna", "ruamel"}:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Absent())
from segdistill.__main__ import main
for command in sys.argv[1:]:
    code = main(command.split())
    if code:
        sys.exit(code)
"""


def tiny_params() -> dict:
    params = json.loads(json.dumps(yaml.safe_load((ROOT / "params.yaml").read_text())))
    for section in ("train_teacher", "distill"):
        params[section]["train"] |= {"iterations": 2, "batch_size": 4, "validate_every": 2, "log_every": 1}
        params[section]["train"]["augmentation"]["crop_size"] = [48, 64]
    params["evaluate"] |= {"overlays": 1, "latency_repeats": 1}
    params["run"], params["seeds"] = ["none", "kd"], [0]
    return params


def test_a_student_is_trained_and_evaluated_with_the_orchestration_unimportable(
    tmp_path: Path, tiny_prepared: Path
) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params()))
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "prepared").symlink_to(tiny_prepared)
    commands = ["plan", "train_teacher", "distill --seed 0", "evaluate --seed 0"]
    environment = {**os.environ, "SEGDISTILL_PIPELINE_RUN": "alone"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *commands],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "reports/evaluation/s0/kd/evaluation.json").read_text())
    assert 0 <= result["models"]["cnn"]["test/miou"] <= 1 and result["samples"] == 4
    lines = [
        json.loads(line)
        for path in (tmp_path / "artifacts/tracking/alone").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    logged = {(line.get("run"), name) for line in lines if line["kind"] == "metrics" for name in line["values"]}
    for name in (
        "train/loss/ce",
        "train/loss/kd.kl",
        "train/loss/total",
        "train/lr",
        "val/miou",
        "test/miou",
        "test/iou/road",
    ):
        assert ("kd-s0", name) in logged, name
    assert ("teacher", "val/miou") in logged
