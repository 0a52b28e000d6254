"""How long a command takes to begin: cold, and as a fork of the preloaded server (segdistill/warm.py).

    python benchmarks/startup.py [--runs 3]

Prints Markdown. A row is the wall-clock time of a whole process that imports what a command needs, and ends; the cold
and the warm run of a row alternate, so that both meet the same machine. The imports of the server are paid once for a
whole ``dvc repro`` and have a line of their own.
"""

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _table import machine, markdown

HERE = Path(__file__).resolve().parent
WARM_CLIENT = "import sys; from segdistill import warm; sys.exit(warm.run(sys.argv[1:], target='startup'))"
TRAINING = "torch torch._dynamo torchvision.transforms.v2 timm segmentation_models_pytorch safetensors.torch"
# What is measured: a name, and the modules that such a command has imported before its work begins.
COMMANDS = {
    "nothing": "",
    "`segdistill --help`": "segdistill.__main__ segdistill.stages",
    "`prepare`: pyarrow, Pillow, mlflow": "pyarrow.parquet PIL.Image mlflow",
    "torch alone": "torch",
    "`distill`, `evaluate`: torch, torchvision, timm, smp": TRAINING,
    "the same, and mlflow on SQLite": f"{TRAINING} mlflow mlflow.store.tracking.sqlalchemy_store",
}


def seconds(command: list[str], environ: dict[str, str]) -> float:
    """Wall-clock time of one process, which must succeed."""
    before = time.perf_counter()
    subprocess.run(command, env=environ, cwd=HERE.parent, check=True)
    return time.perf_counter() - before


def measure(runs: int) -> tuple[list[list[object]], float]:
    """The rows of the table, and the time of the first warm command, which starts the server."""
    cold_client, warm_client = (
        [sys.executable, "-m", "startup", "--probe"],
        [sys.executable, "-c", WARM_CLIENT, "--probe"],
    )
    with tempfile.TemporaryDirectory(prefix="warm") as private:  # its removal ends the server
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SEGDISTILL_WARM")}
        environ |= {"XDG_RUNTIME_DIR": private, "PYTHONPATH": str(HERE), "SEGDISTILL_WARM_IDLE": "600"}
        first = seconds(warm_client, environ)
        rows: list[list[object]] = []
        for name, modules in COMMANDS.items():
            seconds([*cold_client, *modules.split()], environ)  # the files are in the page cache from here on
            pairs = [
                (seconds([*cold_client, *modules.split()], environ), seconds([*warm_client, *modules.split()], environ))
                for _ in range(runs)
            ]
            cold, warm = (statistics.median(times) for times in zip(*pairs, strict=True))
            rows.append([name, cold, warm, f"{cold / warm:.1f}x"])
    return rows, first


def main() -> None:
    parser = argparse.ArgumentParser(description="start-up times, cold and warm, as Markdown")
    parser.add_argument("--runs", type=int, default=3, help="the median of this many runs (%(default)s)")
    parser.add_argument("--probe", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.probe is not None:
        for name in arguments.probe:
            importlib.import_module(name)
        return
    rows, first = measure(arguments.runs)
    print(f"Machine: {machine(('torch', 'torchvision', 'timm', 'mlflow'))}. Median of {arguments.runs} runs.\n")
    print(markdown(["process that imports", "cold, s", "warm, s", "cold / warm"], rows))
    print(f"\nThe first warm command starts the server and waits for its imports: {first:.1f} s, once.")


if __name__ == "__main__":
    main()
