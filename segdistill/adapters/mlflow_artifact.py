"""The files of a registered model: sealed when they are written, and looked at before MLflow loads any.

A registry is written by many. Loading a model with MLflow puts its folder ``code`` on the path of imports and imports
the module that ``pickle_module_info.txt`` names, before anything is checked. So only what we write is loaded: files of
these names, of this one flavor, with the hashes that the version's tag stands for.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from segdistill.errors import UserError
from segdistill.files import SEAL, file_hash, read_bytes, read_text, require_regular, seal, sealed_hashes, write_file

FILES = {
    "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "input_example.json", "serving_input_example.json",
    "data/model.pt2",
}  # fmt: skip
# What may lie beside them: the same network for other runtimes, its card, and pictures of what it sees.
ONNX, CARD = "onnx/model.onnx", "card/card.md"
BESIDE = {ONNX, CARD, *(f"card/overlay-{number}.png" for number in range(4))}
_OF_MLFLOW = "registered_model_meta"  # which it writes beside what it downloads, and only reads as text


class SealedPyTorch:
    """MLflow's flavor for PyTorch, whose files get their hashes beside them."""

    __name__ = "mlflow.pytorch"

    def __init__(self, beside: Mapping[str, bytes]) -> None:
        self.beside = beside  # of :data:`BESIDE`
        self.checksums = ""  # the SHA-256 of the list of hashes, once it is written

    def save_model(self, path: str, **given: Any) -> None:
        """Called by MLflow, on a folder of this machine, before anything is sent."""
        import mlflow

        mlflow.pytorch.save_model(path=path, **given)
        for name, content in self.beside.items():
            (Path(path) / name).parent.mkdir(exist_ok=True)
            write_file(Path(path) / name, content)
        seal(Path(path))
        self.checksums = _checksums(Path(path))


def check_files(folder: Path, checksums: str, uri: str) -> None:
    """Whether a folder that came from a registry holds just what we wrote.

    Args:
        checksums: what :attr:`SealedPyTorch.checksums` was.
        uri: whose files these are.

    Raises:
        UserError: another file, flavor or content; nothing of it was loaded.
    """
    advice = f"nothing of {uri} was loaded; find out who wrote it, and delete that version"
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {_OF_MLFLOW}
    strange = sorted({path.relative_to(folder).as_posix() for path in links} | (found - FILES - BESIDE - {SEAL}))
    if strange:
        raise UserError(f"{uri}: holds '{strange[0]}', which segdistill does not write; {advice}")
    if SEAL not in found or _checksums(folder) != checksums:
        raise UserError(f"{uri}: {SEAL} is not the one that its version was registered with; {advice}")
    hashes = sealed_hashes(folder, mend=advice)
    if missing := sorted(set(hashes) - found):
        raise UserError(f"{uri}: '{missing[0]}' is missing; {advice}")
    for name in sorted(found - {SEAL}):
        require_regular(folder / name)
        if file_hash(folder / name) != hashes.get(name):
            raise UserError(f"{uri}: '{name}' is not the file that was registered; {advice}")
    _check_flavors(folder / "MLmodel", advice)


def _check_flavors(path: Path, advice: str) -> None:
    try:
        flavors = yaml.safe_load(read_text(path))["flavors"]
        modules = flavors["python_function"]["loader_module"], flavors["pytorch"]["model_data"]
        code = [flavor for flavor, settings in flavors.items() if settings.get("code")]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a description of a model; {advice}") from None
    if code or modules != ("mlflow.pytorch", "data") or set(flavors) != {"python_function", "pytorch"}:
        raise UserError(f"{path}: describes a model that segdistill does not write; {advice}")


def _checksums(folder: Path) -> str:
    return hashlib.sha256(read_bytes(folder / SEAL)).hexdigest()
