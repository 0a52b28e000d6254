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
EXIT_CTRL_C = 130
GOES_ON = "the same command goes on"
BEGINS_ANEW = "nothing half-written is left; the same command begins anew"


class UserError(Exception):
    """A mistake that its user can mend.

    The message is one clear sentence that names the file, key or value and what is allowed. The command line
    prints it without a traceback and ends with exit code 2.
    """


class Interrupted(BaseException):
    """The run was asked to stop: the same command goes on, from a checkpoint where there is one.

    The command line ends with exit code 75, after which a scheduler may run the command again, or with 130 after
    Ctrl-C. Like KeyboardInterrupt it is no Exception, since it may come out of any line, and no library's ``except
    Exception`` shall swallow it.
    """

    code = EXIT_RETRY


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
def exit_codes(command: str, again: str = GOES_ON) -> Iterator[None]:
    """Ends a command as its user and a scheduler expect; every command and task is run in it.

    SIGTERM ends what is inside by :class:`Interrupted`, wherever it is: importing, reading, waiting for workers.
    Code that can do better, such as the training loop, listens for itself with :func:`stop_on_signal`, to Ctrl-C too.

    Args:
        command: begins the sentence on standard error.
        again: what the same command will do after Ctrl-C.

    Raises:
        SystemExit: 2 after a user's mistake or a lack of disk or memory, 75 after SIGTERM, 130 after Ctrl-C; each with
            one sentence.
    """

    def interrupt() -> None:
        raise Interrupted(f"stopped; {GOES_ON}")

    try:
        with _at_signal(interrupt, signal.SIGTERM):
            yield
    except UserError as error:
        code, said = EXIT_USER, str(error)
    except Interrupted as error:
        code, said = error.code, str(error)
    except KeyboardInterrupt:
        code, said = EXIT_CTRL_C, f"stopped; {again}"
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
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set; a second Ctrl-C is a KeyboardInterrupt.

    The former handlers come back afterwards, and hear of a wish that nobody heeded.
    """
    stop = threading.Event()
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with _at_signal(stop.set, *former) as told:
        yield stop
    for number in told:
        if callable(former[number]):
            signal.raise_signal(number)


@contextlib.contextmanager
def _at_signal(act: Callable[[], None], *numbers: signal.Signals) -> Iterator[list[signal.Signals]]:
    """Calls ``act`` at the first of these signals; whatever fails after that is its consequence.

    Workers may get the signal before us, and peers that have stopped already break our connections to them. Gives a
    list that has the signal when it has come.
    """
    told: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def handler(number: int, frame: FrameType | None) -> None:
        if not told:  # once: a second SIGTERM must not break off the tidying up
            told.append(signal.Signals(number))
            act()
        elif number == told[0] == signal.SIGINT:  # but who presses Ctrl-C again does not want to wait
            raise KeyboardInterrupt

    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # as in a background job
    former = {number: signal.signal(number, handler) for number in heard}
    try:
        yield told
    except (Exception, Interrupted) as error:
        if not told:
            raise
        ended = error if isinstance(error, Interrupted) else Interrupted(f"stopped; {GOES_ON}")
        if told[0] == signal.SIGINT:
            ended.code = EXIT_CTRL_C
        raise ended from (None if ended is error else error)
    finally:
        for number, handling in former.items():
            signal.signal(number, handling)
