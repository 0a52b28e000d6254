"""Servers and images, started once for all end-to-end tests, in one folder and on free ports of the loopback.

What a machine lacks is a failure in CI and a skip elsewhere. The logs of a failed session are kept.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest
from browser import Browser
from s3_server import KEY, SECRET, Server, weed_binary
from services import Engine, GitDaemon, Missing, MlflowServer, Postgres

ARTIFACTS = "mlflow"  # the bucket of MLflow


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest) -> Iterator[Path]:
    # Not pytest's own, which only its user may enter: PostgreSQL and the containers are other users.
    made = Path(tempfile.mkdtemp(prefix="segdistill-e2e-"))
    made.chmod(0o755)
    yield made
    if request.session.testsfailed:
        shutil.rmtree(made / "docker" / "root", ignore_errors=True)
        print(f"\nlogs of the servers: {made}")
    else:
        shutil.rmtree(made, ignore_errors=True)


def start(service: Any) -> Any:
    try:
        service.start()
    except Missing as lack:
        service.stop()
        _lacking(lack)
    except BaseException:
        service.stop()
        raise
    return service


def _lacking(lack: Missing) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(str(lack))
    pytest.skip(str(lack))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    running = start(Browser(tmp_path_factory.mktemp("browser")))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def engine(folder: Path) -> Iterator[Engine]:
    (folder / "docker").mkdir()
    engine = start(Engine(folder / "docker"))
    with pytest.MonkeyPatch.context() as patch:
        if engine.address:
            patch.setenv("DOCKER_HOST", engine.address)
        yield engine
    engine.stop()


@pytest.fixture(scope="session")
def client(engine: Engine) -> Iterator[docker.DockerClient]:
    client = docker.from_env(timeout=300)
    yield client
    client.close()


@pytest.fixture(scope="session")
def base_image(engine: Engine) -> str:
    try:
        return engine.base_image()
    except Missing as lack:
        _lacking(lack)
        raise


@pytest.fixture(scope="session")
def images(engine: Engine, base_image: str) -> dict[str, str]:
    """The images' names, by the environment variables that the components read when they are imported."""
    made = engine.build("data", "train", "mlflow")
    os.environ.update(made)
    return made


@pytest.fixture(scope="session")
def store(folder: Path) -> Iterator[Server]:
    if weed_binary() is None:
        _lacking(Missing("needs SeaweedFS: the program 'weed' on the PATH or beside python"))
    (folder / "s3").mkdir()
    server = start(Server(folder / "s3"))
    server.client().create_bucket(Bucket=ARTIFACTS)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def database(folder: Path) -> Iterator[Postgres]:
    (folder / "postgres").mkdir()
    database = start(Postgres(folder / "postgres", secrets.token_hex(16)))
    yield database
    database.stop()


@pytest.fixture(scope="session")
def mlflow_server(
    folder: Path, client: docker.DockerClient, images: dict[str, str], store: Server, database: Postgres
) -> Iterator[MlflowServer]:
    environment = {
        "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://mlflow@127.0.0.1:{database.port}/postgres",
        "PGPASSWORD": database.password,
        "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{ARTIFACTS}/artifacts",
        "MLFLOW_S3_ENDPOINT_URL": store.endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    server = MlflowServer(client, images["SEGDISTILL_IMAGE_MLFLOW"], environment, folder / "mlflow.log")
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session")
def git_daemon(folder: Path) -> Iterator[GitDaemon]:
    (folder / "git").mkdir()
    daemon = start(GitDaemon(folder / "git"))
    yield daemon
    daemon.stop()
