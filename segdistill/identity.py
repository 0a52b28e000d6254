"""What a trained network comes from, and what its indices stand for: each said once, and compared in one place."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segdistill.config import to_dict
from segdistill.errors import UserError
from segdistill.files import file_hash

# Of a training's settings: how it is run and watched. What they are changes neither data nor updates.
WITHOUT_EFFECT = ("workers", "cache_gib", "log_every", "checkpoint_every", "gradient_share_every")


@dataclass(frozen=True)
class Identity:
    """The facts that decide what a training gives; a checkpoint is resumed by them, a report and a registry name them.

    Args:
        data: the content hash of the prepared data, its classes included.
        teacher: the SHA-256 of the teacher's weights; None where nothing is learnt from one.
        seed: of weights, order and augmentation.
        settings: all that changes data or updates, defaults spelled out; see :func:`effective`. Files of weights that
            they name count by their content.
    """

    data: str
    teacher: str | None
    seed: int
    settings: Mapping[str, Any]

    @functools.cached_property  # once: files may change while the training that read them goes on
    def key(self) -> str:
        """A short name of all of it."""
        facts = [self.data, self.teacher, self.seed, _by_content(to_dict(self.settings))]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def facts(self) -> dict[str, str]:
        """As files and trackers keep it."""
        teacher = {"teacher_sha256": self.teacher} if self.teacher else {}
        return {"identity": self.key, "data_content": self.data, **teacher}


def _by_content(settings: Any) -> Any:
    """Settings in which a file of weights is its hash."""
    if isinstance(settings, dict):
        return {key: _by_content(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_by_content(value) for value in settings]
    if isinstance(settings, str) and settings.endswith(".safetensors") and Path(settings).is_file():
        return file_hash(Path(settings))
    return settings


def facts_of(document: Mapping[str, Any]) -> dict[str, str]:
    """The :meth:`Identity.facts` in what describes a trained network."""
    return {key: str(document[key]) for key in ("identity", "data_content", "teacher_sha256") if key in document}


def effective(train: Any) -> dict[str, Any]:
    """A TrainConfig without what changes neither data nor updates."""
    settings = {key: value for key, value in to_dict(train).items() if key not in WITHOUT_EFFECT}
    if settings["select"] == "last":
        del settings["validate_every"]  # it is then a matter of curves; of the best weights it decides
    return settings


def require_classes(where: Path, found: Sequence[str], expected: Sequence[str]) -> None:
    """Raises a UserError unless the indices of an artefact stand for the classes of the data set: names and order.

    Args:
        where: the artefact.
        found: its classes; none if it does not say.
        expected: those of the data set.
    """
    if list(found) != list(expected):
        raise UserError(
            f"{where}: made for other classes, or for these in another order: {', '.join(found) or 'it names none'}; "
            f"the data set has {', '.join(expected)}"
        )
