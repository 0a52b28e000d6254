"""The best student by validation score within the budget goes to the model registry.

One beyond a limit is not registered, however good; where none is within them, nothing is, and the reason says so.

Chosen on validation, promoted on test: the alias ``champion`` moves only if the student's test mIoU beats that of the
champion on the same test data by more than ``min_gain`` points (the rule stands in adapters/mlflow_registry.py).
"""

import functools
import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from segdistill import environment
from segdistill.config import config as config_class
from segdistill.config import parse
from segdistill.engine.settings import INFERENCE, InferenceConfig, inference_of
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError, nearest
from segdistill.files import new_folder
from segdistill.identity import facts_of
from segdistill.plan import Job, jobs
from segdistill.report.highlights import Highlights
from segdistill.stages._cohort import folders_of

if TYPE_CHECKING:
    from segdistill.models.outputs import SegmentationNetwork
    from segdistill.report.card import Formats
    from segdistill.report.results import Comparison

logger = logging.getLogger(__name__)
COMPARE = "run the stage 'compare' again"


@config_class
class Config:
    """Section ``register`` of params.yaml."""

    model_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.\-]*$", max_length=200)]
    """The registered model in MLflow."""

    student: str | None
    """Only students of this name; null takes any."""

    max_params: Annotated[int, Field(ge=1, le=10**15)] | None
    """The budget: most parameters of a student; null is no bound."""

    max_macs: Annotated[int, Field(ge=1, le=10**18)] | None
    """The budget: most multiply-accumulates of a student for one test image; null is no bound."""

    min_gain: Annotated[float, Field(ge=0, le=100)]
    """Points of test mIoU (0..100) by which a student must beat the champion to replace it."""

    max_latency_ms: Annotated[float, Field(gt=0, le=10**9)] | None = None
    """The budget: most milliseconds of a forward pass for one test image, the median that evaluate measured; null is no
    bound."""

    max_ece: Annotated[float, Field(ge=0, le=100)] | None = None
    """The budget: most points of expected calibration error (0..100) on the test split; null is no bound."""

    formats: tuple[Literal["onnx", "int8"], ...] = ()
    """What else the version has its network as, each compared with torch, scored on validation and timed: ``onnx``, and
    ``int8``, that quantised; needs the extra ``export``."""

    max_int8_loss: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Points of validation mIoU (0..100) that int8 may lose; one that loses more is left out, and the card says so."""

    data_licence: Annotated[str, Field(pattern=r"^[^|\n]+$", max_length=300)] | None = None
    """Under which licence the data set may be used, in the words that the model card is to have; null: the card says
    that it is not stated."""


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
    weights_sha256: str
    latency_ms: float | None = None  # median
    ece: float | None = None  # share

    def __str__(self) -> str:
        return f"'{self.student}' of {self.experiment}, seed {self.seed} ({100 * self.val_miou:.2f} %)"


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
    device: str = "auto",
) -> None:
    """Writes ``registration``: the model as files and ``registration.json``; registers it and moves the alias.

    Where no student passed the gate or is within the budget, nothing is registered, and ``registration.json`` says so.

    Args:
        config: the stage's parameters.
        run: the experiments.
        seeds: the seeds; every experiment with every seed is a job.
        comparison: what the stage ``compare`` wrote.
        prepared: the data set, whose test split says which scores compare.
        students: the folder of every cohort.
        registration: the folder to write.
        tracker: says which MLflow store and pipeline run.
        device: where a champion that was tested on other data is tested on these; see
            :func:`segdistill.engine.distributed.processes`.

    Raises:
        UserError: a file is missing, or the registered model serves other logits.
    """
    from segdistill.report.results import read_results

    def register_nothing(reason: str) -> None:
        with new_folder(registration) as partial:
            _write(partial, {"name": config.model_name, "version": None, "reason": reason})

    results = read_results(comparison)
    if not results.passed:
        register_nothing("no student passed the gate (compare.min_test_miou)")
        return
    folders = folders_of(jobs(run, seeds), students, "run the stage 'distill' again")
    diverged = {row.student for row in results.rows if row.diverged}
    best, choice = choose(candidates(results, folders, comparison), config, diverged)
    if best is None:
        register_nothing(choice)
        return

    from segdistill.models.export import ExportedSegmenter, load_model
    from segdistill.models.portable import contract, to_program

    classes = class_names(prepared)
    segmenter, document = load_model(best.folder, best.student, classes=classes)
    if document["sha256"] != best.weights_sha256:
        raise UserError(f"{best.folder}: '{best.student}' has other weights than were compared; {COMPARE}")
    from segdistill.adapters.mlflow_artifact import CARD, INT8, ONNX
    from segdistill.adapters.mlflow_registry import CHOICE, Submission, register
    from segdistill.report import card
    from segdistill.stages._champion import evaluate_champion
    from segdistill.stages._formats import Model, measured

    inference = inference_of(best.folder)
    network = ExportedSegmenter(segmenter).eval()
    program = to_program(network, segmenter.images.channels)
    document_of_files = contract(document, segmenter, inference)
    row, scores_of_seed = card.find(results, best.experiment, best.student, best.seed)
    beside = overlays(segmenter, prepared, parse(InferenceConfig, inference, "inference"))
    described = dict.fromkeys(beside, "test images, their labels and what the network sees")
    formats = None
    if config.formats:
        megabytes = (best.folder / f"{best.student}.safetensors").stat().st_size / 1e6
        files, formats = measured(
            Model(segmenter, document_of_files, program), config.formats, prepared, megabytes=megabytes,
            val_miou=best.val_miou, max_loss=config.max_int8_loss,
        )  # fmt: skip
        for name, place, words in (
            ("onnx", ONNX, "the same network for onnxruntime and Triton"), ("int8", INT8, "that, quantised to int8"),
        ):  # fmt: skip
            if name in files:
                beside[place], described[place] = files[name], words
        if formats.refused:
            logger.warning("no int8 file is registered: %s", formats.refused)
    model_card = card.model_card(
        results, row, scores_of_seed, contract=document_of_files, model=document["model"], name=config.model_name,
        files=described, data_md5=environment.data_md5(), data_licence=config.data_licence,
        formats=formats,
    )  # fmt: skip
    beside[CARD] = model_card.encode()
    submission = Submission(
        experiment=best.experiment,
        seed=best.seed,
        student=best.student,
        val_miou=best.val_miou,
        test_miou=best.test_miou,
        test_data=identity_of_test_data(prepared),
        weights_sha256=best.weights_sha256,
        classes=classes,
        contract=document_of_files,
        program=program,
        beside=beside,
        describe=lambda alias, reason: card.description(card.decided(model_card, alias, f"{reason}; {choice}"), CARD),
        facts={CHOICE: choice, **numbers_of(best), **tags_of(formats), **facts_of(document)},
        evaluate_champion=functools.partial(
            evaluate_champion, segmenter=segmenter, results=results, prepared=prepared, device=device,
            inference=parse(InferenceConfig, inference, "inference"),
        ),
    )  # fmt: skip
    registered = register(
        network,
        submission,
        name=config.model_name,
        min_gain=config.min_gain,
        tracker=tracker,
    )
    scores = {name: getattr(best, name) for name in ("experiment", "seed", "student", "val_miou", "test_miou")}
    result = {**asdict(registered), **scores, "distilled": row.distilled, "choice": choice}
    result["formats"] = asdict(formats) if formats else None
    with new_folder(registration) as partial:
        (partial / "model").mkdir()
        for suffix in (".safetensors", ".json"):
            shutil.copy2(best.folder / f"{best.student}{suffix}", partial / "model" / f"{best.student}{suffix}")
        (partial / "model" / INFERENCE).write_text(json.dumps(inference, indent=2) + "\n")
        for name, content in beside.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        (partial / CARD).write_text(card.decided(model_card, registered.alias, f"{registered.reason}; {choice}"))
        _write(partial, result)


def overlays(
    segmenter: "SegmentationNetwork", prepared: Path, inference: InferenceConfig, number: int = 4
) -> dict[str, bytes]:
    """Evenly spread test images with labels and prediction, as PNG files by their names in the version's artefact."""
    from segdistill.data.decoding import encode_png
    from segdistill.data.shards import ShardDataset, read_dataset_info
    from segdistill.engine.evaluate import masks
    from segdistill.engine.inference import Views
    from segdistill.report.pictures import evenly_spread, overlay

    test_set, colors = ShardDataset(prepared, "test"), [entry.color for entry in read_dataset_info(prepared).classes]
    pictures = masks(segmenter, test_set, evenly_spread(len(test_set), number), Views(inference))
    return {
        f"card/overlay-{place}.png": encode_png(overlay(image, label, mask, colors))
        for place, (image, label, mask) in enumerate(pictures)
    }


def _write(folder: Path, result: Mapping[str, Any]) -> None:
    (folder / "registration.json").write_text(json.dumps(result, indent=2) + "\n")


def candidates(results: "Comparison", folders: Mapping[Job, Path], comparison: Path) -> list[Candidate]:
    """Every student of every job that has some, in the order of the matrix.

    Args:
        results: what was compared.
        folders: the folder of each job.
        comparison: where the results are from.

    Raises:
        UserError: the comparison is not of these jobs.
    """
    compared = {Job(row.experiment, one.seed or 0) for row in results.rows for one in row.seeds}
    compared |= {Job(row.experiment, one.seed) for row in results.rows for one in row.diverged}
    if compared != set(folders):
        names = ", ".join(map(str, compared.symmetric_difference(folders)))
        raise UserError(f"{comparison / 'results.json'}: of other jobs than params.yaml has: {names}; {COMPARE}")
    trained = []
    for row in results.rows:
        for scores in row.seeds:
            assert scores.seed is not None and row.params is not None and row.macs is not None
            candidate = Candidate(
                experiment=row.experiment,
                seed=scores.seed,
                student=row.student,
                folder=folders[Job(row.experiment, scores.seed)],
                val_miou=scores.val_miou,
                test_miou=scores.test_miou,
                params=row.params,
                macs=row.macs,
                weights_sha256=scores.weights_sha256,
                latency_ms=row.latency_median_ms,
                ece=scores.ece,
            )
            trained.append(candidate)
    return trained


def choose(
    candidates: Sequence[Candidate], config: Config, diverged: Collection[str] = ()
) -> tuple[Candidate | None, str]:
    """The best by validation score within the limits, of equals the first, and why; None where none is within them.

    Args:
        candidates: those to choose from.
        config: what is allowed.
        diverged: names of students that diverged, with some seed at least, and are no candidates there.

    Raises:
        UserError: there is none of the name that the config asks for.
    """
    names = sorted({candidate.student for candidate in candidates})
    if config.student in diverged and config.student not in names:
        raise UserError(
            f"register.student: '{config.student}' diverged with every seed, so that none can be registered; "
            "lower its learning rate, or take another student"
        )
    if config.student is not None and config.student not in names:
        raise UserError(f"register.student: no student is called '{config.student}'{nearest(config.student, names)}")
    named = [one for one in candidates if config.student in (None, one.student)]
    ranked = sorted(named, key=lambda one: -one.val_miou)  # stable: of equals the first
    best = next((one for one in ranked if not beyond_limits(one, config)), None)
    passed_over = ranked if best is None else ranked[: ranked.index(best)]
    excesses = [f"{one} has {beyond_limits(one, config)}" for one in passed_over[:3]]
    if len(passed_over) > 3:
        excesses.append(f"and {len(passed_over) - 3} more")
    if best is None:
        return None, f"no student is within the limits: {'; '.join(excesses)}"
    choice = f"the best by validation ({100 * best.val_miou:.2f} %) of {len(ranked)} single runs"
    return best, f"{choice} within the limits: {'; '.join(excesses)}" if excesses else choice


def beyond_limits(candidate: Candidate, config: Config) -> str:
    """Which limits a student exceeds, in words and numbers; empty if none."""
    ece = None if candidate.ece is None else 100 * candidate.ece
    measured = (
        ("max_params", candidate.params, "parameters"),
        ("max_macs", candidate.macs, "multiply-accumulates"),
        ("max_latency_ms", candidate.latency_ms, "ms an image"),
        ("max_ece", ece, "points of ECE"),
    )
    excesses = []
    for key, value, unit in measured:
        limit = getattr(config, key)
        if limit is not None and (value is None or not value <= limit):
            has = f"an unknown number of {unit}" if value is None else f"{_number(value)} {unit}"
            excesses.append(f"{has}, more than register.{key}, {_number(limit)}")
    return " and ".join(excesses)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def numbers_of(candidate: Candidate) -> dict[str, str]:
    """What a student costs and how well it is calibrated, as tags."""
    numbers = {key: getattr(candidate, key) for key in ("params", "macs", "latency_ms", "ece")}
    return {key: str(value) for key, value in numbers.items() if value is not None}


def tags_of(formats: "Formats | None") -> dict[str, str]:
    """What each format gives and takes, as tags."""
    if formats is None:
        return {}
    return {f"format_{one.name}": f"{one} for {formats.conditions}" for one in formats.formats}


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
        return f"Not registered: {result['reason']}"
    kind = "" if result.get("distilled", True) else "undistilled "
    return (
        f"Registered: {result['name']} version {result['version']} as {result['alias'] or 'no alias'} "
        f"({result['reason']}): the {kind}'{result['student']}' of {result['experiment']}, seed {result['seed']}, "
        f"{result['choice']}"
    )


def highlights(paths: Mapping[str, Any]) -> Highlights:
    """What was registered, and why."""
    return Highlights(summary=sentence(json.loads((paths["registration"] / "registration.json").read_text())))
