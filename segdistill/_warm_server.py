"""The server half of ``warm.py``, which states the rule: it imports heavy libraries once and forks for each command.

It is run as a script, not as part of the package, and uses the standard library only. One thread, one ``select`` loop.
A fork leaves the loop and goes on as the command; it ends as any Python process does: threads joined, exit handlers
run, streams flushed.

The talk on a connection: the server says READY; the client sends the length of its request with its three file
descriptors, then the request as JSON; the server answers with the process id and, at the end, the wait status.
Meanwhile each byte from the client is a signal for the command; the end of the connection means that the client died.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

NUMBER = struct.Struct("!i")
READY, REFUSED = b"R", b"N"
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL for a command whose client has died
POLL_SECONDS = 0.25  # how often the loop asks whether it may go, or must kill
REQUEST_SECONDS = 10.0  # a client that takes longer to send its request is dropped
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the lock of the private directory: for the time of a connection, a start, or a farewell."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def peer_is_us(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to the same user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] == os.getuid())


def receive_bytes(connection: socket.socket, size: int) -> bytes:
    """Exactly ``size`` bytes; ConnectionError if the other end has gone."""
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError("closed by the other end")
        data += part
    return data


def receive(connection: socket.socket) -> int:
    """One number; ConnectionError if the other end has gone."""
    return int(NUMBER.unpack(receive_bytes(connection, NUMBER.size))[0])


def process_facts(pid: int) -> tuple[str, str, int, int]:
    """Name, state, parent and start time of a process; OSError if there is none."""
    before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")  # the name may hold a bracket, too
    fields = after.split()
    return before.partition("(")[2], fields[0], int(fields[1]), int(fields[19])


@dataclass
class Child:
    """A running command."""

    client: socket.socket | None  # None once the client has died
    kill_at: float = float("inf")


class Server:
    """The loop: greet clients, fork for their requests, pass signals on, report ends, and know when to go."""

    answer = READY

    def __init__(self, listener: socket.socket, path: Path, idle: float) -> None:
        self.listener, self.path, self.idle = listener, path, idle
        self.inode = path.stat().st_ino
        self.greeted: list[socket.socket] = []  # clients that have not sent their request yet
        self.children: dict[int, Child] = {}
        self.owners: set[tuple[int, int]] = set()
        self.wakeup, self.alarm = socket.socketpair()

    def serve(self) -> dict[str, Any] | None:
        """Returns None when the server may go and, in a fork, the request that is to be run."""
        self.last_used = time.monotonic()
        self.wakeup.setblocking(False)
        self.alarm.setblocking(False)
        signal.set_wakeup_fd(self.alarm.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)  # wakes the loop when a command ends
        while not self.may_go():
            clients = {child.client: pid for pid, child in self.children.items() if child.client}
            for ready in select.select([self.listener, self.wakeup, *self.greeted, *clients], [], [], POLL_SECONDS)[0]:
                if ready is self.listener:
                    self.greet()
                elif ready is self.wakeup:
                    self.wakeup.recv(4096)
                elif ready in clients:
                    self.pass_signals_on(clients[ready], ready)
                else:
                    request = self.fork_for(ready)
                    if request is not None:
                        return request
            self.bury()
        return None

    def greet(self) -> None:
        try:
            client, _ = self.listener.accept()
        except OSError:  # the client has gone already
            return
        client.settimeout(REQUEST_SECONDS)
        with contextlib.suppress(OSError):
            if peer_is_us(client):
                client.sendall(self.answer)
                if self.answer == READY:
                    self.greeted.append(client)
                    return
        client.close()

    def fork_for(self, client: socket.socket) -> dict[str, Any] | None:
        """Reads a request and forks; only the fork returns it."""
        self.greeted.remove(client)
        self.last_used = time.monotonic()
        descriptors: list[int] = []
        try:
            header, descriptors, _, _ = socket.recv_fds(client, NUMBER.size, 3)
            request = json.loads(receive_bytes(client, NUMBER.unpack(header)[0]))
            if len(descriptors) != 3:
                raise ConnectionError("a request comes with three file descriptors")
            if request["owner"]:
                self.owners.add(tuple(request["owner"]))
            server = os.getpid()
            pid = os.fork()
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            struct.error,
        ):  # a client that went away, or no memory for a fork
            client.close()
        else:
            if pid == 0:
                signal.set_wakeup_fd(-1)
                others = [child.client for child in self.children.values() if child.client]
                for end in [self.listener, self.wakeup, self.alarm, client, *self.greeted, *others]:
                    end.close()
                return {**request, "descriptors": descriptors, "server": server}
            self.children[pid] = Child(client)
            with contextlib.suppress(OSError):
                client.sendall(NUMBER.pack(pid))
        for descriptor in descriptors:
            os.close(descriptor)
        return None

    def pass_signals_on(self, pid: int, client: socket.socket) -> None:
        try:
            numbers = client.recv(64)
        except OSError:
            numbers = b""
        for number in numbers:
            if number == signal.SIGTSTP:
                signal_group(pid, signal.SIGSTOP)
            elif number == signal.SIGCONT:
                signal_group(pid, signal.SIGCONT)
            else:  # as with `kill`: to the command alone, which looks after its own helpers
                with contextlib.suppress(OSError):
                    os.kill(pid, number)
        if not numbers:
            client.close()
            self.children[pid] = Child(None, kill_at=time.monotonic() + GRACE_SECONDS)
            signal_group(pid, signal.SIGTERM)
            signal_group(pid, signal.SIGCONT)  # a stopped process would not notice

    def bury(self) -> None:
        """Reports the commands that have ended, and kills what is left of those without a client."""
        for pid, child in list(self.children.items()):
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            if child.kill_at < time.monotonic() or (ended and child.client is None):
                signal_group(pid, signal.SIGKILL)  # before the wait, which frees the number for another process
            if not ended:
                continue
            _, status = os.waitpid(pid, 0)
            del self.children[pid]
            self.last_used = time.monotonic()
            if child.client:
                with contextlib.suppress(OSError):
                    child.client.sendall(NUMBER.pack(status))
                child.client.close()

    def may_go(self) -> bool:
        """Whether nobody needs this server any more; then nobody can reach it either."""
        if self.children or self.greeted:
            return False
        with contextlib.suppress(OSError):
            in_place = self.path.stat().st_ino == self.inode
            waited = time.monotonic() - self.last_used > self.idle
            if in_place and not waited and not (self.owners and all(map(has_ended, self.owners))):
                return False
        with contextlib.suppress(OSError), locked(self.path.parent):
            if select.select([self.listener], [], [], 0)[0]:
                return False  # somebody is at the door
            if self.path.stat().st_ino == self.inode:
                self.path.unlink()
                log = self.path.with_suffix(".log")
                if not log.stat().st_size:
                    log.unlink()
        return True


def has_ended(owner: tuple[int, int]) -> bool:
    with contextlib.suppress(OSError):
        _, state, _, start = process_facts(owner[0])
        return state == "Z" or start != owner[1]
    return True


def signal_group(pid: int, number: int) -> None:
    """To a command and its helpers; to the command alone while it has not made its group yet."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        os.kill(pid, number)


def preload(modules: Sequence[str]) -> bytes:
    """Imports the modules; the answer to clients is READY if a fork of this process would be sound."""
    gc.disable()
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            pass  # an optional part that is not installed
        except Exception:
            traceback.print_exc()  # the command will meet it, too, and say it to its user
    gc.freeze()  # or the first collection in each fork would copy every page
    devices = [name for name in map(file_of, Path("/proc/self/fd").iterdir()) if name.startswith("/dev/nvidia")]
    if threading.active_count() > 1 or devices:
        print(f"threads {threading.enumerate()}, devices {devices}: these do not survive a fork", file=sys.stderr)
        return REFUSED
    return READY


def file_of(descriptor: Path) -> str:
    """What an entry of /proc/self/fd is open on; nothing for the one that lists the folder and has gone."""
    with contextlib.suppress(OSError):
        return str(descriptor.readlink())
    return ""


def become(request: dict[str, Any], target: str) -> None:
    """Turns this fork into what ``python -m <target> <argv>`` would be in the client's place."""
    os.setsid()  # a terminal's Ctrl-C goes to the client, which forwards it: it comes once
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != request["server"]:
        os._exit(1)
    for standard, descriptor in enumerate(request["descriptors"]):
        os.dup2(descriptor, standard)
        os.close(descriptor)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if number in request["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        else:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["environ"])
    time.tzset()
    # The same objects for output, because log handlers already hold them; a new one for input, which knows its file.
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    sys.stdin = open(0, encoding=sys.stdin.encoding, errors=sys.stdin.errors, closefd=False)  # noqa: SIM115
    for name in ("random", "numpy.random"):
        if name in sys.modules:
            sys.modules[name].seed()
    if "tempfile" in sys.modules:
        sys.modules["tempfile"].tempdir = None  # type: ignore[attr-defined]
    gc.enable()
    sys.path[:] = request["path"]
    importlib.invalidate_caches()
    sys.argv = [target, *request["argv"]]


def run_and_exit(target: str) -> NoReturn:
    """Runs the command and ends as the interpreter would, but without taking 5000 modules apart first (0.9 s)."""
    code, interrupted = 0, False
    try:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    gc.collect()  # objects in cycles, an open file among them
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        code = 120  # as the interpreter says it
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


def main() -> None:
    settings = json.loads(sys.argv[1])
    server = Server(socket.socket(fileno=settings["listener"]), Path(settings["path"]), settings["idle"])
    if settings["owner"]:
        server.owners.add(tuple(settings["owner"]))
    server.answer = preload(settings["preload"])
    os.chdir("/")  # hold no folder
    request = server.serve()
    if request is not None:
        become(request, settings["target"])
        run_and_exit(settings["target"])


if __name__ == "__main__":
    main()
