"""What a task leaves in the folders that it makes: a mark, written last, and a pointer where a volume has the content.

KFP names the folders of a task's inputs and outputs, and promises little about them. So each folder says itself of
which stage, cohort and version of the data it is, and one without its mark is refused, whatever a runner says of the
task that was to make it.
"""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from segdistill.errors import UserError
from segdistill.files import COMPLETED, lock, read_json
from segdistill.stages import Stage

ELSEWHERE = ".elsewhere"  # in place of an output's content: the folder of a volume that has it


def write_mark(folder: Path, facts: Mapping[str, Any]) -> None:
    """Completes a folder."""
    (folder / COMPLETED).write_text(json.dumps(facts) + "\n")


def read_mark(stage: Stage, folder: Path) -> dict[str, Any]:
    """What a folder says of itself.

    Raises:
        UserError: it is not complete.
    """
    mark = folder / COMPLETED
    if not mark.is_file():
        raise UserError(f"{folder}: {stage.name} needs it, but the task that makes it did not complete")
    return dict(read_json(mark, mend="run the task that makes it again"))


def point_to(output: Path, real: Path) -> None:
    """Says in an output where its content lies."""
    output.mkdir(parents=True, exist_ok=True)
    (output / ELSEWHERE).write_text(json.dumps({"folder": str(real)}) + "\n")


def content_of(folder: Path) -> Path:
    """An input's content, which may lie on a volume."""
    pointer = folder / ELSEWHERE
    if not pointer.is_file():
        return folder
    real = Path(read_json(pointer)["folder"])
    if not real.is_dir():
        raise UserError(f"{real}: no longer on the volume; run the pipeline again with --no-cache")
    return real


@contextlib.contextmanager
def in_turn(folders: Iterable[Path], what: str) -> Iterator[None]:
    """Waits while another run makes one of these folders of a volume, which then is there at our turn."""
    with contextlib.ExitStack() as held:
        for folder in folders:
            folder.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock(folder, what, file=folder.with_name(f".{folder.name}.lock")))
        yield
