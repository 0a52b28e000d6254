"""The device that was asked for, or a sentence that says why it is not there."""

import inspect
from pathlib import Path

import pytest
import torch

from segdistill.__main__ import main
from segdistill.engine import device
from segdistill.engine.distributed import processes
from segdistill.errors import UserError
from segdistill.execution import stage_module
from segdistill.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update it.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # the machine has one
    monkeypatch.setattr(torch.cuda, "init", init)


def test_the_stages_that_run_networks_and_no_others_take_a_device() -> None:
    pytest.importorskip("great_expectations")
    for stage in STAGES:
        assert stage.on_device == ("device" in inspect.signature(stage_module(stage).run).parameters), stage.name


@pytest.mark.parametrize("version", ["13.0", "12.8", "99.1", None])
def test_the_sentence_names_what_torch_says_and_the_driver_that_it_needs(
    version: str | None, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(UserError) as raised:
        device.require_gpus(1, "X")
    built = {
        "13.0": "for CUDA 13.0, which needs NVIDIA's driver R580 or newer",
        "12.8": "for CUDA 12.8, which needs NVIDIA's driver R525 or newer",
        "99.1": "for CUDA 99.1",
        None: "without CUDA",
    }[version]
    assert str(raised.value) == (
        "X, and torch sees 0 that it can use (The NVIDIA driver on your system is too old (found version 12020)); "
        f"torch {torch.__version__} is built {built}"
    )


def test_more_processes_than_gpus_are_refused_also_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    sentence = "the processes of this machine need 2 GPUs, and torch sees 1 that it can use"
    with pytest.raises(UserError, match=sentence), processes("auto"):
        pass


def test_auto_takes_the_cpu_where_the_driver_is_too_old(no_gpu: None) -> None:
    with processes("auto") as here:
        assert here.device.type == "cpu"


@pytest.mark.parametrize("command", ["train_teacher", "distill --seed 0"])
def test_a_gpu_that_is_asked_for_and_cannot_be_used_is_one_sentence(
    command: str, no_gpu: None, tiny_prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    (tmp_path / "artifacts/teacher").mkdir(parents=True)
    assert main(["plan", "--tracker", "none"]) == 0
    capsys.readouterr()
    given = [*command.split(), "--prepared", str(tiny_prepared), "--tracker", "none", "--device", "cuda"]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"segdistill {command.split()[0]}: --device cuda: needs 1 GPU, and torch sees 0")
    assert said.count("\n") == 1 and not (tmp_path / "artifacts/students").exists()
