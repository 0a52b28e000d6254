"""``segdistill calibrate``: what it prints is what a training says, and its weights do what they promise."""

import json
from pathlib import Path

import pytest
import yaml
from test_without_orchestration import tiny_params

from segdistill.__main__ import main
from segdistill.commands.calibrate import Calibration


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_prepared: Path) -> Path:
    """A folder with prepared data and a teacher."""
    root = tmp_path_factory.mktemp("calibrate")
    (root / "params.yaml").write_text(yaml.safe_dump(tiny_params()))
    (root / "artifacts").mkdir()
    (root / "artifacts" / "prepared").symlink_to(tiny_prepared)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage in ("plan", "train_teacher"):
            assert main([stage, "--tracker", "none"]) == 0
    return root


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


def test_every_term_has_its_strength_its_gradient_share_and_its_place(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["calibrate", "--experiment", "apd", "--steps", "6", "--strengths", "0.5", "2"]
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["term"] for row in rows] == ["apd.global", "apd.local", "apd.prototype", "apd.teacher_head"]
    for row in rows:
        assert row["path"] == f"experiments.apd.methods.0.{row['term'].removeprefix('apd.')}_weight"
        assert row["raw"] > 0 and row["strength"] > 0
        assert row["weights"]["2"] == pytest.approx(4 * row["weights"]["0.5"])
        assert row["weights"]["2"] * row["strength"] == pytest.approx(2 * row["weight"])
    shares = [row["gradient_share"] for row in rows]
    assert shares[-1] is None and all(0 < share < 1 for share in shares[:-1])
    assert main(command) == 0
    assert "experiments.apd.methods.0.global_weight" in capsys.readouterr().out
    assert not list(here.glob("artifacts/students*"))


def test_the_printed_weight_gives_the_strength(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # One step: the first batch is the same whatever the weight is, so both medians are too.
    command = ["calibrate", "--experiment", "kd", "--steps", "1", "--strengths", "0.3", "--json"]
    assert main(command) == 0
    (before,) = json.loads(capsys.readouterr().out)
    params = tiny_params()
    params["experiments"]["kd"]["methods"][0]["weight"] = before["weights"]["0.3"]
    Path("changed.yaml").write_text(yaml.safe_dump(params))
    assert main([*command, "--params", "changed.yaml"]) == 0
    (after,) = json.loads(capsys.readouterr().out)
    assert after["strength"] == pytest.approx(0.3) and after["raw"] == pytest.approx(before["raw"])


def test_a_term_that_is_zero_has_no_weight_that_would_help() -> None:
    row = Calibration("cnn", "kd.kl", "x", weight=1.0, raw=0.0, factor=1.0, strength=0.0, gradient_share=None)
    assert row.weight_for(0.3) == float("inf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experiment", "kdd"], "--experiment: 'kdd' is unknown; did you mean 'kd'?"),
        (["--experiment", "none"], "experiments.none.methods: empty; there is nothing to calibrate"),
        (["--experiment", "kd", "--steps", "0"], "--steps: input should be greater than or equal to 1, not 0"),
    ],
)
def test_mistakes_are_named(here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["calibrate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_a_teacher_it_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(tiny_params()))
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", "--experiment", "kd"]) == 2
    assert "artifacts/prepared: calibrate needs it; run what makes it first: dvc repro" in capsys.readouterr().err
