"""What memory an evaluation takes at full size, image after image: bands of rows against all scores at once. Markdown.

    python benchmarks/evaluation.py [--images 8] [--size 1024 2048] [--classes 150] [--stride 4]

Scenes are made as they are asked for, and the network is one convolution, so that what grows is the evaluation. Each
row is a process of its own, whose peak is read after the first, the middle and the last image.
"""

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from _table import machine, markdown
from torch import Tensor, nn

from segdistill.engine import inference
from segdistill.engine.distributed import Processes
from segdistill.engine.evaluate import evaluate
from segdistill.engine.settings import InferenceConfig
from segdistill.models.outputs import ModelInfo

BLOCK = 64  # pixels of one class along a side


class Scenes:
    """Blocks of random classes under noise; none is kept."""

    def __init__(self, images: int, size: tuple[int, int], classes: int) -> None:
        self.images, self.size, self.classes = images, size, classes

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(index)
        coarse = random.integers(0, self.classes, [-(-side // BLOCK) for side in self.size], dtype=np.uint8)
        label = coarse.repeat(BLOCK, 0).repeat(BLOCK, 1)[: self.size[0], : self.size[1]]
        return random.integers(0, 256, (*self.size, 3), dtype=np.uint8), np.ascontiguousarray(label)

    def sample_id(self, index: int) -> str:
        return f"{index:06d}"


class Network(nn.Module):
    """One convolution, whose logits are ``stride`` times smaller than the image; it looks at the memory each time."""

    def __init__(self, classes: int, stride: int) -> None:
        super().__init__()
        self.info = ModelInfo(classes, (3,) * 4, (stride,) * 4, 3, stride, stride, "cnn")
        self.convolution = nn.Conv2d(3, classes, stride, stride)
        self.peaks: list[float] = []

    def logits(self, images: Tensor) -> Tensor:
        self.peaks.append(peak())
        return self.convolution(images)


def peak() -> float:
    """The most memory of this process until now, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(arguments: argparse.Namespace) -> list[float]:
    """MiB at the start and after the first, the middle and the last image, and seconds an image."""
    torch.manual_seed(0)
    height, width = arguments.size
    if arguments.whole:
        inference.BAND = height * width
    scenes = Scenes(arguments.images, (height, width), arguments.classes)
    views = inference.Views(InferenceConfig(batch_size=1, input_scale=1.0, window=None, window_stride=0.67))
    network, started = Network(arguments.classes, arguments.stride), time.perf_counter()
    evaluate(
        network, scenes, views,  # type: ignore[arg-type]
        num_classes=arguments.classes, processes=Processes(0, 1, torch.device("cpu")), calibration=True,
    )  # fmt: skip
    seconds, peaks = (time.perf_counter() - started) / arguments.images, [*network.peaks, peak()]
    return [peaks[0], peaks[1], peaks[(1 + arguments.images) // 2], peaks[-1], seconds]


def main(options: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--stride", type=int, default=4)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # one row, in this process
    arguments = parser.parse_args(options)
    if arguments.alone:
        print(*measure(arguments))
        return
    given = sys.argv[1:] if options is None else options
    rows: list[list[object]] = []
    for name, switches in (("in bands of rows", []), ("all scores at once", ["--whole"])):
        command = [sys.executable, __file__, *given, "--alone", *switches]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append([name, *(float(number) for number in done.stdout.split())])
    print(machine())
    print()
    header = (
        "scores",
        "at the start, MiB",
        "1 image",
        f"{(1 + arguments.images) // 2}",
        f"{arguments.images}",
        "s an image",
    )
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
