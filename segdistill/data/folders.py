"""Writing a folder so that it is either complete or not there."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from segdistill.errors import UserError

# What a component of the pipeline writes last into a folder that it makes: which stage made it, for which job, from
# which version of the data. An imported data set has none.
COMPLETED = ".completed"


@contextmanager
def disk_errors(folder: Path, kept: str = "nothing was left there") -> Iterator[None]:
    """Turns a full disk, or a folder that may not be written, into a sentence that names ``folder``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{folder}: no space left on the disk; {kept}") from None
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
            reason = os.strerror(error.errno)
            raise UserError(f"{error.filename or folder}: {reason}; choose a folder you may use") from None
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives an empty sibling to fill, which takes the place of ``folder`` at the end, or vanishes on any error."""
    target = folder.absolute()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with disk_errors(folder):
        try:
            partial.mkdir(parents=True)
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
