"""Where DVC's objects are read from: a bucket (``s3.py``) or a folder that this machine sees."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from segdistill.errors import UserError
from segdistill.files import MIB, read_bytes, require_regular

LIST_LIMIT = 1024 * MIB  # bytes of an object that is read whole: the list of ten million files
CHUNK_BYTES = 1 << 20  # what one thread holds of an object at any time


class MissingObject(UserError):
    """The store answers, but has no such object."""


class ObjectFolder:
    """A DVC cache, or a remote that is a folder; it has the methods of a :class:`segdistill.adapters.s3.Bucket`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def url(self, key: str) -> str:
        """The object's path."""
        return str(self.root / key)

    def read(self, key: str) -> bytes:
        """A small object, whole."""
        return read_bytes(self._regular(key), limit=LIST_LIMIT)

    def download(self, key: str, target: Path) -> str:
        """Copies an object into a file; returns its md5."""
        path = self._regular(key)
        try:
            source = path.open("rb")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        with source:
            return write_chunks(iter(lambda: source.read(CHUNK_BYTES), b""), target)

    def _regular(self, key: str) -> Path:
        path = self.root / key
        if not path.exists():
            raise MissingObject(f"{path}: no such object")
        require_regular(path)
        return path


def write_chunks(chunks: Iterable[bytes], target: Path) -> str:
    """Writes an object into a file; returns its md5."""
    digest = hashlib.md5(usedforsecurity=False)
    with target.open("wb") as file:
        for chunk in chunks:
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest()
