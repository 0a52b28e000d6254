"""To whom S3 credentials go: only to a server that the user named."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

pytest.importorskip("boto3")

from segdistill.adapters.dvc_remote import open_remote
from segdistill.adapters.dvc_version import Remote
from segdistill.errors import UserError


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "hush")
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """A server of a stranger, and the headers that it was sent."""
    heard: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(str(self.headers))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *arguments: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", heard
    server.shutdown()
    thread.join()
    server.server_close()


def read(**settings: str) -> bytes:
    with open_remote(Remote("bucket", "", settings), patience=0.1) as store:
        return store.read("key")


def test_a_server_that_only_a_repository_names_gets_no_credentials(
    listener: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, heard = listener
    with pytest.raises(UserError, match=rf"{endpoint}: named by .*if they may go there, set AWS_ENDPOINT_URL_S3="):
        read(endpointurl=endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="named by the repository"):
        read(endpointurl=endpoint)
    assert not heard
    assert read(endpointurl=endpoint, allow_anonymous_login="true") == b"[]"
    assert "hush" not in heard[0]
    for variable in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
        monkeypatch.setenv(variable, f"{endpoint}/")
        assert read(endpointurl=endpoint) == b"[]"
        assert "hush" in heard[-1]


@pytest.mark.parametrize(
    "endpoint",
    ["http://s3.amazonaws.com", "https://amazonaws.com.evil.example", "https://evilamazonaws.com", "https://abc1.execute-api.eu-west-1.amazonaws.com",
     "https://s3.amazonaws.com@evil.example"],
)  # fmt: skip
def test_what_only_looks_like_aws_is_a_stranger(endpoint: str) -> None:
    with pytest.raises(UserError, match="named by the repository's DVC remote"):
        read(endpointurl=endpoint)


def test_a_repository_cannot_switch_the_certificates_check_off() -> None:
    with pytest.raises(UserError, match=r"ssl_verify off.*AWS_CA_BUNDLE"):
        read(endpointurl="https://s3.eu-west-1.amazonaws.com", ssl_verify="false")
