"""Names as MLflow and file systems take them, without two that become one.

A name that is taken as it is stays. Any other keeps what it can, and gets a hash of the whole at its end: the same in
every run, and another than that of any other name.
"""

import hashlib
import posixpath
import re
from collections.abc import Callable

_LOOKS_RENAMED = re.compile(r"-[0-9a-f]{8}$")
_KEY_LIMIT = 250  # characters of a metric's, parameter's or tag's name


def metric_name(name: str) -> str:
    """The name of a metric, a parameter or a tag: ``tree (<1m)`` becomes ``tree __1m_-`` and eight digits."""

    def is_path(text: str) -> bool:  # MLflow takes names for paths, and wants each to be written in one way
        return posixpath.normpath(text) == text and not text.startswith(("..", "/")) and text != "."

    parts = [part if part.strip(".") else "_" for part in re.sub(r"[^/\w.\- :]", "_", name).split("/")]
    return _legible(name, re.sub(r"^\.\.", "__", "/".join(parts)), _KEY_LIMIT, is_path)


def file_name(name: str) -> str:
    """The name of a file or folder, with room for an ending."""
    return _legible(name, re.sub(r"[^A-Za-z0-9_.\-]", "_", name), 100, lambda text: bool(text.strip(".")))


def model_name(name: str) -> str:
    """The name of a logged model."""
    return _legible(name, re.sub(r"[^\w\- ]", "_", name), 100, lambda text: bool(text.strip()))


def shortened(text: str, limit: int) -> str:
    """A text that MLflow keeps whole: what is longer says by a hash what it was."""
    return text if len(text) <= limit else f"{text[: limit - 100]}... (SHA-256 of all: {_digest(text)})"


def _legible(name: str, kept: str, limit: int, allowed: Callable[[str], bool]) -> str:
    if name == kept and len(name) <= limit and allowed(name) and not _LOOKS_RENAMED.search(name):
        return name
    return f"{kept[: limit - 9]}-{_digest(name)[:8]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
