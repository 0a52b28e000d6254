"""Exceptions whose message is meant for the person at the keyboard, and how a run is told to stop."""

import contextlib
import difflib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType


class UserError(Exception):
    """A mistake that its user can mend.

    The message is one clear sentence that names the file, key or value and what is allowed. The command line
    prints it without a traceback and ends with exit code 2.
    """


class Interrupted(Exception):
    """The run was asked to stop and has saved its state: the same command continues it.

    The command line ends with exit code 75, after which a scheduler may run the command again.
    """


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'kd'?"`` for a close name, else ``"; allowed: ..."``."""
    allowed = [str(value) for value in allowed]
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; allowed: {', '.join(allowed) or 'nothing'}"


def brief(value: object) -> str:
    """A value for a message: on one line, of a readable length; text as it is if it can be."""
    shown = value if isinstance(value, str) and value.isprintable() else repr(value)
    return shown if len(shown) <= 80 else f"{shown[:60]}... ({len(shown)} characters)"


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; the former handler comes back afterwards."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, frame: FrameType | None) -> None:
        stop.set()

    former = signal.signal(signal.SIGTERM, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, former)
