"""The command line as a person meets it: help at once, mistakes in one sentence with exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from segdistill.__main__ import main
from segdistill.errors import exit_codes
from segdistill.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    """The one line on standard error of a command that ends with exit code 2."""
    assert main(list(command)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def edit(project: Path, **sections: object) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    (project / "params.yaml").write_text(yaml.safe_dump(params | sections))


def test_help_names_every_stage_and_loads_no_heavy_library() -> None:
    code = (
        "import sys\nfrom segdistill.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'timm', 'mlflow', 'great_expectations', 'pyarrow', 'numpy', 'kfp'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        assert stage.name in done.stdout


def test_a_missing_params_file_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "prepare", "--params", "nowhere.yaml") == "segdistill prepare: nowhere.yaml: no such file"


def test_a_broken_params_file_is_named_with_its_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "params.yaml").write_text("validate:\n  layout: [folder\nprepare: 1\n")
    assert refused(capsys, "prepare").startswith("segdistill prepare: params.yaml, line 3: not valid YAML")


def test_a_missing_input_says_what_to_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "prepare", "--tracker", "none")
    assert said == "segdistill prepare: data: prepare needs it as 'data'; run what makes it first: dvc repro"


def test_an_unknown_layout_is_named_with_its_neighbour(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "data").mkdir()
    (project / "reports/validation").mkdir(parents=True)
    (project / "reports/validation/summary.json").write_text('{"success": true, "layout": "foldr"}')
    edit(project, prepare={"layout": "foldr", "shard_samples": 8, "max_side": None, "workers": 1})
    said = refused(capsys, "prepare", "--tracker", "none")
    assert "foldr" in said and "did you mean 'folder'?" in said


def test_an_unknown_seed_is_named_with_those_that_there_are(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "distill", "--seed", "7")
    assert said == "segdistill distill: --seed: 7 is not under seeds; these are: 0, 1, 2"


def test_a_plan_of_other_parameters_is_not_trained(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--tracker", "none"]) == 0
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["experiments"]["kd"]["methods"] = [{"name": "kd", "weight": 2}]
    edit(project, experiments=params["experiments"])
    capsys.readouterr()
    said = refused(capsys, "distill", "--seed", "0")
    assert (
        "artifacts/plan/s0.json: made from other parameters or other code than there are now; run the stage 'plan'"
        in said
    )


def test_the_whole_file_is_checked_with_its_methods(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    assert capsys.readouterr().out == "params.yaml: in order\n"
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["experiments"]["kd"]["methods"] = [{"name": "kd", "temprature": 2}]
    edit(project, experiments=params["experiments"])
    said = refused(capsys, "check")
    assert said.endswith("experiments.kd.methods.0.temprature: unknown key; did you mean 'temperature'?")


def test_a_summary_before_any_run_says_so(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing was compared yet" in refused(capsys, "summary")


def test_data_are_never_written_over(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "data").mkdir()
    (project / "data" / "mine.txt").write_text("precious")
    assert "data" in refused(capsys, "data", "synth", "--out", "data", "--train", "1", "--val", "1", "--test", "1")
    assert (project / "data" / "mine.txt").read_text() == "precious"


def test_a_lack_of_memory_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    with pytest.raises(SystemExit) as ended, exit_codes("segdistill distill"):
        torch.empty(2**60, dtype=torch.uint8)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("segdistill distill: out of memory (") and "lower batch_size or crop_size" in said
    with pytest.raises(RuntimeError, match="another fault"), exit_codes("segdistill distill"):
        raise RuntimeError("another fault")
