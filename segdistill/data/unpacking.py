"""Archives of data sets -> a folder: nothing leaves it, nothing in it is a link, and their size is bounded."""

import functools
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from segdistill.data.parallel import progress
from segdistill.data.zips import archives_below, open_zip, require_safe, zip_entries
from segdistill.errors import UserError
from segdistill.files import MIB, require_regular

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
MOST_RATIO = 200  # bytes that one byte of an archive may stand for; images and masks are compressed already
ANY_RATIO = 64 * MIB  # bytes below which it does not matter


@dataclass(frozen=True)
class _Entry:
    """A file in an archive, of which nothing is to be feared."""

    name: str
    size: int  # bytes, unpacked
    position: int  # bytes of the archive up to here
    extract: Callable[[Path], object]


def find_archives(source: Path) -> list[Path]:
    """The archive that a path names, or those in a folder and two levels below it."""
    if source.is_dir():
        return archives_below(source, SUFFIXES)
    return [source] if source.name.lower().endswith(SUFFIXES) else []


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks an archive into a folder; a file that is there already, of the same size, stays.

    Raises:
        UserError: it is damaged, has an entry that is no plain file below the folder or is there twice, or is larger
            than the disk allows or an honest archive can be. What was unpacked by then is left to the caller.
    """
    size = require_regular(archive)
    free, likely = shutil.disk_usage(folder).free, MOST_RATIO * size + ANY_RATIO
    entries = _zip_entries(archive) if archive.name.lower().endswith(".zip") else _tar_entries(archive)
    steps = _extract(archive, entries, folder, free, likely)
    try:
        for _ in progress(steps, f"unpack {archive.name} (MiB)", size // MIB, lambda step: step):
            pass
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        name = Path(error.filename).name
        raise UserError(f"{archive}: '{name}' is a file and a folder; unpack the archive by hand") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise UserError(f"{archive}: damaged or cut off ({reason}); download it again") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{archive}: damaged ({error}); download it again") from None  # as gzip and bz2 say it


def _extract(archive: Path, entries: Iterator[_Entry], folder: Path, free: int, likely: int) -> Iterator[int]:
    """Yields the MiB of the archive that are newly done, after each file."""
    total = done = 0
    for entry in entries:
        total += entry.size
        if total > free:
            raise UserError(f"{archive}: holds more than the {free / MIB:,.0f} MiB that are free on the disk")
        if total > likely:
            raise UserError(
                f"{archive}: holds more than {MOST_RATIO} times its own size, as no data set does; unpack it by hand if"
                " you trust it"
            )
        target = folder / entry.name
        if not target.is_file():
            entry.extract(folder)
        elif "/" in entry.name and target.stat().st_size != entry.size:  # README on top may differ
            raise UserError(f"{archive}: another archive holds {entry.name} with different content; remove one of them")
        yield entry.position // MIB - done
        done = entry.position // MIB


def _zip_entries(path: Path) -> Iterator[_Entry]:
    position = 0
    with open_zip(path) as archive:
        for entry in zip_entries(archive, path):
            position += entry.compress_size
            yield _Entry(entry.filename, entry.file_size, position, functools.partial(archive.extract, entry))


def _tar_entries(path: Path) -> Iterator[_Entry]:
    names = set[str]()
    with path.open("rb") as raw, tarfile.open(fileobj=raw, encoding="utf-8") as archive:
        while entry := archive.next():
            archive.members = []  # type: ignore[attr-defined]  # else it keeps them all
            if not entry.isdir():
                require_safe(entry.name, _fault(entry), names, path)
                extract = functools.partial(archive.extract, entry, filter="data")
                yield _Entry(entry.name, entry.size, raw.tell(), extract)
        # tarfile takes a broken header, and the end of a file that was cut off, for the end of the archive: two empty
        # blocks, of which it has read the first.
        rest = archive.fileobj.read(MIB) if archive.fileobj else b""
        if len(rest) < tarfile.BLOCKSIZE or any(rest):
            raise tarfile.ReadError("it ends in the middle")


def _fault(entry: tarfile.TarInfo) -> str | None:
    if entry.islnk() or entry.issym():
        return "is a link"
    return None if entry.isreg() and not entry.issparse() else "is no plain file"
