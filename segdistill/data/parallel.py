"""Work over many files: processes or threads, results in order, bounded memory, a progress bar."""

import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from segdistill.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


FEW = 200  # files that are read sooner than processes start
READERS = 4  # threads that decode ahead of a network that is only applied


def worker_count(workers: int, tasks: int) -> int:
    """The number of processes to use; 0 means all cores this process may run on."""
    return max(1, min(workers or len(os.sched_getaffinity(0)), tasks))


def workers_for(files: int) -> int:
    """Processes for a command that somebody waits for: 0, all cores, or 1 where there are few files."""
    return 1 if files < FEW else 0


def ordered_map(function: Callable[[T], R], items: Sequence[T], *, workers: int) -> Iterator[R]:
    """``function`` over ``items`` in processes; results in order, and only a few of them waiting at any time.

    Args:
        function: a module-level function, or a ``functools.partial`` of one.
        items: what is sent to the processes; small things such as paths.
        workers: processes; 0 = all cores; 1 = here, without a process.
    """
    count = worker_count(workers, len(items))
    if count == 1:
        yield from map(function, items)
        return
    # A fork server: a plain fork would copy the locks of whatever threads the caller has.
    context = multiprocessing.get_context("forkserver")
    inner = function.func if isinstance(function, functools.partial) else function
    context.set_forkserver_preload(["__main__", inner.__module__])
    pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin_worker, initargs=(Path.cwd(),))
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 4 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            f"one of {count} worker processes was killed, probably for want of memory; use fewer workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def ahead(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """``function`` over ``items``, in order; threads are at most two items each ahead of who asks."""
    if not workers:
        yield from map(function, items)
        return
    waiting: deque[Future[R]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="reader")
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def progress(items: Iterable[T], label: str, total: int, weight: Callable[[T], int] = lambda item: 1) -> Iterator[T]:
    """Passes ``items`` through, and shows how far they are when someone watches the terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total)
        for item in items:
            bar.advance(task, weight(item))
            yield item


def _begin_worker(folder: Path) -> None:
    os.chdir(folder)  # the fork server stays where it was started, and paths may be relative
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed caller cannot shut its pool down, and an orphan would wait for work, and write, for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
