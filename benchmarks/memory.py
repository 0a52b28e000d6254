"""Memory over time of prepare, train_teacher and evaluate_teacher, as a user runs them, at full size. Markdown.

    python benchmarks/memory.py [--images 200] [--size 1024 2048] [--classes 150] [--iterations 150] [--picture FILE]

Scenes are blocks of random classes under noise, three in four for training and the others, but for two, for the test.
Each stage is a process of its own, whose memory, with that of its children, is read from /proc while it runs: what it
has for itself. Files that it maps, such as the shards, are not counted: the system takes those pages back when it
needs them. Decoded samples are kept in at most --cache GiB, for otherwise they fill half of what is free.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from _table import machine, markdown
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 64  # pixels of one class along a side
STAGES = ("prepare", "train_teacher", "evaluate_teacher")
PARTS = (0.25, 0.5, 0.75, 1.0)
PAUSE = 0.1  # seconds between two readings
Reading = tuple[float, float]  # seconds since the start, MiB


def write_scenes(data: Path, images: int, size: Sequence[int], classes: int) -> None:
    """A data set in the layout ``folder``, made an image at a time."""
    random = np.random.default_rng(0)
    colours = random.integers(0, 256, (classes, 3), dtype=np.uint8)
    splits = {"train": 3 * images // 4, "val": 2, "test": images - 3 * images // 4 - 2}
    for split, count in splits.items():
        for kind in ("images", "masks"):
            (data / kind / split).mkdir(parents=True)
        for number in range(count):
            coarse = random.integers(0, classes, [-(-side // BLOCK) for side in size], dtype=np.uint8)
            mask = coarse.repeat(BLOCK, 0).repeat(BLOCK, 1)[: size[0], : size[1]]
            noise = random.integers(0, 32, (*size, 1), dtype=np.uint8)
            Image.fromarray(colours[mask] // 2 + noise).save(data / f"images/{split}/{number:05d}.jpg", quality=90)
            Image.fromarray(mask).save(data / f"masks/{split}/{number:05d}.png", compress_level=1)
    entries = [{"name": f"class {number}", "color": colour.tolist()} for number, colour in enumerate(colours)]
    (data / "classes.json").write_text(json.dumps({"classes": entries}))


def params(given: argparse.Namespace) -> dict[str, Any]:
    """params.yaml, with a network that takes few seconds an image and crops of a quarter of its sides."""
    changed: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    teacher = changed["train_teacher"]
    teacher["model"] = changed["experiments"]["none"]["students"]["cnn"]["model"]
    crop = [side // 4 for side in given.size]
    teacher["train"] |= {
        "iterations": given.iterations, "batch_size": 2, "cache_gib": given.cache, "workers": 1,
        "validate_every": given.iterations, "checkpoint_every": max(1, given.iterations // 4),
        "augmentation": {"crop_size": crop, "scale": [0.5, 2.0], "flip": 0.5, "color_jitter": 0.2},
    }  # fmt: skip
    teacher["inference"] = changed["evaluate"]["inference"] = {**teacher["inference"], "batch_size": 1}
    changed["evaluate"]["latency_repeats"] = 1
    return changed | {"run": ["none"], "seeds": [0]}


def run(stage: str, folder: Path) -> list[Reading]:
    """Runs a stage to its end and reads its memory meanwhile."""
    print(stage, file=sys.stderr)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started, readings = time.perf_counter(), list[Reading]()
    with (folder / f"{stage}.log").open("w+") as log:
        command = [sys.executable, "-m", "segdistill", stage]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                readings.append((time.perf_counter() - started, own_memory(process.pid)))
                time.sleep(PAUSE)
        finally:
            process.terminate()
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{stage} failed:\n{log.read()}")
    return readings


def own_memory(process: int) -> float:
    """MiB that a process and its children have for themselves; 0 for one that has just ended."""
    try:
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    kibibytes = sum(int(fields.get(field, "0 kB").split()[0]) for field in ("RssAnon", "RssShmem"))
    return kibibytes / 1024 + sum(own_memory(int(child)) for child in children)


def row(stage: str, readings: Sequence[Reading]) -> list[object]:
    """The most memory in each quarter of the time, and of all."""
    end = readings[-1][0]
    quarters = [
        max((memory for second, memory in readings if end * (part - 0.25) <= second <= end * part), default=0.0)
        for part in PARTS
    ]
    return [stage, f"{end:.0f}", *(f"{memory:.0f}" for memory in (*quarters, max(quarters)))]


def draw(stages: dict[str, list[Reading]], picture: Path) -> None:
    """A curve a stage, beside each other."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(stages), figsize=(9, 2.6), layout="constrained")
    for axis, (stage, readings) in zip(axes, stages.items(), strict=True):
        axis.plot(*zip(*readings, strict=True), color="#2a6f97", linewidth=1.2)
        axis.set(title=stage, xlabel="seconds", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("MiB")
    figure.savefig(picture, dpi=110)


def main(options: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="(%(default)s; 12 at least)")
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--classes", type=int, default=150)
    parser.add_argument("--iterations", type=int, default=150, help="of the training, 2 crops each (%(default)s)")
    parser.add_argument("--cache", type=float, default=0.25, help="GiB for decoded samples (%(default)s)")
    parser.add_argument("--picture", type=Path, help="where to draw the curves, a PNG")
    given = parser.parse_args(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scenes(folder / "data", given.images, given.size, given.classes)
        (folder / "params.yaml").write_text(yaml.safe_dump(params(given)))
        report = folder / "reports/validation"  # as validate would write it: nobody else has touched the data
        report.mkdir(parents=True)
        (report / "summary.json").write_text('{"success": true, "layout": "folder"}')
        run("plan", folder)
        stages = {stage: run(stage, folder) for stage in STAGES}
    print(f"{given.images} images of {given.size[1]}x{given.size[0]}, {given.classes} classes. {machine()}\n")
    header = ["stage", "seconds", *(f"MiB, quarter {number}" for number in (1, 2, 3, 4)), "peak"]
    print(markdown(header, [row(stage, readings) for stage, readings in stages.items()]))
    if given.picture:
        draw(stages, given.picture)


if __name__ == "__main__":
    main()
