"""The same search for every experiment: learning rates, weights and the like, by the validation split alone.

Rounds of trials train as cohorts, all experiments together, by one pass of the teacher. Several processes with the same
parameters and store share the trials; each can be stopped at any time. The last one writes ``reports/tuning``.
"""

import argparse
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

from segdistill import environment, execution
from segdistill.config import parse, read_yaml, to_dict
from segdistill.engine.tracker import NullTracker, Tracker
from segdistill.errors import Interrupted, UserError
from segdistill.files import lock, new_folder
from segdistill.plan import DistillConfig, Job, PlannedJob, cohort_plan
from segdistill.search import (
    Parameter,
    TuneConfig,
    parameters,
    trial_protocol,
    tuned_experiments,
    with_tuned_values,
    with_values,
)
from segdistill.stages import BY_NAME, Stage
from segdistill.stages.distill import Common, Member, as_member, in_parts, teacher_hash, train_together

if TYPE_CHECKING:
    from segdistill.adapters.optuna_store import Search, Session, Trial
    from segdistill.engine.evaluate import Evaluation

logger = logging.getLogger(__name__)

WORK, REPORT = Path("artifacts/tuning"), Path("reports/tuning")
TUNE = Stage(
    name="tune", module="", image=None, params=("tune", "distill", "experiments", "run"),
    inputs={key: BY_NAME["distill"].inputs[key] for key in ("prepared", "teacher")}, outputs={"report": str(REPORT)},
)  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """An experiment that is tuned: what it is, and what is searched."""

    job: PlannedJob
    parameters: Sequence[Parameter]
    search: str  # names all that decides what its trials give


class Tuning:
    """A search over all experiments.

    Args:
        params: the parameters as a whole.
        prepared, teacher: where these lie.
        device: where networks run.
    """

    def __init__(self, params: Mapping[str, Any], prepared: Path, teacher: Path, *, device: str) -> None:
        from segdistill.data.shards import read_dataset_info

        self.config: TuneConfig = parse(TuneConfig, params["tune"], "tune")
        self.protocol = trial_protocol(self.config, parse(DistillConfig, params["distill"], "distill"))
        self.prepared, self.teacher, self.device = prepared, teacher, device
        self.tracker: Tracker = NullTracker()  # trials become its children
        self.hashes = read_dataset_info(prepared).content_hash, teacher_hash(teacher)
        names = tuned_experiments(self.config, params["run"], params["experiments"])
        self.experiments = {name: self._tuned(name, params) for name in names}
        self.name = sha256("".join(tuned.search for tuned in self.experiments.values()).encode()).hexdigest()[:8]
        self.work = WORK / self.name

    def _tuned(self, name: str, params: Mapping[str, Any]) -> Tuned:
        config = self.config
        (job,) = cohort_plan(params["distill"], params["experiments"], [Job(name, 0)]).jobs
        searched = parameters(name, job.settings, config.search)
        identity = as_member(job, self.protocol, *self.hashes).identity
        own = {"parameters": to_dict(searched), "seeds": config.seeds, "pruning": config.pruning, "seed": config.seed}
        key = replace(identity, settings={**identity.settings, "tune": own}).key
        return Tuned(job, searched, f"{name}-{key}")

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

        session, started, first = Session(), time.monotonic(), self.settled()
        whole = self.config.trials * len(self.experiments)
        logger.info("%d of %d trials are there; search %s", first, whole, self.name)
        with session.held():
            while claimed := self._claim(session):
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
        with join(self.device) as processes:
            if processes.world_size > 1:
                raise UserError("tune trains in one process; start it several times instead: they share the trials")
            for seed in self.config.seeds:
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
                parts = in_parts(members, self.protocol, self.prepared, self.teacher, work, processes, act)
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
            execution.check_params(read_yaml(partial / "params.yaml"), networks=False, here=True)
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


def command(arguments: argparse.Namespace) -> None:
    """Tunes the experiments of params.yaml."""
    params = read_yaml(arguments.params)
    execution.check_params(params, networks=False, here=True)
    chosen = execution.sections(TUNE, params)
    paths = execution.resolve(TUNE, None, chosen, {})
    context = execution.context(arguments.params)
    tuning = Tuning(chosen, paths["prepared"], paths["teacher"], device=arguments.device)
    here = replace(context, pipeline_run=environment.pipeline_run() or f"tune-{tuning.name}")
    tuning.tracker = execution.open_tracker(arguments.tracker, here, TUNE, None)
    status, complete = "FAILED", False
    try:
        complete = tuning.run()
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        tuning.tracker.close(status)
        if complete or status != "FINISHED":
            tuning.tracker.finish_pipeline(status)
    if not complete:
        logger.info("other processes train the rest; the last of them writes %s", REPORT)
        return
    with lock(REPORT, "segdistill tune", file=WORK / "report.lock"):
        tuning.write(arguments.params.read_text(encoding="utf-8-sig"), REPORT)
    print(f"{REPORT / 'report.html'}: the page; {REPORT / 'params.yaml'}: the tuned parameters")
