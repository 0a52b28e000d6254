"""Where DVC's objects are read from: a bucket (``s3.py``) or a folder that this machine sees."""

import hashlib
from pathlib import Path
from typing import Protocol

from segdistill.errors import UserError

CHUNK_BYTES = 1 << 20  # what one thread holds of an object at any time


class MissingObject(UserError):
    """The store answers, but has no such object."""


class Stopped(Exception):
    """The store was closed while a thread was reading from it."""


class ObjectStore(Protocol):
    """Objects by key; several threads may read at a time."""

    def url(self, key: str) -> str:
        """An object's name for people."""

    def read(self, key: str) -> bytes:
        """A small object, whole."""

    def download(self, key: str, target: Path) -> str:
        """Streams an object into a file; returns its md5."""


class ObjectFolder:
    """A DVC cache, or a remote that is a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def url(self, key: str) -> str:
        """The object's path."""
        return str(self.root / key)

    def read(self, key: str) -> bytes:
        """A small object, whole.

        Raises:
            UserError: it is missing, or cannot be read.
        """
        try:
            return (self.root / key).read_bytes()
        except OSError as error:
            raise self._sentence(key, error) from None

    def download(self, key: str, target: Path) -> str:
        """Copies an object into a file; returns its md5.

        Raises:
            UserError: it is missing, or cannot be read.
        """
        digest = hashlib.md5(usedforsecurity=False)
        try:
            source = (self.root / key).open("rb")
        except OSError as error:
            raise self._sentence(key, error) from None
        with source, target.open("wb") as file:
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        return digest.hexdigest()

    def _sentence(self, key: str, error: OSError) -> UserError:
        if isinstance(error, FileNotFoundError):
            return MissingObject(f"{self.url(key)}: no such object")
        return UserError(f"{self.url(key)}: cannot be read: {error.strerror}")
