"""Registration against a real SQLite registry: the choice, the served model, the alias, and many at once."""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from segdistill.__main__ import main
from segdistill.adapters.mlflow_artifact import CODE, FILES
from segdistill.adapters.mlflow_registry import (
    CHAMPION,
    ChampionScore,
    Submission,
    check_served,
    decide,
    holder,
    register,
)
from segdistill.adapters.mlflow_store import default_store, import_mlflow
from segdistill.adapters.mlflow_tracking import MlflowTracker, Settings
from segdistill.config import to_dict
from segdistill.data.shards import read_dataset_info
from segdistill.engine.settings import InferenceConfig
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.files import SEAL, file_hash, seal, sealed_hashes
from segdistill.models.config import ModelConfig
from segdistill.models.export import ExportedSegmenter, load_model, save_model
from segdistill.models.segmenter import build_segmenter
from segdistill.plan import Job
from segdistill.report.inputs import Diverged
from segdistill.report.results import Comparison, Protocol, Row, SeedResult, read_results
from segdistill.stages import prepare
from segdistill.stages import register as stage
from segdistill.stages._champion import evaluate_champion
from segdistill.stages._cohort import write_record
from segdistill.stages.register import Candidate, Config, choose, identity_of_test_data

mlflow = pytest.importorskip("mlflow")
NAME = "segdistill-student"
ANY = Config(model_name=NAME, student=None, max_params=None, max_macs=None, min_gain=0.5)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def root(tmp_path: Path, database: bytes) -> Path:
    (tmp_path / "mlflow.db").write_bytes(database)
    return tmp_path


class Scaled(nn.Module):
    """The smallest network there is."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        nn.init.constant_(self.conv.weight, factor)
        nn.init.constant_(self.conv.bias, 0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)


def tracker(root: Path, name: str = "register", pipeline_run: str = "p") -> MlflowTracker:
    tags = {"data_md5": "d", "git_commit": "c", "pipeline_run": pipeline_run}
    return MlflowTracker(name, Settings(default_store(root), root / "spool", pipeline_run, tags))


def submission(
    weights: str,
    test_miou: float,
    *,
    identity: str = "unknown",
    test_data: str = "t",
    classes: tuple[str, ...] = ("road", "sky"),
) -> Submission:
    return Submission("kd", 0, "cnn", 0.5, test_miou, test_data, weights, classes, {}, {"identity": identity})


# --- the choice


def candidate(experiment: str, val_miou: float, *, student: str = "cnn", **numbers: float) -> Candidate:
    cost = {"params": 10, "macs": 10, "latency_ms": 4.0, "ece": 0.02, **numbers}
    return Candidate(experiment, 0, student, Path("none"), val_miou, 1 - val_miou, weights_sha256="weights", **cost)


def test_the_choice_is_by_validation_and_never_by_test() -> None:
    best, why = choose([candidate("none", 0.4), candidate("kd", 0.6), candidate("apd", 0.5)], ANY)
    assert best is not None and (best.experiment, best.test_miou) == ("kd", 0.4)
    assert why == "the best by validation (60.00 %) of 3 single runs"


def test_a_student_that_diverged_with_every_seed_is_said_to_have() -> None:
    config = replace(ANY, student="vit")
    with pytest.raises(UserError, match=r"^register.student: 'vit' diverged with every seed, so that none can be"):
        choose([candidate("none", 0.4)], config, diverged={"vit"})
    best, _ = choose([candidate("none", 0.4, student="vit")], config, diverged={"vit"})
    assert best is not None and best.student == "vit", "another seed"


def test_the_choice_stays_within_the_budget_and_the_name() -> None:
    all_of_them = [
        candidate("big", 0.9, params=99),
        candidate("slow", 0.8, macs=99),
        candidate("vit", 0.7, student="vit"),
        candidate("fits", 0.6),
    ]
    config = Config(model_name=NAME, student="cnn", max_params=50, max_macs=50, min_gain=0)
    best, why = choose(all_of_them, config)
    assert best is not None and best.experiment == "fits"
    assert why == (
        "the best by validation (60.00 %) of 3 single runs within the limits: 'cnn' of big, seed 0 (90.00 %) has 99 "
        "parameters, more than register.max_params, 50; 'cnn' of slow, seed 0 (80.00 %) has 99 multiply-accumulates, "
        "more than register.max_macs, 50"
    )


@pytest.mark.parametrize(
    ("limit", "excess"),
    [
        ({"max_params": 9}, "10 parameters, more than register.max_params, 9"),
        ({"max_macs": 9}, "10 multiply-accumulates, more than register.max_macs, 9"),
        ({"max_latency_ms": 3.5}, "4 ms an image, more than register.max_latency_ms, 3.5"),
        ({"max_ece": 1.5}, "2 points of ECE, more than register.max_ece, 1.5"),
    ],
)
def test_a_student_beyond_a_limit_is_not_registered_and_the_decision_says_which(
    limit: dict[str, float], excess: str
) -> None:
    best, why = choose([candidate("kd", 0.5)], replace(ANY, **limit))
    assert best is None
    assert why == f"no student is within the limits: 'cnn' of kd, seed 0 (50.00 %) has {excess}"
    assert choose([candidate("kd", 0.5)], replace(ANY, **dict.fromkeys(limit, 11)))[0], "a limit that holds"


def test_what_was_not_measured_is_not_within_a_limit() -> None:
    best, why = choose([candidate("kd", 0.5, ece=None)], replace(ANY, max_ece=5.0))
    assert best is None and "an unknown number of points of ECE" in why


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"student": "cmn"}, "register.student: no student is called 'cmn'; did you mean 'cnn'?"),
    ],
)
def test_a_choice_that_leaves_nobody_says_why(change: dict, sentence: str) -> None:
    given = {"model_name": NAME, "student": None, "max_params": None, "max_macs": None, "min_gain": 0.0}
    with pytest.raises(UserError) as error:
        choose([candidate("kd", 0.5)], Config(**{**given, **change}))
    assert str(error.value) == sentence


# --- the rule


def version(number: int, test_miou: float, test_data: str = "t", **more: str):
    given = {"test_miou": repr(test_miou), "test_data": test_data, **more}
    tags = [mlflow.entities.model_registry.ModelVersionTag(*item) for item in given.items()]
    return mlflow.entities.model_registry.ModelVersion(NAME, str(number), 0, tags=tags)


@pytest.mark.parametrize(
    ("champion", "wins", "words"),
    [
        (None, True, "no champion"),
        (version(2, 0.40), True, "already"),
        (version(1, 0.394), True, "+0.60 points"),
        (version(1, 0.396), False, "+0.40 points"),
        (version(1, 0.41), False, "-1.00 points"),
        (version(1, 0.1, "other"), False, "by hand"),
    ],
)
def test_the_champion_is_replaced_only_by_the_rule(champion, wins: bool, words: str) -> None:
    won, reason = decide(version(2, 0.40), champion, min_gain=0.5)
    assert won is wins
    assert words in reason


def test_a_champion_of_other_classes_or_in_another_order_is_not_compared() -> None:
    champion, challenger = ('["road", "sky"]', '["sky", "road"]')
    won, reason = decide(version(2, 0.9, classes=challenger), version(1, 0.1, classes=champion), min_gain=0.5)
    assert not won
    assert champion in reason and challenger in reason and "by hand" in reason
    assert decide(version(2, 0.9, classes=champion), version(1, 0.1, classes=champion), min_gain=0.5)[0]


def test_a_champion_of_other_classes_and_other_data_stays_and_the_classes_are_why() -> None:
    champion, challenger = ('["road", "sky"]', '["road", "car"]')
    won, reason = decide(
        version(2, 0.9, "new", classes=challenger), version(1, 0.1, "old", classes=champion), min_gain=0.5
    )
    assert not won
    assert reason.startswith("the champion, version 1, tells other classes apart")
    assert "it stays, since who serves it relies on its channels" in reason


def test_a_version_with_checksums_replaces_one_of_the_same_weights_without() -> None:
    old, new = version(1, 0.4, weights_sha256="w"), version(2, 0.4, weights_sha256="w", checksums_sha256="c")
    won, reason = decide(new, old, min_gain=0.5)
    assert won and "the same weights, and files without checksums" in reason


# --- the registry


def test_the_same_weights_are_one_version_and_the_alias_follows_the_rule(root: Path) -> None:
    one = tracker(root)
    first = register(Scaled(1), submission("a", 0.40), name=NAME, min_gain=0.5, tracker=one)
    again = register(Scaled(1), submission("a", 0.40), name=NAME, min_gain=0.5, tracker=one)
    assert (first.version, first.alias, first.previous_champion) == (1, "champion", None)
    assert (again.version, again.alias) == (1, "champion")
    retested = register(Scaled(1), submission("a", 0.40, test_data="u"), name=NAME, min_gain=0.5, tracker=one)
    assert (retested.version, retested.alias) == (1, "champion")
    stranger = register(Scaled(2), submission("b", 0.99), name=NAME, min_gain=0.5, tracker=one)
    assert (stranger.version, stranger.alias) == (2, "challenger"), "scores on other test data do not compare"
    register(Scaled(1), submission("a", 0.40), name=NAME, min_gain=0.5, tracker=one)
    worse = register(Scaled(2), submission("b", 0.403), name=NAME, min_gain=0.5, tracker=one)
    assert (worse.version, worse.alias, worse.previous_champion) == (2, "challenger", 1)
    # The same challenger, asked again under a lower bar.
    raised = register(Scaled(2), submission("b", 0.403), name=NAME, min_gain=0.0, tracker=one)
    assert (raised.version, raised.alias, raised.previous_champion) == (2, "champion", 1)
    client = default_store(root).client()
    assert {key: int(value) for key, value in client.get_registered_model(NAME).aliases.items()} == {
        "champion": 2,
        "previous": 1,
    }
    tags = client.get_model_version(NAME, "2").tags
    assert (tags["data_md5"], tags["git_commit"], tags["experiment"], tags["seed"]) == ("d", "c", "kd", "0")
    assert (tags["student"], tags["weights_sha256"], float(tags["test_miou"])) == ("cnn", "b", 0.403)
    assert tags["run_id"] == raised.run_id
    assert "+0.30 points" in tags["decision"]


def test_a_rollback_restores_the_previous_champion_and_a_second_one_undoes_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    client = default_store(root).client()
    client.create_registered_model(NAME)
    for score in (0.3, 0.6):
        client.create_model_version(NAME, source=str(root), tags={"test_miou": repr(score), "student": "cnn"})
    client.set_registered_model_alias(NAME, CHAMPION, "2")
    assert main(["champion", "rollback", "--name", NAME]) == 2
    assert "has no version 'previous' to go back to" in capsys.readouterr().err
    client.set_registered_model_alias(NAME, "previous", "1")
    for now, before in ((1, 2), (2, 1)):
        assert main(["champion", "rollback", "--name", NAME]) == 0
        assert f"version {now} is champion again; version {before} is now 'previous'" in capsys.readouterr().out
        assert int(client.get_model_version_by_alias(NAME, CHAMPION).version) == now
    assert main(["champion", "--name", NAME]) == 0
    text = capsys.readouterr().out
    assert "60.00" in text and "champion, version 2: A person went back to it from version 1." in text
    assert main(["champion", "--name", "other"]) == 2
    assert "has no such registered model" in capsys.readouterr().err


def test_the_same_weights_for_other_classes_are_another_version(root: Path) -> None:
    one = tracker(root)
    first = register(Scaled(1), submission("a", 0.40), name=NAME, min_gain=0.5, tracker=one)
    turned = submission("a", 0.90, classes=("sky", "road"))
    second = register(Scaled(1), turned, name=NAME, min_gain=0.5, tracker=one)
    assert (first.version, first.alias) == (1, "champion")
    assert (second.version, second.alias) == (2, "challenger")


def test_files_that_we_did_not_write_are_refused_before_anything_of_them_is_loaded(root: Path, tmp_path: Path) -> None:
    one, proof = tracker(root), tmp_path / "it-ran"
    register(Scaled(1), submission("a", 0.40), name=NAME, min_gain=0.5, tracker=one)
    (description,) = root.rglob("MLmodel")
    folder, aside = description.parent, tmp_path / "aside"
    shutil.copytree(folder, aside)
    evil = f"open({str(proof)!r}, 'w').close()\n"
    text = description.read_text()

    def code() -> None:
        (folder / "code").mkdir()
        for name in ("mlflow_evil.py", "sitecustomize.py", "_codecs_evil.py"):
            (folder / "code" / name).write_text(evil)
        description.write_text(re.sub(r"(?m)^    code:.*$", "    code: code", text))

    def entry() -> None:
        description.write_text(re.sub(r"(?m)^    code:.*$", "    code: data", text))

    def module() -> None:
        (folder / "data/pickle_module_info.txt").write_text("evil")
        (folder / "data/model.pth").write_bytes(b"")

    def loader() -> None:
        description.write_text(text.replace("loader_module: mlflow.pytorch", "loader_module: evil"))

    tampers = {
        "code": (code, "holds 'code/_codecs_evil.py', which segdistill does not write"),
        "module": (module, "holds 'data/model.pth', which segdistill does not write"),
        "entry": (entry, "'MLmodel' is not the file that was registered"),
        "loader": (loader, "'MLmodel' is not the file that was registered"),
        "weights": (lambda: (folder / "data/model.pt2").write_bytes(b"PK"), "'data/model.pt2' is not the file"),
        "missing": ((folder / "requirements.txt").unlink, "'requirements.txt' is missing"),
        "seal": ((folder / SEAL).unlink, "is not the one that its version was registered with"),
    }  # fmt: skip
    client = default_store(root).client()
    mlflow.set_tracking_uri(default_store(root).uri)
    mlflow.set_registry_uri(default_store(root).uri)
    registered = client.get_model_version(NAME, "1").tags["checksums_sha256"]
    for resealed in (False, True):  # of one who writes artifacts, and of one who writes tags, too
        for tamper, reason in tampers.values():
            tamper()
            checksums = registered
            if resealed:
                seal(folder)
                checksums = file_hash(folder / SEAL)
            if not resealed or tamper in (code, module, entry, loader):
                described = resealed and tamper in (entry, loader)
                expected = "describes a model that segdistill does not write" if described else reason
                with pytest.raises(UserError, match=re.escape(expected)) as caught:
                    check_served(Scaled(1), f"models:/{NAME}/1", checksums)
                assert f"models:/{NAME}/1" in str(caught.value) and "delete that version" in str(caught.value)
            shutil.rmtree(folder)
            shutil.copytree(aside, folder)
    code()
    with pytest.raises(UserError, match="which segdistill does not write"):
        register(Scaled(1), submission("a", 0.40), name=NAME, min_gain=0.5, tracker=one)
    assert client.get_model_version(NAME, "1").version, "somebody else's version is left to be looked at"
    assert not proof.exists()
    assert "evil" not in sys.modules


def test_a_student_is_registered_from_the_latest_finished_run_with_its_identity(root: Path) -> None:
    ids = {}
    for pipeline, identity, student, status in (
        ("first", "i", "cnn", "FINISHED"),
        ("again", "i", "cnn", "FINISHED"),
        ("killed", "i", "cnn", "KILLED"),
        ("other", "j", "cnn", "FINISHED"),
        ("peer", "i", "vit", "FINISHED"),
    ):
        run = tracker(root, "kd-s0", pipeline)
        run.tags({"identity": identity, "student": student})
        run.metrics({"val/miou": 0.5}, 10)
        run.close(status)
        ids[pipeline] = run.run_id
    mine = submission("a", 0.4, identity="i")
    registered = register(Scaled(), mine, name=NAME, min_gain=0, tracker=tracker(root))
    assert registered.run_id == ids["again"]
    client = default_store(root).client()
    assert client.get_run(registered.run_id).info.status == "FINISHED"
    models = client.search_logged_models([client.get_run(registered.run_id).info.experiment_id])
    assert [model.source_run_id for model in models] == [ids["again"]]


def test_a_student_whose_run_is_not_there_is_registered_all_the_same_and_that_is_said(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registered = register(Scaled(), submission("a", 0.4, identity="i"), name=NAME, min_gain=0, tracker=tracker(root))
    assert registered.version == 1
    assert "knows no finished run with the tags identity 'i' and student 'cnn'" in caplog.text
    run = default_store(root).client().get_run(registered.run_id)
    assert run.data.tags["mlflow.runName"] == "register", "a run of its own"


def test_a_version_that_serves_other_logits_is_refused(root: Path) -> None:
    class Wandering(Scaled):
        """Not the same twice, as a graph that was traced in training mode would be."""

        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            Wandering.calls += 1
            return self.conv(images) * float(Wandering.calls)

    with pytest.raises(UserError, match="served logits at 64x96 differ from the network's"):
        register(Wandering(), submission("a", 0.4), name=NAME, min_gain=0, tracker=tracker(root))
    client = default_store(root).client()
    assert not client.search_model_versions(f"name = '{NAME}'")
    assert holder(client, NAME, CHAMPION) is None


SCORES = (0.3, 0.7, 0.1, 0.5, 0.8, 0.2, 0.6, 0.4)


def _register_one(root: Path, number: int) -> None:
    score = SCORES[number]
    run = tracker(root, f"register-{number}")
    register(Scaled(number), submission(f"w{number}", score), name=NAME, min_gain=0.0, tracker=run)
    os._exit(0)


def _fork(work, root: Path, numbers: range) -> None:
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=work, args=(root, number)) for number in numbers]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [0] * len(workers)


def test_the_champion_of_a_moved_project_is_served_from_where_it_is(tmp_path: Path, database: bytes) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "mlflow.db").write_bytes(database)
    import_mlflow()
    _fork(_register_one, old, range(1))  # a process of its own: no connection to the store outlives the move
    old.rename(new)
    again = register(Scaled(0), submission("w0", SCORES[0]), name=NAME, min_gain=0.5, tracker=tracker(new))
    assert (again.version, again.alias) == (1, "champion")
    better = register(Scaled(2), submission("b", 0.50), name=NAME, min_gain=0.5, tracker=tracker(new))
    assert (better.version, better.alias, better.previous_champion) == (2, "champion", 1)
    assert not old.exists(), "nothing is written where the folder was"


def test_eight_processes_that_register_at_once_leave_the_best_as_champion(root: Path) -> None:
    import_mlflow()
    import torch.export  # forked with what they need; nobody has met this store yet

    torch.export.export(Scaled(), (torch.rand(2, 3, 8, 8),))
    _fork(_register_one, root, range(8))
    client = default_store(root).client()
    champion = holder(client, NAME, CHAMPION)
    assert champion is not None
    assert champion.tags["weights_sha256"] == "w4"
    versions = client.search_model_versions(f"name = '{NAME}'")
    assert sorted(int(item.version) for item in versions) == list(range(1, 9))
    assert {item.tags["weights_sha256"] for item in versions} == {f"w{number}" for number in range(8)}
    mlflow.set_tracking_uri(default_store(root).uri)
    mlflow.set_registry_uri(default_store(root).uri)
    check_served(Scaled(4), f"models:/{NAME}@champion", champion.tags["checksums_sha256"], sizes=[(17, 9)])


def rematch(score: float, paired: str = "paired"):
    """A submission's way to evaluate the champion, whose program it is given."""

    def evaluate_champion(program: Path) -> ChampionScore:
        assert program.is_file()
        return ChampionScore(score, paired)

    return evaluate_champion


@pytest.mark.parametrize(("score", "alias"), [(0.30, "champion"), (0.60, "challenger")])
def test_a_champion_of_other_test_data_is_evaluated_on_the_present_ones_before_it_is_compared(
    score: float, alias: str, root: Path
) -> None:
    one = tracker(root)
    register(Scaled(1), submission("a", 0.40), name=NAME, min_gain=0.5, tracker=one)
    asking = replace(submission("b", 0.50, test_data="new"), evaluate_champion=rematch(score))
    second = register(Scaled(2), asking, name=NAME, min_gain=0.5, tracker=one)
    assert second.alias == alias
    assert f"{100 * (0.50 - score):+.2f} points" in second.reason
    assert second.reason.endswith(
        f"; evaluated again on the present test data, the champion has {100 * score:.2f} % mIoU; it had 40.00 % on "
        "others; paired"
    )
    tags = default_store(root).client().get_model_version(NAME, "1").tags
    assert (float(tags["test_miou"]), tags["test_data"]) == (score, "new"), "the next student needs no evaluation"
    assert "it had 40.00 % on others" in tags["evaluated_again"]


def test_a_champion_that_cannot_be_evaluated_on_the_present_test_data_stays(root: Path) -> None:
    one = tracker(root)
    register(Scaled(1), submission("a", 0.40), name=NAME, min_gain=0.5, tracker=one)
    asking = replace(submission("b", 0.50, test_data="new"), evaluate_champion=rematch(0.1))
    for file in (root / "mlartifacts").rglob("model.pt2"):
        file.write_bytes(b"PK")
    second = register(Scaled(2), asking, name=NAME, min_gain=0.5, tracker=one)
    assert second.alias == "challenger"
    assert "was tested on other data" in second.reason
    assert "the champion could not be evaluated on the present test data" in second.reason
    assert "is not the file that was registered" in second.reason


def test_a_champion_of_other_classes_is_not_evaluated(root: Path) -> None:
    def never(program: Path) -> ChampionScore:
        raise AssertionError("its logits stand for other classes")

    one = tracker(root)
    register(Scaled(1), submission("a", 0.40), name=NAME, min_gain=0.5, tracker=one)
    asking = replace(submission("b", 0.9, test_data="new", classes=("sky", "road")), evaluate_champion=never)
    assert register(Scaled(2), asking, name=NAME, min_gain=0.5, tracker=one).alias == "challenger"


# --- the stage


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny data set through the real stage."""
    root = tmp_path_factory.mktemp("data")
    data, generator = root / "data", np.random.default_rng(0)
    for split, count in (("train", 2), ("val", 1), ("test", 3)):
        for kind in ("images", "masks"):
            (data / kind / split).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 255, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(data / "images" / split / f"{split}{number}.png")
            labels = generator.integers(0, 2, (24, 32), dtype=np.uint8)
            Image.fromarray(labels).save(data / "masks" / split / f"{split}{number}.png")
    classes = [{"name": "road", "color": [0, 0, 0]}, {"name": "sky", "color": [9, 9, 9]}]
    (data / "classes.json").write_text(json.dumps({"classes": classes, "ignore_index": 255}))
    (root / "report").mkdir()
    (root / "report" / "summary.json").write_text(json.dumps({"success": True, "layout": "folder"}))
    for samples in (2, 100):
        config = prepare.Config(layout="folder", shard_samples=samples, max_side=None, workers=1)
        prepare.run(config, data=data, report=root / "report", prepared=root / f"by-{samples}", tracker=Tracker())
    return root / "by-2"


def test_the_identity_of_the_test_data_does_not_depend_on_the_shards_but_on_each_label(prepared: Path) -> None:
    from segdistill.data.shards import INFO_FILE

    whole = prepared.with_name("by-100")
    assert identity_of_test_data(prepared) == identity_of_test_data(whole)
    info = json.loads((whole / INFO_FILE).read_text())
    info["classes"][0]["name"] = "street"
    (whole / INFO_FILE).write_text(json.dumps(info))
    seal(whole, leave=["shards"])
    assert identity_of_test_data(prepared) != identity_of_test_data(whole)


def compared(folder: Path, rows: list[Row], *, passed: bool = True) -> Comparison:
    """What compare leaves in a folder."""
    protocol = Protocol((0, 1), (), ("road", "sky"), {}, None, None, 0.95, 1, "data", "teacher")
    comparison = Comparison(row("teacher", {}), tuple(rows), ("kd", "cnn"), protocol, (), passed)
    (folder / "results.json").write_text(json.dumps(to_dict(comparison)))
    seal(folder)
    return comparison


def row(experiment: str, seeds: dict[int, tuple[float, float, str]], diverged: tuple[int, ...] = ()) -> Row:
    """Of seeds with their val and test mIoU and the hash of their weights."""
    results = tuple(
        SeedResult(seed, test, 0.9, val, 80, 1.0, None, None, weights) for seed, (val, test, weights) in seeds.items()
    )
    failures = tuple(Diverged(experiment, seed, 120, "kd.kl is not finite", None, None) for seed in diverged)
    cost = (10, 10) if seeds else (None, None)
    unknown = dict.fromkeys([
        "reference", "equal_time_reference", "test_miou", "val_miou", "test_pixel_accuracy", "latency_ms",
        "images_per_second", "training_seconds", "step_seconds", "gain", "equal_time_gain",
    ])  # fmt: skip
    return Row(
        experiment=experiment, student="cnn", methods=(), distilled=False, seeds=results, diverged=failures,
        per_class_iou={}, views={}, params=cost[0], macs=cost[1], **unknown,
    )  # fmt: skip


def test_a_comparison_of_other_jobs_is_refused(tmp_path: Path) -> None:
    results = compared(tmp_path, [row("none", {0: (0.3, 0.3, "w")})])
    with pytest.raises(UserError, match=r"results.json: of other jobs than params.yaml has: .*kd-s0.*compare"):
        stage.candidates(results, {Job("kd", 0): tmp_path, Job("none", 0): tmp_path}, tmp_path)


def test_seeds_that_diverged_are_no_candidates(tmp_path: Path) -> None:
    results = compared(tmp_path, [row("kd", {1: (0.3, 0.4, "w")}, diverged=(0,)), row("cwd", {}, diverged=(0, 1))])
    jobs = {Job(experiment, seed): tmp_path for experiment in ("kd", "cwd") for seed in (0, 1)}
    candidates = stage.candidates(results, jobs, tmp_path)
    assert [(one.experiment, one.seed, one.val_miou, one.test_miou) for one in candidates] == [("kd", 1, 0.3, 0.4)]


def test_nothing_is_registered_if_no_student_passed_the_gate(root: Path, prepared: Path) -> None:
    compared(root, [row("kd", {0: (0.3, 0.3, "w")})], passed=False)
    registration, one = root / "registration", tracker(root)
    stage.run(
        ANY, run=["kd"], seeds=[0], comparison=root, prepared=prepared, students=[root / "s0"],
        registration=registration, tracker=one,
    )  # fmt: skip
    one.close()
    found = json.loads((registration / "registration.json").read_text())
    assert found["version"] is None and found["name"] == NAME
    assert stage.sentence(found) == "Not registered: no student passed the gate (compare.min_test_miou)"
    assert not (registration / "model").exists()


def test_nothing_is_registered_if_no_student_is_within_the_limits(root: Path, prepared: Path) -> None:
    compared(root, [row("kd", {0: (0.3, 0.3, "w")})])
    save_student(root / "s0/kd", prepared, seed=0)
    write_record(root / "s0", [Job("kd", 0)])
    registration, one = root / "registration", tracker(root)
    stage.run(
        replace(ANY, max_params=9), run=["kd"], seeds=[0], comparison=root, prepared=prepared,
        students=[root / "s0"], registration=registration, tracker=one,
    )  # fmt: skip
    one.close()
    found = json.loads((registration / "registration.json").read_text())
    assert found["version"] is None
    assert stage.sentence(found) == (
        "Not registered: no student is within the limits: 'cnn' of kd, seed 0 (30.00 %) has 10 parameters, more than "
        "register.max_params, 9"
    )


@pytest.mark.parametrize("verdict", [{}, {"passed": "false"}, {"passed": None}])
def test_a_comparison_without_a_verdict_registers_nothing(verdict: dict[str, object], root: Path) -> None:
    content = to_dict(compared(root, [row("kd", {0: (0.3, 0.3, "w")})]))
    del content["passed"]
    (root / "results.json").write_text(json.dumps(content | verdict))
    seal(root)
    with pytest.raises(UserError, match=r"results\.json\.passed: .*; run the stage 'compare' again"):
        read_results(root)


def test_weights_that_were_not_compared_are_not_registered(root: Path, prepared: Path) -> None:
    save_student(root / "s0/kd", prepared, seed=0)
    write_record(root / "s0", [Job("kd", 0)])
    compared(root, [row("kd", {0: (0.3, 0.3, "others")})])
    with pytest.raises(UserError, match=r"s0/kd: 'cnn' has other weights than were compared; run the stage 'compare'"):
        stage.run(
            ANY, run=["kd"], seeds=[0], comparison=root, prepared=prepared, students=[root / "s0"],
            registration=root / "registration", tracker=tracker(root),
        )  # fmt: skip
    assert not (root / "registration").exists()


def save_student(folder: Path, prepared: Path, seed: int) -> str:
    """A folder as distill leaves it; returns the hash of its weights."""
    model = ModelConfig(
        architecture="DeepLabV3Plus", encoder="tu-mobilenetv3_small_050", output_stride=16,
        decoder={"decoder_channels": 64},
    )  # fmt: skip
    torch.manual_seed(seed)
    classes = [{"name": entry.name, "color": entry.color} for entry in read_dataset_info(prepared).classes]
    save_model(folder, "cnn", build_segmenter(model, len(classes)), {"classes": classes, "data_content": "d"})
    seal(folder)
    return str(json.loads((folder / "cnn.json").read_text())["sha256"])


def test_the_stage_registers_a_student_that_serves_any_image_size(root: Path, prepared: Path) -> None:
    rows = []
    for experiment, scores in (("none", (0.31, 0.30)), ("kd", (0.33, 0.35))):
        seeds = {}
        for seed, score in enumerate(scores):
            seeds[seed] = (score, score + 0.06, save_student(root / f"s{seed}" / experiment, prepared, seed))
        rows.append(row(experiment, seeds))
    for seed in (0, 1):
        write_record(root / f"s{seed}", [Job(experiment, seed) for experiment in ("none", "kd")])
    compared(root, rows)
    registration, one = root / "registration", tracker(root)
    stage.run(
        ANY, run=["none", "kd"], seeds=[0, 1], comparison=root, prepared=prepared, students=[root / "s1", root / "s0"],
        registration=registration, tracker=one,
    )  # fmt: skip
    one.close()

    found = json.loads((registration / "registration.json").read_text())
    assert (found["name"], found["version"], found["alias"]) == (NAME, 1, "champion")
    assert (found["experiment"], found["seed"], found["student"]) == ("kd", 1, "cnn")
    assert (found["val_miou"], found["previous_champion"]) == (0.35, None)
    assert found["test_miou"] == pytest.approx(0.41)
    assert found["model_uri"] == f"models:/{NAME}/1"
    segmenter, _ = load_model(registration / "model", "cnn")

    # As `mlflow models serve` would, with unpickling forbidden, at a size that nobody exported.
    logged = [path for path in (root / "mlartifacts").rglob("*") if path.is_file()]
    assert not [path for path in logged if path.suffix in (".pth", ".pkl")]
    folder = next(path.parent for path in logged if path.name == "MLmodel")
    beside = {"card/card.md", *(f"card/overlay-{number}.png" for number in range(3))}
    written = FILES - set(CODE) - {"input_example.json", "serving_input_example.json"}  # those of older versions
    assert {path.relative_to(folder).as_posix() for path in logged} == written | {SEAL} | beside
    text = mlflow.MlflowClient().get_model_version(NAME, "1").description
    for words in (
        "**Champion**: there was no champion; the best by validation (35.00 %) of 4 single runs.",
        "| road | ",
        "41.0 %",
        "**This student was not distilled**",
    ):
        assert words in text
    assert (registration / "card/card.md").read_text() == text
    assert Image.open(folder / "card/overlay-0.png").height >= 240
    assert sealed_hashes(folder, mend="")["data/model.pt2"] == file_hash(folder / "data/model.pt2")
    assert mlflow.models.get_model_info(f"models:/{NAME}/1").metadata["classes"] == ["road", "sky"]
    out, image = root / "out", next((prepared.parent / "data/images/test").iterdir())
    with contextlib.chdir(root):
        assert main(["predict", f"models:/{NAME}@champion", str(image), "--out", str(out)]) == 0
        assert main(["predict", str(registration), str(image), "--out", f"{out}2"]) == 0
    masks = [np.array(Image.open(folder / "masks" / image.name)) for folder in (out, Path(f"{out}2"))]
    assert masks[0].shape == (24, 32) and (masks[0] == masks[1]).all()
    assert json.loads((out / "classes.json").read_text())["classes"][1] == {"name": "sky", "color": [9, 9, 9]}

    # The program of the registry and the network in its folder are the same: paired, they differ by nothing.
    score = evaluate_champion(
        folder / "data/model.pt2", segmenter=segmenter, results=read_results(root), prepared=prepared,
        inference=InferenceConfig(batch_size=2, input_scale=1.0, window=None, window_stride=0.67), device="cpu",
    )  # fmt: skip
    assert 0 < score.test_miou < 1
    assert score.paired == "over the same 3 images the difference is +0.00 points, [+0.00, +0.00] with 95 %"
    served = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    images = np.random.default_rng(1).random((1, 3, 51, 83), dtype=np.float32)
    with torch.no_grad():
        expected = ExportedSegmenter(segmenter).eval()(torch.from_numpy(images))
    torch.testing.assert_close(torch.from_numpy(served.predict(images)), expected, atol=1e-4, rtol=1e-4)
