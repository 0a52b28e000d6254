"""The files of a registered model: sealed when they are written, and looked at before MLflow loads any.

A registry is written by many. Loading a model with MLflow puts its folder ``code`` on the path of imports and imports
the module that ``pickle_module_info.txt`` names, before anything is checked. So only what we write is loaded: files of
these names, of these flavors, with the hashes that the version's tag stands for.

A version has two faces. ``mlflow.pytorch`` loads the tensor face, images to logits, from ``data/model.pt2``. What
MLflow serves is the image face, ``image_model.py``, where the network is there as ONNX, and the tensor face otherwise.
"""

import hashlib
import importlib.metadata
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from segdistill.data import decoding
from segdistill.errors import UserError
from segdistill.files import SEAL, file_hash, read_bytes, read_text, require_regular, seal, sealed_hashes, write_file
from segdistill.images import of_contract

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from torch.export import ExportedProgram

FILES = {
    "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "input_example.json", "serving_input_example.json",
    "data/model.pt2", "image_model.py", "decoding.py",
}  # fmt: skip
# What may lie beside them: the same network for other runtimes, its card, and pictures of what it sees.
ONNX, INT8, CARD = "onnx/model.onnx", "onnx/int8.onnx", "card/card.md"
PROGRAM = "data/model.pt2"
# Code that MLflow runs where it serves images: its name in the artefact, and the file of this package that it copies.
IMAGE_MODEL, DECODING = "image_model.py", "decoding.py"
CODE = {IMAGE_MODEL: Path(__file__).with_name(IMAGE_MODEL), DECODING: Path(decoding.__file__)}
_ARTIFACTS = {"network": ONNX, "decoding": DECODING}  # what image_model.py is told the places of
BESIDE = {ONNX, INT8, CARD, *(f"card/overlay-{number}.png" for number in range(4))}
_OF_MLFLOW = "registered_model_meta"  # which it writes beside what it downloads, and only reads as text


class SealedModel:
    """Both faces of a network, for MLflow to log, with the hashes of all files beside them.

    Args:
        program: the network's graph.
        classes: how many there are.
        document: its contract (models/portable.py).
        beside: further files, of :data:`BESIDE`.
    """

    __name__ = "mlflow.pytorch"

    def __init__(
        self, program: "ExportedProgram", classes: int, document: Mapping[str, Any], beside: Mapping[str, bytes]
    ) -> None:
        self.program, self.document, self.beside = program, document, beside
        self.serves_images = ONNX in beside
        self.signature = (
            image_signature() if self.serves_images else tensor_signature(classes, of_contract(document).channels)
        )
        packages = ("numpy", "onnxruntime", "pillow") if self.serves_images else ("numpy", "torch")
        self.requirements = [f"{package}=={importlib.metadata.version(package)}" for package in packages]
        self.checksums = ""  # the SHA-256 of the list of hashes, once it is written

    def save_model(self, path: str, mlflow_model: Any, **given: Any) -> None:
        """Called by MLflow, on a folder of this machine, before anything is sent."""
        import mlflow
        import torch

        from segdistill.models.portable import save_program

        face = {"python_model": str(CODE[IMAGE_MODEL])} if self.serves_images else {"loader_module": "mlflow.pytorch"}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*An input example was not provided")  # the signature is written by hand
            mlflow.pyfunc.save_model(
                path=path, mlflow_model=mlflow_model, signature=self.signature, pip_requirements=self.requirements,
                **face, **given,
            )  # fmt: skip
        folder, served = Path(path), mlflow_model.flavors["python_function"]
        files = dict(self.beside)
        if self.serves_images:
            files[DECODING] = read_bytes(CODE[DECODING])
            served["model_code_path"] = IMAGE_MODEL  # not where it was copied from
            served["artifacts"] = {key: {"path": place, "uri": place} for key, place in _ARTIFACTS.items()}
        else:
            served.update(data="data", model_config={"device": None})
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, content)
        (folder / PROGRAM).parent.mkdir()
        save_program(self.program, folder / PROGRAM, self.document)
        mlflow_model.add_flavor("pytorch", model_data="data", pytorch_version=str(torch.__version__), code=None)
        mlflow_model.save(str(folder / "MLmodel"))
        seal(folder)
        self.checksums = _checksums(folder)


def tensor_signature(classes: int, images: int = 3) -> "ModelSignature":
    """Images [B, C, H, W] in 0..1 to logits [B, K, H, W]."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    inputs, outputs = (
        Schema([TensorSpec(np.dtype("float32"), (-1, channels, -1, -1))]) for channels in (images, classes)
    )
    return ModelSignature(inputs=inputs, outputs=outputs)


def image_signature() -> "ModelSignature":
    """An encoded image to its mask, as image_model.py answers; over HTTP, both are base64."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, Object, Property, Schema

    colored = Object([Property("name", DataType.string), Property("color", Array(DataType.long))])
    outputs = {"mask": DataType.string, "width": DataType.long, "height": DataType.long, "classes": Array(colored)}
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([ColSpec(kind, name) for name, kind in outputs.items()]),
    )


def check_files(folder: Path, checksums: str, uri: str, *, to_serve: bool = False) -> None:
    """Whether a folder that came from a registry holds just what we wrote.

    Args:
        folder: of the version.
        checksums: what :attr:`SealedModel.checksums` was.
        uri: whose files these are.
        to_serve: whether MLflow shall run the code of its image face, which then must be that of this package.

    Raises:
        UserError: another file, flavor or content; nothing of it was loaded.
    """
    advice = f"nothing of {uri} was loaded; find out who wrote it, and delete that version"
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()} - {_OF_MLFLOW}
    strange = sorted({path.relative_to(folder).as_posix() for path in links} | (names - FILES - BESIDE - {SEAL}))
    if strange:
        raise UserError(f"{uri}: holds '{strange[0]}', which segdistill does not write; {advice}")
    if SEAL not in names or _checksums(folder) != checksums:
        raise UserError(f"{uri}: {SEAL} is not the one that its version was registered with; {advice}")
    hashes = sealed_hashes(folder, mend=advice)
    if missing := sorted(set(hashes) - names):
        raise UserError(f"{uri}: '{missing[0]}' is missing; {advice}")
    for name in sorted(names - {SEAL}):
        require_regular(folder / name)
        if file_hash(folder / name) != hashes.get(name):
            raise UserError(f"{uri}: '{name}' is not the file that was registered; {advice}")
    _check_flavors(folder / "MLmodel", advice)
    for name, source in CODE.items() if to_serve else ():
        if name in names and file_hash(folder / name) != file_hash(source):
            raise UserError(f"{uri}: '{name}' is not the code of this version of segdistill; register the model again")


def _check_flavors(path: Path, advice: str) -> None:
    try:
        flavors = yaml.safe_load(read_text(path))["flavors"]
        served, tensors = flavors["python_function"], flavors["pytorch"]
        code = [flavor for flavor, settings in flavors.items() if settings.get("code")]
        if "model_code_path" in served:
            places = {key: artifact["path"] for key, artifact in served["artifacts"].items()}
            known = (served["loader_module"], served["model_code_path"], places) == (
                "mlflow.pyfunc.loaders.code_model", IMAGE_MODEL, _ARTIFACTS,
            )  # fmt: skip
        else:
            known = served["loader_module"] == "mlflow.pytorch"
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: not a description of a model; {advice}") from None
    if code or not known or tensors["model_data"] != "data" or set(flavors) != {"python_function", "pytorch"}:
        raise UserError(f"{path}: describes a model that segdistill does not write; {advice}")


def _checksums(folder: Path) -> str:
    return hashlib.sha256(read_bytes(folder / SEAL)).hexdigest()
