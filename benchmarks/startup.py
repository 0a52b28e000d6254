"""What a command's start and end take, with Python's garbage collection as it is and as ours has it. Prints Markdown.

    python benchmarks/startup.py [--rounds 5]

A process imports what the training stages import, and ends; seconds are the fastest of the rounds, which alternate.
"""

import argparse
import subprocess
import sys
import time

from _table import machine, markdown

IMPORTS = "import segmentation_models_pytorch, mlflow"
SETTINGS = {
    "as Python has it": "",
    "as segdistill has it": "from segdistill.__main__ import leave_imports_alone; leave_imports_alone()",
}


def seconds_of(setting: str) -> tuple[float, float]:
    """Of the imports, and of the whole process."""
    code = f"{setting}\nimport time\nbegan = time.perf_counter()\n{IMPORTS}\nprint(time.perf_counter() - began)"
    started = time.perf_counter()
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return float(printed), time.perf_counter() - started


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=5)
    rounds = range(arguments.parse_args().rounds)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
    for _ in rounds:
        for name, setting in SETTINGS.items():
            taken[name].append(seconds_of(setting))
    print(f"{machine(('torch', 'mlflow'))}\n")
    print(markdown(["garbage collection", "imports, s", "process, s"],
                   [[name, *map(min, zip(*seconds, strict=True))] for name, seconds in taken.items()]))  # fmt: skip


if __name__ == "__main__":
    main()
