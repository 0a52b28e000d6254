"""A network as one file for programs that know nothing of this package, compared with torch before it is written.

An int8 file is calibrated on training images, and is only written if it loses no more mIoU on validation than allowed.
"""

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field
from rich.console import Console
from rich.table import Table

from segdistill.commands._model import Model, open_model
from segdistill.config import parse
from segdistill.errors import UserError
from segdistill.files import disk_errors, folder_place, write_file

if TYPE_CHECKING:
    from segdistill.data.shards import ShardDataset
    from segdistill.models.outputs import Network

Images = Annotated[int, Field(ge=1, le=100_000)]
Side = Annotated[int, Field(ge=1, le=16_384)]
Points = Annotated[float, Field(ge=0, le=100)]


def command(arguments: argparse.Namespace) -> None:
    """Exports what the command line names, and prints what was measured."""
    import torch

    from segdistill.models import portable

    out: Path = arguments.out
    format_name = arguments.format or out.suffix.removeprefix(".")
    if format_name not in portable.FORMATS:
        raise UserError(f"--out: {out}: a file's name ends with {' or '.join(f'.{name}' for name in portable.FORMATS)}")
    if out.suffix != f".{format_name}":
        raise UserError(f"--out: {out}: a file of this format ends with .{format_name}")
    if arguments.int8 and format_name != "onnx":
        raise UserError("--int8: quantised by onnxruntime, so only with --format onnx")
    folder_place(out.parent)
    if out.is_dir():
        raise UserError(f"--out: {out}: a folder; expected the file to write")
    size = parse(tuple[Side, Side], arguments.size, "--size")
    images, loss = (
        parse(Images, arguments.calibration, "--calibration"),
        parse(Points, arguments.max_loss, "--max-loss"),
    )
    if arguments.int8:
        from segdistill.data.shards import read_dataset_info

        read_dataset_info(arguments.prepared)  # before the minute that the rest takes
    model = open_model(arguments.model, arguments.student, torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="segdistill-export-") as scratch:
        exported, facts = Path(scratch) / f"model.{format_name}", []
        networks: dict[str, Network] = {}
        if arguments.int8 and arguments.model.endswith(".onnx"):
            shutil.copy(arguments.model, exported)
            networks[format_name] = model.network
        else:
            networks["torch"] = model.network
            difference, networks[format_name] = to_file(model, exported)
            facts.append(f"logits within {difference:.1g} of torch's, as a share of the largest")
        if arguments.int8:
            exported, sentence = quantized(model, exported, arguments.prepared, images, loss)
            networks["int8"] = portable.load_portable(exported, torch.device("cpu"))[0]
            facts.append(sentence)
        seconds = {
            name: portable.latency(network, size, channels=model.images.channels) for name, network in networks.items()
        }
        content = exported.read_bytes()
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, content)
    opset = f", opset {portable.OPSET}" if format_name == "onnx" else ""
    console = Console()
    console.print(f"{out}: {len(content) / 1e6:.1f} MB{opset}, any batch and size; {'; '.join(facts)}", soft_wrap=True)
    threads = torch.get_num_threads()
    console.print(f"One image of {size[0]} x {size[1]} on the CPU, {threads} thread(s), median of warm passes:")
    table = Table()
    table.add_column("format")
    table.add_column("ms", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{1000 * value:.1f}")
    console.print(table)


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
        program = portable.to_program(expected, model.images.channels)
    elif model.program is not None:
        program, expected = model.program, model.program.module()
    else:
        raise UserError("MODEL is an ONNX file already; only --int8 can be made of it")
    return portable.save_checked(program, expected, path, model.contract)


def quantized(model: Model, source: Path, prepared: Path, images: int, max_loss: float) -> tuple[Path, str]:
    """Writes the int8 version of an ONNX file beside it, if it is good enough.

    Args:
        model: whose file it is.
        source: the float32 file.
        prepared: the prepared data: its train split gives the ranges, its val split the loss.
        images: training images to take the ranges from, evenly spread.
        max_loss: points of validation mIoU (0..100) that it may lose.

    Returns:
        The file, and its loss in words.

    Raises:
        UserError: it loses more.
    """
    import torch

    from segdistill.data.shards import ShardDataset, read_dataset_info
    from segdistill.identity import require_classes
    from segdistill.models import portable

    classes = [entry.name for entry in read_dataset_info(prepared).classes]
    require_classes(prepared, [entry["name"] for entry in model.contract["classes"]], classes)
    path = source.with_name("int8.onnx")
    train_set, val_set = (ShardDataset(prepared, split) for split in ("train", "val"))
    portable.quantize(source, path, calibration(train_set, images, model.inference.input_scale), model.contract)
    scores = [
        validation_miou(model, portable.load_portable(file, torch.device("cpu"))[0], val_set) for file in (source, path)
    ]
    loss = 100 * (scores[0] - scores[1])
    words = f"val mIoU {100 * scores[1]:.2f}, of float32 {100 * scores[0]:.2f}: int8 loses {loss:.2f} points"
    if loss > max_loss:
        raise UserError(f"{words}, more than --max-loss {max_loss:g}; nothing was written")
    return path, words


def validation_miou(model: Model, network: "Network", dataset: "ShardDataset") -> float:
    """As ``evaluate`` would score it, on another split."""
    import torch

    from segdistill.engine.distributed import Processes
    from segdistill.engine.evaluate import evaluate
    from segdistill.engine.inference import Views

    processes, classes = Processes(0, 1, torch.device("cpu")), len(model.contract["classes"])
    return evaluate(network, dataset, Views(model.inference), num_classes=classes, processes=processes).miou


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
