"""Files of one revision of a git repository, without a working copy and without its history."""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from segdistill.errors import UserError
from segdistill.secrets import masked_text

GIT_SECONDS = 600
PROTOCOLS = "file:git:http:https:ssh"  # of an address that the user gives
# What `git rev-parse --local-env-vars` lists but for configuration, in which an environment may have its credentials.
OF_A_REPOSITORY = re.compile(
    "GIT_(ALTERNATE_OBJECT_DIRECTORIES|OBJECT_DIRECTORY|DIR|WORK_TREE|IMPLICIT_WORK_TREE|GRAFT_FILE|INDEX_FILE"
    "|REPLACE_REF_BASE|PREFIX|SHALLOW_FILE|COMMON_DIR|NAMESPACE)"
)


@dataclass(frozen=True)
class Revision:
    """A commit and the files that were asked of it."""

    commit: str
    files: dict[str, str | None]  # text by path; None for a file that the revision has not


def read_revision(repository: str, revision: str, paths: Sequence[str]) -> Revision:
    """Reads a few files of one revision.

    Args:
        repository: an address that git understands, or a folder; in a folder below a repository's top, paths are
            below it too.
        revision: a branch, a tag or a commit; of a folder, whatever git understands there.
        paths: relative, with forward slashes.

    Raises:
        UserError: no such repository, no way in, or no such revision in it.
    """
    if not revision or not re.fullmatch(r"[^\s:+*?\[\\-][^\s:*?\[\\]*", revision):
        raise UserError(f"revision '{revision}': expected a branch, a tag or a commit of {masked_text(repository)}")
    if repository.startswith("-"):
        raise UserError(f"repository '{repository}': expected a folder or an address that git understands")
    if Path(repository).is_dir():
        folder = Path(repository)
        inside = _git(folder, "rev-parse", "--show-prefix")
        if inside.returncode:
            raise UserError(
                f"{repository}: not a git repository that can be read: {_reason(inside)}; name the one that has the "
                "data, or make this one: git init && git add --all && git commit --message start"
            )
        return _read(folder, repository, revision, paths, inside.stdout.rstrip("\n"))
    with tempfile.TemporaryDirectory(prefix="segdistill-git-") as scratch:
        name = _bring(Path(scratch), repository, revision)
        return _read(Path(scratch), repository, name, paths, protocols=PROTOCOLS)


def _bring(folder: Path, repository: str, revision: str) -> str:
    """Fetches the one commit, and what is not a name there (``abc123``, ``v1~2``) with the history but no contents."""
    for arguments in (("init", "--quiet", "--bare"), ("remote", "add", "origin", repository)):
        done = _git(folder, *arguments)
        if done.returncode:
            raise UserError(f"{masked_text(repository)}: {_reason(done)}")
    lean = ("fetch", "--quiet", "--no-tags", "--filter=blob:none")
    done = _git(folder, *lean, "--depth=1", "origin", revision, protocols=PROTOCOLS)
    if done.returncode == 0:
        return "FETCH_HEAD"
    if not re.search("couldn't find remote ref|not our ref|unadvertised object|invalid refspec", done.stderr):
        raise UserError(f"{masked_text(repository)}: git cannot read it: {_reason(done)}")
    everything = ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")
    done = _git(folder, *lean, "origin", *everything, protocols=PROTOCOLS)
    if done.returncode:
        raise UserError(f"{masked_text(repository)}: git cannot read it: {_reason(done)}")
    return revision


def _read(
    folder: Path, repository: str, revision: str, paths: Sequence[str], prefix: str = "", protocols: str = ""
) -> Revision:
    parsed = _git(folder, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", protocols=protocols)
    if parsed.returncode:
        raise UserError(f"{masked_text(repository)}: no revision '{revision}'; expected a branch, a tag or a commit")
    commit = parsed.stdout.strip()
    files: dict[str, str | None] = {}
    for path in paths:
        listed = _git(folder, "ls-tree", "--full-tree", "--name-only", commit, "--", prefix + path, protocols=protocols)
        content = None
        if listed.stdout:
            content = _git(folder, "cat-file", "blob", f"{commit}:{prefix}{path}", protocols=protocols)
        for done in (listed, content):
            if done is not None and done.returncode:
                raise UserError(f"{masked_text(repository)}: git cannot read {path} of {commit}: {_reason(done)}")
        files[path] = content.stdout if content else None
    return Revision(commit, files)


def _git(folder: Path, *arguments: str, protocols: str = "") -> subprocess.CompletedProcess[str]:
    """Runs git in a folder whose own configuration may be hostile.

    Such a configuration can call any remote a source of missing objects, and a remote can be a command. So git speaks
    no protocol but those asked for, whatever is configured there.
    """
    # Another repository that a caller (a git hook) points at is not the one that is asked for.
    environment = {key: value for key, value in os.environ.items() if not OF_A_REPOSITORY.fullmatch(key)}
    environment |= {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", "GIT_ALLOW_PROTOCOL": protocols}
    environment |= {"GIT_NO_REPLACE_OBJECTS": "1"}  # a commit is what its hash says
    environment.setdefault("GIT_SSH_COMMAND", "ssh -o BatchMode=yes")
    command, nothing = ["git", "-C", str(folder), *arguments], subprocess.DEVNULL
    try:
        return subprocess.run(
            command, env=environment, stdin=nothing, capture_output=True, errors="replace", timeout=GIT_SECONDS
        )
    except FileNotFoundError:
        raise UserError(
            "git: not installed; it reads the version of the data from its repository. Install it, on Debian with "
            "apt-get install git"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"git {arguments[0]}: no answer within {GIT_SECONDS} seconds") from None


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Git's own word for what went wrong: the first line that says so."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    grave = [line for line in lines if line.startswith(("fatal:", "error:"))] or lines or ["git gave no reason"]
    return masked_text(grave[0].removeprefix("fatal: ").removeprefix("error: ").rstrip("."))
