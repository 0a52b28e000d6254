"""SeaweedFS, a real S3 server, for tests that read from one."""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KEY, SECRET = "the-key-of-the-test", "the-secret-of-the-test"
SERVERS = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc")
SERVERS += ("volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")


def credentials(key: str = KEY, secret: str = SECRET) -> dict[str, str]:
    return {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_EC2_METADATA_DISABLED": "true"}


def free_ports(count: int) -> list[int]:
    """Different ports of the loopback that nobody has at the moment."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(one.getsockname()[1]) for one in held]
    for one in held:
        one.close()
    return ports


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def weed_binary() -> str | None:
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else shutil.which("weed")


@dataclass
class Server:
    """SeaweedFS on free ports of this machine, that can be ended and started again."""

    folder: Path
    ports: list[int] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.ports = free_ports(len(SERVERS))
        access = [{"accessKey": KEY, "secretKey": SECRET}, {"accessKey": "stranger", "secretKey": SECRET}]
        identities = [
            {"name": "ci", "credentials": access[:1], "actions": ["Admin", "Read", "Write", "List"]},
            {"name": "stranger", "credentials": access[1:], "actions": ["Read:elsewhere"]},
        ]
        (self.folder / "s3.json").write_text(json.dumps({"identities": identities}))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    def start(self, *, wait: bool = True) -> None:
        options = [f"-{server}={port}" for server, port in zip(SERVERS, self.ports, strict=True)]
        options += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={self.folder}", "-filer", "-s3"]
        options += [f"-s3.config={self.folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        options += [
            "-master.volumeSizeLimitMB=64",
            "-volume.max=20",
            "-master.telemetry=false",
            "-master.electionTimeout=1s",
        ]
        binary = weed_binary()
        assert binary
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([binary, "server", *options], stdout=log, stderr=log, cwd=self.folder)
        deadline = time.monotonic() + 60
        while wait and not self.ready():
            assert self.process.poll() is None, (self.folder / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, (self.folder / "log").read_text()[-3000:]
            time.sleep(0.1)

    def ready(self) -> bool:
        return answers(f"{self.endpoint}/healthz")

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()

    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="any"
        )
