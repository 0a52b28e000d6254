"""Parts of a stage in processes of their own: what they return, and how they end."""

import functools
import itertools
import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segdistill.config import read_yaml
from segdistill.engine.distributed import Processes
from segdistill.engine.parts import divided, run_parts
from segdistill.engine.progress import Advance, TrainingBar
from segdistill.errors import Interrupted, UserError, stop_on_signal
from segdistill.plan import cohort_plan, cohorts
from segdistill.stages.distill import as_member, cost_of

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.mark.usefixtures("two_threads")
def test_items_are_divided_by_their_cost() -> None:
    assert divided([1, 2, 1, 1, 2, 1], sum, ALONE) == [[1, 2, 1], [1, 2, 1]]
    assert divided([1, 9, 1], sum, ALONE) == [[1, 1], [9]]
    assert divided([5], sum, ALONE) == [[5]]
    assert divided([], sum, ALONE) == []


@given(items=st.lists(st.integers(1, 9), max_size=6), shared=st.integers(0, 9), threads=st.sampled_from([2, 3]))
def test_the_dearest_part_is_as_cheap_as_any_division_makes_it(items: list[int], shared: int, threads: int) -> None:
    def cost(part: Sequence[tuple[int, int]]) -> float:  # the odd ones share something
        return sum(item for _, item in part) + (shared if any(item % 2 for _, item in part) else 0)

    def part_of(way: Sequence[int], number: int) -> list[tuple[int, int]]:
        return [item for item, place in zip(numbered, way, strict=True) if place == number]

    torch.set_num_threads(threads)
    numbered = list(enumerate(items))
    parts = divided(numbered, cost, ALONE)
    assert sorted(item for part in parts for item in part) == numbered
    assert all(part == sorted(part) for part in parts)
    ways = [[cost(part_of(way, number)) for number in range(threads)]
            for way in itertools.product(range(threads), repeat=len(items))]  # fmt: skip
    costs = [cost(part) for part in parts]
    assert (max(costs, default=0), sum(costs)) == min((max(way), sum(way)) for way in ways)


@pytest.mark.usefixtures("two_threads")
@given(items=st.lists(st.integers(1, 9), min_size=15, max_size=40), shared=st.integers(0, 9))
def test_of_very_many_divisions_the_best_of_neighbours_is_taken(items: list[int], shared: int) -> None:
    def cost(part: Sequence[int]) -> float:
        return sum(part) + (shared if any(item % 2 for item in part) else 0)

    parts = divided(items, cost, ALONE)
    assert [item for part in parts for item in part] == items
    assert len(parts) <= 2
    cheapest = min(max(cost(items[:place]), cost(items[place:])) for place in range(len(items) + 1))
    assert max(map(cost, parts)) == cheapest


def test_one_thread_and_a_batch_that_is_shared_make_one_part() -> None:
    assert divided([1, 1], sum, ALONE) == [[1, 1]]
    torch.set_num_threads(2)
    assert divided([1, 1], sum, Processes(0, 2, torch.device("cpu"))) == [[1, 1]]
    assert divided([1, 1], sum, Processes(0, 1, torch.device("cuda"))) == [[1, 1]]


@pytest.mark.usefixtures("two_threads")
def test_each_part_has_a_process_and_its_share_of_the_threads() -> None:
    answers = run_parts([lambda: (os.getpid(), torch.get_num_threads())] * 2, ALONE)
    assert len({process for process, _ in answers} | {os.getpid()}) == 3
    assert {threads for _, threads in answers} == {1}


def test_with_one_thread_on_a_gpu_and_under_torchrun_tasks_run_here() -> None:
    assert run_parts([os.getpid], ALONE) == [os.getpid()]
    torch.set_num_threads(2)
    for elsewhere in (Processes(0, 2, torch.device("cpu")), Processes(0, 1, torch.device("cuda"))):
        assert run_parts([os.getpid], elsewhere) == [os.getpid()]


@pytest.mark.usefixtures("two_threads")
def test_one_part_has_a_process_too_so_that_others_can_follow_it() -> None:
    assert run_parts([os.getpid], ALONE) != [os.getpid()]


@pytest.mark.usefixtures("two_threads")
def test_nothing_to_do_is_done_at_once() -> None:
    assert run_parts([], ALONE) == []


@pytest.mark.usefixtures("two_threads")
def test_a_mistake_in_one_part_is_raised_when_the_others_have_ended(tmp_path: Path) -> None:
    def mistake() -> None:
        raise UserError("a mistake")

    def work() -> None:
        time.sleep(0.2)
        (tmp_path / "done").touch()

    with pytest.raises(UserError, match="a mistake"):
        run_parts([mistake, work], ALONE)
    assert (tmp_path / "done").exists()


@pytest.mark.usefixtures("two_threads")
def test_a_part_that_is_killed_says_what_can_be_done() -> None:
    with pytest.raises(UserError, match=r"one of the processes of this stage was killed.*OMP_NUM_THREADS=1"):
        run_parts([lambda: None, lambda: os.kill(os.getpid(), signal.SIGKILL)], ALONE)


@pytest.mark.usefixtures("two_threads")
def test_a_wish_to_stop_reaches_every_part(tmp_path: Path) -> None:
    def work(number: int) -> None:
        with stop_on_signal() as stop:
            (tmp_path / str(number)).touch()
            assert stop.wait(60)
        raise Interrupted("stopped")

    def tell() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGTERM)
        with stop_on_signal() as stop:
            stop.wait(60)

    former = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(Interrupted):
            run_parts([functools.partial(work, 0), functools.partial(work, 1), tell], ALONE)
    finally:
        signal.signal(signal.SIGTERM, former)


@pytest.mark.usefixtures("two_threads")
def test_ctrl_c_reaches_every_part_which_saves_and_ends_with_the_code_of_ctrl_c(tmp_path: Path) -> None:
    def work(number: int) -> None:
        with stop_on_signal() as stop:
            (tmp_path / str(number)).touch()
            assert stop.wait(60)
            raise Interrupted("stopped and saved")

    def press() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGINT)
        with stop_on_signal() as stop:
            stop.wait(60)

    former = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with pytest.raises(Interrupted, match="stopped and saved") as ended:
            run_parts([functools.partial(work, 0), functools.partial(work, 1), press], ALONE)
    finally:
        signal.signal(signal.SIGINT, former)
    assert ended.value.code == 130


@pytest.mark.usefixtures("two_threads")
def test_what_a_part_logs_and_how_far_it_is_are_shown_by_one_process(caplog: pytest.LogCaptureFixture) -> None:
    bar = TrainingBar("student", [["none"], ["kd"]], [1, 1], enabled=False)
    bar.bar.disable = False
    heard: list[tuple[int, int, Advance]] = []

    def work(group: int) -> None:
        logging.getLogger("segdistill.engine").warning("from %d", group)
        bar.update(Advance(5, 10, 0.5, 1.0), group)

    draw, bar.bar.start = bar.update, lambda: None  # type: ignore[method-assign]
    bar.update = lambda advance, group=0: (heard.append((os.getpid(), group, advance)), draw(advance, group))[1]  # type: ignore[method-assign, func-returns-value, misc, assignment]
    run_parts([functools.partial(work, group) for group in (0, 1)], ALONE, bar)
    assert sorted(heard) == [(os.getpid(), 0, Advance(5, 10, 0.5, 1.0)), (os.getpid(), 1, Advance(5, 10, 0.5, 1.0))]
    assert sorted(caplog.messages) == ["from 0", "from 1"]


@pytest.mark.usefixtures("two_threads")
def test_of_the_default_cohort_one_part_has_the_teacher() -> None:
    params = read_yaml(Path(__file__).resolve().parents[2] / "params.yaml")
    jobs = cohorts(params["run"], params["seeds"])["s0"]
    planned = cohort_plan(params["distill"], params["experiments"], jobs)
    members = [as_member(job, planned.protocol, "data", "teacher") for job in planned.jobs]
    costs = {member.name: member.cost for member in members}
    assert costs["none"] < costs["kd"] < costs["none_vit"] < costs["c2vkd_ce"] < costs["hfd_bsd"]
    parts = divided(members, cost_of, ALONE)
    assert [any(member.needs_teacher for member in part) for part in parts] == [False, True]
