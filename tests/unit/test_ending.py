"""How a stage ends when it is told to stop, when the disk is full, and beside another process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from segdistill import execution
from segdistill.__main__ import main
from segdistill.commands import stage as stage_command
from segdistill.errors import BEGINS_ANEW, Interrupted, exit_codes, stop_on_signal
from segdistill.files import lock
from segdistill.stages import STAGES, Stage

ROOT = Path(__file__).resolve().parents[2]
EVERY_STAGE = pytest.mark.parametrize("stage", STAGES, ids=[stage.name for stage in STAGES])


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a stage's command with something else in place of its work; all its inputs are there."""
    text = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text)
    seeds = yaml.safe_load(text)["seeds"]
    monkeypatch.chdir(tmp_path)

    def command(stage: Stage, act: Callable[[], Any]) -> int:
        for template in stage.inputs.values():
            for seed in seeds:
                Path(template.format(cohort=f"s{seed}")).mkdir(parents=True, exist_ok=True)
        module = execution.stage_module(stage)
        monkeypatch.setattr(stage_command, "_require_current", lambda *_: None)
        monkeypatch.setattr(module, "run", lambda **_: act())
        options = ["--seed", str(seeds[0])] if stage.per_cohort else []
        return main([stage.name, "--tracker", "none", *options])

    return command


def place(stage: Stage) -> Path:
    seed = yaml.safe_load((ROOT / "params.yaml").read_text())["seeds"][0]
    return Path(next(iter(stage.outputs.values())).format(cohort=f"s{seed}"))


@EVERY_STAGE
def test_sigterm_ends_every_stage_with_the_code_for_retry(
    run: Callable[..., int], stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    former = signal.getsignal(signal.SIGTERM)
    assert run(stage, told) == 75
    assert capsys.readouterr().err == f"segdistill {stage.name}: stopped; the same command goes on\n"
    assert signal.getsignal(signal.SIGTERM) is former


@EVERY_STAGE
def test_a_full_disk_is_one_sentence_that_names_the_output(
    run: Callable[..., int], stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    assert run(stage, full) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"segdistill {stage.name}: {place(stage)}: no space left on the disk") and len(said) < 200


@EVERY_STAGE
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    run: Callable[..., int], stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    output, other = place(stage), Path("reports/metrics.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.touch()
    assert run(stage, lambda: pytest.fail("must not run")) == 2
    assert f"{output}: exists and is no folder" in capsys.readouterr().err
    if stage.metrics:
        output.unlink()
        other.mkdir()
        assert run(stage, lambda: pytest.fail("must not run")) == 2
        assert f"{other}: a folder; {stage.name} writes a file there" in capsys.readouterr().err


@EVERY_STAGE
def test_the_second_process_in_an_output_is_told_who_has_it_and_runs_nothing(
    run: Callable[..., int], stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[int] = []
    with lock(place(stage), "somebody"):
        assert run(stage, lambda: ran.append(1)) == 2
    said = capsys.readouterr().err
    assert f"{place(stage)}: in use by somebody (process {os.getpid()}" in said and said.count("\n") == 1
    assert not ran
    run(stage, lambda: ran.append(1))
    assert ran


def test_what_fails_after_sigterm_is_its_consequence() -> None:
    """A worker that got the signal first, a peer that is gone already."""
    with pytest.raises(Interrupted), stop_on_signal():
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker is killed by signal")


def test_a_wish_to_stop_that_a_loop_did_not_heed_ends_what_is_around_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, exit_codes("x"):
        with stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set()
        time.sleep(60)
    assert end.value.code == 75


def test_ctrl_c_in_a_loop_that_saves_ends_with_its_sentence_and_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, exit_codes("x"), stop_on_signal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        raise Interrupted("stopped and saved at iteration 7; the same command goes on from there")
    assert end.value.code == 130
    assert capsys.readouterr().err == "x: stopped and saved at iteration 7; the same command goes on from there\n"


def test_who_presses_ctrl_c_twice_does_not_wait_for_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end, exit_codes("x", BEGINS_ANEW), stop_on_signal():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("must have ended")
    assert end.value.code == 130
    assert capsys.readouterr().err == "x: stopped; nothing half-written is left; the same command begins anew\n"


def test_a_background_job_that_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGINT, former)


def test_no_library_swallows_the_wish_to_stop() -> None:
    with pytest.raises(SystemExit) as end, exit_codes("x"):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except Exception:
            pass
    assert end.value.code == 75


def test_workers_that_get_the_signal_too_change_nothing(tmp_path: Path) -> None:
    """As when a scheduler ends a whole process group: prepare's workers die before their caller has tidied up."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\nfrom pathlib import Path\n"
        "from segdistill.data.parallel import ordered_map\nfrom segdistill.errors import exit_codes\n\n"
        "def work(path):\n    Path(path).touch()\n    time.sleep(3)\n\n"
        "if __name__ == '__main__':\n"
        "    with exit_codes('x'):\n"
        "        list(ordered_map(work, [f'{sys.argv[1]}/{n}' for n in range(40)], workers=2))\n"
    )
    running = subprocess.Popen([sys.executable, script, tmp_path], start_new_session=True, stderr=subprocess.PIPE)
    while not (tmp_path / "0").exists() and running.poll() is None:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGTERM)
    assert running.communicate(timeout=60)[1].decode() == "x: stopped; the same command goes on\n"
    assert running.returncode == 75


def test_a_killed_process_leaves_its_lock_to_nobody(tmp_path: Path) -> None:
    """Its workers, forks that live on for seconds, must not hold it."""
    script = (
        "import os, sys, time; from pathlib import Path; from segdistill.files import lock\n"
        "with lock(Path(sys.argv[1]), 'x'):\n"
        "    if not os.fork(): os.close(1); time.sleep(5); os._exit(0)\n"
        "    print(flush=True); time.sleep(60)"
    )
    running = subprocess.Popen([sys.executable, "-c", script, tmp_path / "out"], stdout=subprocess.PIPE)
    assert running.stdout is not None
    running.stdout.readline()
    time.sleep(0.2)
    running.kill()
    running.wait()
    with lock(tmp_path / "out", "y"):
        pass


def test_what_a_killed_process_left_half_made_goes_with_the_next_one(run: Callable[..., int]) -> None:
    stage = next(stage for stage in STAGES if stage.name == "evaluate")
    folder = place(stage)
    left, others = (folder.with_name(f".{name}.7.partial") for name in (folder.name, "other"))
    for path in (left, others):
        (path / "overlays").mkdir(parents=True)
    assert run(stage, dict) == 0
    assert not left.exists() and others.exists()
