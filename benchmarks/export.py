"""The formats of one network, mIoU on the test split, latency and size, as the table of docs/results/export.md.

    python benchmarks/export.py MODEL [MODEL ...] --prepared artifacts/prepared

Latency is that of one image of the test split's first size on the CPU: the median of repeated passes when warm, of all
formats in turn, so that what else the machine does falls upon all alike.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch

from segdistill.commands._model import open_model
from segdistill.data.shards import ShardDataset
from segdistill.engine.distributed import Processes
from segdistill.engine.evaluate import evaluate
from segdistill.engine.inference import Views
from segdistill.engine.stopwatch import pass_seconds
from segdistill.models import portable
from segdistill.stages._formats import quantized, to_file

CPU = torch.device("cpu")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("models", nargs="+", metavar="MODEL")
    arguments.add_argument("--prepared", type=Path, default=Path("artifacts/prepared"))
    arguments.add_argument("--calibration", type=int, default=64)
    arguments.add_argument("--rounds", type=int, default=5, help="of 20 passes of each format (%(default)s)")
    given = arguments.parse_args()
    test_set = ShardDataset(given.prepared, "test")
    size = test_set[0][1].shape
    print(
        f"One image of {size[0]} x {size[1]}, {torch.get_num_threads()} thread(s); test mIoU of {len(test_set)} images."
    )
    print("\n| network | format | test mIoU | latency, ms | size, MB |\n|---|---|---|---|---|")
    for text in given.models:
        model = open_model(text, None, CPU)
        with tempfile.TemporaryDirectory() as scratch:
            files = {name: Path(scratch) / f"model.{name}" for name in ("pt2", "onnx")}
            for path in files.values():
                to_file(model, path)
            files["onnx, int8"] = quantized(model, files["onnx"], given.prepared, given.calibration, 100.0).path
            networks = {"torch": model.network} | {
                name: portable.load_portable(path, CPU)[0] for name, path in files.items()
            }
            rounds = [
                {name: statistics.median(pass_seconds(network, size, repeats=20)) for name, network in networks.items()}
                for _ in range(given.rounds)
            ]
            for name, network in networks.items():
                classes = len(model.contract["classes"])
                scores = evaluate(
                    network, test_set, Views(model.inference), num_classes=classes, processes=Processes(0, 1, CPU)
                )
                seconds = statistics.median(one[name] for one in rounds)
                megabytes = f"{files[name].stat().st_size / 1e6:.1f}" if name in files else ""
                label = f"{Path(text).name}/{model.contract['name']}"
                print(
                    f"| {label} | {name} | {100 * scores.miou:.2f} | {1000 * seconds:.1f} | {megabytes} |", flush=True
                )


if __name__ == "__main__":
    main()
