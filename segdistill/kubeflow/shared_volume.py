"""The folders of a stage that runs on several nodes, on a volume that all of them mount."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from segdistill.files import COMPLETED, disk_errors, new_folder

INPUTS, OUTPUTS = "inputs", "outputs"  # folders of the volume


def copy_input(source: Path, volume: Path) -> Path:
    """Copies an input to the volume, once, however many tasks and attempts read it; returns where it is there.

    A copy is known by the path that it was made from, the completion mark in it, and the names and sizes of its files.
    It grows file by file under another name, and gets its own when it is complete: what an attempt has copied, the next
    one need not, and several may work on one copy at a time. Copies stay on the volume, for its owner to remove.

    Args:
        source: a folder of this pod.
        volume: a folder on the volume, by the path at which every pod mounts it.

    Raises:
        UserError: the volume is full, or may not be written.
    """
    with disk_errors(volume, "what has been copied is kept, and the next attempt continues"):
        return _copy(source.absolute(), volume / INPUTS)


def bring_back(place: Path, target: Path) -> None:
    """Moves an output from the volume to where it belongs; it is there as a whole, or not at all.

    Raises:
        UserError: the disk is full, or may not be written.
    """
    with new_folder(target) as partial:
        shutil.copytree(place, partial, dirs_exist_ok=True)
    shutil.rmtree(place)


def _copy(source: Path, folder: Path) -> Path:
    files, mark = sorted(_files(source)), source / COMPLETED
    identity = json.dumps([str(source), mark.read_text() if mark.is_file() else None, files])
    target = folder / f"{source.name}-{sha256(identity.encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    partial = target.with_name(f".{target.name}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    # The half of a file lies elsewhere: another attempt may have the copy complete, and named, at any time.
    with tempfile.TemporaryDirectory(prefix=".incoming-", dir=folder) as incoming:
        half = Path(incoming) / "half"
        try:
            partial.mkdir(exist_ok=True)
            for name, size in files:
                place = partial / name
                if not place.is_file() or place.stat().st_size != size:
                    shutil.copyfile(source / name, half)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    half.replace(place)
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _files(folder: Path) -> Iterator[tuple[str, int]]:
    """Relative path and size of every file below a folder."""
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = Path(parent, name)
            yield path.relative_to(folder).as_posix(), path.stat().st_size
