"""``segdistill tune``: what it writes, what it may look at, and that it can be stopped and shared."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tiny_params import tuning_project

from segdistill.__main__ import main
from segdistill.config import read_yaml
from segdistill.data import shards
from segdistill.engine import cohort, trainer
from segdistill.errors import Interrupted, UserError
from segdistill.execution import check_params
from segdistill.search import Parameter

pytest.importorskip("optuna")
ROOT = Path(__file__).resolve().parents[2]
REPORT = Path("reports/tuning")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_prepared: Path) -> Path:
    """A folder with prepared data, whose test split is empty of files, and a teacher."""
    return tuning_project(tmp_path_factory.mktemp("tune"), read_yaml(ROOT / "params.yaml"), tiny_prepared)


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project, without any trial yet."""
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def change(here: Path) -> Callable[..., None]:
    """Changes the section ``tune``, or the section that is named."""

    def apply(section: str = "tune", **values: Any) -> None:
        params = read_yaml(here / "params.yaml")
        part = params
        for key in section.split("."):
            part = part[key]
        part |= values
        (here / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    return apply


def tune(tracker: str = "none") -> int:
    return main(["tune", "--tracker", tracker, "--device", "cpu"])


def trials() -> dict[str, list[dict[str, Any]]]:
    found = json.loads((REPORT / "trials.json").read_text())["experiments"]
    return {name: experiment["each"] for name, experiment in found.items()}


def test_every_experiment_gets_as_many_trials_and_the_test_split_is_never_opened(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = set()
    read = shards.ShardDataset.__init__

    def watched(self: Any, prepared: Path, split: str, *rest: Any) -> None:
        opened.add(split)
        read(self, prepared, split, *rest)

    monkeypatch.setattr(shards.ShardDataset, "__init__", watched)
    test_files = list((here / "artifacts/prepared").rglob("*test*"))
    assert test_files
    for file in test_files:
        file.unlink()
    assert tune("jsonl") == 0
    assert opened == {"train", "val"}
    assert {name: len(each) for name, each in trials().items()} == {"none": 2, "kd": 2}
    present = read_yaml(Path("params.yaml"))["experiments"]["none"]["students"]["cnn"]["optimizer"]["lr"]
    for each in trials().values():
        assert each[0]["values"]["students.cnn.optimizer.lr"] == present, "the present settings"
        assert {trial["state"] for trial in each} == {"finished"}
    check_params(read_yaml(REPORT / "params.yaml"))
    page = (REPORT / "report.html").read_text()
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org", "")
    (log,) = Path("artifacts/tracking").glob("tune-*/tune.jsonl")
    runs = {line.get("run") for line in map(json.loads, log.read_text().splitlines())} - {None}
    assert runs == {f"{name}-s0-t{number}" for name in ("none", "kd") for number in range(2)}


def test_a_second_call_trains_nothing_and_writes_the_same(
    here: Path, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change(experiments=["none"])
    assert tune() == 0
    before = {path.name: path.read_bytes() for path in REPORT.iterdir()}
    monkeypatch.setattr(cohort.Cohort, "run", lambda _: pytest.fail("it trains"))
    assert tune() == 0
    assert {path.name: path.read_bytes() for path in REPORT.iterdir()} == before
    assert not list(Path("artifacts/tuning").rglob("resume*"))


def test_a_tuning_that_was_stopped_goes_on_from_the_checkpoints_and_gives_the_same(
    here: Path, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    change("distill.train", iterations=4)
    change(experiments=["none"], trials=3)
    assert tune() == 0
    never_stopped = trials()
    shutil.rmtree("reports")
    shutil.rmtree("artifacts/tuning")

    saved: list[str] = []
    save = trainer.Trainer.save

    def stopped(self: Any) -> None:
        save(self)
        saved.append(self.training.name)
        if len(saved) == 2:
            raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "save", stopped)
        assert tune() == 75
    assert not REPORT.exists()
    resumed: list[int] = []
    take_up = trainer.Trainer._take_up

    def watched(self: Any, state: Any) -> None:
        resumed.append(state["progress"]["iteration"])
        take_up(self, state)

    monkeypatch.setattr(trainer.Trainer, "_take_up", watched)
    assert tune() == 0
    assert resumed == [2, 2]
    same = [
        {**after, "number": before["number"]}
        for after, before in zip(trials()["none"], never_stopped["none"], strict=True)
    ]
    assert same == never_stopped["none"]


def test_a_trial_that_was_scored_but_not_settled_is_taken_up_with_the_last_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from segdistill.stages import tune as command

    rounds: list[list[str]] = []

    def in_parts(members: Any, *_: Any, **__: Any) -> list[list[list[str]]]:
        rounds.append([member.name for member in members])
        return [[["none-t1"]]] if len(rounds) == 1 else []  # pruned with the first seed

    monkeypatch.setattr(command, "in_parts", in_parts)
    tuning = command.Tuning.__new__(command.Tuning)
    tuning.config, tuning.device, tuning.work = SimpleNamespace(seeds=[0, 1]), "cpu", Path("work")
    tuning.protocol = tuning.prepared = tuning.teacher = None
    tuning.trials, tuning.settled = 3, lambda: 0
    tuning._member = lambda name, trial, _: SimpleNamespace(name=f"{name}-t{trial.number}")
    notes = [{"miou-s0": {}, "miou-s1": {}}, {}, {"miou-s0": {}}]
    tuning._train({"none": [SimpleNamespace(number=number, notes=each) for number, each in enumerate(notes)]})
    assert rounds == [["none-t1"], ["none-t0", "none-t2"]]


def test_nobody_leaves_a_trial_of_another_machine_before_it_would_be_known_that_it_died(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from segdistill.adapters.optuna_store import GRACE_SECONDS, Session
    from segdistill.stages import tune as stage

    clock, session = [0.0], Session()
    time = SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda seconds: clock.append(clock.pop() + seconds))
    monkeypatch.setattr(stage, "time", time)
    trial = SimpleNamespace(state="running", notes={"place": "elsewhere"})
    tuning: Any = stage.Tuning.__new__(stage.Tuning)
    tuning.searches = lambda: contextlib.nullcontext({"none": SimpleNamespace(all=lambda: [trial])})
    tuning._claim = lambda _: {"none": [trial]} if clock[0] > GRACE_SECONDS else {}
    assert tuning._await_others(session) == {"none": [trial]}
    tuning._claim, clock[0] = lambda _: {}, 0.0
    assert tuning._await_others(session) == {}, "who is alive after that needs no help"
    assert GRACE_SECONDS < clock[0] < 2 * GRACE_SECONDS
    trial.notes["place"], clock[0] = session.place, 0.0
    assert tuning._await_others(session) == {} and clock[0] == 0, "of this machine it is known"


def test_the_report_of_a_tuning_that_is_not_done_is_refused(here: Path) -> None:
    from segdistill.stages import tune_report

    with pytest.raises(UserError, match="0 of 4 trials are done; run the pipeline again, which goes on"):
        tune_report.run(
            plan=Path("params.yaml"), prepared=Path("artifacts/prepared"), teacher=Path("artifacts/teacher"),
            report=REPORT,
        )  # fmt: skip
    assert not REPORT.exists()


def test_a_trial_that_diverges_is_a_failed_one_and_the_page_says_so(
    here: Path, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def highest(parameter: Parameter, value: float) -> float:
        return parameter.present if value == parameter.present else parameter.high

    monkeypatch.setattr(Parameter, "rounded", highest)  # whatever was drawn, which is another with other code
    change("distill.train", iterations=8)
    change(experiments=["kd"])
    change("tune.search", learning_rate=[1.0, 1999.0], weight=[1.0, 1e6])
    params = read_yaml(Path("params.yaml"))
    params["experiments"]["kd"]["students"]["cnn"]["optimizer"] = {"name": "sgd", "lr": 0.05, "momentum": 0.99}
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    assert tune("jsonl") == 0
    present, wild = trials()["kd"]
    assert present["state"] == "finished"
    assert wild["state"] == "diverged" and "not finite" in wild["why"] and wild["score"] is None
    assert "diverged" in (REPORT / "report.md").read_text()
    assert read_yaml(REPORT / "params.yaml")["experiments"] == params["experiments"], "the present settings stay"


def test_a_score_is_the_mean_over_seeds(here: Path, change: Callable[..., None]) -> None:
    change(experiments=["none"], trials=1, seeds=[0, 1])
    assert tune("jsonl") == 0
    (log,) = Path("artifacts/tracking").glob("tune-*/tune.jsonl")
    last = {
        line["run"]: line["values"]["val/miou"]
        for line in map(json.loads, log.read_text().splitlines())
        if line["kind"] == "metrics" and "val/miou" in line["values"]
    }
    assert set(last) == {"none-s0-t0", "none-s1-t0"}
    assert trials()["none"][0]["score"] == pytest.approx(sum(last.values()) / 2)


def test_without_prepared_data_it_says_what_makes_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("artifacts/prepared")
    assert tune() == 2
    said = capsys.readouterr().err
    assert (
        said == "segdistill tune: artifacts/prepared: tune needs it as 'prepared'; run what makes it first: dvc repro\n"
    )


def test_a_section_that_is_absent_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = read_yaml(Path("params.yaml"))
    del params["tune"]
    Path("params.yaml").write_text(yaml.safe_dump(params))
    assert tune() == 2
    assert capsys.readouterr().err == "segdistill tune: tune: missing; tune needs it\n"
