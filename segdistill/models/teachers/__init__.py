"""Where a teacher may come from: a family of files each, in a module each.

A module has ``outline(folder)``, what is known of the network without its weights; ``read(folder, classes, labels)``,
the network whose logits are those of the data set's classes; ``build(description, num_classes, where)``, the same from
the ``config`` of such a network, as ``teacher.json`` keeps it, without weights; and ``names(folder)``, its classes.
Importing this package imports no torch, and a family's libraries are imported where one of its teachers is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdistill.config import parse_yaml
from segdistill.errors import UserError, nearest
from segdistill.files import file_hash, read_json, read_text
from segdistill.identity import require_classes

if TYPE_CHECKING:
    from segdistill.models.outputs import ModelInfo, SegmentationNetwork

FAMILIES = {
    "segdistill": "segdistill.models.teachers.own",
    "huggingface": "segdistill.models.teachers.huggingface",
    "torchvision": "segdistill.models.teachers.torchvision",
    "ensemble": "segdistill.models.teachers.ensemble",
}
MARKERS = {"teacher.json": "segdistill", "torchvision.json": "torchvision", "config.json": "huggingface"}
"""The file by which a folder's family is known."""
CARD = "README.md"
MOST_WORDS = 300  # characters of a licence's name and place


def family_of(folder: Path) -> str:
    """The family of the teacher in a folder; a UserError where there is no folder, or none of the files that tell."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    family = next((family for marker, family in MARKERS.items() if (folder / marker).is_file()), None)
    if family is None:
        raise UserError(f"{folder}: no teacher in it; allowed: a folder with one of {', '.join(MARKERS)}")
    return family


def names(folder: Path) -> list[str]:
    """The classes of the teacher in a folder, in order."""
    return _module(family_of(folder)).names(folder)  # type: ignore[no-any-return]


def matched(names: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """Those of a teacher's ``names`` that one of ``classes`` has but for case, spaces, hyphens and underscores."""
    plain = {_plain(label): label for label in classes}
    return {name: plain[_plain(name)] for name in names if _plain(name) in plain}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.casefold())


def table(folder: Path, classes: Sequence[str]) -> dict[str, str]:
    """The classes of a teacher that are the data set's by name: its -> the data set's.

    Raises:
        UserError: there is none, or it is a teacher of ours and of other classes.
    """
    own = names(folder)
    if family_of(folder) == "segdistill":
        require_classes(folder / "teacher.json", own, classes)
    if not (pairs := matched(own, classes)):
        raise UserError(
            f"{folder}: none of its classes has a name of the data set's; it has {', '.join(own)}; the data set has"
            f" {', '.join(classes)}; a params.yaml with train_teacher.import_from and .labels says which is which"
        )
    return pairs


def require_labels(folders: Sequence[Path], labels: Mapping[str, str]) -> None:
    """Raises a UserError for an entry of ``train_teacher.labels`` that is a class of none of the teachers."""
    known = [name for folder in folders for name in names(folder)]
    for name in labels:
        if name not in known:
            raise UserError(f"train_teacher.labels: no teacher has a class '{name}'{nearest(name, known)}")


def outline(folders: Sequence[Path]) -> ModelInfo:
    """What is known of the teacher without its weights, nor memory for them; of several, of the mean of them."""
    infos = [_outline(folder) for folder in folders]
    return infos[0] if len(infos) == 1 else _module("ensemble").mean_info(infos)  # type: ignore[no-any-return]


def _outline(folder: Path) -> ModelInfo:
    import torch

    module = _module(family_of(folder))
    with contextlib.suppress(Exception), torch.device("meta"):
        return module.outline(folder)  # type: ignore[no-any-return]
    return module.outline(folder)  # type: ignore[no-any-return]  # some networks read values while they are built


def open_teacher(folders: Sequence[Path], classes: Sequence[str], labels: Mapping[str, str]) -> SegmentationNetwork:
    """The trained network in a folder, or the mean of several, with the data set's classes.

    Args:
        labels: a class of a teacher -> the data set's, where their names differ.

    Raises:
        UserError: a file is absent, damaged or of a kind that is not read, or a class has no source.
    """
    require_labels(folders, labels)
    networks = [_module(family_of(folder)).read(folder, classes, labels) for folder in folders]
    return networks[0] if len(networks) == 1 else _module("ensemble").mean_of(networks)  # type: ignore[no-any-return]


def build_network(description: Mapping[str, Any], num_classes: int, where: str) -> SegmentationNetwork:
    """A network from its description, without weights; no network is asked, and random numbers are left alone."""
    family = description.get("family", "segdistill")
    if family not in FAMILIES:
        raise UserError(f"{where}.family: unknown family '{family}'{nearest(str(family), FAMILIES)}")
    return _module(family).build(dict(description), num_classes, where)  # type: ignore[no-any-return]


def title(description: Mapping[str, Any]) -> str:
    """A network's description in a few words."""
    if "members" in description:
        return f"the mean of {', '.join(title(member) for member in description['members'])}"
    if "origin" in description:
        return f"{description['architecture']} from '{description['origin']}'"
    return f"{description['architecture']} over {description['encoder']}"


def files_hash(folders: Sequence[Path]) -> str:
    """One hash of all files that say what a teacher is: their names, their content, and the order of folders."""
    digest = hashlib.sha256()
    for folder in folders:
        family_of(folder)
        for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors"), folder / CARD]):
            if path.is_file():
                digest.update(f"{path.name} {file_hash(path)}\n".encode())
        digest.update(b"\n")
    return digest.hexdigest()


def licence(folders: Sequence[Path]) -> str | None:
    """What the folders say of the licence of their weights, on one line; None where none says anything.

    A card (README.md) of the hub begins with ``license`` and its like in YAML; a teacher that this project imported has
    in ``metrics.json`` what was said of it then.
    """
    stated = {folder.resolve().name: _licence(folder) for folder in folders}
    if not any(stated.values()):
        return None
    return "; ".join(f"{text or 'not stated'} (of '{name}')" for name, text in stated.items())


def _licence(folder: Path) -> str | None:
    if (folder / "metrics.json").is_file():
        document: Any = read_json(folder / "metrics.json")
        values = [document.get("licence")] if isinstance(document, dict) else []
    elif (folder / CARD).is_file():
        head = re.match(r"---\s*\n(.*?)\n---", read_text(folder / CARD), re.DOTALL)
        try:
            document = parse_yaml(head[1], str(folder / CARD)) if head else None
        except UserError:  # a card is read by people; what is no YAML states nothing
            document = None
        keys = ("license", "license_name", "license_link")
        values = [document.get(key) for key in keys] if isinstance(document, dict) else []
    else:
        return None
    words = ", ".join(str(value) for value in values if value)
    return re.sub(r"[\s|]+", " ", words)[:MOST_WORDS] or None  # a cell of a table


def _module(family: str) -> Any:
    return importlib.import_module(FAMILIES[family])
