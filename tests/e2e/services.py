"""The real servers of the end-to-end tests: Docker, PostgreSQL, MLflow and git, each ended by its own process id."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docker
from s3_server import answers, free_ports

from pipelines.docker_runner import TASK

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "segdistill"
BASE = "segdistill-base:bookworm"


class Missing(Exception):
    """What this machine lacks."""


def wait_until(
    ready: Callable[[], bool], process: subprocess.Popen[bytes] | None, log: Path, seconds: float = 180
) -> None:
    """Waits, within bounds, and as long as the process lives."""
    deadline = time.monotonic() + seconds
    while not ready():
        said = log.read_text(errors="replace")[-3000:] if log.exists() else ""
        assert process is None or process.poll() is None, f"ended with {process.poll()}: {said}"
        assert time.monotonic() < deadline, f"not ready after {seconds} seconds: {said}"
        time.sleep(0.2)


def stop(process: subprocess.Popen[bytes] | None, number: int = signal.SIGTERM) -> None:
    if process is None or process.poll() is not None:
        return
    process.send_signal(number)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def docker_client() -> str:
    """A client that knows BuildKit: 20.10 does, a later one by the plugin buildx."""
    for name in filter(None, (shutil.which("docker"), shutil.which("docker", path="/usr/bin"))):
        version = subprocess.run([name, "--version"], capture_output=True, text=True).stdout
        if " 20.10." in version or subprocess.run([name, "buildx", "version"], capture_output=True).returncode == 0:
            return name
    raise Missing("needs a Docker client that knows BuildKit; on Debian: apt-get install docker.io")


@dataclass
class Engine:
    """A Docker engine: the one that answers already (DOCKER_HOST, or the usual socket), or one of our own."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None
    address: str = field(default_factory=lambda: os.environ.get("DOCKER_HOST", ""))
    docker: str = "docker"

    def start(self) -> None:
        self.docker = docker_client()
        if self._alive():
            return
        missing = [name for name in ("dockerd", "iptables") if shutil.which(name) is None]
        if missing or os.getuid():
            lacks = f"{', '.join(missing)} and root's rights" if missing else "root's rights"
            raise Missing(f"needs Docker: no engine answers (DOCKER_HOST), and to start one it needs {lacks}")
        self.address = f"unix://{self.folder}/docker.sock"
        log = self.folder / "dockerd.log"
        options = [f"--data-root={self.folder}/root", f"--exec-root={self.folder}/exec", f"--host={self.address}"]
        # Containers use the machine's network, so the engine needs neither a bridge nor rules of a firewall.
        options += [f"--pidfile={self.folder}/dockerd.pid", "--bridge=none", "--iptables=false"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(["dockerd", *options], stdout=output, stderr=output)
        try:
            wait_until(self._alive, self.process, log, 60)
        except AssertionError as error:
            raise Missing(f"Docker does not start here: {error}") from None

    def _alive(self) -> bool:
        return subprocess.run([self.docker, "version"], env=self.environment(), capture_output=True).returncode == 0

    def environment(self) -> dict[str, str]:
        return {**os.environ, "DOCKER_HOST": self.address} if self.address else dict(os.environ)

    def stop(self) -> None:
        if self.process is not None:
            stop(self.process)
            # It leaves a mount behind, and with it a folder that cannot be removed.
            subprocess.run(["umount", f"{self.folder}/exec/netns/default"], capture_output=True)

    def base_image(self) -> str:
        """``BASE_IMAGE`` of the environment, or Debian's Python by debootstrap where no registry is in reach."""
        if os.environ.get("BASE_IMAGE"):
            return os.environ["BASE_IMAGE"]
        known = subprocess.run([self.docker, "image", "inspect", BASE], env=self.environment(), capture_output=True)
        if known.returncode:
            archive = CACHE / "base-bookworm.tar"
            if not archive.exists():
                _debootstrap(archive, self.folder / "base")
            command = [self.docker, "import", "--change", 'CMD ["python3"]', str(archive), BASE]
            subprocess.run(command, env=self.environment(), check=True, stdout=subprocess.DEVNULL)
        return BASE

    def build(self, *images: str) -> dict[str, str]:
        """The images of the committed tree, by name; the environment variables that name them."""
        settings = {"BASE_IMAGE": self.base_image(), "IMAGES": " ".join(images), "DOCKER": self.docker}
        log = self.folder / "build.log"
        with log.open("wb") as output:
            done = subprocess.run(
                [str(ROOT / "dockerfiles" / "build"), "--network", "host", "--progress", "plain"],
                env={**self.environment(), **settings}, stdout=subprocess.PIPE, stderr=output, text=True,
            )  # fmt: skip
        assert done.returncode == 0, log.read_text(errors="replace")[-5000:]
        print(done.stdout)
        lines = [line.removeprefix("export ").split("  #")[0] for line in done.stdout.splitlines()]
        return dict(line.split("=", 1) for line in lines)


def _debootstrap(archive: Path, folder: Path) -> None:
    if shutil.which("debootstrap") is None or os.getuid():
        raise Missing(
            "needs a base image: set BASE_IMAGE=python:3.11-slim-bookworm, or install debootstrap and be root"
        )
    packages = "python3,python3-pip,python3-venv,ca-certificates"
    command = ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for left in ("var/cache/apt/archives", "var/lib/apt/lists"):
        shutil.rmtree(folder / left)
        (folder / left).mkdir()
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_suffix(".partial")
    subprocess.run(["tar", "-C", str(folder), "-cf", str(partial), "."], check=True)
    partial.replace(archive)
    shutil.rmtree(folder)


def tasks(client: docker.DockerClient, task: str = "", *, all: bool = False) -> list[Any]:
    """The containers of pipelines' tasks that run, or ``all``; of one task if it is named.

    Docker 20.10 lists a container before it can be asked about it, so one that it denies is not there yet, or no more.
    """
    label = f"{TASK}={task}" if task else TASK
    return client.containers.list(all=all, filters={"label": label}, ignore_removed=True)


@dataclass
class Postgres:
    """PostgreSQL as an ordinary user; it refuses to run as root."""

    folder: Path
    password: str
    port: int = field(default_factory=lambda: free_ports(1)[0])
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        if not found:
            raise Missing("needs PostgreSQL; on Debian: apt-get install postgresql")
        data, log, secret = self.folder / "data", self.folder / "log", self.folder / "password"
        # As another user: its own folder, and none of this process's groups.
        ordinary: dict[str, Any] = {} if os.getuid() else {"user": "postgres", "group": "postgres", "extra_groups": []}
        secret.write_text(self.password)
        if ordinary:
            for path in (self.folder, secret):
                shutil.chown(path, "postgres", "postgres")
        command = [str(found[-1] / "initdb"), f"--pgdata={data}", "--username=mlflow", f"--pwfile={secret}"]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
        made = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, **ordinary)
        assert made.returncode == 0, made.stdout + made.stderr
        options = ["-D", str(data), "-p", str(self.port), "-k", str(self.folder), "-c", "listen_addresses=127.0.0.1"]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(found[-1] / "postgres"), *options], cwd=self.folder, stdout=output, stderr=output, **ordinary
            )
        wait_until(lambda: b"ready to accept connections" in log.read_bytes(), self.process, log, 60)

    def stop(self) -> None:
        stop(self.process, signal.SIGINT)  # its word for a fast end


@dataclass
class MlflowServer:
    """MLflow in a container of our own image: runs in PostgreSQL, artifacts in S3, of which clients know nothing."""

    client: Any
    image: str
    environment: dict[str, str]
    log: Path
    port: int = field(default_factory=lambda: free_ports(1)[0])
    container: Any = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *, wait: bool = True) -> None:
        if self.container is None:
            given = {
                "MLFLOW_HOST": "127.0.0.1", "MLFLOW_PORT": str(self.port), "MLFLOW_WORKERS": "1", "HOME": "/tmp",
                **self.environment,
            }  # fmt: skip
            self.container = self.client.containers.create(self.image, network_mode="host", environment=given)
        self.container.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        deadline = time.monotonic() + 300
        while not answers(f"{self.uri}/health"):
            self.container.reload()
            alive = self.container.status == "running"
            assert alive and time.monotonic() < deadline, self.container.logs(tail=50).decode()
            time.sleep(0.5)

    def stop(self) -> None:
        if self.container is not None:
            self.container.kill()

    def remove(self) -> None:
        if self.container is not None:
            self.log.write_bytes(self.container.logs())
            self.container.remove(force=True, v=True)


@dataclass
class GitDaemon:
    """Serves the repositories below a folder."""

    folder: Path
    port: int = field(default_factory=lambda: free_ports(1)[0])
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = self.folder / "git-daemon.log"
        options = ["--export-all", f"--base-path={self.folder}", "--listen=127.0.0.1", f"--port={self.port}"]
        # A repository may belong to another user than the daemon's.
        trust = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                ["git", "daemon", "--reuseaddr", "--verbose", *options],
                stdout=output, stderr=output, env={**os.environ, **trust}, start_new_session=True,
            )  # fmt: skip
        wait_until(lambda: b"Ready to rumble" in log.read_bytes(), self.process, log, 30)

    def address(self, name: str) -> str:
        return f"git://127.0.0.1:{self.port}/{name}"

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)  # git starts the daemon as a child
            self.process.wait()
