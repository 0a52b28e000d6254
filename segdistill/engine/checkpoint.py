"""Resume checkpoints: one safetensors file that holds all a resume needs, written under another name and renamed.

Nothing is pickled: tensors go into the file as they are, the tree around them (optimiser state, counters) as JSON in
its header.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from segdistill.errors import UserError

_TENSOR, _TUPLE, _PAIRS = "__tensor__", "__tuple__", "__pairs__"


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a tree of dicts, lists, tuples, numbers, strings and tensors, atomically.

    Raises:
        UserError: the disk is full or the folder cannot be written; an older checkpoint stays as it was.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(state, "", tensors)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata={"tree": json.dumps(tree)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: the checkpoint could not be written: {error}") from None


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The tree that :func:`save` wrote, or None if there is no such file.

    Raises:
        UserError: the file is not one of ours.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tree = json.loads((file.metadata() or {})["tree"])
            return _unpack(tree, file)
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a resume checkpoint of this program ({error}); delete it to start anew") from None


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[name] = value.detach().clone().contiguous()  # safetensors refuses tensors that share memory
        return {_TENSOR: name}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: _pack(item, f"{name}/{key}", tensors) for key, item in value.items()}
        return {_PAIRS: [[key, _pack(item, f"{name}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    return value


def _unpack(value: Any, file: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item, file) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return file.get_tensor(value[_TENSOR])
    if _TUPLE in value:
        return tuple(_unpack(item, file) for item in value[_TUPLE])
    if _PAIRS in value:
        return {key: _unpack(item, file) for key, item in value[_PAIRS]}
    return {key: _unpack(item, file) for key, item in value.items()}
