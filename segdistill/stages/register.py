"""The best student by validation score within the budget goes to the model registry.

Chosen on validation, promoted on test: the alias ``champion`` moves only if the student's test mIoU beats that of the
champion on the same test data by more than ``min_gain`` points (the rule stands in adapters/mlflow_registry.py).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from segdistill.config import config as config_class
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError, nearest
from segdistill.files import new_folder, read_sealed_json
from segdistill.identity import facts_of
from segdistill.plan import jobs
from segdistill.report.highlights import Highlights
from segdistill.stages._cohort import diverged, folders_of

COMPARE = "run the stage 'compare' again"


@config_class
class Config:
    """Section ``register`` of params.yaml."""

    # The registered model in MLflow.
    model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$", max_length=200)]
    # Only students of this name; null takes any.
    student: str | None
    # The budget; null is no bound. MACs are those of one test image.
    max_params: Annotated[int, Field(ge=1, le=10**15)] | None
    max_macs: Annotated[int, Field(ge=1, le=10**18)] | None
    # Points of test mIoU (0..100) by which a student must beat the champion to replace it.
    min_gain: Annotated[float, Field(ge=0, le=100)]


@dataclass(frozen=True)
class Candidate:
    """One trained student with what the choice depends on; scores are shares (0..1)."""

    experiment: str
    seed: int
    student: str
    folder: Path
    val_miou: float
    test_miou: float
    params: int
    macs: int


def run(
    config: Config,
    *,
    run: list[str],
    seeds: list[int],
    comparison: Path,
    prepared: Path,
    students: list[Path],
    registration: Path,
    tracker: Tracker,
) -> None:
    """Writes ``registration``: the model as files and ``registration.json``; registers it and moves the alias.

    Where no student passed the gate, nothing is registered, and ``registration.json`` says so.

    Args:
        config: the stage's parameters.
        run: the experiments.
        seeds: the seeds; every experiment with every seed is a job.
        comparison: what the stage ``compare`` wrote.
        prepared: the data set, whose test split says which scores compare.
        students: the folder of every cohort.
        registration: the folder to write.
        tracker: says which MLflow store and pipeline run.

    Raises:
        UserError: no student is within the budget, a file is missing, or the registered model serves other logits.
    """
    if not passed(comparison):
        with new_folder(registration) as partial:
            _write(partial, {"name": config.model_name, "version": None, "reason": "no student passed the gate"})
        return
    best = choose(read_candidates(run, seeds, students, comparison), config)

    from segdistill.models.export import ExportedSegmenter, load_model

    classes = class_names(prepared)
    segmenter, document = load_model(best.folder, best.student, classes=classes)
    from segdistill.adapters.mlflow_registry import Submission, register

    submission = Submission(
        experiment=best.experiment,
        seed=best.seed,
        student=best.student,
        val_miou=best.val_miou,
        test_miou=best.test_miou,
        test_data=identity_of_test_data(prepared),
        weights_sha256=document["sha256"],
        classes=classes,
        facts={"params": str(best.params), "macs": str(best.macs), **facts_of(document)},
    )
    registered = register(
        ExportedSegmenter(segmenter).eval(),
        submission,
        name=config.model_name,
        min_gain=config.min_gain,
        tracker=tracker,
    )
    scores = {name: getattr(best, name) for name in ("experiment", "seed", "student", "val_miou", "test_miou")}
    result = {**asdict(registered), **scores}
    with new_folder(registration) as partial:
        (partial / "model").mkdir()
        for suffix in (".safetensors", ".json"):
            shutil.copy2(best.folder / f"{best.student}{suffix}", partial / "model" / f"{best.student}{suffix}")
        _write(partial, result)


def _write(folder: Path, result: Mapping[str, Any]) -> None:
    (folder / "registration.json").write_text(json.dumps(result, indent=2) + "\n")


def passed(comparison: Path) -> bool:
    """What the gate ``compare.min_test_miou`` said.

    Raises:
        UserError: the comparison has no such verdict.
    """
    results = comparison / "results.json"
    verdict = read_sealed_json(comparison, "results.json", mend=COMPARE).get("passed")
    if not isinstance(verdict, bool):
        raise UserError(f"{results}: passed: expected true or false, found {verdict!r}; run compare again")
    return verdict


def read_candidates(
    run: Sequence[str], seeds: Sequence[int], students: Sequence[Path], comparison: Path
) -> list[Candidate]:
    """Every student of every job, in the order of the matrix.

    Raises:
        UserError: a job's file is absent, or the comparison is not of these jobs.
    """
    from segdistill.report.inputs import read_training

    results = comparison / "results.json"
    compared: dict[tuple[str, int, str], tuple[dict[str, Any], dict[str, Any]]] = {}
    for row in read_sealed_json(comparison, "results.json", mend=COMPARE).get("rows", []):
        for entry in row["seeds"]:
            compared[row["experiment"], entry["seed"], row["student"]] = (row, entry)
    candidates = []
    for job, folder in folders_of(jobs(run, seeds), students, "run the stage 'distill' again").items():
        if diverged(folder):
            continue
        experiment, seed = job.experiment, job.seed
        for student, scores in read_training(folder)["students"].items():
            found = compared.get((experiment, seed, student))
            if found is None:
                raise UserError(
                    f"{results}: nothing about {experiment} ({student}) with seed {seed}; run compare again"
                )
            row, entry = found
            candidates.append(
                Candidate(
                    experiment,
                    seed,
                    student,
                    folder,
                    scores["val/miou"],
                    entry["test_miou"],
                    row["params"],
                    row["macs"],
                )
            )
    return candidates


def choose(candidates: Sequence[Candidate], config: Config) -> Candidate:
    """The best by validation score among those that the config allows; of equals the first.

    Raises:
        UserError: there is none.
    """
    names = sorted({candidate.student for candidate in candidates})
    if config.student is not None and config.student not in names:
        raise UserError(f"register.student: no student is called '{config.student}'{nearest(config.student, names)}")
    fitting = [one for one in candidates if config.student in (None, one.student)]
    for key, bound in (("params", config.max_params), ("macs", config.max_macs)):
        within = [one for one in fitting if bound is None or getattr(one, key) <= bound]
        if not within:
            least = min(getattr(one, key) for one in fitting)
            raise UserError(f"register.max_{key}: {bound} is below every student left, of which the least has {least}")
        fitting = within
    return max(fitting, key=lambda one: one.val_miou)


def identity_of_test_data(prepared: Path) -> str:
    """A hash of the classes and of every test image and label, whatever the shards they lie in."""
    from segdistill.data.shards import ShardDataset

    return ShardDataset(prepared, "test").content_hash


def class_names(prepared: Path) -> tuple[str, ...]:
    """The class of each logit, in order."""
    from segdistill.data.shards import read_dataset_info

    return tuple(entry.name for entry in read_dataset_info(prepared).classes)


def sentence(result: Mapping[str, Any]) -> str:
    """``registration.json`` in words."""
    if result["version"] is None:
        return f"Not registered: {result['reason']} (compare.min_test_miou)"
    return (
        f"Registered: {result['name']} version {result['version']} as {result['alias'] or 'no alias'} "
        f"({result['reason']}): the '{result['student']}' of {result['experiment']}, seed {result['seed']}, "
        "the best by validation"
    )


def highlights(paths: Mapping[str, Any]) -> Highlights:
    """What was registered, and why."""
    return Highlights(summary=sentence(json.loads((paths["registration"] / "registration.json").read_text())))
