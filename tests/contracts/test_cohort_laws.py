"""Laws of a cohort: what its members become does not depend on who trains beside them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from test_loop_laws import finished, result, two

from segdistill.engine import checkpoint, cohort, stopwatch
from segdistill.engine.distributed import Processes
from segdistill.engine.tracker import Tracker
from segdistill.engine.trainer import Diverged, Ended, Result

ALONE = Processes(0, 1, torch.device("cpu"))
# Dropout in all; masks that are drawn, memories, critics, heads with an optimiser of their own, peers.
NAMES = ["none", "kd", "cwd", "mgd", "cirkd", "skd", "apd", "fitnet", "hfd_bsd", "dml"]
Trained = tuple[dict[str, torch.Tensor], dict[str, Any]]
EQUAL: Mapping[str, float] = {}
# Of 7 iterations: 3, 7, 12 and 4.
BUDGETS = {"none": 0.43, "cirkd": 1.7, "dml": 0.55}


class Recorder(Tracker):
    def __init__(self) -> None:
        self.said: dict[str, str] = {}

    def tags(self, values: Any) -> None:
        self.said |= values


def together(
    work: Path,
    names: Sequence[str],
    dead: str = "",
    judges: Any = None,
    budgets: Mapping[str, float] = EQUAL,
    **changes: Any,
) -> tuple[Any, dict[str, Trained]]:
    """A cohort of these methods, and what became of its members; the ``dead`` one's loss is NaN from step 3 on."""
    trainings = [
        tiny.make_training(
            name, work / name, method=name, dropout=0.3, trackers=Recorder(), budget=budgets.get(name, 1.0)
        )
        for name in names
    ]
    settings = {"iterations": 7, "accumulate": 2, "select": "best"} | changes
    trained = tiny.make_cohort(trainings, ALONE, **settings)
    members = dict(trained.members)
    for name, judge in (judges or {}).items():
        members[name].training = dataclasses.replace(members[name].training, judge=judge)
    if dead:
        poison(members[dead])
    outcomes = trained.run()
    assert list(outcomes) == list(names)
    sound = {name for name, outcome in outcomes.items() if isinstance(outcome, Result)}
    return outcomes, {name: (tiny.weights(members[name]), members[name].progress.curves) for name in sound}


def poison(member: Any) -> None:
    total = member.learner.total
    member.learner.total = lambda terms, progress: (
        total(terms, progress) * (float("nan") if member.progress.iteration >= 3 else 1.0)
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Each training in a cohort of its own."""
    work, trained = tmp_path_factory.mktemp("alone"), {}
    for name in NAMES:
        trained |= together(work, [name])[1]
    return trained


def assert_equal(trained: dict[str, Trained], alone: dict[str, Trained]) -> None:
    for name, (weights, curves) in trained.items():
        assert curves == alone[name][1], name
        for key, value in weights.items():
            assert torch.equal(value, alone[name][0][key]), f"{name}: {key}"


@pytest.mark.parametrize("names", [NAMES, NAMES[::-1], NAMES[1::2]], ids=["in order", "reversed", "every other"])
def test_a_cohort_gives_bit_for_bit_what_its_members_give_alone(
    tmp_path: Path, names: list[str], alone: dict[str, Trained]
) -> None:
    trained = together(tmp_path, names)[1]
    assert set(trained) == set(names)
    assert_equal(trained, alone)


def killed(work: Path, names: Sequence[str], saves: int, **options: Any) -> None:
    """A cohort that is no more after so many saves of its members; each saves at 2, 4, 6 and 7 iterations."""
    written, original = [], checkpoint.save

    def save(path: Path, state: dict[str, Any]) -> None:
        if len(written) == saves:
            raise KeyboardInterrupt
        original(path, state)
        written.append(path)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", save)
        together(work, names, **options)


@pytest.mark.parametrize("saves", [1, 5, 9, 11])
def test_killed_after_any_members_save_and_resumed_equals_never_stopped(
    tmp_path: Path, saves: int, alone: dict[str, Trained]
) -> None:
    names = ["mgd", "cirkd", "dml"]
    killed(tmp_path, names, saves)
    trained = together(tmp_path, names)[1]
    assert set(trained) == set(names)
    assert_equal(trained, alone)


@pytest.fixture(scope="module")
def alone_by_budget(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    work, trained = tmp_path_factory.mktemp("alone_by_budget"), {}
    for name in ("none", "mgd", "cirkd", "dml"):
        trained |= together(work, [name], budgets=BUDGETS)[1]
    return trained


@pytest.mark.parametrize("saves", [None, 1, 4, 8, 13])
def test_members_that_end_at_different_iterations_become_what_they_become_alone_even_if_killed_and_resumed(
    tmp_path: Path, saves: int | None, alone_by_budget: dict[str, Trained]
) -> None:
    names = ["cirkd", "none", "mgd", "dml"]
    if saves is not None:
        killed(tmp_path, names, saves, budgets=BUDGETS)
    outcomes, trained = together(tmp_path, names, budgets=BUDGETS)
    assert [outcomes[name].iterations for name in names] == [12, 3, 7, 4]
    assert_equal(trained, alone_by_budget)


@pytest.fixture(scope="module")
def alone_with_unlabelled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    work, trained = tmp_path_factory.mktemp("alone_with_unlabelled"), {}
    for name in NAMES:
        trained |= together(work, [name], unlabelled=4)[1]
    return trained


@pytest.mark.parametrize("saves", [None, 5, 17])
def test_images_without_labels_teach_all_but_the_student_without_a_method_which_does_not_see_them(
    tmp_path: Path, saves: int | None, alone: dict[str, Trained], alone_with_unlabelled: dict[str, Trained]
) -> None:
    if saves is not None:
        killed(tmp_path, NAMES, saves, unlabelled=4)
    _, trained = together(tmp_path, NAMES, unlabelled=4)
    assert_equal(trained, alone_with_unlabelled)
    for name, (weights, _) in trained.items():
        same = all(torch.equal(value, alone[name][0][key]) for key, value in weights.items())
        assert same == (name == "none"), name


def test_images_that_nobody_takes_are_not_read(tmp_path: Path) -> None:
    training = tiny.make_training("none", tmp_path)
    only = tiny.make_cohort([training], ALONE, iterations=1, unlabelled=8)
    only.unlabelled_set.__class__ = type("Unread", (tiny.Blobs,), {"__getitem__": None})
    assert only.run()["none"].iterations == 1


def test_a_budget_of_twice_the_iterations_is_a_training_of_twice_the_iterations(tmp_path: Path) -> None:
    _, doubled = together(tmp_path / "a", ["kd"], budgets={"kd": 2.0})
    _, longer = together(tmp_path / "b", ["kd"], iterations=14)
    assert_equal(doubled, longer)


def test_a_budget_multiplies_seconds_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch.Stopwatch, "take", lambda self: 1.0)
    outcomes, _ = together(tmp_path, ["kd"], budgets={"kd": 1.5}, iterations=None, seconds=4.0)
    assert (outcomes["kd"].seconds, outcomes["kd"].iterations) == (7.0, 7)


def test_a_member_that_comes_later_takes_the_batches_that_the_others_have_had(
    tmp_path: Path, alone: dict[str, Trained]
) -> None:
    together(tmp_path, ["kd", "dml"])
    assert_equal(together(tmp_path, ["kd", "apd", "dml"])[1], alone)


def test_a_member_that_diverges_ends_alone_and_leaves_the_others_as_they_are(
    tmp_path: Path, alone: dict[str, Trained]
) -> None:
    names = ["kd", "fitnet", "dml"]
    outcomes, trained = together(tmp_path, names, dead="fitnet")
    diverged = outcomes["fitnet"]
    assert isinstance(diverged, Diverged) and diverged.iteration == 4 and "is not finite" in diverged.reason
    assert set(trained) == {"kd", "dml"}
    assert_equal(trained, alone)


def test_a_member_that_its_judge_ends_leaves_the_others_as_they_are(tmp_path: Path, alone: dict[str, Trained]) -> None:
    heard = []

    def judge(iteration: int, scores: Any) -> None:
        heard.append((iteration, set(scores)))
        raise Ended(iteration, "not worth it")

    judges = {"fitnet": judge, "dml": lambda *heard_of: heard.append(heard_of)}
    outcomes, trained = together(tmp_path, ["kd", "fitnet", "dml"], judges=judges)
    ended = outcomes["fitnet"]
    assert isinstance(ended, Ended) and not isinstance(ended, Diverged)
    assert heard[0] == (ended.iteration, {"cnn"}) and ended.iteration < 7
    assert max(iteration for iteration, _ in heard) < 7, "the last validation is nobody's to judge"
    assert_equal(trained, alone)


def test_who_diverges_while_the_others_wait_does_not_make_them_decode_what_they_have_had(
    tmp_path: Path, alone: dict[str, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def batches(*rest: Any, first_iteration: int, **options: Any) -> Any:
        for batch in original(*rest, first_iteration=first_iteration, **options):
            drawn.append(batch)
            yield batch

    original = cohort.training_batches
    killed(tmp_path, ["kd"], saves=3)
    monkeypatch.setattr(cohort, "training_batches", batches)
    _, trained = together(tmp_path, ["kd", "fitnet"], dead="fitnet")
    assert len(drawn) == 2 * (4 + 1), "two pieces for each of four steps of one and the last step of the other"
    assert_equal(trained, alone)


def test_a_batch_is_shown_to_the_teacher_once_and_not_at_all_where_nobody_learns_from_it(tmp_path: Path) -> None:
    for names, passes in ((["none", "kd", "cwd", "dml"], 14), (["none", "dml"], 0)):
        trainings = [tiny.make_training(name, tmp_path / str(passes) / name, method=name) for name in names]
        together = tiny.make_cohort(trainings, ALONE, iterations=7, accumulate=2)
        shown: list[Any] = []
        if together.teacher is not None:
            together.teacher.register_forward_hook(lambda *batch, shown=shown: shown.append(batch))
        together.run()
        assert len(shown) == passes


def test_a_member_is_charged_for_its_steps_and_what_it_shares_and_not_for_start_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, original = [0.0], cohort.training_batches

    def taking(seconds: float, action: Any) -> Any:
        def act(*rest: Any, **options: Any) -> Any:
            now[0] += seconds
            return action(*rest, **options)

        return act

    def batches(*rest: Any, **options: Any) -> Any:
        for batch in original(*rest, **options):
            now[0] += 1
            yield batch

    clock = SimpleNamespace(monotonic=lambda: now[0], process_time=lambda: 2 * now[0])  # two threads, all the time
    monkeypatch.setattr(cohort, "time", clock)
    monkeypatch.setattr(stopwatch, "time", clock)
    monkeypatch.setattr(cohort, "training_batches", batches)
    trainings = [tiny.make_training(name, tmp_path / name, method=name) for name in ("none", "kd")]
    pair = tiny.make_cohort(trainings, ALONE, iterations=4)
    pair.teacher.forward = taking(10, pair.teacher.forward)
    for seconds, member in zip((100, 1000), pair.members.values(), strict=True):
        member.step = taking(seconds, member.step)
    outcomes = pair.run()
    assert outcomes["none"].seconds == 3 * (1 + 100) and outcomes["kd"].seconds == 3 * (1 + 10 + 1000)
    assert all(outcome.cpu_seconds == 2 * outcome.seconds for outcome in outcomes.values())
    assert outcomes["kd"].images_per_second == 3 * 8 / outcomes["kd"].seconds
    assert pair.seconds == {"data": 3 * 1, "training": 3 * (10 + 100 + 1000), "evaluation": 0}


def test_what_cannot_be_a_cohort_is_refused(tmp_path: Path) -> None:
    one, other = (tiny.make_training(name, tmp_path, method=name) for name in ("none", "kd"))
    with pytest.raises(ValueError, match="clock that several trainings share"):
        tiny.make_cohort([one, other], ALONE, iterations=None, seconds=1.0)
    with pytest.raises(ValueError, match="there are no images without labels"):
        cohort.Cohort(
            [one], tiny.Blobs(), None, tiny.train_config(unlabelled=2), inference=tiny.INFERENCE, seed=0, teacher=None,
            processes=ALONE,
        )  # type: ignore[arg-type]  # fmt: skip
    with pytest.raises(ValueError, match="names of their own"):
        tiny.make_cohort([one, one], ALONE)
    with pytest.raises(ValueError, match=r"\['kd'\] learn from a teacher"):
        cohort.Cohort(
            [other], tiny.Blobs(), None, tiny.train_config(), inference=tiny.INFERENCE, seed=0, teacher=None,
            processes=ALONE,
        )  # type: ignore[arg-type]  # fmt: skip


def test_two_processes_train_a_cohort_as_one_does_and_agree_on_who_diverged(tmp_path: Path) -> None:
    outcomes = [tmp_path / "out", tmp_path / "out-fitnet"]
    running = two(tmp_path / "work", tmp_path / "out", "method=none,kd,fitnet", "dead=kd", "select=best")
    assert [finished(process) for process in running] == [0, 0]
    assert sorted(tmp_path.glob("out*")) == outcomes
    for name, path in zip(("none", "fitnet"), outcomes, strict=True):
        trainer = tiny.make_trainer(tmp_path / "one" / name, ALONE, method=name, select="best")
        trainer.run()
        for key, value in tiny.weights(trainer).items():
            torch.testing.assert_close(result(path)["weights"][key], value, rtol=1e-5, atol=1e-6)


def test_a_large_cohort_is_compiled_once_a_member(tmp_path: Path) -> None:
    """Dynamo stops compiling a function after eight times, and all learners share theirs."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    trainings = [tiny.make_training(f"{tenths}", tmp_path, dropout=tenths / 10) for tenths in range(10)]
    members = tiny.make_cohort(trainings, ALONE, compile=True).members.values()
    images, target = torch.rand(2, 3, *tiny.SIZE), torch.randint(tiny.CLASSES, (2, *tiny.SIZE))
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    for member in members:
        member.learner.compile(backend=keep)
    for _ in range(2):
        for member in members:
            member.learner(images, target)
    assert len(graphs) == len(members) and not counters["recompile_limit"]
