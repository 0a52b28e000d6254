"""The folders of a stage that runs on several nodes, on a volume that all of them mount."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from segdistill.files import COMPLETED, disk_errors, new_folder


@dataclass(frozen=True)
class Shared:
    """Where the folders of a task are."""

    inputs: dict[str, Path]  # by name, on the volume
    outputs: dict[str, Path]  # by name, on the volume
    targets: Mapping[str, Path]  # by name, where the outputs belong

    @property
    def completed(self) -> bool:
        """Whether an earlier attempt has made all outputs, and was lost before it could bring them back."""
        return all((place / COMPLETED).is_file() for place in self.outputs.values())

    def bring_back(self) -> None:
        """Moves the outputs to where they belong; each is there as a whole, or not at all.

        Raises:
            UserError: the disk is full, or may not be written.
        """
        for name, place in self.outputs.items():
            with new_folder(self.targets[name]) as partial:
                shutil.copytree(place, partial, dirs_exist_ok=True)
        for place in self.outputs.values():
            shutil.rmtree(place)


def shared(inputs: Mapping[str, Path], outputs: Mapping[str, Path], *, volume: Path, task: str) -> Shared:
    """Copies the inputs to the volume, each once, however many tasks and attempts read it.

    A copy is known by the path that it was made from, the completion mark in it, and the names and sizes of its files.
    It grows file by file under another name, and gets its own when it is complete: what an attempt has copied, the next
    one need not, and several may work on one copy at a time. Copies stay on the volume, for its owner to remove.

    Args:
        inputs: folders of this pod, by name.
        outputs: where the folders that the task makes belong, by name.
        volume: a folder on the volume, by the path at which every pod mounts it.
        task: what every attempt of this task is called, and no other task.

    Raises:
        UserError: the volume is full, or may not be written.
    """
    with disk_errors(volume, "what has been copied is kept, and the next attempt continues"):
        copies = {name: _copy(path.absolute(), volume / "inputs") for name, path in inputs.items()}
        places = {name: volume / "outputs" / task / name for name in outputs}
        (volume / "outputs" / task).mkdir(parents=True, exist_ok=True)
    return Shared(copies, places, dict(outputs))


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
