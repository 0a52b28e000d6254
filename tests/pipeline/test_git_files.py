"""Reading a repository that may be hostile: what its own configuration names is never run."""

import os
import subprocess
from pathlib import Path

import pytest

from segdistill.adapters.git_files import read_revision
from segdistill.errors import UserError


def git(folder: Path, *arguments: str) -> str:
    author = {
        f"GIT_{who}_{what}": "ci@example.invalid" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=os.environ | author, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit with one file ``data.dvc``."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch", "main")
    (folder / "data.dvc").write_text("outs: []\n")
    git(folder, "add", "data.dvc")
    git(folder, "commit", "--quiet", "--message", "one")
    return folder


@pytest.mark.parametrize("transport", ["ext", "upload-pack", "ssh", "credential helper", "vcs"])
def test_a_repository_that_lacks_an_object_has_none_of_its_commands_run(
    transport: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof, command = tmp_path / "it-ran", tmp_path / "command"
    command.write_text(f"#!/bin/sh\ntouch {proof}\n")
    command.chmod(0o755)
    monkeypatch.setenv("GIT_ALLOW_PROTOCOL", "ext:file:https:ssh")  # whoever runs us may be careless
    settings = {
        "ext": {"remote.x.url": f"ext::{command}", "protocol.ext.allow": "always"},
        "upload-pack": {"remote.x.url": str(repository), "remote.x.uploadpack": str(command)},
        "ssh": {"remote.x.url": "ssh://127.0.0.1/x", "core.sshCommand": str(command)},
        "credential helper": {"remote.x.url": "https://127.0.0.1:9/x", "credential.helper": f"!{command}"},
        "vcs": {"remote.x.vcs": "ext", "remote.x.url": str(command), "protocol.ext.allow": "always"},
    }
    always = {
        "core.repositoryFormatVersion": "1", "extensions.partialClone": "x", "remote.x.promisor": "true",
        "core.fsmonitor": str(command), "core.pager": str(command), "diff.external": str(command),
        "core.hooksPath": str(tmp_path),
    }  # fmt: skip
    for key, value in (always | settings[transport]).items():
        git(repository, "config", key, value)
    blob = git(repository, "rev-parse", "HEAD:data.dvc")
    (repository / ".git/objects" / blob[:2] / blob[2:]).unlink()  # git would bring it from the "promisor"
    proof.unlink(missing_ok=True)  # the commands above are ours
    for address in (str(repository), f"file://{repository}"):
        with pytest.raises(UserError, match=r"git cannot read"):
            read_revision(address, "main", ["data.dvc"])
    assert not proof.exists()


def test_an_address_that_is_a_command_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="transport 'ext' not allowed"):
        read_revision(f"ext::touch {tmp_path}/it-ran", "main", ["data.dvc"])
    assert not (tmp_path / "it-ran").exists()


def test_what_stands_in_for_a_commit_is_not_read(repository: Path) -> None:
    first = git(repository, "rev-parse", "HEAD")
    (repository / "data.dvc").write_text("another\n")
    git(repository, "commit", "--quiet", "--all", "--message", "two")
    git(repository, "replace", first, "HEAD")
    assert read_revision(str(repository), first, ["data.dvc"]).files == {"data.dvc": "outs: []\n"}


def test_a_folder_and_an_address_give_the_same_files(repository: Path) -> None:
    for address in (str(repository), f"file://{repository}"):
        assert read_revision(address, "main", ["data.dvc", "absent"]).files == {
            "data.dvc": "outs: []\n",
            "absent": None,
        }
