"""``dockerfiles/compose.yaml``: what it promises of ports, passwords and images, and its S3 store as a real one."""

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from s3_server import KEY, SECRET, SERVERS, answers, credentials, free_ports, weed_binary

FOLDER = Path(__file__).resolve().parents[2] / "dockerfiles"
SERVICES: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]


def test_ports_are_the_loopbacks_and_images_do_not_move() -> None:
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), (name, port)
        assert not service["image"].endswith(":latest") and ":" in service["image"], name


def test_every_secret_has_to_be_given_and_the_template_has_none() -> None:
    template = dict(line.split("=") for line in (FOLDER / "compose.env").read_text().split() if "=" in line)
    asked = set()
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|KEY", name):
                (wanted,) = re.findall(r"^\$\{(\w+):\?set \1 in \.env\}$", value)
                asked.add(wanted)
    assert asked == {"POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert {name for name, value in template.items() if not value} == asked


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    """The S3 store by the command of its service, on free ports and in a folder of this machine."""
    pytest.importorskip("boto3")
    weed = weed_binary()
    if weed is None:
        pytest.skip("needs SeaweedFS: the program 'weed' on the PATH or beside python")
    ports = free_ports(len(SERVERS))
    here = [f"-{server}={port}" for server, port in zip(SERVERS, ports, strict=True)]
    here += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.electionTimeout=1s"]
    command = [part.replace("-dir=/data", f"-dir={tmp_path}") for part in SERVICES["s3"]["command"]]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [weed, *command, *here], env=os.environ | credentials(), stdout=log, stderr=log, cwd=tmp_path
        )
    try:
        health = SERVICES["s3"]["healthcheck"]["test"][-1].replace(":8333", f":{ports[0]}")
        deadline = time.monotonic() + 60
        while not answers(health):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        process.kill()
        process.wait()


def test_the_store_knows_the_key_of_the_environment_only_and_gets_its_bucket(store: str) -> None:
    import boto3
    from botocore.exceptions import ClientError

    environment = os.environ | credentials() | {"MLFLOW_S3_ENDPOINT_URL": store, "AWS_DEFAULT_REGION": "us-east-1"}
    script = SERVICES["bucket"]["command"][-1]
    for _ in range(2):  # `docker compose up` runs it each time
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)

    def client(secret: str) -> Any:
        return boto3.client(
            "s3", endpoint_url=store, aws_access_key_id=KEY, aws_secret_access_key=secret, region_name="us-east-1"
        )

    known = client(SECRET)
    bucket = SERVICES["mlflow"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"].split("/")[2]
    assert [one["Name"] for one in known.list_buckets()["Buckets"]] == [bucket]
    known.put_object(Bucket=bucket, Key="artifacts/a", Body=b"content")
    assert known.get_object(Bucket=bucket, Key="artifacts/a")["Body"].read() == b"content"
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        client("wrong").list_buckets()
    with pytest.raises(urllib.error.HTTPError, match="403"):  # without any key
        urllib.request.urlopen(f"{store}/{bucket}/artifacts/a", timeout=30)
