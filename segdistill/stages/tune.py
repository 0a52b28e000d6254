"""The same search for every experiment: learning rates, weights and the like, by the validation split alone.

Rounds of trials train as cohorts, all experiments together, by one pass of the teacher. Several processes with the same
parameters and store share the trials; each can be stopped at any time.
"""

import contextlib
import functools
import json
import logging
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdistill.config import parse, read_yaml, to_dict
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.files import new_folder
from segdistill.plan import DistillConfig, Job, PlannedJob, cohort_plan, experiments, parse_methods
from segdistill.search import (
    Parameter,
    TuneConfig,
    parameters,
    trial_protocol,
    tuned_experiments,
    with_tuned_values,
    with_values,
)
from segdistill.stages.distill import Common, Member, as_member, in_parts, teacher_hash, train_together

if TYPE_CHECKING:
    from segdistill.adapters.optuna_store import Search, Session, Trial
    from segdistill.engine.evaluate import Evaluation

logger = logging.getLogger(__name__)

WORK = Path("artifacts/tuning")  # checkpoints, and the store where none is named
SECTIONS = ("tune", "distill", "experiments", "run")  # of the parameters
POLL_SECONDS = 10


@dataclass(frozen=True)
class SearchPlan:
    """What the parameters say of a search, before there are data or a teacher."""

    config: TuneConfig
    protocol: DistillConfig  # of a trial
    jobs: Mapping[str, PlannedJob]  # of the experiments, with their present settings
    parameters: Mapping[str, Sequence[Parameter]]  # what is searched of each


def search_plan(params: Mapping[str, Any]) -> SearchPlan:
    """Reads the parameters as a whole.

    Raises:
        UserError: a section is missing, or a value in it is wrong.
    """
    if missing := [key for key in SECTIONS if key not in params]:
        raise UserError(f"{missing[0]}: missing; tune needs it")
    config: TuneConfig = parse(TuneConfig, params["tune"], "tune")
    protocol = trial_protocol(config, parse(DistillConfig, params["distill"], "distill"))
    names = tuned_experiments(config, params["run"], params["experiments"])
    planned = cohort_plan(params["distill"], params["experiments"], [Job(name, 0) for name in names]).jobs
    jobs = {job.experiment: job for job in planned}
    searched = {name: parameters(name, job.settings, config.search) for name, job in jobs.items()}
    return SearchPlan(config, protocol, jobs, searched)


@dataclass(frozen=True)
class Tuned:
    """An experiment that is tuned: what it is, and what is searched."""

    job: PlannedJob
    parameters: Sequence[Parameter]
    search: str  # names all that decides what its trials give


class Tuning:
    """A search over all experiments.

    Args:
        params: the parameters as a whole; see :func:`search_plan`.
        prepared, teacher: where these lie.
        device: where networks run.
        work: for checkpoints.
    """

    def __init__(
        self, params: Mapping[str, Any], prepared: Path, teacher: Path, *, device: str, work: Path = WORK
    ) -> None:
        from segdistill.data.shards import read_dataset_info

        plan = search_plan(params)
        self.config, self.protocol = plan.config, plan.protocol
        self.prepared, self.teacher, self.device = prepared, teacher, device
        self.tracker: Tracker = Tracker()  # trials become its children
        self.hashes = read_dataset_info(prepared).content_hash, teacher_hash(teacher)
        self.experiments = {name: self._tuned(job, plan.parameters[name]) for name, job in plan.jobs.items()}
        self.name = sha256("".join(tuned.search for tuned in self.experiments.values()).encode()).hexdigest()[:8]
        self.work = work / self.name
        self.trials = self.config.trials * len(self.experiments)

    def _tuned(self, job: PlannedJob, searched: Sequence[Parameter]) -> Tuned:
        config = self.config
        identity = as_member(job, self.protocol, *self.hashes).identity
        own = {"parameters": to_dict(searched), "seeds": config.seeds, "pruning": config.pruning, "seed": config.seed}
        key = replace(identity, settings={**identity.settings, "tune": own}).key
        return Tuned(job, searched, f"{job.experiment}-{key}")

    @contextlib.contextmanager
    def searches(self) -> Iterator[dict[str, "Search"]]:
        """The search of each experiment, in a store that is open for as long."""
        from segdistill.adapters.optuna_store import Range, Search, opened

        iterations = self.protocol.train.iterations
        assert iterations is not None
        with opened(self.config.storage, WORK) as store:
            yield {
                name: Search(
                    store,
                    tuned.search,
                    {each.path: Range(each.low, each.high, each.log) for each in tuned.parameters},
                    {each.path: each.present for each in tuned.parameters},
                    trials=self.config.trials,
                    seed=self.config.seed,
                    patience=iterations // 3 if self.config.pruning else None,
                )
                for name, tuned in self.experiments.items()
            }

    # -- rounds -------------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Works on trials until none is left to claim; whether all are settled, by whomever."""
        from segdistill.adapters.optuna_store import Session

        session, started, first, whole = Session(), time.monotonic(), self.settled(), self.trials
        logger.info("%d of %d trials are there; search %s", first, whole, self.name)
        with session.held():
            while claimed := self._claim(session) or self._await_others(session):
                try:
                    self._train(claimed)
                finally:
                    self._give_back(claimed)
                done = self.settled()
                left = (time.monotonic() - started) / max(1, done - first) * (whole - done)
                logger.info("%d of %d trials; about %s left", done, whole, _minutes(left))
        return self.settled() == whole

    def settled(self) -> int:
        """Trials of which nothing more will become."""
        with self.searches() as searches:
            done = [sum(trial.settled for trial in search.all()) for search in searches.values()]
        return sum(min(count, self.config.trials) for count in done)

    def _claim(self, session: "Session") -> dict[str, list["Trial"]]:
        with self.searches() as searches:
            for search in searches.values():
                search.take_back()
            claimed = {name: search.claim(self.config.round, session) for name, search in searches.items()}
        return {name: trials for name, trials in claimed.items() if trials}

    def _await_others(self, session: "Session") -> dict[str, list["Trial"]]:
        """Trials that another machine was at work on, if it died: until it would be known, nobody may leave them."""
        from segdistill.adapters.optuna_store import GRACE_SECONDS

        until = time.monotonic() + GRACE_SECONDS + POLL_SECONDS
        while time.monotonic() < until and self._elsewhere(session):
            time.sleep(POLL_SECONDS)
            if claimed := self._claim(session):
                return claimed
        return {}

    def _elsewhere(self, session: "Session") -> bool:
        """Whether a trial is another machine's, of whose processes nobody here knows whether they live."""
        with self.searches() as searches:
            running = [trial for search in searches.values() for trial in search.all() if trial.state == "running"]
        return any(trial.notes.get("place") != session.place for trial in running)

    def _give_back(self, claimed: Mapping[str, Sequence["Trial"]]) -> None:
        """What is not settled waits for the next process; checkpoints of the others go."""
        with self.searches() as searches:
            for name, trials in claimed.items():
                now = {trial.number: trial for trial in searches[name].all()}
                for trial in trials:
                    if now[trial.number].settled:
                        for folder in self.work.glob(f"*/{name}-t{trial.number}"):
                            shutil.rmtree(folder)
                    else:
                        searches[name].give_back(trial.attempt)

    def _train(self, claimed: Mapping[str, Sequence["Trial"]]) -> None:
        """Trains trials of all experiments together, one seed after another."""
        from segdistill.engine.distributed import processes as join

        ended: set[str] = set()  # with an earlier seed
        before = self.settled() / self.trials
        share = sum(map(len, claimed.values())) / self.trials / len(self.config.seeds)
        with join(self.device) as processes:
            if processes.world_size > 1:
                raise UserError(
                    "tune trains in one process, on one GPU; start it several times instead: they share the trials"
                )
            for number, seed in enumerate(self.config.seeds):
                # That of the last seed settles the trial: at once, from its checkpoint, if it came to its end before.
                pairs = [
                    (self._member(name, trial, seed), trial)
                    for name, several in claimed.items()
                    for trial in several
                    if _scores(seed) not in trial.notes or seed == self.config.seeds[-1]
                ]
                members = [member for member, _ in pairs if member.name not in ended]
                act = functools.partial(self._train_group, trials={member.name: trial for member, trial in pairs})
                work = self.work / f"s{seed}"
                parts = in_parts(
                    members, self.protocol, self.prepared, self.teacher, work, processes, act, kind="trial",
                    before=before + number * share, share=share,
                )  # fmt: skip
                ended |= {name for part in parts for group in part for name in group}

    def _member(self, name: str, trial: "Trial", seed: int) -> Member:
        tuned = self.experiments[name]
        values = {each.path: each.rounded(trial.values[each.path]) for each in tuned.parameters}
        job = replace(tuned.job, seed=seed, settings=with_values(name, tuned.job.settings, values))
        return replace(as_member(job, self.protocol, *self.hashes), trial=f"t{trial.number}")

    def _train_group(self, group: Sequence[Member], common: Common, trials: Mapping[str, "Trial"]) -> list[str]:
        """Trains some trials with one seed, maybe in a process of its own; the names of those that ended early."""
        from segdistill.adapters.optuna_store import heartbeats
        from segdistill.engine.trainer import Diverged, Ended

        seeds, ended = self.config.seeds, []
        attempts: dict[str, list[int]] = {}
        for member in group:
            search = self.experiments[member.planned.experiment].search
            attempts.setdefault(search, []).append(trials[member.name].attempt)
        with self.searches() as searches, heartbeats(self.config.storage, WORK, attempts):

            def keep(member: Member, _: Any, outcome: Any) -> None:
                search, attempt = searches[member.planned.experiment], trials[member.name].attempt
                if isinstance(outcome, Ended):
                    ended.append(member.name)
                    search.note(attempt, "why", f"{outcome.reason} by iteration {outcome.iteration}")
                    search.settle(attempt, "diverged" if isinstance(outcome, Diverged) else "pruned")
                    return
                scores = {name: evaluation.miou for name, evaluation in outcome.evaluations.items()}
                search.note(attempt, _scores(member.planned.seed), scores)
                if member.planned.seed == seeds[-1]:
                    notes = search.notes(attempt)
                    score = statistics.fmean(value for seed in seeds for value in notes[_scores(seed)].values())
                    search.settle(attempt, "finished", score)

            judged = [
                replace(member, judge=_judge(searches[member.planned.experiment], trials[member.name].attempt))
                if member.planned.seed == seeds[0] else member
                for member in group
            ]  # fmt: skip
            train_together(judged, common, self.tracker, keep)
        return ended

    # -- results ------------------------------------------------------------------------------------------------------

    def write(self, params_text: str, output: Path) -> None:
        """Fills the output folder: the tuned parameters, the page, and the trials as JSON."""
        import segdistill.report.tuning as report

        with self.searches() as searches:
            results = [
                report.Result(
                    name, self.experiments[name].parameters, search.all()[: self.config.trials], search.importances()
                )
                for name, search in searches.items()
            ]  # fmt: skip
        text = with_tuned_values(params_text, {result.name: result.tuned for result in results})
        whole = report.Report(self.name, self.config, self.protocol.train.iterations or 0, results)
        with new_folder(output) as partial:
            (partial / "params.yaml").write_text(text)
            for name, settings in experiments(read_yaml(partial / "params.yaml")["experiments"]).items():
                parse_methods(name, settings)
            (partial / "report.md").write_text(report.markdown(whole))
            (partial / "report.html").write_text(report.page(whole))
            (partial / "trials.json").write_text(json.dumps(report.as_json(whole), indent=1) + "\n")


def _scores(seed: int) -> str:
    """The name of a trial's note of its students' scores with a seed."""
    return f"miou-s{seed}"


def _judge(search: "Search", attempt: int) -> Callable[[int, Mapping[str, "Evaluation"]], None]:
    from segdistill.engine.trainer import Pruned

    def judge(iteration: int, evaluations: Mapping[str, "Evaluation"]) -> None:
        score = statistics.fmean(evaluation.miou for evaluation in evaluations.values())
        if search.should_end(attempt, iteration, score):
            raise Pruned(iteration, "below the median of the finished trials")

    return judge


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def run(
    *,
    plan: Path,
    prepared: Path,
    teacher: Path,
    trials: Path,
    tracker: Tracker,
    device: str = "auto",
    work: Path | None = None,
) -> None:
    """One of several workers: trains trials until none is left to claim, and writes how many are done.

    Args:
        plan: the parameters as a whole, as params.yaml has them.
        prepared, teacher: where these lie.
        trials: the folder to write.
        tracker: trials become its children.
        device: where networks run.
        work: for checkpoints, by default beside the output.
    """
    folder = work or trials.with_name(trials.name + ".work")
    tuning = Tuning(read_yaml(plan), prepared, teacher, device=device, work=folder)
    tuning.tracker = tracker
    tuning.run()
    with new_folder(trials) as partial:
        facts = {"search": tuning.name, "settled": tuning.settled(), "of": tuning.trials}
        (partial / "trials.json").write_text(json.dumps(facts) + "\n")
