"""A network as a file for other programs: written, compared with torch, measured; by ``register`` and ``export``."""

import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segdistill.config import parse
from segdistill.engine.settings import InferenceConfig
from segdistill.errors import UserError
from segdistill.images import ImageFormat, of_contract
from segdistill.report.card import Format, Formats

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from segdistill.data.shards import ShardDataset
    from segdistill.models.outputs import Network

CALIBRATION = 64  # training images from which int8 takes its ranges


@dataclass(frozen=True)
class Model:
    """A network, and what its file says of it (:func:`segdistill.models.portable.contract`)."""

    network: "Network"
    contract: dict[str, Any]
    program: "ExportedProgram | None"  # where it came as one, or was traced already

    @property
    def images(self) -> ImageFormat:
        """What it is shown."""
        return of_contract(self.contract)

    @property
    def inference(self) -> InferenceConfig:
        """How images were shown to it when it was scored; where it does not say, whole and as they are."""
        known = self.contract.get("inference") or {"input_scale": 1.0, "window": None, "window_stride": 0.67}
        return parse(InferenceConfig, {"batch_size": 8, **known}, "inference")


@dataclass(frozen=True)
class Quantized:
    """An int8 file, and what it loses: shares (0..1) of mIoU on validation."""

    path: Path
    float32_miou: float
    miou: float
    max_loss: float  # points (0..100) that it may lose

    @property
    def loss(self) -> float:
        """Points of mIoU."""
        return 100 * (self.float32_miou - self.miou)

    @property
    def sentence(self) -> str:
        """The loss in words, and whether it is too much."""
        scores = f"val mIoU {100 * self.miou:.2f}, of float32 {100 * self.float32_miou:.2f}"
        excess = f", more than the {self.max_loss:g} that it may; it is not kept" if self.is_refused else ""
        return f"{scores}: int8 loses {self.loss:.2f} points{excess}"

    @property
    def is_refused(self) -> bool:
        """Whether it loses more than it may."""
        return self.loss > self.max_loss


def to_file(model: Model, path: Path) -> "tuple[float, Network]":
    """Writes a network as ``.pt2`` or ``.onnx``, and compares it with torch at several sizes.

    Returns:
        The largest difference of logits, as a share of the largest logit, and the network in the file.

    Raises:
        UserError: the model is an ONNX file already, or its logits come out otherwise.
    """
    import torch

    from segdistill.models import portable
    from segdistill.models.export import ExportedSegmenter
    from segdistill.models.outputs import SegmentationNetwork

    expected: torch.nn.Module
    if isinstance(model.network, SegmentationNetwork):
        expected = ExportedSegmenter(model.network).eval()
        program = model.program or portable.to_program(expected, model.images.channels)
    elif model.program is not None:
        program, expected = model.program, model.program.module()
    else:
        raise UserError("MODEL is an ONNX file already; only --int8 can be made of it")
    return portable.save_checked(program, expected, path, model.contract)


def quantized(model: Model, source: Path, prepared: Path, images: int, max_loss: float) -> Quantized:
    """Writes the int8 version of an ONNX file beside it, and measures what it loses.

    Args:
        model: whose file it is.
        source: the float32 file.
        prepared: the prepared data: its train split gives the ranges, its val split the loss.
        images: training images to take the ranges from, evenly spread.
        max_loss: points of validation mIoU (0..100) that it may lose.
    """
    import torch

    from segdistill.data.shards import ShardDataset, read_dataset_info
    from segdistill.identity import require_classes
    from segdistill.models import portable

    classes = [entry.name for entry in read_dataset_info(prepared).classes]
    require_classes(prepared, [entry["name"] for entry in model.contract["classes"]], classes)
    path = source.with_name("int8.onnx")
    train_set = ShardDataset(prepared, "train")
    portable.quantize(source, path, calibration(train_set, images, model.inference.input_scale), model.contract)
    float32, int8 = (
        validation_miou(model, portable.load_portable(file, torch.device("cpu"))[0], prepared)
        for file in (source, path)
    )
    return Quantized(path, float32, int8, max_loss)


def validation_miou(model: Model, network: "Network", prepared: Path) -> float:
    """As ``evaluate`` would score it, on another split."""
    import torch

    from segdistill.data.shards import ShardDataset
    from segdistill.engine.distributed import Processes
    from segdistill.engine.evaluate import evaluate
    from segdistill.engine.inference import Views

    processes, classes = Processes(0, 1, torch.device("cpu")), len(model.contract["classes"])
    views = Views(model.inference)
    return evaluate(network, ShardDataset(prepared, "val"), views, num_classes=classes, processes=processes).miou


def calibration(dataset: "ShardDataset", images: int, scale: float) -> Iterator[np.ndarray]:
    """Evenly spread images, one at a time, at the scale that the network is shown: [1, C, H, W] float32."""
    import torch
    from torch.nn import functional

    from segdistill.data.transforms import unit_range
    from segdistill.report.pictures import evenly_spread

    for index in evenly_spread(len(dataset), images):
        pixels = unit_range(torch.from_numpy(dataset[index][0]).permute(2, 0, 1)[None])
        if scale != 1.0:
            size = [max(1, round(length * scale)) for length in pixels.shape[-2:]]
            pixels = functional.interpolate(pixels, size=size, mode="bilinear", antialias=scale < 1.0)
        yield pixels.numpy()


def measured(
    model: Model, wanted: Collection[str], prepared: Path, *, megabytes: float, val_miou: float, max_loss: float
) -> tuple[dict[str, bytes], Formats]:
    """The files of a student by their format, and what each gives and takes beside torch itself.

    Args:
        model: the student.
        wanted: ``onnx``, ``int8`` or both.
        prepared: the prepared data.
        megabytes: of its weights as they were saved.
        val_miou: the share (0..1) by which it was chosen.
        max_loss: points of validation mIoU (0..100) that int8 may lose; if it loses more there is no such file, and
            :attr:`Formats.refused` says so.
    """
    import torch

    from segdistill.data.shards import ShardDataset
    from segdistill.models import portable

    height, width = ShardDataset(prepared, "val")[0][1].shape
    formats, files = [Format("torch", megabytes, val_miou, _milliseconds(model, model.network, (height, width)))], {}
    refused = ""

    def keep(name: str, path: Path, miou: float) -> None:
        network, _ = portable.load_portable(path, torch.device("cpu"))
        files[name] = path.read_bytes()
        latency = _milliseconds(model, network, (height, width))
        formats.append(Format(name, len(files[name]) / 1e6, miou, latency))

    with tempfile.TemporaryDirectory(prefix="segdistill-formats-") as scratch:
        source = Path(scratch) / "model.onnx"
        _, network = to_file(model, source)
        int8 = quantized(model, source, prepared, CALIBRATION, max_loss) if "int8" in wanted else None
        if "onnx" in wanted:
            keep("onnx", source, int8.float32_miou if int8 else validation_miou(model, network, prepared))
        if int8 and int8.is_refused:
            refused = int8.sentence
        elif int8:
            keep("int8", int8.path, int8.miou)
    return files, Formats((height, width), torch.get_num_threads(), tuple(formats), refused)


def _milliseconds(model: Model, network: "Network", size: tuple[int, int]) -> float:
    from segdistill.engine.stopwatch import pass_seconds

    return 1000 * min(pass_seconds(network, size, channels=model.images.channels))
