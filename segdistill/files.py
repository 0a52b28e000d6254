"""Reading what may be damaged or hostile, and writing so that a file or folder is complete or not there.

Everything that the program reads and did not just write goes through here: regular files only, of a bounded size,
UTF-8, JSON without doubled keys, and what a stage sealed is compared with the hashes of its seal.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from segdistill.errors import UserError

logger = logging.getLogger(__name__)

MIB = 2**20
TEXT_LIMIT = 64 * MIB  # bytes; class lists, scores and settings are far smaller
SEAL = "checksums.json"  # the hashes of the other files of a folder, written last
# What a component of the pipeline writes last into a folder that it makes: which stage made it, for which cohort,
# from which version of the data. An imported data set has none.
COMPLETED = ".completed"


# Reading


def read_bytes(path: Path, *, limit: int = TEXT_LIMIT) -> bytes:
    """The content of a regular file.

    Args:
        path: links are followed; what they lead to must be a regular file.
        limit: the most bytes that such a file may have.

    Raises:
        UserError: absent, unreadable, no regular file, or larger than ``limit``.
    """
    size = require_regular(path, limit=limit)
    with _readable(path), path.open("rb") as file:
        content = file.read(size + 1)
    if len(content) > size:
        raise UserError(f"{path}: grew while it was read; wait until it is complete")
    return content


def read_text(path: Path, *, limit: int = TEXT_LIMIT) -> str:
    """The content of a UTF-8 file, without the mark that some editors put at its beginning.

    Raises:
        UserError: as :func:`read_bytes`, or not UTF-8.
    """
    try:
        return read_bytes(path, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def read_json(path: Path, *, mend: str = "", limit: int = TEXT_LIMIT) -> Any:
    """What a JSON file says.

    Args:
        mend: how its reader gets another one, such as "run the stage 'prepare' again"; ends the message.

    Raises:
        UserError: as :func:`read_text`, or not JSON.
    """
    try:
        return parse_json(read_text(path, limit=limit), str(path))
    except UserError as error:
        raise UserError(f"{error}; {mend}" if mend else str(error)) from None


def parse_json(text: str | bytes, where: str) -> Any:
    """What a JSON text says: no key twice, no NaN or infinity, no number or nesting beyond reason.

    Raises:
        UserError: it is not such a text; the message begins with ``where``.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite)
    except RecursionError:
        raise UserError(f"{where}: not valid JSON: nested too deeply") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer with too many digits
        reason = str(error)
        if reason.startswith("Exceeds the limit"):
            reason = f"an integer of more than {sys.get_int_max_str_digits()} digits"
        raise UserError(f"{where}: not valid JSON: {reason}") from None


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits; the file is never held in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path, leave: Iterable[str] = ()) -> None:
    """Writes the hashes of all files of a folder into it; files below ``leave`` keep checks of their own.

    Args:
        leave: names in the folder, of files or sub-folders.
    """
    skipped = {SEAL, COMPLETED, *leave}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder) for path in files]
    hashes = {name.as_posix(): file_hash(folder / name) for name in names if name.parts[0] not in skipped}
    write_file(folder / SEAL, (json.dumps(hashes, indent=1) + "\n").encode())


def read_sealed(folder: Path, name: str, *, mend: str, limit: int = TEXT_LIMIT) -> bytes:
    """The content of one file of a sealed folder, compared with its hash.

    Raises:
        UserError: absent, or another content than was sealed.
    """
    try:
        content = read_bytes(folder / name, limit=limit)
    except UserError as error:
        raise UserError(f"{error}; {mend}") from None
    if hashlib.sha256(content).hexdigest() != sealed_hashes(folder, mend=mend).get(name):
        raise UserError(f"{folder / name}: damaged: not the content that {folder / SEAL} records; {mend}")
    return content


def read_sealed_json(folder: Path, name: str, *, mend: str) -> Any:
    """What one JSON file of a sealed folder says; see :func:`read_sealed`."""
    return parse_json(read_sealed(folder, name, mend=mend), str(folder / name))


def sealed_hashes(folder: Path, *, mend: str) -> Mapping[str, str]:
    """The hash of each file of a sealed folder, by its name in there."""
    hashes = read_json(folder / SEAL, mend=mend)
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise UserError(f"{folder / SEAL}: damaged; {mend}")
    return hashes


def require_regular(path: Path, *, limit: int | None = None) -> int:
    """The size in bytes of what will be read by somebody else's code.

    Raises:
        UserError: absent, no regular file, or larger than ``limit``.
    """
    return regular_status(path, limit=limit).st_size


def regular_status(path: Path, *, limit: int | None = None) -> os.stat_result:
    """What the system says of a file; see :func:`require_regular`."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    with _readable(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: {kinds.get(stat.S_IFMT(status.st_mode), 'a device')}; expected a regular file")
    if limit is not None and status.st_size > limit:
        raise UserError(f"{path}: {status.st_size / MIB:.1f} MiB; at most {limit / MIB:g} MiB are read")
    return status


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what the system has against reading a file into a sentence."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' twice")
    return mapping


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


# Writing


@contextmanager
def disk_errors(folder: Path, kept: str = "nothing was left there") -> Iterator[None]:
    """Turns a full disk, or a folder that may not be written, into a sentence that names ``folder``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{folder}: no space left on the disk; {kept}") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENAMETOOLONG):
            reason = os.strerror(error.errno)
            raise UserError(f"{error.filename or folder}: {reason}; choose a folder you may use") from None
        raise


def folder_place(folder: Path) -> Path:
    """Where a folder that is to be written lies: a link stays, and what it leads to is replaced.

    Raises:
        UserError: no folder can be there, since something else is, there or above.
    """
    place = Path(os.path.realpath(folder))
    there = next(path for path in (place, *place.parents) if os.path.lexists(path))
    if not there.is_dir():
        name = folder if there == place else there
        raise UserError(f"{name}: exists and is no folder; remove it, or choose another place")
    return place


def require_free(folder: Path) -> None:
    """Raises a UserError where a folder that somebody asks for has content already, which is his."""
    place = folder_place(folder)
    if place.is_dir() and any(place.iterdir()):
        raise UserError(f"{folder}: exists and is not an empty folder; remove it first, or choose another one")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty sibling to fill, which takes the place of ``folder`` at the end, or vanishes on any error.

    Raises:
        UserError: no folder can be written there.
    """
    target = folder_place(folder)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with disk_errors(folder):
        try:
            try:
                partial.mkdir(parents=True)
            except FileNotFoundError as error:  # where no folder can be made, such as in /proc
                raise UserError(f"{folder}: cannot be made: {error.strerror}; choose another place") from None
            yield partial
            replace_folder(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def replace_folder(source: Path, target: Path) -> None:
    """Renames ``source`` to ``target``, whatever folder was there before."""
    if target.is_dir():
        shutil.rmtree(target)
    source.rename(target)


def write_file(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def lock(folder: Path, what: str, *, file: Path | None = None) -> Iterator[None]:
    """Holds ``folder`` for one process; it is free again when that process ends, however it ends.

    Args:
        folder: need not exist.
        what: what is being done, told to whoever comes second.
        file: on a volume that other machines see, whose processes then wait for their turn. By default a file of this
            machine, and whoever comes second is refused.

    Raises:
        UserError: another process of this machine holds it; says which and since when.
    """
    locks = Path(tempfile.gettempdir()) / f"segdistill-locks-{os.getuid()}"
    locks.mkdir(mode=0o700, exist_ok=True)
    # Not beside the folder: DVC counts every file there as the content of its parent.
    path = file or locks / hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 500, 0).decode(errors="replace").strip() or "another process"
            if file is None:
                raise UserError(f"{folder}: in use by {holder}; wait until that ends") from None
            logger.info("%s: in use by %s; waiting for its end", folder, holder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            since = time.strftime("since %Y-%m-%d %H:%M:%S")
            os.pwrite(descriptor, f"{what} (process {os.getpid()} on {socket.gethostname()}, {since})".encode(), 0)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


_held: set[int] = set()  # of the locks of this process


def _let_go() -> None:
    """A worker that was forked, and lives on for seconds after its killed parent, must not hold what that held."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
