"""Parts of one stage, each in a process of its own: how a CPU's cores train several students at once.

The operations of a small network on small images are too small to be shared out to cores; whole trainings are not.
"""

import functools
import itertools
import logging
import logging.handlers
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

import torch

from segdistill.engine.distributed import Processes
from segdistill.engine.progress import PartsBar
from segdistill.errors import Interrupted, UserError, stop_on_signal

T = TypeVar("T")
MOST_DIVISIONS = 20_000  # of which each is looked at: fourteen items in two parts, seven in four

logger = logging.getLogger(__name__)


def divided(items: Sequence[T], cost: Callable[[Sequence[T]], float], processes: Processes) -> list[list[T]]:
    """Items in as many parts as this CPU's threads can work on, the dearest of them as cheap as can be.

    Where there are very many ways, those are compared in which neighbours go together. On a GPU there is one part;
    under torchrun, too, where the processes share each batch instead.

    Args:
        items: what is done; each part has its own in this order.
        cost: how dear some of them are in one part; what they share counts once.
        processes: where it is done.
    """
    items = list(items)
    count = min(len(items), torch.get_num_threads()) if _may_fork(processes) else 1
    if count ** len(items) > MOST_DIVISIONS:
        return _neighbours(items, cost, count)

    def parts_of(places: Sequence[int]) -> list[list[T]]:
        parts = [[item for item, place in zip(items, places, strict=True) if place == part] for part in range(count)]
        return [part for part in parts if part]

    def dearness(places: Sequence[int]) -> tuple[float, float]:
        costs = [cost(part) for part in parts_of(places)]
        return max(costs, default=0.0), sum(costs)

    return parts_of(min(itertools.product(range(count), repeat=len(items)), key=dearness))


def _neighbours(items: list[T], cost: Callable[[Sequence[T]], float], count: int) -> list[list[T]]:
    @functools.cache
    def cost_between(start: int, end: int) -> float:
        return cost(items[start:end])

    # By the number of items that are in parts: what the dearest of these costs, and where each begins.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for _ in range(count):
        best = {
            end: min((max(dearest, cost_between(start, end)), [*starts, start])
                     for start, (dearest, starts) in best.items() if start <= end)
            for end in range(len(items) + 1)
        }  # fmt: skip
    starts = best[len(items)][1]
    return [items[start:end] for start, end in itertools.pairwise([*starts, len(items)]) if start < end]


def _may_fork(processes: Processes) -> bool:
    """Whether there are threads to share out, and neither a GPU nor other processes that know this one."""
    return processes.world_size == 1 and processes.device.type == "cpu" and torch.get_num_threads() > 1


def run_parts(tasks: Sequence[Callable[[], T]], processes: Processes, bar: PartsBar | None = None) -> list[T]:
    """What the tasks return, each from a process of its own, which has its share of this one's threads.

    Processes are forked, so that they share what is loaded and start at once; nothing may have been computed with
    several threads before, and no thread of ours may run. So a single task has a process, too: this one may fork again
    after it. With one thread, on a GPU and under torchrun tasks run here. SIGTERM is passed on to the processes, and
    what one raises is raised here when all have ended. What they log, and the bar that they move, is shown by this one.
    """
    if not (tasks and _may_fork(processes)):
        return [task() for task in tasks]
    context, threads = multiprocessing.get_context("fork"), max(1, torch.get_num_threads() // len(tasks))
    children: list[tuple[BaseProcess, Connection]] = []
    with stop_on_signal() as stop, _no_orphans(children):
        for task in tasks:
            reader, writer = context.Pipe(duplex=False)
            child = context.Process(target=_run, args=(task, threads, writer, bar))
            child.start()
            writer.close()
            children.append((child, reader))
        answers = _answers(children, stop, bar)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        for failure in sorted(failures, key=lambda error: not isinstance(error, Exception)):
            raise failure  # a mistake rather than the wish to stop
    return answers  # type: ignore[return-value]


class _Relay(logging.handlers.QueueHandler):
    """Hands over what a child logs, and how far it is: two processes that write to one terminal mix their lines."""

    def enqueue(self, record: object) -> None:
        """Sends it; threads of the child wait for each other."""
        with self.lock:  # type: ignore[union-attr]
            self.queue.send(record)  # type: ignore[attr-defined]


def _run(task: Callable[[], T], threads: int, writer: Connection, bar: PartsBar | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork has its parent's
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    relay = _Relay(writer)  # type: ignore[arg-type]
    logging.getLogger("segdistill").handlers = [relay]
    if bar is not None:
        bar.relay = relay.enqueue
    answer: T | BaseException
    try:
        answer = task()
    except BaseException as error:
        if not isinstance(error, UserError | Interrupted | KeyboardInterrupt):
            error.add_note(traceback.format_exc())
        answer = error
    relay.enqueue(_Answer(answer))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@dataclass(frozen=True)
class _Answer:
    value: object


def _answers(
    children: Sequence[tuple[BaseProcess, Connection]], stop: threading.Event, bar: PartsBar | None
) -> list[object]:
    """What each child sent; where it died without a word, an error that says so."""
    answers: dict[Connection, object] = {}
    told = False
    while len(answers) < len(children):
        waiting = [reader for _, reader in children if reader not in answers]
        for reader in wait(waiting, timeout=0.5):
            assert isinstance(reader, Connection)
            try:
                news = reader.recv()
                if isinstance(news, _Answer):
                    answers[reader] = news.value
                elif isinstance(news, logging.LogRecord):
                    logging.getLogger(news.name).handle(news)
                elif bar is not None:
                    bar.update(*news)
            except EOFError:
                answers[reader] = UserError(
                    "one of the processes of this stage was killed, probably for want of memory; set"
                    " OMP_NUM_THREADS=1 for a single one, or lower batch_size or crop_size"
                )
        if stop.is_set() and not told:
            told = True
            for child, _ in children:
                child.terminate()
    return [answers[reader] for _, reader in children]


@contextmanager
def _no_orphans(children: Sequence[tuple[BaseProcess, Connection]]) -> Iterator[None]:
    """Ctrl-C reaches the children as well: they end first."""
    try:
        yield
    finally:
        for child, _ in children:
            child.join()
