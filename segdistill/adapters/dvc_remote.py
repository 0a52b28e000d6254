"""DVC data of any git revision, from its remote into a folder, every byte verified.

``git`` gives ``data.dvc`` and ``.dvc/config`` of the revision, ``.dvc/config`` the remote, and the remote the
objects ``files/md5/xx/yyyy``: first the list of the folder (``.dir``), then its files. An object's name is the md5 of
its content, so all that arrives can be verified.

Why not DVC itself (3.67, tried against a real S3 server)? ``dvc get --rev`` and ``dvc pull`` wrote a corrupted object
into the folder and reported success; with the remote's ``verify`` on, ``dvc pull`` failed without a word of which file.
``dvc get`` gave up on an S3 that was away for 20 seconds, cannot continue, and trusts credentials that stand in git.
So the loop over the objects is ours; git, boto3 and configobj, which reads DVC's config for DVC too, do the rest.
"""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import yaml

from segdistill.adapters.dvc_version import CONFIG_FILE, Remote, Version, find, is_true, parse_list
from segdistill.adapters.objects import MissingObject, ObjectFolder
from segdistill.data.parallel import progress
from segdistill.errors import UserError
from segdistill.files import disk_errors, lock, read_text, require_regular, write_file

if TYPE_CHECKING:
    from segdistill.adapters.s3 import Bucket

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

THREADS = 16  # unless the remote's ``jobs`` says otherwise
MOST_NAMED = 20  # broken objects after which there is no point in looking for more


def fetch(repository: str, revision: str, out: Path, *, patience: float = 120.0) -> Version:
    """Brings one version of the data set into a folder, which is then exactly that version, or is not there.

    What arrives is gathered in ``.<name>.partial`` beside the folder; the same call continues after a failure, and
    keeps every file whose md5 is right. Nobody's file is overwritten or removed: a folder that holds anything but the
    version is refused. Beside the folder ``<name>.dvc`` records version and commit, as later stages look for it.

    Args:
        repository: a git repository's address or folder.
        revision: a branch, a tag or a commit.
        out: the folder to make; not a mount point itself.
        patience: how many seconds an S3 that is away may stay away.

    Raises:
        UserError: whatever went wrong, with the object, file or key.
    """
    version = find(repository, revision)
    record = out.absolute().with_name(f"{out.absolute().name}.dvc")
    _check_record(record, version)
    kept = "what has arrived is kept, and the same command continues"
    with open_remote(version.remote, patience) as store, disk_errors(out, kept):
        files = list_files(store, version)
        if _holds_something(out):
            _check_folder(out, files, version)
            logger.info("%s: is %s already", out, version.md5)
        else:
            _fill(out, store, version, files)
            logger.info("%s: %d files of %s, commit %s", out, len(files), version.md5, version.commit[:12])
        _write_record(record, out, version)
    return version


def open_remote(remote: Remote, patience: float) -> "contextlib.AbstractContextManager[ObjectFolder | Bucket]":
    """The remote's objects. An ``endpointurl`` must be the server of ``AWS_ENDPOINT_URL_S3``, or AWS."""
    if remote.bucket is None:
        return contextlib.nullcontext(ObjectFolder(Path(remote.prefix)))
    from segdistill.adapters.s3 import Bucket

    verify = remote.settings.get("ssl_verify", "true")
    return Bucket(
        remote.bucket,
        endpoint=remote.settings.get("endpointurl"),
        region=remote.settings.get("region"),
        tls=is_true(verify) if verify.lower() in ("true", "false", "yes", "no", "on", "off", "1", "0") else verify,
        anonymous=is_true(remote.settings.get("allow_anonymous_login")),
        connections=_threads(remote),
        patience=patience,
    )


def _threads(remote: Remote) -> int:
    jobs = remote.settings.get("jobs", str(THREADS))
    if not jobs.isdecimal() or not 1 <= int(jobs) <= 256:
        raise UserError(f"{CONFIG_FILE}: jobs is '{jobs}'; expected 1 to 256")
    return int(jobs)


def _key(remote: Remote, md5: str) -> str:
    prefix = remote.prefix if remote.bucket else ""
    return "/".join(part for part in (prefix, "files/md5", md5[:2], md5[2:]) if part)


def list_files(store: "ObjectFolder | Bucket", version: Version) -> dict[str, str]:
    """The version's files: md5 by relative path, itself verified. This list is held in memory, and no file is.

    Raises:
        UserError: the list is missing or corrupted, or names a file outside of the folder.
    """
    key = _key(version.remote, version.md5)
    try:
        content = store.read(key)
    except MissingObject as error:
        raise UserError(f"{error}: data version {version.md5} was never pushed there; run dvc push") from None
    return parse_list(content, version.md5, store.url(key))


def _fill(out: Path, store: "ObjectFolder | Bucket", version: Version, files: Mapping[str, str]) -> None:
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    with lock(out, "segdistill data fetch"):
        arrived, incoming = partial / "files", partial / "incoming"
        shutil.rmtree(incoming, ignore_errors=True)  # halves of files
        incoming.mkdir(parents=True)
        arrived.mkdir(exist_ok=True)
        threads = _threads(version.remote)
        present = _keep_right_files(arrived, files, threads)
        missing = [(path, md5) for path, md5 in files.items() if path not in present]
        if present:
            logger.info("%s: %d of %d files had arrived before", out, len(present), len(files))
        for folder in {(arrived / path).parent for path, _ in missing}:
            folder.mkdir(parents=True, exist_ok=True)

        def bring(number: int, path: str, md5: str) -> str | None:
            key, half = _key(version.remote, md5), incoming / str(number)
            try:
                arrived_md5 = store.download(key, half)
            except MissingObject:
                return f"{store.url(key)} ({path}) is missing"
            if arrived_md5 != md5:
                half.unlink()
                return f"{store.url(key)} ({path}) is corrupted: expected md5 {md5}, found {arrived_md5}"
            half.rename(arrived / path)
            return None

        tasks = ((number, path, md5) for number, (path, md5) in enumerate(missing))
        broken: list[str] = []
        for complaint in progress(_in_threads(lambda task: bring(*task), tasks, threads), "fetching", len(missing)):
            if complaint:
                broken.append(complaint)
                if len(broken) == MOST_NAMED:
                    break
        if broken:
            raise UserError(
                f"{'at least ' if len(broken) == MOST_NAMED else ''}{len(broken)} of {len(files)} files of "
                f"{version.md5} cannot be had from the remote: {'; '.join(broken)}"
            )
        try:
            arrived.rename(out.absolute())
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.EXDEV, errno.ENOTEMPTY):
                raise
            raise UserError(
                f"{out}: cannot take its place ({os.strerror(error.errno)}); choose a folder below a mount point"
            ) from None
        shutil.rmtree(partial)


def _keep_right_files(folder: Path, files: Mapping[str, str], threads: int) -> set[str]:
    """Removes whatever is not of the version from the partial folder, which is ours; returns what stays."""
    right: set[str] = set()
    for path, md5 in _hashes(folder, threads):
        if files.get(path) == md5:
            right.add(path)
        else:
            (folder / path).unlink()
    for parent, _, _ in os.walk(folder, topdown=False):
        if Path(parent) != folder:
            with contextlib.suppress(OSError):  # not empty
                Path(parent).rmdir()
    return right


def _holds_something(out: Path) -> bool:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; expected a folder, or a name that is free")
    return out.is_dir() and any(out.iterdir())


def _check_folder(out: Path, files: Mapping[str, str], version: Version) -> None:
    """Raises a UserError unless the folder is exactly the version."""
    there = dict(_hashes(out, _threads(version.remote)))
    wrong = [f"{path} is not of it" for path in there if path not in files]
    wrong += [f"{path} differs" for path, md5 in there.items() if path in files and files[path] != md5]
    wrong += [f"{path} is missing" for path in files if path not in there]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{out}: holds something else than {version.md5} ({', '.join(sorted(wrong)[:3])}{more}); "
            "nothing there was touched: move it away, or choose a folder that is not there"
        )


def _hashes(folder: Path, threads: int) -> Iterator[tuple[str, str]]:
    """Relative path and md5 of every file below a folder."""
    paths = sorted(Path(parent, name) for parent, _, names in os.walk(folder) for name in names)

    def md5_of(path: Path) -> tuple[str, str]:
        require_regular(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        return path.relative_to(folder).as_posix(), digest.hexdigest()

    return progress(_in_threads(md5_of, paths, threads), "checking", len(paths))


def _in_threads(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """``function`` over ``items`` in threads; results in order, and only a few of them waiting at any time."""
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _check_record(record: Path, version: Version) -> None:
    """Raises a UserError where ``<name>.dvc`` says that the folder is another version: later stages believe it."""
    recorded = re.search(r"md5:\s*(\S+)", read_text(record)) if record.exists() else None
    if recorded and recorded[1] != version.md5:
        raise UserError(
            f"{record}: says that the folder beside it is {recorded[1]}, but {version.commit[:12]} has "
            f"{version.md5}; choose another folder, or bring that file to the same revision"
        )


def _write_record(record: Path, out: Path, version: Version) -> None:
    if not record.exists():
        entry = {**version.entry, "path": out.absolute().name}
        meta = {"repository": version.repository, "commit": version.commit}
        write_file(record, yaml.safe_dump({"outs": [entry], "meta": meta}, sort_keys=False).encode())
