"""How long it takes to count what a mIoU is made of, beside torchmetrics, in Markdown.

    python benchmarks/metrics.py [--rounds 10] [--size 1024 2048] [--classes 19 150] [--device cpu]

Classes and labels of one image, with pixels that count nowhere; neither is made in the time, which is that of the CPU,
or of the clock where the device is another. Each round runs all in turn, and a ratio is the median over the rounds of
theirs to ours in the same round. The counts must be the same. Needs the extra benchmarks.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from _table import machine, markdown
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex

from segdistill.metrics.confusion import confusion_matrix_per_image, iou_counts

IGNORED = 255


def seconds(update: Callable[[], object], device: torch.device) -> float:
    if device.type == "cpu":  # what other programs do on the machine is not counted
        started = time.process_time()
        update()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    update()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(classes: int, size: tuple[int, int], rounds: int, device: torch.device) -> list[list[object]]:
    """A row for each way to count: seconds an image, and by how much it is slower than ours."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (1, size[0] // 32, size[1] // 32), generator=random)
    labels = labels.repeat_interleave(32, 1).repeat_interleave(32, 2)  # [1, H, W] int64
    wrong = torch.rand(labels.shape, generator=random) < 0.2
    prediction = torch.where(wrong, torch.randint(0, classes, labels.shape, generator=random), labels).to(device)
    labels[torch.rand(labels.shape, generator=random) < 0.1] = IGNORED
    labels = labels.to(device)
    confusion = torch.zeros((classes, classes), dtype=torch.int64, device=device)
    per_image: list[Tensor] = []

    def ours() -> None:  # as engine/evaluate.py counts, which keeps three counts a class of each image, too
        matrices = confusion_matrix_per_image(prediction, labels, classes)
        confusion.add_(matrices.sum(0))
        per_image[:] = [torch.stack(iou_counts(matrices), -2)]

    options = {"num_classes": classes, "ignore_index": IGNORED}
    metrics = {
        "MulticlassJaccardIndex": MulticlassJaccardIndex(**options),
        "MulticlassJaccardIndex, validate_args=False": MulticlassJaccardIndex(**options, validate_args=False),
        "MulticlassConfusionMatrix": MulticlassConfusionMatrix(**options),
        "MulticlassConfusionMatrix, validate_args=False": MulticlassConfusionMatrix(**options, validate_args=False),
    }
    ways: dict[str, Callable[[], object]] = {"segdistill": ours}
    for name, metric in metrics.items():
        ways[name] = functools.partial(metric.to(device).update, prediction, labels)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, update in ways.items():
            spent = seconds(update, device)
            if number:  # the first round warms up
                times[name].append(spent)
    for name, metric in metrics.items():
        assert torch.equal(metric.confmat, confusion), name
    rows: list[list[object]] = []
    for name, spent in times.items():
        ratios = [theirs / own for theirs, own in zip(spent, times["segdistill"], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append([name, classes, 1000 * statistics.median(spent), f"{statistics.median(ratios):.2f}", spread])
    return rows


def main(options: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--classes", type=int, nargs="+", default=(19, 150))
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(options)
    print(machine(("torch", "torchmetrics")))
    print()
    rows: list[list[object]] = []
    for classes in given.classes:
        rows += measure(classes, tuple(given.size), given.rounds, torch.device(given.device))
    print(markdown(("counting", "classes", "ms an image", "times ours", "over the rounds"), rows))


if __name__ == "__main__":
    main()
