"""The MODEL of ``predict`` and ``export``, a folder, a registered model or a file, as a network that scores."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from segdistill.engine.settings import inference_of
from segdistill.errors import UserError, nearest
from segdistill.stages._formats import Model

if TYPE_CHECKING:
    import torch

REGISTRY = "models:/"
HELP = "a folder of ours, a registered model (models:/segdistill-student@champion), or a .pt2 or .onnx file"


def open_model(text: str, student: str | None, device: "torch.device") -> Model:
    """The network that a MODEL of the command line names.

    Raises:
        UserError: there is none, or what is there is damaged or not ours.
    """
    from segdistill.models.portable import ProgramNetwork, load_portable, load_program, require_contract

    path = Path(text)
    if text.startswith(REGISTRY):
        from segdistill.adapters.mlflow_registry import fetch

        with tempfile.TemporaryDirectory(prefix="segdistill-model-") as scratch:
            files, contract = fetch(text, Path(scratch))
            program, _ = load_program(files / "data" / "model.pt2")
        contract = require_contract(contract, text)
        return Model(ProgramNetwork(program, device), contract, program)
    if path.is_dir():
        return _of_folder(path, student, device)
    if path.suffix not in (".pt2", ".onnx"):
        raise UserError(f"{text}: no such model; allowed: {HELP}")
    if path.suffix == ".pt2":
        program, document = load_program(path)
        return Model(ProgramNetwork(program, device), require_contract(document, path), program)
    return Model(*load_portable(path, device), None)


def _of_folder(folder: Path, student: str | None, device: "torch.device") -> Model:
    """A network as training or the stage ``register`` left it."""
    from segdistill.models.export import load_model, model_names
    from segdistill.models.portable import contract, require_contract

    if not model_names(folder) and (folder / "model").is_dir():  # that of a registration
        folder = folder / "model"
    names = model_names(folder)
    if student is None and len(names) > 1:
        raise UserError(f"{folder}: has several networks; choose one with --student{nearest('', names)}")
    if not names:
        raise UserError(f"{folder}: no model in it, which is a NAME.safetensors with its NAME.json")
    name = student or names[0]
    segmenter, document = load_model(folder, name, device)
    require_contract(document, folder / f"{name}.json")
    return Model(segmenter, contract(document, segmenter, inference_of(folder)), None)
