"""What a git revision says of its DVC data: which version of the folder, and where its objects are."""

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from segdistill.adapters.git_files import read_revision
from segdistill.adapters.objects import LIST_LIMIT
from segdistill.errors import UserError, nearest
from segdistill.files import parse_json, read_bytes
from segdistill.secrets import masked_text

logger = logging.getLogger(__name__)

DATA_FILE = "data.dvc"
CONFIG_FILE = ".dvc/config"
MOST_OF_A_PATH = 1000  # characters of a file's path in the data set

# Keys of a remote that hold or choose credentials. Those in git are everybody's.
CREDENTIALS = ("access_key_id", "secret_access_key", "session_token", "profile", "credentialpath", "configpath")


@dataclass(frozen=True)
class Remote:
    """Where the objects are: below a prefix of an S3 bucket, or in a folder that this machine sees."""

    bucket: str | None  # None: a folder
    prefix: str  # in the bucket; or the folder
    settings: Mapping[str, str] = field(default_factory=dict)  # the rest of its section in .dvc/config


@dataclass(frozen=True)
class Version:
    """One version of the data set."""

    repository: str  # as it may be shown
    commit: str
    entry: Mapping[str, Any]  # what data.dvc says of the folder
    remote: Remote

    @property
    def md5(self) -> str:
        """The version's identity, as ``data.dvc`` has it."""
        return str(self.entry["md5"])


def find(repository: str, revision: str) -> Version:
    """What a revision says of its data: the version, and the remote that has it.

    A repository that is a folder of this machine may have the version in DVC's cache; then that is where it comes from.

    Raises:
        UserError: no such repository or revision, or one whose data is not a folder in a remote of DVC 3.
    """
    address, read = masked_text(repository), read_revision(repository, revision, (DATA_FILE, CONFIG_FILE))
    where = f"{address} at {read.commit[:12]}"
    recorded, configured = read.files[DATA_FILE], read.files[CONFIG_FILE]
    if recorded is None:
        raise UserError(f"{where}: has no {DATA_FILE}; expected a folder 'data' under DVC: dvc add data")
    entry = _entry(recorded, f"{where}: {DATA_FILE}")
    sections = _read_config(configured or "", f"{where}: {CONFIG_FILE}")
    base = Path(repository).absolute() / ".dvc"  # what relative paths in its config are relative to
    cache = base / str(sections.get("cache", {}).get("dir", "cache"))
    if _is_cached(cache, entry["md5"]):
        remote = Remote(None, str(cache))
    else:
        remote = _remote(sections, entry, base, f"{where}: {CONFIG_FILE}")
    return Version(address, read.commit, entry, remote)


def parse_list(content: bytes, md5: str, where: str) -> dict[str, str]:
    """The files of a version, md5 by relative path, as its list (an object ``<md5>.dir``) says.

    Raises:
        UserError: the list is corrupted, or names what can be no file below one folder.
    """
    digest = _md5(content)
    if f"{digest}.dir" != md5:
        raise UserError(f"{where}: the list of files is corrupted: expected md5 {md5[:32]}, found {digest}")
    entries = parse_json(content, where)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{where}: not a list of files, as dvc push writes it")
    files: dict[str, str] = {}
    folders: set[str] = set()
    for entry in entries:
        path = entry.get("relpath") if isinstance(entry, dict) else None
        if not isinstance(path, str) or not _is_path(path):
            raise UserError(f"{where}: {path!r} is no path of a file below one folder; was the list made by dvc push?")
        if not isinstance(entry.get("md5"), str) or not re.fullmatch("[0-9a-f]{32}", entry["md5"]):
            raise UserError(f"{where}: {path!r} has the md5 {entry.get('md5')!r}; expected 32 hexadecimal digits")
        if path in files:
            raise UserError(f"{where}: names {path!r} twice")
        files[path] = entry["md5"]
        folders.update(map(str, PurePosixPath(path).parents))
    if both := folders & files.keys():
        raise UserError(f"{where}: {min(both)!r} is a file and a folder there")
    return files


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _is_path(path: str) -> bool:
    try:
        parts = [part.encode() for part in path.split("/")]
    except UnicodeEncodeError:
        return False
    # Shorter than any file system's limit below some folder, and not too deep for one.
    return len(path) <= MOST_OF_A_PATH and all(
        0 < len(part) <= 255 and part not in (b".", b"..") and b"\0" not in part for part in parts
    )


def _is_cached(cache: Path, md5: str) -> bool:
    """Whether a DVC cache has every object of a version. Whether they are right, who reads them sees."""
    objects = cache / "files/md5"
    path = objects / md5[:2] / md5[2:]
    try:
        content = read_bytes(path, limit=LIST_LIMIT)
    except UserError:
        return False
    if f"{_md5(content)}.dir" != md5:
        return False
    return all((objects / name[:2] / name[2:]).is_file() for name in parse_list(content, md5, str(path)).values())


def _entry(text: str, where: str) -> Mapping[str, Any]:
    try:
        (entry,) = yaml.safe_load(text)["outs"]
        md5 = str(entry["md5"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError):
        raise UserError(f"{where}: expected one entry with an md5 under outs, as dvc add writes it") from None
    if not re.fullmatch(r"[0-9a-f]{32}\.dir", md5):
        raise UserError(f"{where}: md5 is '{md5}'; expected that of a folder: 32 hexadecimal digits and '.dir'")
    if entry.get("hash") != "md5":
        raise UserError(f"{where}: written by a DVC before 3.0; run dvc cache migrate --dvc-files and dvc push there")
    return dict(entry)


def _read_config(text: str, where: str) -> dict[str, Mapping[str, Any]]:
    from configobj import ConfigObj, ConfigObjError

    try:
        config = ConfigObj(text.splitlines(), interpolation=False)
    except ConfigObjError as error:
        raise UserError(f"{where}: cannot be read: {error}") from None
    return {str(key).strip("'"): value for key, value in config.items() if isinstance(value, Mapping)}


def _remote(sections: Mapping[str, Mapping[str, Any]], entry: Mapping[str, Any], base: Path, where: str) -> Remote:
    remotes = {
        match.group(1): value for key, value in sections.items() if (match := re.fullmatch(r'remote "(.+)"', key))
    }
    name = entry.get("remote") or sections.get("core", {}).get("remote")
    if name is None:
        raise UserError(
            f"{where}: no default remote, and the data is not in DVC's cache here; "
            "bring it there (make data), or add a remote: dvc remote add --default NAME s3://BUCKET/PREFIX"
        )
    if name not in remotes:
        raise UserError(f"{where}: no remote '{name}'{nearest(str(name), remotes)}")
    settings = {str(key): str(value) for key, value in remotes[name].items()}
    url = settings.get("url", "")
    match = re.fullmatch(r"s3://([^/@]+)(?:/(.*))?", url)
    folder = base / url if url and "://" not in url else None
    if match is None and (folder is None or not folder.is_dir()):
        raise UserError(
            f"{where}: remote '{name}' is at '{masked_text(url)}'; it can be fetched from s3://BUCKET/PREFIX, "
            "or from a folder that this machine sees"
        )
    for key in ("version_aware", "worktree"):
        if is_true(settings.get(key)):
            raise UserError(f"{where}: remote '{name}' has {key}; only a remote without it can be fetched")
    if ignored := [key for key in CREDENTIALS if key in settings]:
        advice = "S3 credentials come from the environment or a mounted secret; what is in git is no secret"
        logger.warning("%s: %s of remote '%s' ignored: %s", where, ", ".join(ignored), name, advice)
    rest = {key: value for key, value in settings.items() if key not in ("url", *CREDENTIALS)}
    if match is None:
        return Remote(None, str(folder), rest)
    return Remote(match.group(1), (match.group(2) or "").strip("/"), rest)


def is_true(value: str | None) -> bool:
    """A switch in .dvc/config; absent is off."""
    return (value or "").lower() in ("true", "yes", "on", "1")
