"""A folder that reads as if the zip archives in it were unpacked where they lie.

What is unpacked counts before what an archive holds, whose files are read where their folder is not there.
"""

import errno
import functools
import os
import re
import stat
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from segdistill.errors import UserError

if TYPE_CHECKING:
    from zipfile import ZipFile, ZipInfo

PLACES = ("*", "*/*", "*/*/*")  # of archives, below a folder: images/train2017.zip, VOCdevkit/VOC2012/NAME.zip
MOST_FILES = 2_000_000  # in an archive
LONGEST_NAME = 255  # bytes between two slashes, as file systems have it

State = tuple[str, int, int]  # of an archive: path, bytes, time of its last change


def with_zips(root: Path) -> Path:
    """A folder together with what the zips in it hold; the plain path where there are none.

    Raises:
        UserError: an archive that cannot be read safely, or a file that two of them hold with different contents.
    """
    archives = archives_below(root, (".zip",))
    if not archives:
        return root
    states = [(path, path.stat()) for path in archives]
    return ZippedPath(root, _open(tuple((str(path), state.st_size, state.st_mtime_ns) for path, state in states)))


def archives_below(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files with these suffixes in a folder and two levels below it, in the order of their names."""
    paths = (path for place in PLACES for path in root.glob(place))
    names = (path for path in paths if path.name.lower().endswith(suffixes) and not path.name.startswith("."))
    return sorted(path for path in names if path.is_file())


class ZippedPath(type(Path())):  # type: ignore[misc]  # PosixPath
    """A path in a folder with zips. What ``/``, ``joinpath``, ``parent`` and ``iterdir`` give is one again."""

    contents: "Contents"

    def __new__(cls, path: Path | str, contents: "Contents") -> "ZippedPath":
        self: ZippedPath = super().__new__(cls, path)
        self.contents = contents
        return self

    def __reduce__(self) -> Any:  # each process opens the archives for itself
        return ZippedPath, (str(self), self.contents)

    def joinpath(self, *parts: Path | str) -> "ZippedPath":
        return ZippedPath(super().joinpath(*parts), self.contents)

    def __truediv__(self, part: Path | str) -> "ZippedPath":
        return self.joinpath(part)

    @property
    def parent(self) -> "ZippedPath":
        return ZippedPath(super().parent, self.contents)

    @property
    def is_zipped(self) -> bool:
        """Whether it is a file in an archive."""
        return str(self) in self.contents.files

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        """Size and kind; the time of change is that of the archive."""
        if self.is_zipped:
            archive, entry = self.contents.files[str(self)]
            return _status(stat.S_IFREG | 0o444, entry.file_size, self.contents.changed[archive])
        try:
            return super().stat(follow_symlinks=follow_symlinks)  # type: ignore[no-any-return]
        except (FileNotFoundError, NotADirectoryError):
            if str(self) in self.contents.folders:
                return _status(stat.S_IFDIR | 0o555)
            raise

    def iterdir(self) -> Iterator["ZippedPath"]:
        names = set(self.contents.folders.get(str(self), ()))
        unpacked = super().iterdir()
        try:
            names.update(path.name for path in unpacked)
        except (FileNotFoundError, NotADirectoryError):
            if not names:
                raise
        return (self / name for name in names)

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
        """The content of a file in an archive as bytes, compared with the archive's checksum; else the file.

        Raises:
            OSError: the archive is damaged there.
        """
        if not self.is_zipped:
            return super().open(mode, *args, **kwargs)  # type: ignore[no-any-return]
        from zipfile import BadZipFile

        archive, entry = self.contents.files[str(self)]
        try:
            with self.contents.archives[archive].open(entry) as file:
                return BytesIO(file.read(entry.file_size + 1))  # without a number it would unpack whatever is there
        except (BadZipFile, EOFError, zlib.error) as error:
            raise OSError(errno.EIO, f"damaged in {archive}: {error or 'cut off'}") from None


class Contents:
    """What the zips of a folder hold, by the paths at which it would lie unpacked."""

    def __init__(self, states: tuple[State, ...]) -> None:
        self.states = states
        self.changed = {path: changed for path, _, changed in states}
        self.archives = {path: open_zip(Path(path)) for path in self.changed}
        self.files: dict[str, tuple[str, ZipInfo]] = {}
        self.folders: dict[str, set[str]] = {}
        for archive in self.archives:
            self._add(archive)
        if both := self.files.keys() & self.folders:
            raise UserError(f"{min(both)}: a file and a folder in the archives; remove one of them")

    def __reduce__(self) -> Any:
        return _open, (self.states,)

    def _add(self, archive: str) -> None:
        base = Path(archive).parent
        unpacked = functools.cache(Path.is_dir)
        for entry in zip_entries(self.archives[archive], archive):
            path = base / entry.filename
            if path.exists() if path.parent == base else unpacked(path.parent):
                continue
            other, known = self.files.setdefault(str(path), (archive, entry))
            # What lies on top of published archives, such as README, differs from one to the next.
            if path.parent != base and (known.CRC, known.file_size) != (entry.CRC, entry.file_size):
                raise UserError(f"{path}: {other} and {archive} hold it with different contents; remove one of them")
            while path != base and path.name not in self.folders.setdefault(str(path.parent), set()):
                self.folders[str(path.parent)].add(path.name)
                path = path.parent


@functools.lru_cache(maxsize=4)
def _open(states: tuple[State, ...]) -> Contents:
    return Contents(states)


def open_zip(path: Path) -> "ZipFile":
    """A zip archive, to be read.

    Raises:
        UserError: it is none, or cut off.
    """
    from zipfile import BadZipFile, ZipFile

    try:
        return ZipFile(path)
    except (BadZipFile, EOFError, UnicodeDecodeError, NotImplementedError, OSError) as error:
        raise UserError(f"{path}: no whole zip archive ({error}); download it again, or remove it") from None


def zip_entries(archive: "ZipFile", path: Path | str) -> "Iterator[ZipInfo]":
    """The files of a zip archive, as long as none can harm.

    Raises:
        UserError: one could, is there twice, or cannot be read.
    """
    names = set[str]()
    for entry in archive.infolist():
        if not entry.is_dir():
            require_safe(entry.filename, _fault(entry), names, path)
            yield entry


def require_safe(name: str, fault: str | None, names: set[str], archive: Path | str) -> None:
    """Adds the name of a file in an archive to those before it.

    Args:
        name: the path in the archive.
        fault: what else is wrong with the file, in words.
        names: of the archive's files up to here.
        archive: its path, for messages.

    Raises:
        UserError: the name leads out of the archive, cannot be a file's, or is there twice; or the file has a fault.
    """
    fault = _name_fault(name) or fault or ("is there twice" if PurePosixPath(name).as_posix() in names else None)
    if fault:
        raise UserError(f"{archive}: {name[:200]!a} {fault}; unpack the archive by hand if you trust it")
    names.add(PurePosixPath(name).as_posix())
    if len(names) > MOST_FILES:
        raise UserError(f"{archive}: more than {MOST_FILES:,} files; unpack it by hand if you trust it")


def _name_fault(name: str) -> str | None:
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return "is an absolute path"
    if "\\" in name:
        return "has backslashes"
    parts = name.split("/")
    if ".." in parts:
        return "leaves the folder"
    if not name.isprintable():
        return "is not UTF-8, or has characters that cannot be shown"
    if max(len(part.encode()) for part in parts) > LONGEST_NAME:
        return f"is longer than {LONGEST_NAME} bytes"
    return None


def _fault(entry: "ZipInfo") -> str | None:
    from zipfile import ZIP_DEFLATED, ZIP_STORED

    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a link"
    if entry.flag_bits & 0x1:
        return "is encrypted"
    return None if entry.compress_type in (ZIP_STORED, ZIP_DEFLATED) else "is compressed by an unusual method"


def _status(mode: int, size: int = 0, changed: int = 0) -> os.stat_result:
    return os.stat_result((mode, 0, 0, 1, 0, 0, size, 0, 0, 0), {"st_mtime_ns": changed})
