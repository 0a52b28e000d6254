"""Models as files: safetensors + JSON. Nothing that needs unpickling is written, and nothing pickled is read."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import segdistill
from segdistill.config import to_dict
from segdistill.errors import UserError, nearest
from segdistill.files import SEAL, file_hash, read_json, read_sealed_json, require_regular, write_file
from segdistill.identity import require_classes
from segdistill.models.outputs import SegmentationNetwork
from segdistill.models.segmenter import logits_at
from segdistill.models.teachers import build_network
from segdistill.models.weights import not_finite, read_safetensors

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class ExportedSegmenter(nn.Module):
    """What is served: images to logits of the same size, without auxiliary head and taps."""

    def __init__(self, segmenter: SegmentationNetwork) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: Tensor) -> Tensor:
        """Float32 logits at the size of the images.

        Shape:
            images: [B, C, H, W], float in 0..1. Returns [B, K, H, W].
        """
        stride = self.segmenter.info.logits_stride
        return logits_at(self.segmenter.logits(images), images.shape[-2:], stride)


def save_model(folder: Path, name: str, segmenter: SegmentationNetwork, metadata: Mapping[str, Any]) -> None:
    """Writes ``<name>.safetensors`` and ``<name>.json``, each under a temporary name first.

    Args:
        folder: made if absent.
        metadata: anything JSON can hold: ``classes`` (a list of name and color), scores, provenance. The facts that
            this function knows itself (model, num_classes, params, ...) win over entries of the same name.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{name}: not a name for a model; allowed: letters, digits, '_', '-' and '.'")
    broken = not_finite(segmenter.state_dict())
    if broken:
        raise UserError(f"{name}: '{broken[0]}' is not finite: the training diverged, and its weights are not saved")
    classes = metadata.get("classes")
    if classes is not None and len(classes) != segmenter.info.num_classes:
        raise ValueError(f"{len(classes)} classes in metadata, {segmenter.info.num_classes} in the model")
    # One layout on disk, whatever the memory format or device in training.
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in segmenter.state_dict().items()}
    # What another library makes of weights is a matter of its settings: the hash of the file covers both.
    settings = {"model": json.dumps(to_dict(segmenter.config))} if hasattr(segmenter.config, "family") else None
    weights = to_safetensors(tensors, metadata=settings)
    document = {
        **to_dict(dict(metadata)),
        "name": name,
        "model": to_dict(segmenter.config),
        "num_classes": segmenter.info.num_classes,
        "params": count_parameters(segmenter),
        "segdistill": segdistill.__version__,
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{name}.safetensors", weights)
    write_file(folder / f"{name}.json", text.encode())


def load_model(
    folder: Path, name: str, device: torch.device | str = "cpu", *, classes: Sequence[str] | None = None
) -> tuple[SegmentationNetwork, dict[str, Any]]:
    """What :func:`save_model` wrote, in eval mode, and its whole JSON document; no network, no random numbers drawn.

    Args:
        folder: of one or several models; its seal, where it has one, is honoured.
        classes: the data set's, in order, which must be the model's; None where no label is read or shown.

    Raises:
        UserError: a file is absent, damaged or not of this pair, a key is missing, unexpected, of another shape or not
            finite, or the model is of other classes.
    """
    path, document_path = folder / f"{name}.safetensors", folder / f"{name}.json"
    for needed in (document_path, path):
        if not needed.is_file():
            raise UserError(f"{needed}: no such file; models in {folder}{nearest(name, model_names(folder))}")
        require_regular(needed)
    document = read_document(document_path)
    if classes is not None:
        require_classes(document_path, [entry["name"] for entry in document.get("classes") or ()], classes)
    if file_hash(path) != document["sha256"]:
        raise UserError(
            f"{path}: not the weights that {document_path.name} describes (sha256 differs); save the model again"
        )
    segmenter = build_network(document["model"], document["num_classes"], f"{document_path}: model")
    load_weights(segmenter, path)
    return segmenter.to(device).eval(), document


def load_weights(segmenter: SegmentationNetwork, path: Path) -> None:
    """Fills a whole segmenter from a safetensors file; a UserError names the first missing, unexpected or other key."""
    given, wanted = read_safetensors(path), segmenter.state_dict()
    for key, tensor in wanted.items():
        if key not in given:
            raise UserError(f"{path}: key '{key}' is missing; a partly loaded model is no model")
        read, needed = (f"{weight.dtype} {list(weight.shape)}" for weight in (given[key], tensor))
        if read != needed:
            raise UserError(f"{path}: key '{key}' is {read}, the model needs {needed}")
    if unexpected := next((key for key in given if key not in wanted), None):
        raise UserError(f"{path}: key '{unexpected}' is unexpected; the model has no such parameter")
    segmenter.load_state_dict(given, strict=True)


def model_names(folder: Path) -> list[str]:
    """Names of the complete pairs in a folder, sorted."""
    weights = {path.stem for path in folder.glob("*.safetensors")}
    return sorted(path.stem for path in folder.glob("*.json") if path.stem in weights)


def count_parameters(segmenter: SegmentationNetwork) -> int:
    """Parameters that serving needs: all but the auxiliary head's."""
    head = segmenter.aux_head
    aux = 0 if head is None else sum(parameter.numel() for parameter in head.parameters())
    return sum(parameter.numel() for parameter in segmenter.parameters()) - aux


def count_macs(segmenter: SegmentationNetwork, size: tuple[int, int]) -> int:
    """Multiply-accumulates of serving one image of ``size`` (H, W); convolutions and matrix products are counted.

    Shapes are followed and no number is computed, so that memory and time do not grow with the image.
    """
    training, device = segmenter.training, next(segmenter.parameters()).device
    # Attention by its plain products, since fused kernels are not counted on every device.
    with (
        FlopCounterMode(display=False) as counter,
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
    ):
        segmenter.eval().logits(torch.zeros(1, segmenter.images.channels, *size, device=device))
    segmenter.train(training)
    return int(counter.get_total_flops()) // 2


def read_document(path: Path) -> dict[str, Any]:
    """The JSON document of a saved model, or a UserError where it is absent, damaged, or not one."""
    if (path.parent / SEAL).exists():
        document = read_sealed_json(path.parent, path.name, mend="make the model again")
    else:
        document = read_json(path)
    needed: dict[str, type] = {"model": dict, "num_classes": int, "sha256": str}
    for key, kind in needed.items():
        if not isinstance(document, dict) or not isinstance(document.get(key), kind):
            raise UserError(
                f"{path}: no '{key}' of type {kind.__name__} in it; this is not a saved model's description"
            )
    return document
