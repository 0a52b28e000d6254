"""Resume checkpoints: one safetensors file that holds all a resume needs, written under another name and renamed.

Nothing is pickled: tensors go into the file as they are, the tree around them (optimiser state, counters) as JSON in
its header.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from segdistill.errors import UserError
from segdistill.files import require_regular

_TENSOR, _TUPLE, _PAIRS = "__tensor__", "__tuple__", "__pairs__"


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a tree of dicts, lists, tuples, numbers, strings and tensors, atomically, with a hash of all of it.

    Raises:
        UserError: the disk is full or the folder cannot be written; an older checkpoint stays as it was.
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_pack(state, "", tensors))
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"tree": tree, "sha256": _hash(tree, tensors)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: the checkpoint could not be written: {error}") from None


def load(path: Path) -> dict[str, Any] | None:
    """The tree that :func:`save` wrote, its tensors on the CPU, or None if there is no such file.

    Raises:
        UserError: the file is not one of ours, or not what was written.
    """
    if not path.exists():
        return None
    require_regular(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({error})") from None
    tree = facts.get("tree", "")
    if facts.get("sha256") != _hash(tree, tensors):
        raise UserError(f"{path}: not the checkpoint that was written: its content and its hash differ")
    return dict(_unpack(json.loads(tree), tensors))


def put_aside(path: Path) -> Path:
    """Renames a file that is of no use to us, and may be to somebody else; gives its new name."""
    number = 1
    while (kept := path.with_name(f"unusable-{number}-{path.name}")).exists():
        number += 1
    return path.rename(kept)


def _hash(tree: str, tensors: Mapping[str, Tensor]) -> str:
    """Of the content and not of the file, which cannot hold its own hash."""
    digest = hashlib.sha256(tree.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        # A copy, since safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _pack(item, f"{name}/{key}", tensors) for key, item in value.items()}
        return {_PAIRS: [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unpack(item, tensors) for item in value[_TUPLE])
    if _PAIRS in value:
        return {key: _unpack(item, tensors) for key, item in value[_PAIRS]}
    return {key: _unpack(item, tensors) for key, item in value.items()}
