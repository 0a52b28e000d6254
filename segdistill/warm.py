"""A preloaded fork server: the stages of one ``dvc repro`` share a single import of the heavy libraries.

Why: ``dvc repro`` starts one short process per stage, and each would spend 10 to 17 seconds importing torch,
torchvision, timm and mlflow. The first stage that runs with ``--warm`` therefore starts a server (``_warm_server.py``)
on a Unix socket, which imports them once; that stage and all later ones ask it to fork, and the fork runs the stage.

The rule, in plain words:

* A warm stage must not differ from a cold one. The fork takes the client's arguments, folder, environment, umask,
  file descriptors and ignored signals, and then does what ``python -m segdistill`` does. Whatever libraries read only
  once, at their import, and whatever a process can only inherit is part of the server's name (``_key``): where it
  differs, another server is started.
* The server never imports segdistill beyond its own file, so an edit of our code is always seen. It runs no torch
  operation, so it has no thread pool and no CUDA context, neither of which survives a fork; should a library break
  this, the server refuses to fork.
* Nobody is left alone. A signal to the client reaches the stage. A dead client ends the stage. A dead server ends the
  stage, and the client says so. The server goes when the ``dvc`` that led to it has ended, when it was idle for a while
  (``SEGDISTILL_WARM_IDLE``, 60 seconds), or when its socket file is removed; never while a stage runs.
* It is only a shortcut. If anything is amiss before the stage has begun, ``run`` returns None and the caller runs
  cold. ``SEGDISTILL_WARM=0`` switches it off.

This module must stay light: it uses the standard library only, and imports what is slow where it is used.
"""

import contextlib
import json
import os
import signal
import socket
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from segdistill import _warm_server, environment
from segdistill._warm_server import NUMBER, READY, locked, peer_is_us, process_facts, receive

# What the server imports, in this order; a module that is not installed is skipped.
PRELOAD = (
    "yaml",
    "pydantic",
    "rich.progress",
    "rich.table",
    "PIL.Image",
    "pyarrow.parquet",
    "torch._dynamo",
    "torchvision.transforms.v2",
    "timm",
    "segmentation_models_pytorch",
    "safetensors.torch",
    "mlflow.pytorch",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
)
# The first stage of a run: it imports what its check of the parameters needs, and the server imports beside it.
LIGHT = ("validate",)
# Variables that differ between the stages of a run and that no library reads at its import; all others are in the key.
LATE_VARIABLES = ("DVC_", "SEGDISTILL_", "PWD", "OLDPWD", "SHLVL", "COLUMNS", "LINES", "MAKELEVEL")
SHELLS = ("sh", "dash", "bash", "zsh", "ksh", "fish", "busybox", "env", "nice", "timeout", "time", "nohup")
FORWARDED = [getattr(signal, f"SIG{name}") for name in ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "TSTP")]
PRELOAD_SECONDS = 180  # a client that has waited this long for the imports runs cold
LOST = "segdistill: the warm server ended, and this command with it; SEGDISTILL_WARM=0 runs commands without the server"


def run(argv: Sequence[str], *, target: str = "segdistill", preload: Sequence[str] = PRELOAD) -> int | None:
    """Runs ``python -m <target> <argv>`` in a fork of the server, which is started if there is none.

    Returns:
        The exit code, or None if there is no warm way, or no use in it, and nothing was run. If the command died of a
        signal, this process ends itself by the same one.
    """
    if argv and argv[0] in LIGHT:
        ensure_started(target=target, preload=preload)
        return None
    try:
        connection = _connect(target, preload)
        if connection is None:
            return None
        with connection:
            connection.settimeout(PRELOAD_SECONDS)
            if connection.recv(1) != READY:
                return None
            connection.settimeout(None)
            return _command(connection, argv)
    except OSError:
        return None


def ensure_started(*, target: str = "segdistill", preload: Sequence[str] = PRELOAD) -> None:
    """Lets the server begin its imports while a stage that does not need them runs; returns at once."""
    with contextlib.suppress(OSError):
        connection = _connect(target, preload)
        if connection:
            connection.close()


def _command(connection: socket.socket, argv: Sequence[str]) -> int:
    """Hands a command over, forwards signals to it and waits for its end; OSError if it did not begin."""
    started = False

    ignored = [int(number) for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN]
    previous = {number: signal.getsignal(number) for number in FORWARDED if number not in ignored}

    def forward(number: int, frame: FrameType | None) -> None:
        if not started:
            former = previous[number]
            if callable(former):
                former(number, frame)
            _die_of(number)
        with contextlib.suppress(OSError):  # the server has died: the wait below ends, too
            connection.send(bytes([number]))
            if number == signal.SIGTSTP:  # Ctrl-Z: stop together, continue together
                os.kill(os.getpid(), signal.SIGSTOP)
                connection.send(bytes([signal.SIGCONT]))

    for number in previous:
        signal.signal(number, forward)
    try:
        umask = os.umask(0o077)
        os.umask(umask)
        request: dict[str, Any] = {"argv": list(argv), "cwd": str(Path.cwd()), "environ": dict(os.environ)}
        request |= {"path": sys.path, "umask": umask, "ignored": ignored, "owner": _owner()}
        payload = json.dumps(request).encode()
        sys.stdout.flush()
        sys.stderr.flush()
        socket.send_fds(connection, [NUMBER.pack(len(payload))], [0, 1, 2])
        connection.sendall(payload)
        receive(connection)  # the process id of the fork
        started = True
        try:
            status = receive(connection)
        except OSError:
            print(LOST, file=sys.stderr)
            return 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else _die_of(-code)


def _die_of(number: int) -> int:
    """Ends this process by a signal, so that its parent sees the truth."""
    with contextlib.suppress(OSError):  # SIGKILL takes no handler
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number


def _connect(target: str, preload: Sequence[str]) -> socket.socket | None:
    """A connection to the server of our key, started if need be; None where there is no warm way."""
    if sys.platform != "linux" or not environment.warm():
        return None
    if None in (sys.__stdin__, sys.__stdout__, sys.__stderr__):  # closed, so its number may be another file's by now
        return None
    directory = _private_directory()
    if directory is None:
        return None
    path = directory / _key(target, preload)
    connection = socket.socket(socket.AF_UNIX)
    try:
        with locked(directory):  # one of several first clients starts the server, and none leaves while we knock
            try:
                connection.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                path.unlink(missing_ok=True)
                _start(path, target, preload)
                connection.connect(str(path))
        if peer_is_us(connection):
            return connection
    except BaseException:
        connection.close()
        raise
    connection.close()
    return None


def _start(path: Path, target: str, preload: Sequence[str]) -> None:
    """Starts a detached server on a socket that listens already, so that nobody has to poll for it."""
    import subprocess

    idle = environment.warm_idle_seconds()
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    with socket.socket(socket.AF_UNIX) as listener, path.with_suffix(".log").open("wb") as log:
        listener.bind(str(path))
        listener.listen(128)
        settings = {"listener": listener.fileno(), "path": str(path), "target": target, "preload": list(preload)}
        settings |= {"idle": idle, "owner": _owner()}
        # -P: else the folder of the script, our package, would be searched for top-level modules.
        process = subprocess.Popen(
            [sys.executable, *flags, "-P", str(Path(_warm_server.__file__).absolute()), json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )
    process.returncode = 0  # it outlives us on purpose: no warning when this object goes


def _private_directory() -> Path | None:
    """A folder that only we can enter; None if something else has its name."""
    parent = os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("TMPDIR") or "/tmp"
    directory = Path(parent) / f"segdistill-warm-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    found = directory.lstat()
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    return directory if private else None


def _key(target: str, preload: Sequence[str]) -> str:
    """The name of the server whose forks equal a cold start from here and now."""
    import hashlib
    import resource

    # What libraries read at their import ...
    variables = {name: value for name, value in os.environ.items() if not name.startswith(LATE_VARIABLES)}
    variables.pop("_", None)
    interpreter = [sys.executable, sys.prefix, list(sys.flags), sys.warnoptions, sys._xoptions]
    packages = [entry for entry in sys.path if entry.endswith("-packages")]
    files = [Path(file) for file in (_warm_server.__file__, "requirements.lock", *packages)]
    modified = [file.stat().st_mtime_ns if file.exists() else None for file in files]
    # ... and what a fork inherits from the server and not from us.
    limits = [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if name.startswith("RLIMIT_")]
    cpus = [sorted(os.sched_getaffinity(0)), os.getpriority(os.PRIO_PROCESS, 0)]
    identity = [os.getresuid(), os.getresgid(), sorted(os.getgroups())]
    spaces = [str(Path(f"/proc/self/ns/{name}").readlink()) for name in ("mnt", "net", "pid")]
    spaces.append(Path("/proc/self/cgroup").read_text())
    facts = [target, list(preload), str(Path.cwd()), variables, interpreter, modified, limits, cpus, identity, spaces]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _owner() -> tuple[int, int] | None:
    """Process id and start time of the nearest ancestor that is no shell: the ``dvc`` that runs the stages."""
    pid = os.getppid()
    while pid > 1:
        name, _, parent, start = process_facts(pid)
        if name not in SHELLS:
            return pid, start
        pid = parent
    return None
