"""A model server in a process of its own, for tests that ask it as the docs say."""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path


@contextlib.contextmanager
def model_server(command: str, folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Runs a documented line in ``folder`` with a free port for 5001, and gives that port once the server answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    server = subprocess.Popen(
        ["bash", "-c", command.replace("5001", port)], cwd=folder, env=dict(environment), start_new_session=True
    )
    try:
        while True:
            assert server.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
