"""Laws of the training loop, with SGD, since Adam hides a wrong loss scale."""

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from segdistill.engine import checkpoint
from segdistill.engine.distributed import Processes
from segdistill.engine.stopwatch import Stopwatch
from segdistill.errors import Interrupted, UserError

ALONE = Processes(0, 1, torch.device("cpu"))


# Children of a server that has imported torch and computed nothing: clean processes, without the seconds of import.
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(
    ["segdistill.engine.cohort", "segdistill.methods.apd", "torch._dynamo", "segmentation_models_pytorch", "timm"]
)


def start(*arguments: Any, environment: dict[str, str] | None = None) -> Any:
    process = CLEAN.Process(target=tiny.child, args=(list(map(str, arguments)), environment or {}))
    process.start()
    return process


def finished(process: Any) -> int:
    process.join(timeout=300)
    assert process.exitcode is not None, "still running"
    return process.exitcode  # type: ignore[no-any-return]


def ranks() -> list[dict[str, str]]:
    """The environments that torchrun would set for two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


def two(*arguments: Any) -> list[Any]:
    """Two gloo processes."""
    return [start(*arguments, environment=environment) for environment in ranks()]


def result(path: Path) -> dict[str, Any]:
    state = checkpoint.load(path)
    assert state is not None
    return state


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    """Bit for bit: weights and logged losses."""
    assert left["curves"] == right["curves"]
    assert left["weights"].keys() == right["weights"].keys()
    for name, value in left["weights"].items():
        assert torch.equal(value, right["weights"][name]), name


def trained(work: Path, **changes: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    trainer = tiny.make_trainer(work, ALONE, **changes)
    trainer.run()
    return trainer, tiny.weights(trainer)


MASKED, UNMASKED = {"mask_ignore": True}, {"mask_ignore": False}


@pytest.mark.parametrize(
    ("method", "settings", "void", "unlabelled"),
    [
        ("none", {}, 0, 0),
        ("none", {}, 0.95, 4),
        ("dml", MASKED, 0, 8),
        ("dml", UNMASKED, 0.95, 0),
        ("kd", UNMASKED, 0.95, 4),
    ],
)
def test_one_batch_of_eight_equals_four_of_two_accumulated(
    tmp_path: Path, method: str, settings: dict[str, Any], void: float, unlabelled: int
) -> None:
    options = {"method": method, "settings": settings, "void": void, "unlabelled": unlabelled}
    _, whole = trained(tmp_path / "a", **options)
    _, pieces = trained(tmp_path / "b", **options, accumulate=4)
    before = tiny.weights(tiny.make_trainer(tmp_path / "c", ALONE, method=method))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if method == "dml" else {"rtol": 1e-5, "atol": 1e-6}
    for name, value in whole.items():
        assert not torch.equal(value, before[name]), f"{name} was not trained"
        torch.testing.assert_close(pieces[name], value, **tolerance)


WEIGHTED = [0.1, 1.0, 5.0]  # of the three classes


def test_with_class_weights_one_batch_of_eight_equals_four_of_two_and_two_processes_of_four(tmp_path: Path) -> None:
    _, whole = trained(tmp_path / "a", void=0.95, class_weights=WEIGHTED)
    _, plain = trained(tmp_path / "b", void=0.95)
    _, pieces = trained(tmp_path / "c", void=0.95, class_weights=WEIGHTED, accumulate=4)
    options = ["void=0.95", f"class_weights={','.join(map(str, WEIGHTED))}"]
    assert [finished(process) for process in two(tmp_path / "work", tmp_path / "out", *options)] == [0, 0]
    shared = result(tmp_path / "out")["weights"]
    assert max((plain[name] - value).abs().max() for name, value in whole.items()) > 1e-3
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(shared[name], value, rtol=1e-5, atol=1e-6)


def test_a_mean_over_labelled_pixels_that_a_method_takes_is_one_of_the_piece(tmp_path: Path) -> None:
    # The condition of the law: pieces weigh alike in a method's terms, however few labels they have.
    _, whole = trained(tmp_path / "a", method="kd", settings=MASKED, void=0.95)
    _, pieces = trained(tmp_path / "b", method="kd", settings=MASKED, void=0.95, accumulate=4)
    assert max((pieces[name] - value).abs().max() for name, value in whole.items()) > 1e-4


def test_two_processes_count_each_image_once_where_their_number_is_odd(tmp_path: Path) -> None:
    pair = [CLEAN.Process(target=tiny.evaluated, args=(str(tmp_path), 7, environment)) for environment in ranks()]
    for process in pair:
        process.start()
    assert [finished(process) for process in pair] == [0, 0]
    tiny.evaluated(str(tmp_path / "alone"), 7, {})
    whole = result(tmp_path / "alone/0")
    assert int(whole["confusion"].sum()) == 7 * tiny.SIZE[0] * tiny.SIZE[1]
    for rank in (0, 1):
        for name, counts in result(tmp_path / str(rank)).items():
            assert torch.equal(counts, whole[name]), (rank, name)


@pytest.mark.parametrize(
    ("method", "supervised", "void", "unlabelled"),
    [("none", 1, 0, 0), ("none", 1, 0.95, 0), ("fitnet", 1, 0.95, 4), ("fitnet", 0, 0, 0)],
)
def test_one_batch_of_eight_equals_two_processes_of_four(
    tmp_path: Path, method: str, supervised: int, void: float, unlabelled: int
) -> None:
    _, whole = trained(tmp_path / "a", method=method, supervised=supervised, void=void, unlabelled=unlabelled)
    # Without cross-entropy the classifier is not trained.
    options = [f"method={method}", f"supervised={supervised}", f"void={void}", f"unlabelled={unlabelled}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, tiny.__file__, tmp_path / "work", tmp_path / "out", *options], check=True, timeout=300)
    for name, value in result(tmp_path / "out")["weights"].items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["apd", "cirkd", "mgd", "skd", "dml"])
def test_killed_and_resumed_equals_never_interrupted_bit_for_bit(tmp_path: Path, method: str) -> None:
    options = [f"method={method}", "dropout=0.3", "iterations=11", "select=best"]
    assert finished(start(tmp_path / "whole", tmp_path / "whole.out", *options)) == 0
    first, second = sorted(random.sample(range(3, 11), 2))
    for deadly in (first, second):
        died = finished(start(tmp_path / "work", tmp_path / "out", *options, f"die_at={deadly}"))
        assert died == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    assert finished(start(tmp_path / "work", tmp_path / "out", *options)) == 0
    assert_equal(result(tmp_path / "out"), result(tmp_path / "whole.out"))


def test_killed_while_a_checkpoint_is_written_resumes_from_the_one_before(tmp_path: Path) -> None:
    options = ["iterations=7"]
    assert finished(start(tmp_path / "whole", tmp_path / "whole.out", *options)) == 0
    assert finished(start(tmp_path / "work", tmp_path / "out", *options, "die_in_save=4")) == -signal.SIGKILL
    assert result(tmp_path / "work" / "resume.safetensors")["progress"]["iteration"] == 2
    assert finished(start(tmp_path / "work", tmp_path / "out", *options)) == 0
    assert_equal(result(tmp_path / "out"), result(tmp_path / "whole.out"))


def wait_for(path: Path, running: Any = None) -> None:
    for _ in range(3000):
        if path.exists():
            return
        assert running is None or running.poll() is None, "it ended before"
        time.sleep(0.1)
    raise AssertionError(f"{path} never came")


def test_sigterm_saves_and_exits_with_the_code_for_retry(tmp_path: Path) -> None:
    options = ["iterations=25", "checkpoint_every=1000"]
    running = start(tmp_path / "work", tmp_path / "out", *options, "slow=0.5", f"started={tmp_path / 'started'}")
    wait_for(tmp_path / "started")
    os.kill(running.pid, signal.SIGTERM)
    assert finished(running) == 75
    assert 1 <= result(tmp_path / "work" / "resume.safetensors")["progress"]["iteration"] < 25
    assert finished(start(tmp_path / "work", tmp_path / "out", *options)) == 0
    assert finished(start(tmp_path / "whole", tmp_path / "whole.out", *options)) == 0
    assert_equal(result(tmp_path / "out"), result(tmp_path / "whole.out"))


def test_ctrl_c_saves_says_so_and_ends_with_130(tmp_path: Path) -> None:
    trainer = tiny.make_trainer(tmp_path / "work", ALONE, iterations=6, checkpoint_every=1000)
    step = trainer.step

    def pressed() -> None:
        step()
        if trainer.progress.iteration == 2:
            signal.raise_signal(signal.SIGINT)

    trainer.step = pressed
    with pytest.raises(Interrupted, match="stopped and saved at iteration 2; the same command goes on") as ended:
        trainer.run()
    assert ended.value.code == 130
    assert result(tmp_path / "work" / "resume.safetensors")["progress"]["iteration"] == 2


def test_sigterm_to_a_whole_group_saves_all_the_same(tmp_path: Path) -> None:
    """Loading processes that died of it would end the training in the middle of a step."""
    options = ["iterations=200", "checkpoint_every=1000", "slow=0.1", "workers=2", f"started={tmp_path / 'started'}"]
    command = [sys.executable, tiny.__file__, tmp_path / "work", tmp_path / "out", *options]
    running = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
    wait_for(tmp_path / "started", running)
    os.killpg(running.pid, signal.SIGTERM)
    said = running.communicate(timeout=120)[1].decode()
    assert running.returncode == 75 and "Traceback" not in said, said
    assert 1 <= result(tmp_path / "work" / "resume.safetensors")["progress"]["iteration"] < 200


def test_sigterm_to_one_of_two_processes_stops_both_in_the_same_iteration(tmp_path: Path) -> None:
    options = ["iterations=600", "checkpoint_every=1000", "slow=0.05", f"started={tmp_path / 'started'}"]
    running = two(tmp_path / "work", tmp_path / "out", *options)
    wait_for(tmp_path / "started")
    os.kill(running[1].pid, signal.SIGTERM)
    assert [finished(process) for process in running] == [75, 75]
    assert result(tmp_path / "work" / "resume.safetensors")["progress"]["iteration"] % 10 == 0


def test_sigterm_to_one_of_two_processes_after_they_agreed_to_go_on_stops_both_the_next_time(tmp_path: Path) -> None:
    options = ["iterations=60", "checkpoint_every=10", "told_in_save=20"]  # rank 0 alone saves
    assert [finished(process) for process in two(tmp_path / "work", tmp_path / "out", *options)] == [75, 75]
    assert result(tmp_path / "work" / "resume.safetensors")["progress"]["iteration"] == 30


def test_the_teacher_is_unchanged_and_in_no_checkpoint(tmp_path: Path) -> None:
    trainer = tiny.make_trainer(tmp_path, ALONE, method="apd")
    before = {name: value.clone() for name, value in trainer.cohort.teacher.segmenter.state_dict().items()}
    head = trainer.learner.methods["apd"].teacher_head[0].weight.detach().clone()
    trainer.run()
    for name, value in trainer.cohort.teacher.segmenter.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not trainer.cohort.teacher.segmenter.training
    assert not torch.equal(trainer.learner.methods["apd"].teacher_head[0].weight, head), "APD trains the teacher's head"
    names = trainer.state()["learner"].keys()
    assert {name.split(".")[0] for name in names} == {"_students", "_methods"}
    own = trainer.optimizers["apd.teacher_head"]
    assert {id(p) for g in own.param_groups for p in g["params"]}.isdisjoint(
        id(p) for g in trainer.optimizers["cnn"].param_groups for p in g["params"]
    )


def test_a_checkpoint_of_another_configuration_is_not_resumed(tmp_path: Path) -> None:
    _, whole = trained(tmp_path / "whole", iterations=6)
    tiny.make_trainer(tmp_path / "work", ALONE, iterations=6, fingerprint="another").run()
    _, fresh = trained(tmp_path / "work", iterations=6)
    for name, value in whole.items():
        assert torch.equal(value, fresh[name]), name


def test_a_wall_clock_budget_ends_in_time(tmp_path: Path) -> None:
    trainer = tiny.make_trainer(tmp_path, ALONE, iterations=None, seconds=2.0)
    outcome = trainer.run()
    assert outcome.iterations > 1
    assert 2.0 <= outcome.seconds < 20


def test_the_clock_of_a_budget_starts_with_the_end_of_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter([90.0, 2.0, 2.0, 2.0])  # the first waits for compilers, caches and data
    monkeypatch.setattr(Stopwatch, "take", lambda self: next(steps, 0.0))
    outcome = tiny.make_trainer(tmp_path, ALONE, iterations=None, seconds=6.0).run()
    assert (outcome.startup_seconds, outcome.seconds, outcome.iterations) == (90, 6, 4)
    assert outcome.images_per_second == 8 / 2


def test_best_weights_are_those_of_the_best_validation(tmp_path: Path) -> None:
    trainer = tiny.make_trainer(tmp_path, ALONE, iterations=12, validate_every=2, select="best")
    outcome = trainer.run()
    seen = [point["val/miou"] for point in outcome.curves["cnn"] if "val/miou" in point]
    assert outcome.evaluations["cnn"].miou == max(seen)


def test_clipping_bounds_the_gradient_norm(tmp_path: Path) -> None:
    trainer = tiny.make_trainer(tmp_path, ALONE, max_grad_norm=1e-6, iterations=3)
    before = tiny.weights(trainer)
    trainer.optimizers["cnn"].param_groups[0]["weight_decay"] = 0.0
    for group in trainer.optimizers["cnn"].param_groups:
        group["weight_decay"] = 0.0
    trainer.run()
    for name, value in tiny.weights(trainer).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size 8 is not divisible by accumulate 3"):
        tiny.make_trainer(tmp_path, ALONE, accumulate=3)
    with pytest.raises(UserError, match="unlabelled 3 is not divisible by accumulate 2"):
        tiny.make_trainer(tmp_path, ALONE, accumulate=2, unlabelled=3)
    with pytest.raises(UserError, match="iterations or as seconds"):
        tiny.make_trainer(tmp_path, ALONE, seconds=3.0)


def test_two_processes_that_are_resumed_equal_two_that_never_stopped(tmp_path: Path) -> None:
    """Each goes on in its own random stream: dropout draws on every rank."""
    options = ["dropout=0.5", "iterations=8"]
    assert [finished(process) for process in two(tmp_path / "whole", tmp_path / "whole.out", *options)] == [0, 0]
    torchrun = two(tmp_path / "work", tmp_path / "out", *options, "checkpoint_every=4", "stop_after=4")
    assert [finished(process) for process in torchrun] == [75, 75]
    assert [finished(process) for process in two(tmp_path / "work", tmp_path / "out", *options)] == [0, 0]
    assert_equal(result(tmp_path / "out"), result(tmp_path / "whole.out"))
