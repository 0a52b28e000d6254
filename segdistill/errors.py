"""Exceptions whose message is meant for the person at the keyboard, how a run is told to stop, and how it ends."""

import contextlib
import difflib
import errno
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

# A scheduler may run the same command again after this code (sysexits.h, EX_TEMPFAIL): nothing is lost.
EXIT_RETRY = 75
EXIT_USER = 2


class UserError(Exception):
    """A mistake that its user can mend.

    The message is one clear sentence that names the file, key or value and what is allowed. The command line
    prints it without a traceback and ends with exit code 2.
    """


class Interrupted(BaseException):
    """The run was asked to stop: the same command goes on, from a checkpoint where there is one.

    The command line ends with exit code 75, after which a scheduler may run the command again. Like KeyboardInterrupt
    it is no Exception, since it may come out of any line, and no library's ``except Exception`` shall swallow it.
    """


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'kd'?"`` for a close name, else ``"; allowed: ..."``."""
    allowed = [str(value) for value in allowed]
    close = difflib.get_close_matches(name, allowed, n=1)
    return f"; did you mean '{close[0]}'?" if close else f"; allowed: {', '.join(allowed) or 'nothing'}"


def brief(value: object) -> str:
    """A value for a message: on one line, of a readable length; text as it is if it can be."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


@contextlib.contextmanager
def exit_codes(command: str) -> Iterator[None]:
    """Ends a command as its user and a scheduler expect; every command and task is run in it.

    SIGTERM ends what is inside by :class:`Interrupted`, wherever it is: importing, reading, waiting for workers.
    Code that can do better, such as the training loop, listens for itself with :func:`stop_on_sigterm`.

    Args:
        command: begins the sentence on standard error.

    Raises:
        SystemExit: 2 after a user's mistake or a lack of disk or memory, 75 after SIGTERM, 130 after Ctrl-C; each with
            one sentence.
    """

    def interrupt() -> None:
        raise Interrupted("stopped; the same command goes on")

    try:
        with _at_sigterm(interrupt):
            yield
    except UserError as error:
        code, said = EXIT_USER, str(error)
    except Interrupted as error:
        code, said = EXIT_RETRY, str(error)
    except KeyboardInterrupt:
        code, said = 130, "interrupted"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        code, said = EXIT_USER, f"{error.filename or 'disk'}: no space left on the disk"
    except (MemoryError, RuntimeError) as error:
        # torch's own class is a RuntimeError on a GPU, and there is none for the CPU.
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        reason = " ".join(str(error).split())[:200] or "none left"
        code, said = EXIT_USER, f"out of memory ({reason}); lower batch_size or crop_size, or raise accumulate"
    else:
        return
    print(f"{command}: {said}", file=sys.stderr)
    raise SystemExit(code)


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; the former handler comes back afterwards, and hears of a wish that nobody heeded."""
    stop = threading.Event()
    former = signal.getsignal(signal.SIGTERM)
    with _at_sigterm(stop.set):
        yield stop
    if stop.is_set() and callable(former):
        signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def _at_sigterm(act: Callable[[], None]) -> Iterator[None]:
    """Calls ``act`` at the first SIGTERM; whatever fails after that is its consequence.

    Workers may get the signal before us, and peers that have stopped already break our connections to them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    told = threading.Event()

    def handler(number: int, frame: FrameType | None) -> None:
        if not told.is_set():  # once: a second one must not break off the tidying up
            told.set()
            act()

    former = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    except Exception as error:
        if told.is_set():
            raise Interrupted("stopped; the same command goes on") from error
        raise
    finally:
        signal.signal(signal.SIGTERM, former)
