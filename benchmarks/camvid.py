"""CamVid (SegNet split): three students, every method, with all labels and with an eighth of them. Writes Markdown.

    python benchmarks/camvid.py run --folder study --data CamVid --weights weights [--budget 540]

does what fits into ``--budget`` seconds and ends with exit code 0, or 75 where something is left to do: the same
command goes on, within a training from its last checkpoint. It needs PyTorch, timm and the like, but neither MLflow nor
KFP nor DVC, and Great Expectations only where it prepares the data. ``--preset`` says what is trained:
``presets/camvid.yaml``, for a GPU, or ``presets/camvid-cpu.yaml``. ``--weights`` holds the files of encoder weights
that the preset names.

To go on on another machine, which need not have ``--data`` or ``--weights``:

    python benchmarks/camvid.py pack --folder study study.tar      # here
    tar xf study.tar                                               # there; then run --folder study

The archive has prepared data, encoder weights, teachers, scores and predictions, and no student that is evaluated;
a cohort that was begun begins anew there unless ``--checkpoints`` sends it along.

``--iterations 3 --scale 0.2 --seeds 0`` is a rehearsal: the whole matrix, few iterations, small images.

The result is ``study/camvid.md`` and, for each arm, ``study/ARM/reports/comparison`` with ``results.json`` and a page.
Until all seeds are done it is about those that are.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from _table import machine

from segdistill.config import read_yaml, to_dict
from segdistill.errors import EXIT_RETRY, Interrupted, UserError, exit_codes
from segdistill.files import file_hash, read_json, write_file
from segdistill.plan import cohort_plan, cohorts, teacher_plan

ROOT = Path(__file__).resolve().parents[1]
UNLABELLED_ALONE = "pseudo"  # experiments of this name are of the arm that has images without labels
LARGEST_GRACE = 45.0  # seconds for a stage to write its checkpoint and end, and as many for the comparison
DONE = "done.json"
PREPARED, TEACHER = Path("artifacts/prepared"), Path("artifacts/teacher")
TUNED = Path("reports/tuning/params.yaml")


@dataclass(frozen=True)
class Step:
    """A part of an arm that is done once: commands of segdistill, one after another.

    Attributes:
        folder: below the arm's; gets the file that says that it is done.
        key: of all that decides what it gives.
    """

    name: str
    folder: Path
    key: str
    commands: Sequence[Sequence[str]]


class Clock:
    """The time that a call has.

    Args:
        budget: seconds from now, or None.
    """

    def __init__(self, budget: float | None) -> None:
        self.end = None if budget is None else time.monotonic() + budget
        self.grace = LARGEST_GRACE if budget is None else min(LARGEST_GRACE, budget / 10)

    def left(self) -> float | None:
        """Seconds until a stage must be told to end."""
        return None if self.end is None else self.end - 2 * self.grace - time.monotonic()


class Arm:
    """One matrix with its data, in a folder in which segdistill's commands run.

    Args:
        name: "all" or "eighth".
        given: the command line.
    """

    def __init__(self, name: str, given: argparse.Namespace) -> None:
        self.name, self.given = name, given
        self.folder = given.folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.params = arm_params(name, given)
        self._write_params("params.yaml", self.params)

    def prepare(self, clock: Clock) -> None:
        """Makes the data unless they are there, as made here or as sent."""
        if (self.folder / PREPARED / "checksums.json").exists():
            return
        data = self.given.data
        if data is None:
            raise UserError(f"--data: {self.folder / PREPARED} is not there yet; name the folder of CamVid")
        if not data.is_dir():
            raise UserError(f"--data: {data}: no such folder; docs/datasets.md says how CamVid lies there")
        for stage in ("validate", "prepare"):
            self._command([stage, "--data", str(data.resolve())], clock)

    def work(self, clock: Clock) -> None:
        """Does what is left.

        Raises:
            Interrupted: the time is over.
            UserError: what a stage has against what it was given.
        """
        self.prepare(clock)
        content = read_json(self.folder / PREPARED / "dataset.json")["content_hash"]
        self._step(self._teacher(content), clock)
        self._tune(clock)
        steps = list(self.cohorts())
        for number, step in enumerate(steps, 1):
            say(f"{self.name}: {step.name}, {number} of {len(steps)}")
            self._step(step, clock)

    def _teacher(self, content: str) -> Step:
        settings = [to_dict(teacher_plan(self.params["train_teacher"])), self.params["evaluate"], content]
        stages = ("plan", "train_teacher", "evaluate_teacher")
        return Step("teacher", TEACHER, key_of(settings), [[stage, *self._device(stage)] for stage in stages])

    def _tune(self, clock: Clock) -> None:
        """Replaces the parameters by tuned ones, where the preset asks for it."""
        if "tune" not in self.params or not self.given.tune:
            return
        missing = [package for package in ("optuna", "ruamel") if not installed(package)]
        if missing:
            say(f"{self.name}: not tuned, since {' and '.join(missing)} cannot be imported here")
            return
        tuned, key = self.folder / TUNED, key_of(self.params)
        marker = self.folder / "tuned.json"
        if not (tuned.exists() and marker.exists() and read_json(marker)["key"] == key):
            say(f"{self.name}: tuning")
            self._command(["tune", *self._device("tune")], clock)
            write_file(marker, json.dumps({"key": key}).encode())
        self.params = read_yaml(tuned)

    def cohorts(self) -> Iterator[Step]:
        """The cohorts, seed by seed, each with its parameters written."""
        params = self.params
        prepared = read_json(self.folder / PREPARED / "dataset.json")["content_hash"]
        teacher = read_json(self.folder / TEACHER / "teacher.json")["sha256"]
        for name, jobs in cohorts(params["run"], params["seeds"], self.given.cohort).items():
            folder, seed = Path("cohorts") / name, str(jobs[0].seed)
            part = {**params, "run": [job.experiment for job in jobs], "seeds": [jobs[0].seed]}
            part.pop("tune", None)
            self._write_params(f"{folder}/params.yaml", part)
            planned = to_dict(cohort_plan(params["distill"], params["experiments"], jobs))
            common = ["--params", f"{folder}/params.yaml"]
            students = ["--students", f"{folder}/students"]
            commands = [
                ["plan", *common, "--plan", f"{folder}/plan"],
                ["distill", *common, "--seed", seed, "--plan", f"{folder}/plan/s{seed}.json", *students],
                ["evaluate", *common, "--seed", seed, *students, "--evaluations", f"{folder}/evaluations"],
            ]
            key = key_of([planned, params["evaluate"], prepared, teacher])
            yield Step(name, folder, key, [[*command, *self._device(command[0])] for command in commands])

    def _device(self, stage: str) -> list[str]:
        return [] if stage == "plan" else ["--device", self.given.device]

    def _step(self, step: Step, clock: Clock) -> None:
        if self.is_done(step):
            return
        marker, started = self.folder / step.folder / DONE, time.time()
        for command in step.commands:
            self._command(command, clock)
        record = {"key": step.key, "machine": machine(["torch"]), "seconds_of_last_call": time.time() - started}
        write_file(marker, (json.dumps(record) + "\n").encode())

    def is_done(self, step: Step) -> bool:
        """Whether it was done, with the parameters, code and data of now."""
        marker = self.folder / step.folder / DONE
        return marker.exists() and read_json(marker)["key"] == step.key

    def _command(self, command: Sequence[str], clock: Clock) -> None:
        """Runs a command of segdistill in the arm's folder, for as long as there is time."""
        left = clock.left()
        if left is not None and left <= 0:
            raise Interrupted("the budget is spent; the same command goes on")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        process = subprocess.Popen(
            [sys.executable, "-m", "segdistill", *command, "--tracker", "none"],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=sys.stderr,
        )
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(clock.grace)
            code = EXIT_RETRY
        except (Interrupted, KeyboardInterrupt):
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(clock.grace)
            raise
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if code == EXIT_RETRY:
            raise Interrupted("the budget is spent; the same command goes on")
        if code:
            raise UserError(f"segdistill {command[0]} ended with exit code {code} in {self.folder}; it said why above")

    # -- result -------------------------------------------------------------------------------------------------------

    def compare(self) -> dict[str, Any] | None:
        """Compares the seeds that are complete; what is known of them, or None where there is none."""
        from segdistill.config import parse
        from segdistill.engine.tracker import Tracker
        from segdistill.stages import compare

        if not (self.folder / TEACHER / DONE).exists():
            return None
        self.params = read_yaml(self.folder / TUNED) if (self.folder / "tuned.json").exists() else self.params
        steps = list(self.cohorts())
        waiting = {step.name for step in steps if not self.is_done(step)}
        by_seed = {
            seed: list(cohorts(self.params["run"], [seed], self.given.cohort)) for seed in self.params["seeds"]
        }  # fmt: skip
        complete = [seed for seed, names in by_seed.items() if waiting.isdisjoint(names)]
        if not complete:
            return None
        folders = [self.folder / step.folder for step in steps if any(step.name in by_seed[seed] for seed in complete)]
        report = self.folder / "reports/comparison"
        compare.run(
            parse(compare.Config, self.params["compare"], "compare"), run=self.params["run"], seeds=complete,
            prepared=self.folder / PREPARED, teacher=self.folder / TEACHER,
            teacher_evaluation=self.folder / "reports/evaluation/teacher",
            students=[folder / "students" for folder in folders],
            evaluations=[folder / "evaluations" for folder in folders],
            report=report, metrics=self.folder / "reports/metrics.json", tracker=Tracker(),
        )  # fmt: skip
        machines = {read_json(folder / DONE)["machine"] for folder in folders}
        return {
            "seeds": complete, "wanted": self.params["seeds"], "machines": sorted(machines),
            "text": (report / "report.md").read_text().partition("\n")[2].strip(),
        }  # fmt: skip

    def _write_params(self, name: str, params: Mapping[str, Any]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, yaml.safe_dump(to_dict(params), sort_keys=False).encode())


def arm_params(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """The preset, as an arm and a rehearsal have it, with its encoder weights where the study has them."""
    params: dict[str, Any] = json.loads(json.dumps(read_yaml(given.preset)))  # anchors become copies
    train = params["distill"]["train"]
    if arm == "eighth":
        params["prepare"]["labelled"], train["unlabelled"] = 0.125, train["batch_size"]
    else:
        params["run"] = [name for name in params["run"] if not name.startswith(UNLABELLED_ALONE)]
    if given.seeds:
        params["seeds"] = given.seeds
    for section in (params["train_teacher"]["train"], train):
        if given.iterations:
            section["iterations"] = given.iterations
            for key in ("log_every", "validate_every", "checkpoint_every"):
                section[key] = min(section[key], given.iterations)
        if given.scale < 1:
            crop = section["augmentation"]["crop_size"]
            section["augmentation"]["crop_size"] = [max(32, round(side * given.scale / 8) * 8) for side in crop]
    if given.scale < 1:
        params["prepare"]["max_side"] = round((params["prepare"]["max_side"] or 480) * given.scale)
    students = [student for entry in params["experiments"].values() for student in entry["students"].values()]
    for part in (params["train_teacher"], *students):
        name = part["model"].get("encoder_weights", "none")
        if name.endswith(".safetensors"):
            part["model"]["encoder_weights"] = place_weights(name, given)
    return params


def place_weights(name: str, given: argparse.Namespace) -> str:
    """Copies encoder weights into the study, and returns their path from an arm's folder."""
    name = Path(name).name
    place = given.folder / "weights" / name
    if not place.exists():
        source = (given.weights or Path("weights")) / name
        if not source.is_file():
            raise UserError(
                f"--weights: {source}: no such file; docs/datasets.md, 'Encoder weights', says where it comes from"
            )
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
    return f"../weights/{name}"


def key_of(value: Any) -> str:
    return sha256(json.dumps(to_dict(value), sort_keys=True, default=str).encode()).hexdigest()


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


# Two commands


def run(given: argparse.Namespace) -> None:
    clock = Clock(given.budget)
    names = ["all", "eighth"] if given.arm == "both" else [given.arm]
    arms = [Arm(name, given) for name in names]
    try:
        for arm in arms:
            arm.work(clock)
    finally:
        with contextlib.suppress(FileNotFoundError):
            page = result(given, {arm.name: found for arm in arms if (found := arm.compare())})
            write_file(given.folder / "camvid.md", page.encode())
    print(given.folder / "camvid.md")


def result(given: argparse.Namespace, arms: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's part that the command writes."""
    lines = []
    for name, arm in arms.items():
        title = {"all": "All labels", "eighth": "An eighth of the labels, the other images without"}[name]
        seeds = f"{len(arm['seeds'])} of {len(arm['wanted'])} seeds are done"
        lines += [f"## {title}", "", f"{seeds}. {'; '.join(arm['machines'])}.", ""]
        # A heading of the comparison's page is one below ours.
        lines += [f"#{line}" if line.startswith("#") else line for line in arm["text"].splitlines()]
        lines += [""]
    return "\n".join(lines) if lines else "No seed is complete yet.\n"


def pack(given: argparse.Namespace) -> None:
    """Writes the archive of what another machine needs."""
    folder = given.folder
    if not folder.is_dir():
        raise UserError(f"--folder: {folder}: no such folder; run the study there first")
    sizes = {"data": 0, "weights": 0, "the rest": 0}
    partial = given.archive.with_name(given.archive.name + ".partial")
    with tarfile.open(partial, "w") as archive:
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if not path.is_file() or not travels(folder, inside, checkpoints=given.checkpoints):
                continue
            archive.add(path, f"{folder.resolve().name}/{inside}")
            kind = "data" if PREPARED.name in inside.parts else "the rest"
            sizes["weights" if inside.parts[0] == "weights" else kind] += path.stat().st_size
    partial.replace(given.archive)
    parts = ", ".join(f"{size / 1e6:.1f} MB {kind}" for kind, size in sizes.items())
    print(f"{given.archive}: {parts}; SHA-256 {file_hash(given.archive)}")


def travels(folder: Path, inside: Path, *, checkpoints: bool) -> bool:
    """Whether a file is needed elsewhere: neither scratch, nor the weights of students that are evaluated."""
    parts = inside.parts
    if any(part.startswith(".") or part.endswith(".partial") for part in parts):
        return False
    if any(part.endswith(".work") for part in parts):
        return checkpoints
    if "cohorts" in parts:
        cohort = folder.joinpath(*parts[: parts.index("cohorts") + 2])
        if not (cohort / DONE).exists():
            return checkpoints
        return inside.suffix != ".safetensors"
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    study = commands.add_parser("run", help="do what is left, within the budget")
    study.add_argument("--folder", type=Path, default=Path("study"), help="of all state and the result (%(default)s)")
    study.add_argument("--data", type=Path, help="CamVid in the SegNet split; not needed once the data are prepared")
    study.add_argument("--weights", type=Path, help="the folder of encoder weights; needed once (./weights)")
    study.add_argument("--preset", type=Path, default=ROOT / "presets/camvid.yaml", help="what is trained")
    study.add_argument("--arm", choices=["all", "eighth", "both"], default="both", help="how many labels (%(default)s)")
    study.add_argument("--budget", type=float, metavar="SECONDS", help="of this call, its end included; default none")
    study.add_argument(
        "--cohort", type=int, default=8, metavar="N", help="experiments that train together; %(default)s"
    )
    study.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    study.add_argument("--no-tune", dest="tune", action="store_false", help="take the preset's settings as they are")
    study.add_argument("--seeds", type=int, nargs="+", help="instead of the preset's")
    study.add_argument("--iterations", type=int, help="for a rehearsal: of the teacher and of each student")
    study.add_argument("--scale", type=float, default=1.0, help="for a rehearsal: of images and crops (%(default)s)")
    archive = commands.add_parser("pack", help="write the archive of what another machine needs")
    archive.add_argument("--folder", type=Path, default=Path("study"))
    archive.add_argument("--checkpoints", action="store_true", help="with what is half trained: some hundred MB")
    archive.add_argument("archive", type=Path, help="the .tar to write")
    given = parser.parse_args(arguments)
    with exit_codes(f"camvid {given.command}"):
        {"run": run, "pack": pack}[given.command](given)


if __name__ == "__main__":
    main()
