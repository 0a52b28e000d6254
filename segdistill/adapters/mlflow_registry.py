"""The model registry: a version for a student, a check that it serves what was trained, and who is champion.

The rule of the alias ``champion``: without a champion the new version takes it; against a champion it takes it only if
its test mIoU on the same test data is higher by more than ``min_gain`` points. A champion that was tested on other data
is tested on the present ones first (:attr:`Submission.evaluate_champion`); where that cannot be, they do not compare.
Nor do networks whose logits stand for other classes: who serves the champion relies on its channels. In both cases the
champion stays, the new version is ``challenger``, and a person decides.
"""

import contextlib
import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from segdistill import environment
from segdistill.adapters.mlflow_artifact import SealedModel, check_files
from segdistill.adapters.mlflow_names import model_name
from segdistill.adapters.mlflow_store import (
    ROLE_TAG,
    Store,
    default_store,
    ensure_run,
    experiment_id,
    import_mlflow,
    one_line,
)
from segdistill.adapters.mlflow_tracking import MlflowTracker, Settings
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.files import read_text
from segdistill.images import of_contract

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from torch import nn
    from torch.export import ExportedProgram

logger = logging.getLogger(__name__)

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ALREADY = "it is the champion already"
REASON = "decision"  # the tag that says why a version has the alias that it got
CHOICE = "choice"  # the tag that says why it was registered
WEIGHTS, TEST_MIOU, TEST_DATA = "weights_sha256", "test_miou", "test_data"
CLASSES, CHECKSUMS = "classes", "checksums_sha256"  # of the logits, as JSON; of the files, all together
_URI = re.compile(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))")
CHECKED_SIZES = ((64, 96), (97, 75))  # (H, W); the exported graph must take any, odd ones too


@dataclass(frozen=True)
class Registered:
    """What became of a student in the registry."""

    name: str
    version: int
    alias: str
    previous_champion: int | None
    reason: str
    run_id: str
    model_uri: str


@dataclass(frozen=True)
class ChampionScore:
    """What a champion did on the present test data."""

    test_miou: float  # 0..1
    paired: str  # its difference to the student that asks, image by image, in words; empty where there is none


@dataclass(frozen=True)
class Submission:
    """A student that asks for registration."""

    experiment: str
    seed: int
    student: str
    val_miou: float  # 0..1, as test_miou
    test_miou: float
    test_data: str  # the identity of the test images and labels behind test_miou
    weights_sha256: str
    classes: tuple[str, ...]  # the name of each logit
    contract: Mapping[str, Any]  # what a file of it says of itself (models/portable.py)
    facts: Mapping[str, str]  # further tags
    program: "ExportedProgram | None" = None  # the graph of the network, where it was traced already
    describe: Callable[[str, str], str] | None = None  # alias and reason to the version's description, in Markdown
    beside: Mapping[str, bytes] = field(default_factory=dict)  # further files of its artefact
    evaluate_champion: Callable[[Path], ChampionScore] | None = (
        None  # tests a champion's exported program on the data of test_data
    )


def register(model: "nn.Module", submission: Submission, *, name: str, min_gain: float, tracker: Tracker) -> Registered:
    """Registers ``model`` under ``name``, unless these very weights are there, checks it, and gives it its alias.

    Args:
        model: images [B, C, H, W] in 0..1 to logits [B, K, H, W], in eval mode.
        submission: whose model it is.
        name: the registered model.
        min_gain: points of mIoU by which the champion must be beaten.
        tracker: says which store and pipeline run; any other than MLflow's means the default store.
    """
    settings = tracker.settings if isinstance(tracker, MlflowTracker) else None
    store = settings.store if settings else default_store(Path())
    with _as_current(store):
        return _register(model, submission, name, min_gain, store, settings)


def _register(
    model: "nn.Module", submission: Submission, name: str, min_gain: float, store: Store, settings: Settings | None
) -> Registered:
    import mlflow

    client = store.client()
    tags = _tags(submission, settings.tags if settings else {})
    _ensure_model(client, name)
    version = find_version(client, name, tags)
    is_new = version is None
    if version is None:
        trained = find_training_run(client, store, submission)
        run_id = trained or ensure_run(
            client,
            store,
            settings.pipeline_run if settings else "by-hand",
            "register",
            tags,
            settings.dataset if settings else None,
        )
        mlflow.set_experiment(experiment_id=client.get_run(run_id).info.experiment_id)
        uri, checksums = log_exported(model, submission, run_id, tags)
        if trained is None:
            client.set_terminated(run_id)
        own = {**tags, CHECKSUMS: checksums, "run_id": run_id}
        with store.lock(".registry"):  # another process may have been faster
            version = find_version(client, name, tags) or client.create_model_version(
                name, source=uri, run_id=run_id, tags=own, model_id=uri.removeprefix("models:/")
            )
    try:
        channels = of_contract(submission.contract).channels
        check_served(model, f"models:/{name}/{version.version}", version.tags[CHECKSUMS], channels=channels)
    except UserError:
        if is_new:
            client.delete_model_version(name, version.version)
        raise
    # The same weights may have been tested on other data since, and chosen among others.
    for key in {TEST_MIOU, TEST_DATA, CHOICE, "ece", "latency_ms"} & set(tags):
        client.set_model_version_tag(name, version.version, key, tags[key])
    version = client.get_model_version(name, version.version)
    evaluated_again = _evaluate_champion(client, name, version, submission)
    with store.lock(".registry"):
        alias, previous, reason = award(client, name, version, min_gain)
    if alias == CHAMPION and previous is not None:
        client.set_registered_model_alias(name, PREVIOUS, str(previous))
    if reason == ALREADY:  # what was decided when it became champion still holds
        reason = version.tags.get(REASON, reason)
    reason = "; ".join(filter(None, (reason, evaluated_again)))
    client.set_model_version_tag(name, version.version, REASON, reason)
    if submission.describe is not None:
        client.update_model_version(name, version.version, submission.describe(alias, reason))
    run_id = version.run_id or version.tags.get("run_id", "")
    return Registered(name, int(version.version), alias, previous, reason, run_id, f"models:/{name}/{version.version}")


def _evaluate_champion(client: "MlflowClient", name: str, version: "ModelVersion", submission: Submission) -> str:
    """Tests a champion that was tested on other data on the present ones; says what came of it, or why not."""
    from mlflow.exceptions import MlflowException

    champion = holder(client, name, CHAMPION)
    if champion is None or champion.version == version.version or submission.evaluate_champion is None:
        return ""
    if _same_test(version, champion) or CLASSES not in champion.tags or not _same_classes(version, champion):
        return ""
    uri = f"models:/{name}/{champion.version}"
    try:
        with tempfile.TemporaryDirectory(prefix="segdistill-model-") as scratch:
            test = submission.evaluate_champion(_download(uri, champion, scratch) / "data" / "model.pt2")
    except (UserError, MlflowException, OSError) as error:
        reason = str(error) if isinstance(error, UserError) else one_line(error)
        return f"the champion could not be evaluated on the present test data: {reason}"
    before = f"it had {100 * _score(champion):.2f} % on others"
    tested = f"evaluated again on the present test data, the champion has {100 * test.test_miou:.2f} % mIoU; {before}"
    tags = {TEST_MIOU: repr(test.test_miou), TEST_DATA: submission.test_data, "evaluated_again": tested}
    for key, value in tags.items():
        client.set_model_version_tag(name, champion.version, key, value)
    return "; ".join(filter(None, (tested, test.paired)))


def _download(uri: str, version: "ModelVersion", scratch: str) -> Path:
    """The files of a version, looked at but not loaded.

    Raises:
        UserError: they are not those that were registered.
    """
    import mlflow

    if CHECKSUMS not in version.tags:
        raise UserError(f"{uri}: was registered without checksums, so nobody can tell whose files these are")
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}", dst_path=scratch))
    check_files(folder, version.tags[CHECKSUMS], uri)
    return folder


def find_version(client: "MlflowClient", name: str, tags: Mapping[str, str]) -> "ModelVersion | None":
    """The lowest version with these weights for these classes; one without checksums can no longer be verified."""
    versions = client.search_model_versions(f"name = '{name}' and tags.{WEIGHTS} = '{tags[WEIGHTS]}'")
    same = [one for one in versions if one.tags.get(CLASSES) == tags[CLASSES] and CHECKSUMS in one.tags]
    return min(same, key=lambda version: int(version.version), default=None)


def find_training_run(client: "MlflowClient", store: Store, submission: Submission) -> str | None:
    """The latest finished run that trained this student with this identity; None, which is said, if there is none."""
    identity = submission.facts.get("identity", "")
    condition = (
        f"tags.identity = '{identity}' and tags.student = '{submission.student}' and tags.`{ROLE_TAG}` = 'run' "
        "and attributes.status = 'FINISHED'"
    )
    order = ["attributes.start_time DESC"]
    runs = client.search_runs([experiment_id(client, store)], condition, max_results=1, order_by=order)
    if runs:
        return str(runs[0].info.run_id)
    unknown = "%s knows no finished run with the tags identity '%s' and student '%s': the model gets a run of its own"
    logger.warning(unknown, store.address, identity, submission.student)
    return None


def log_exported(model: "nn.Module", submission: Submission, run_id: str, tags: Mapping[str, str]) -> tuple[str, str]:
    """Logs the model to a run as an exported program, without pickle, for any batch and image size.

    Returns:
        Its URI, and the SHA-256 of the list of its files' hashes.
    """
    import mlflow
    from mlflow.entities import Metric
    from mlflow.models import Model

    from segdistill.models.portable import to_program

    program = submission.program or to_program(model, of_contract(submission.contract).channels)
    flavor = SealedModel(program, len(submission.classes), submission.contract, submission.beside)
    info = Model.log(
        artifact_path=None,
        name=model_name(submission.student),
        flavor=flavor,
        run_id=run_id,
        tags=dict(tags),
        metadata={"classes": list(submission.classes), "segdistill": dict(submission.contract)},  # for who serves it
    )
    score = Metric("test/miou", submission.test_miou, round(1000 * time.time()), 0, model_id=info.model_id)
    mlflow.MlflowClient().log_batch(run_id, metrics=[score])
    return f"models:/{info.model_id}", flavor.checksums


def fetch(uri: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Brings the files of a registered model, looked at but not loaded, and its contract.

    Args:
        uri: ``models:/<name>@<alias>`` or ``models:/<name>/<version>``.
        folder: where to.

    Raises:
        UserError: there is no such version, or its files are not those that were registered.
    """
    store = default_store(Path())
    with _as_current(store):
        from mlflow.exceptions import MlflowException

        parts = _URI.fullmatch(uri)
        if parts is None:
            raise UserError(f"{uri}: not a registered model; allowed: models:/NAME@ALIAS, models:/NAME/VERSION")
        client, (name, alias, number) = store.client(), parts.groups()
        try:
            version = (
                client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
            )
        except MlflowException as error:
            raise UserError(f"{uri}: {store.address} has no such version ({one_line(error)})") from None
        version = client.get_model_version(name, version.version)  # with its tags
        path = _download(uri, version, str(folder))
    description = yaml.safe_load(read_text(path / "MLmodel"))
    return path, dict((description.get("metadata") or {}).get("segdistill") or {})


def champions(name: str) -> dict[str, dict[str, str]]:
    """The versions that have an alias: alias -> ``version`` and its tags.

    Raises:
        UserError: there is no such model.
    """
    store = default_store(Path())
    with _as_current(store):
        client = store.client()
        aliases = _aliases(client, store, name)
        versions = {alias: client.get_model_version(name, version) for alias, version in aliases.items()}
    return {alias: {**version.tags, "version": str(version.version)} for alias, version in versions.items()}


def roll_back(name: str) -> tuple[int, int]:
    """Makes the version ``previous`` champion, and the champion ``previous``, so that a second call undoes the first.

    Returns:
        The versions that is champion now, and that was.

    Raises:
        UserError: there is no such model, or no version before its champion.
    """
    store = default_store(Path())
    with _as_current(store), store.lock(".registry"):
        client = store.client()
        aliases = _aliases(client, store, name)
        if not {CHAMPION, PREVIOUS} <= set(aliases):
            raise UserError(f"{name}: has no version '{PREVIOUS}' to go back to: no champion was replaced yet")
        now, before = aliases[PREVIOUS], aliases[CHAMPION]
        client.set_registered_model_alias(name, CHAMPION, now)
        client.set_registered_model_alias(name, PREVIOUS, before)
        client.set_model_version_tag(name, now, REASON, f"a person went back to it from version {before}")
    return int(now), int(before)


def _aliases(client: "MlflowClient", store: Store, name: str) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    try:
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}
    except MlflowException as error:
        raise UserError(f"{name}: {store.address} has no such registered model ({one_line(error)})") from None


def check_served(
    model: "nn.Module", uri: str, checksums: str, sizes: Sequence[tuple[int, int]] = CHECKED_SIZES, channels: int = 3
) -> None:
    """Loads the registered model without unpickling and compares its logits with those of the network.

    Raises:
        UserError: its files are not those that were registered, and none was loaded; or the logits differ.
    """
    import mlflow
    import torch

    with tempfile.TemporaryDirectory(prefix="segdistill-model-") as scratch:
        folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=scratch))
        check_files(folder, checksums, uri)
        served = mlflow.pytorch.load_model(str(folder), device="cpu")
    generator = torch.Generator().manual_seed(0)
    for number, (height, width) in enumerate(sizes):
        images = torch.rand((number + 1, channels, height, width), generator=generator)
        with torch.no_grad():
            expected, logits = model.eval()(images), served(images)
        difference = float((expected - logits).abs().max()) if expected.shape == logits.shape else math.inf
        if not difference <= 1e-4 * max(1.0, float(expected.abs().max())):
            raise UserError(f"{uri}: served logits at {height}x{width} differ from the network's by {difference:g}")


def award(client: "MlflowClient", name: str, version: "ModelVersion", min_gain: float) -> tuple[str, int | None, str]:
    """Gives ``version`` the alias it deserves: (alias, champion before, reason). Its callers take turns by a lock."""
    champion = holder(client, name, CHAMPION)
    previous = int(champion.version) if champion and champion.version != version.version else None
    wins, reason = decide(version, champion, min_gain)
    if not wins:
        client.set_registered_model_alias(name, CHALLENGER, version.version)
        return CHALLENGER, previous, reason
    if champion is None or previous is not None:
        client.set_registered_model_alias(name, CHAMPION, version.version)
        second = holder(client, name, CHALLENGER)
        if second is not None and second.version == version.version:
            client.delete_registered_model_alias(name, CHALLENGER)
    return CHAMPION, previous, reason


def decide(version: "ModelVersion", champion: "ModelVersion | None", min_gain: float) -> tuple[bool, str]:
    """The rule of this module: whether ``version`` is to be champion, and why, in one sentence."""
    if champion is None:
        return True, "there was no champion"
    before = f"the champion, version {champion.version},"
    if champion.version == version.version:
        return True, ALREADY
    difference = ""
    if not _same_classes(version, champion):
        given, asked = champion.tags[CLASSES], version.tags[CLASSES]
        difference = (
            f"tells other classes apart, or in another order ({given}, not {asked}): it stays, since who serves it"
            " relies on its channels"
        )
    elif not _same_test(version, champion):
        difference = "was tested on other data, and such scores do not compare: it stays"
    if difference:
        return False, f"{before} {difference}; move the alias by hand if version {version.version} is to replace it"
    if champion.tags.get(WEIGHTS, "") == version.tags.get(WEIGHTS) and CHECKSUMS not in champion.tags:
        return True, f"{before} has the same weights, and files without checksums"
    gain = 100 * (_score(version) - _score(champion))
    wins = gain > min_gain
    word = "more than" if wins else "not more than"
    scores = f"{100 * _score(version):.2f} % and {100 * _score(champion):.2f} %"
    return wins, f"its test mIoU differs by {gain:+.2f} points from {before} {word} the asked {min_gain:g} ({scores})"


def holder(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    """The version that has an alias, with its tags."""
    version = client.get_registered_model(name).aliases.get(alias)
    return client.get_model_version(name, str(version)) if version is not None else None


def _score(version: "ModelVersion") -> float:
    return float(version.tags.get(TEST_MIOU, "-inf"))


def _same_test(one: "ModelVersion", other: "ModelVersion") -> bool:
    return one.tags.get(TEST_DATA) is not None and one.tags.get(TEST_DATA) == other.tags.get(TEST_DATA)


def _same_classes(one: "ModelVersion", other: "ModelVersion") -> bool:
    """Whether names and order agree; of older versions, the identity of the test data says so."""
    return None in (given := (one.tags.get(CLASSES), other.tags.get(CLASSES))) or given[0] == given[1]


def _tags(submission: Submission, given: Mapping[str, str]) -> dict[str, str]:
    own = {
        "experiment": submission.experiment,
        "seed": str(submission.seed),
        "student": submission.student,
        "val_miou": repr(submission.val_miou),
        TEST_MIOU: repr(submission.test_miou),
        TEST_DATA: submission.test_data,
        WEIGHTS: submission.weights_sha256,
        CLASSES: json.dumps(submission.classes, ensure_ascii=False),
    }
    return {**given, **submission.facts, **own}


def _ensure_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextlib.contextmanager
def _as_current(store: Store) -> Iterator[None]:
    """Points mlflow's module-wide functions to the store, patiently, with unpickling forbidden."""
    import_mlflow()
    import mlflow

    careful = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5"}
    set_by_mlflow = dict.fromkeys(("MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"))
    with environment.changed({**careful, **set_by_mlflow}):
        mlflow.set_tracking_uri(store.uri)
        mlflow.set_registry_uri(store.uri)
        yield
