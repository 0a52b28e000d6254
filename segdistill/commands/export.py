"""A network as one file for programs that know nothing of this package, compared with torch before it is written.

An int8 file is calibrated on training images, and is only written if it loses no more mIoU on validation than allowed.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field
from rich.console import Console
from rich.table import Table

from segdistill.commands._model import open_model
from segdistill.config import parse
from segdistill.errors import UserError
from segdistill.files import disk_errors, folder_place, write_file
from segdistill.stages._formats import quantized, to_file

if TYPE_CHECKING:
    from segdistill.models.outputs import Network

Images = Annotated[int, Field(ge=1, le=100_000)]
Side = Annotated[int, Field(ge=1, le=16_384)]
Points = Annotated[float, Field(ge=0, le=100)]


def command(arguments: argparse.Namespace) -> None:
    """Exports what the command line names, and prints what was measured."""
    import torch

    from segdistill.engine.stopwatch import pass_seconds
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
            int8 = quantized(model, exported, arguments.prepared, images, loss)
            if int8.is_refused:
                raise UserError(int8.sentence)
            exported = int8.path
            networks["int8"] = portable.load_portable(exported, torch.device("cpu"))[0]
            facts.append(int8.sentence)
        seconds = {
            name: min(pass_seconds(network, size, channels=model.images.channels)) for name, network in networks.items()
        }
        content = exported.read_bytes()
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, content)
    opset = f", opset {portable.OPSET}" if format_name == "onnx" else ""
    console = Console()
    console.print(f"{out}: {len(content) / 1e6:.1f} MB{opset}, any batch and size; {'; '.join(facts)}", soft_wrap=True)
    threads = torch.get_num_threads()
    console.print(f"One image of {size[0]} x {size[1]} on the CPU, {threads} thread(s), fastest of warm passes:")
    table = Table()
    table.add_column("format")
    table.add_column("ms", justify="right")
    for name, value in seconds.items():
        table.add_row(name, f"{1000 * value:.1f}")
    console.print(table)
