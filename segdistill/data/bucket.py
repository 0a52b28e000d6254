"""Prepared data whose shards stay in S3: a reader fetches the samples that it needs, and keeps them on its disk.

``segdistill data attach`` brings the sealed index, which says where in its shard each sample lies, and its hash. So a
sample is one request for its bytes, verified before it is kept. Whole shards are not fetched: an epoch is shuffled over
all of them, so that a disk smaller than the data would bring a shard of 128 MiB for each image.
"""

import contextlib
import fcntl
import functools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from segdistill import environment
from segdistill.errors import UserError
from segdistill.files import MIB, write_file
from segdistill.patience import Patience
from segdistill.secrets import masked_text

SOURCE_FILE = "bucket.json"  # in place of the shards: where they are
READERS = 8  # threads that fetch ahead of a training, if params.yaml does not say more
PATIENCE = 120.0  # seconds that S3 may stay away
FULL = 60.0  # seconds after which a full cache is looked at again
TURNS = 64  # files that are fetched at a time, at most, by all processes with one cache
T = TypeVar("T")
_URL = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])/?(.*?)/*")
_OUTAGE = re.compile(r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|REQUEST_TIMEOUT"
                     r"|THROTTLING)|HTTP status (429|5\d\d)|curlCode: ")  # fmt: skip


class Bucket:
    """The objects below one prefix, for any number of threads; opened on first use, by each process for itself.

    The credentials are those that Amazon's library finds: the environment, its files, a web identity, a node's role.
    They go to AWS, or to the server that the environment names; no file of ours can name one.

    Args:
        url: ``s3://bucket/prefix``.
        patience: seconds to wait, read by read, for a server that is away.

    Raises:
        UserError: it is no such address.
    """

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        if not (match := _URL.fullmatch(url)) or ".." in url.split("/"):
            raise UserError(f"{url}: not an address of prepared data in S3; expected s3://bucket/prefix")
        self.url = url.rstrip("/")
        self._root = "/".join(part for part in match.groups() if part)
        self._patience, self._opening = Patience(f"s3://{match[1]}", patience), threading.Lock()
        self._files: dict[tuple[int, str], Any] = {}

    def read(self, name: str, offset: int = 0, size: int | None = None) -> bytes:
        """An object, or a part of it.

        Raises:
            UserError: it cannot be had; one sentence.
        """

        def outage(error: Exception) -> str | None:
            return "S3 cannot be reached" if isinstance(error, OSError) and _OUTAGE.search(str(error)) else None

        try:
            return self._patience.ask(lambda: self._read(name, offset, size), outage)
        except FileNotFoundError:
            reason = "no such object, or no such bucket"
        except OSError as error:
            found = re.search(r"AWS Error (.*)", " ".join(str(error).split()))
            reason = masked_text(found[1] if found else str(error))
            if "ACCESS_DENIED" in reason or "CREDENTIALS" in reason.upper():
                reason = "S3 forbids reading it with these credentials (AWS_ACCESS_KEY_ID, or what else AWS knows)"
        raise UserError(f"{self.url}/{name}: {reason}") from None

    def _read(self, name: str, offset: int, size: int | None) -> bytes:
        with self._opening:
            key = os.getpid(), name
            if key not in self._files:
                self._files[key] = _filesystem(os.getpid()).open_input_file(f"{self._root}/{name}")
            file = self._files[key]
        return bytes(file.read_at(file.size() - offset if size is None else size, offset))


@functools.cache
def _filesystem(process: int) -> Any:
    """A ``pyarrow.fs.S3FileSystem`` of this process."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    endpoint, authorities = environment.s3_server()
    return S3FileSystem(
        endpoint_override=endpoint, tls_ca_file_path=authorities, connect_timeout=10, request_timeout=60,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=1),  # the retries are ours
    )  # fmt: skip


class Cache:
    """Samples on this machine's disk, in bounded space, for all processes that share the folder.

    When it is full, samples of other data sets go, those first that were used least recently. Those of the same data
    set stay, and what has no room is fetched each time: of a shuffled epoch the least recently used is what comes next
    as likely as any other, and to remove it would lose most of the cache's hits.

    Args:
        folder: made if absent; whatever lies there is the cache's to remove.
        gibibytes: its room.
        data: the name of the data set, another one for other content.
    """

    def __init__(self, folder: Path, gibibytes: float, data: str) -> None:
        self.folder, self._own, self._limit = folder, folder / data, int(gibibytes * 1024 * MIB)
        self._full_until = 0.0

    def open(self, name: str, fetch: Callable[[], bytes]) -> int:
        """An open file with what ``fetch`` returns, which is called unless the file is there.

        Several threads and processes that want it at a time fetch it once, if there is room for it.
        """
        path = self._own / name
        with contextlib.suppress(FileNotFoundError):
            return _used(path)
        self._own.mkdir(parents=True, exist_ok=True)
        with self._held(f"turn-{int(sha256(name.encode()).hexdigest(), 16) % TURNS:02d}"):
            with contextlib.suppress(FileNotFoundError):
                return _used(path)
            content = fetch()
            with contextlib.suppress(OSError):  # a full disk is a smaller cache
                if self._has_room(len(content)):
                    write_file(path, content)
        descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        return descriptor

    def forget(self, name: str) -> bool:
        """Removes a file that turned out to be damaged; whether it was there."""
        try:
            (self._own / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def _has_room(self, size: int) -> bool:
        """Whether there is room for so many bytes, which are then taken."""
        with self._held("size") as file:
            used = int(os.pread(file, 32, 0) or 0)  # of a run that was killed one file too many, until it is counted
            if used + size > self._limit and time.monotonic() > self._full_until:
                used = self._make_room(size)
            fits = used + size <= self._limit
            os.ftruncate(file, os.pwrite(file, str(used + size * fits).encode(), 0))
        return fits

    def _make_room(self, size: int) -> int:
        """Removes what may go until a sixteenth of the room is free; returns the bytes of what stays."""
        files = []
        for path in self.folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process's temporary name
                state = path.stat()
                files.append((path.parent == self._own, state.st_mtime_ns, state.st_size, path))
        used = sum(length for _, _, length, _ in files)
        for own, _, length, path in sorted(files):
            if used + size <= self._limit * 15 // 16 or (own and used <= self._limit):
                break
            path.unlink(missing_ok=True)
            used -= length
        if used + size > self._limit:
            self._full_until = time.monotonic() + FULL
        return used

    @contextlib.contextmanager
    def _held(self, name: str) -> Iterator[int]:
        """A file that one thread of all processes holds at a time; a killed one holds it no longer."""
        file = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(file)


def _used(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    os.utime(descriptor)
    return descriptor
