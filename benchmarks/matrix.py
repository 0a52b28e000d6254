"""Offline experiments with one teacher and one seed: one after another, as a cohort, and as its parts. Prints Markdown.

    python benchmarks/matrix.py [--experiments 12] [--iterations 4] [--size 64 96] [--rounds 2]

On a GPU, at CamVid's size, in some minutes and without a network:

    python benchmarks/matrix.py --device cuda --size 360 480 --batch-size 8 --iterations 100 --precision bf16 \
        --channels-last --workers 4

Both train with the real loop and loader, on synthetic streets that are made for it, from the same seed. Every training
is of a small student (DeepLabV3+ over MobileNetV3-small at half width) under one of the ``--methods``, each time with
another weight. Parts are what stage ``distill`` makes of a cohort on a CPU: a process a thread. Each side has a process
of its own, and rounds alternate; a first training, not timed, loads what is loaded on first use. Peak memory is what
PyTorch allocated on a GPU, and the resident set on a CPU, of all processes, what they share counted in each.
"""

import argparse
import functools
import itertools
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from _cost import MIB
from _streets import make_data
from _table import machine, markdown

from segdistill.config import parse
from segdistill.data.shards import ShardDataset, read_dataset_info
from segdistill.engine.building import build_learner
from segdistill.engine.cohort import Cohort
from segdistill.engine.distributed import Processes
from segdistill.engine.parts import divided, run_parts
from segdistill.engine.settings import InferenceConfig, TrainConfig
from segdistill.engine.tracker import Tracker
from segdistill.engine.trainer import Diverged, Training
from segdistill.models.config import ModelConfig
from segdistill.models.export import count_parameters
from segdistill.models.segmenter import build_segmenter
from segdistill.models.teacher import Teacher
from segdistill.plan import ExperimentConfig, parse_methods

STUDENT = {
    "model": {
        "architecture": "DeepLabV3Plus", "encoder": "mobilenetv3_small_050", "encoder_weights": "none",
        "output_stride": 16, "decoder": {"decoder_channels": 64},
    },
    "optimizer": {"name": "sgd", "lr": 0.01},
}  # fmt: skip
INFERENCE = {"batch_size": 8, "input_scale": 1.0, "window": None, "window_stride": 0.67}


@dataclass(frozen=True)
class Side:
    """Trainings: each in a cohort of its own, all in one, or in parts with a process each."""

    given: argparse.Namespace
    prepared: Path
    experiments: range
    kind: Literal["one after another", "a cohort", "its parts"]

    def run(self) -> tuple[float, float, int]:
        """Seconds, peak memory in bytes, and the parameters of a student."""
        torch.set_num_threads(self.given.threads)
        device = torch.device(self.given.device)
        info = read_dataset_info(self.prepared)
        torch.manual_seed(0)
        encoder = {"encoder": self.given.teacher, "encoder_weights": "none", "output_stride": 8, "decoder": {}}
        model: Any = parse(ModelConfig, {"architecture": "DeepLabV3Plus", **encoder}, "teacher")
        teacher = Teacher(build_segmenter(model, info.num_classes))
        with tempfile.TemporaryDirectory() as work:

            def training(number: int) -> Training:
                return self.training(number, Path(work), info.num_classes, teacher)

            if self.kind == "its parts":  # a process that has computed with several threads must not be forked
                torch.set_num_threads(1)
            self.train([training(0)], teacher, iterations=2)
            (Path(work) / "0" / "resume.safetensors").unlink()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()

            def train(group: Sequence[int]) -> tuple[float, int]:
                trainings = [training(number) for number in group]
                return self.train(trainings, teacher, iterations=self.given.iterations), resident()

            everything = list(self.experiments)
            if self.kind == "its parts":
                torch.set_num_threads(self.given.threads)
                alone = Processes(0, 1, device)
                parts = divided(everything, lambda number: 1.0, alone)
                measured = run_parts([functools.partial(train, part) for part in parts], alone)
                seconds, peak = max(one for one, _ in measured), sum(size for _, size in measured)
            else:
                groups = [everything] if self.kind == "a cohort" else [[number] for number in everything]
                seconds, peak = sum(train(group)[0] for group in groups), resident()
            student = training(0).learner.students["student"]
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak
        return seconds, peak, count_parameters(student)

    def training(self, number: int, work: Path, num_classes: int, teacher: Teacher) -> Training:
        methods = self.given.methods
        method = {"name": methods[number % len(methods)], "weight": 1 / (1 + number // len(methods))}
        entry = {"students": {"student": STUDENT}, "methods": [method]}
        settings: ExperimentConfig = parse(ExperimentConfig, entry, "experiment")
        student, (_, configs) = settings.students["student"], parse_methods("experiment", settings)
        learner = build_learner(
            {"student": student.model},
            [one for _, one in configs],
            seed=0,
            num_classes=num_classes,
            teacher=teacher.info,
        )
        optimizers = {"student": student.optimizer}
        return Training(str(number), learner, optimizers, "", work / str(number), {"student": Tracker()})

    def train(self, trainings: Sequence[Training], teacher: Teacher, *, iterations: int) -> float:
        """Seconds from the first batch to the last step, checkpoint included."""
        given = self.given
        augmentation = {"crop_size": given.size, "scale": (0.8, 1.5), "flip": 0.5, "color_jitter": 0.2}
        settings = {
            "iterations": iterations, "seconds": None, "batch_size": given.batch_size, "accumulate": 1,
            "augmentation": augmentation, "precision": given.precision, "channels_last": given.channels_last,
            "compile": False, "max_grad_norm": None, "workers": given.workers, "cache_gib": given.cache_gib,
            "log_every": 20, "validate_every": 10**6, "checkpoint_every": 10**6, "gradient_share_every": 0,
            "select": "last",
        }  # fmt: skip
        cohort = Cohort(
            trainings, ShardDataset(self.prepared, "train"), None, parse(TrainConfig, settings, "train"),
            inference=parse(InferenceConfig, INFERENCE, "inference"), seed=0, teacher=teacher,
            processes=Processes(0, 1, torch.device(given.device)),
        )  # fmt: skip
        started = time.perf_counter()
        outcomes = cohort.run()
        if given.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        assert not any(isinstance(outcome, Diverged) for outcome in outcomes.values())
        return seconds


def resident() -> int:
    """The largest resident set of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_its_own_process(run: Callable[[], tuple[float, float, int]]) -> tuple[float, float, int]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run).result()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experiments", type=int, default=12)
    parser.add_argument("--methods", nargs="+", default=["kd", "cwd", "dist", "at"])
    parser.add_argument("--teacher", default="resnet50", help="encoder of the teacher's DeepLabV3+ at stride 8")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--size", type=int, nargs=2, default=(64, 96), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--cache-gib", type=float, default=0.0, help="decoded samples that are kept; 0 decodes each time"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args(arguments)
    count, images = given.experiments, given.experiments * given.iterations * given.batch_size
    with tempfile.TemporaryDirectory() as folder:
        prepared = make_data(Path(folder), given.size, given.samples)
        sides = get_args(Side.__annotations__["kind"])[: 2 if given.device == "cuda" or given.threads == 1 else 3]
        outcomes: dict[str, list[tuple[float, float, int]]] = {name: [] for name in sides}
        for number, name in itertools.product(range(given.rounds), sides):
            outcomes[name].append(in_its_own_process(Side(given, prepared, range(count), name).run))
            print(f"round {number + 1}, {name}: {outcomes[name][-1][0]:.1f} s", file=sys.stderr, flush=True)
        sizes = sorted({1, max(1, count // 4), max(1, count // 2)} - {count})
        peaks = {size: in_its_own_process(Side(given, prepared, range(size), "a cohort").run)[1] for size in sizes}
    peaks[count] = statistics.median(outcome[1] for outcome in outcomes["a cohort"])
    height, width = given.size
    print(
        f"{count} experiments ({', '.join(given.methods)}; {outcomes['a cohort'][0][2] / 1e6:.2f} million parameters a "
        f"student), {given.iterations} iterations of {given.batch_size} crops of {width}x{height}, {given.precision}, "
        f"{given.device}, {given.threads} threads; the teacher's encoder is {given.teacher}. {machine(['torch'])}\n"
    )
    singles = outcomes["one after another"]
    rows = []
    for name, measured in outcomes.items():
        seconds, peak = (statistics.median(outcome[place] for outcome in measured) for place in (0, 1))
        ratio = statistics.median(one[0] / other[0] for one, other in zip(singles, measured, strict=True))
        rows.append([name, f"{seconds:.1f}", f"{images / seconds:.1f}", f"{ratio:.2f}", f"{peak / MIB:.0f}"])
    print(markdown(["", "seconds", "images/s", "times as fast", "peak, MiB"], rows))
    steps = [[str(size), f"{peak / MIB:.0f}"] for size, peak in peaks.items()]
    print("\n" + markdown(["students in a cohort", "peak, MiB"], steps))


if __name__ == "__main__":
    main()
