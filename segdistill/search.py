"""What ``segdistill tune`` searches: section ``tune`` of params.yaml, and the parameters of an experiment.

A parameter has the dotted path of its value below the experiment. Ranges are multiples of the present value, or parts
of the budget where 0 is a usual value; they hold the present value whatever they say, since it is tried first.
"""

import copy
import dataclasses
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from segdistill.config import Fraction, Name, Seed, config, parse, to_dict
from segdistill.engine.settings import Iterations, PolySchedule
from segdistill.errors import UserError, nearest
from segdistill.plan import DistillConfig, ExperimentConfig, parse_methods

Multiple = Annotated[float, Field(ge=1e-6, le=1e6)]
DIGITS = 3  # of a value that is tried: more would promise more than a search can know
EDGE = 0.05  # of a range, at its ends: a best value there says that the range was too narrow


@config
class SearchConfig:
    """The ranges: the least and the greatest value that are tried; null leaves a setting as it is."""

    learning_rate: tuple[Multiple, Multiple] | None
    """Multiples of the present learning rate, on a logarithmic scale."""

    weight_decay: tuple[Multiple, Multiple] | None
    """Multiples of the present weight decay, on a logarithmic scale."""

    weight: tuple[Multiple, Multiple] | None
    """Of each method: its ``weight``."""

    temperature: tuple[Multiple, Multiple] | None
    """Of each method: ``temperature``, and what ends in ``_temperature``."""

    warmup: tuple[Fraction, Fraction] | None
    """Parts of the budget: the schedule's ``warmup_fraction``."""

    ramp: tuple[Fraction, Fraction] | None
    """Parts of the budget: each method's ``ramp``."""

    terms: bool
    """Whether a method with several terms has each ``<term>_weight`` searched instead of its ``weight``."""

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> "SearchConfig":
        for field in dataclasses.fields(self):
            bounds = getattr(self, field.name)
            if isinstance(bounds, tuple) and not bounds[0] < bounds[1]:
                raise ValueError(f"{field.name}: the first bound must be below the second, not {list(bounds)}")
        return self


@config
class TuneConfig:
    """Section ``tune`` of params.yaml: one search budget for every experiment."""

    trials: Annotated[int, Field(ge=1, le=100_000)]
    """Trials of each experiment; the first is its present settings."""

    round: Annotated[int, Field(ge=1, le=1000)]
    """Trials of each experiment that train together, as one cohort."""

    experiments: Annotated[list[Name], Field(min_length=1)] | None
    """Which experiments are tuned; null: those under ``run``."""

    iterations: Iterations | None
    """Iterations of a trial; null: those of distill.train."""

    seeds: Annotated[list[Seed], Field(min_length=1)]
    """A trial trains once with each of these; its score is the mean."""

    pruning: bool
    """End a trial whose validation is below the median of its experiment's finished trials at that iteration."""

    seed: Seed
    """Of what the search draws."""

    search: SearchConfig
    """The ranges that are searched; null leaves a setting as it is."""

    storage: Annotated[str, Field(min_length=1)] | None
    """Null: a SQLite file under artifacts/tuning; or the URL of a database that several machines share, without its
    password, which is that of SEGDISTILL_TUNE_PASSWORD."""


@dataclass(frozen=True)
class Parameter:
    """A value that is searched."""

    path: str  # below the experiment, dotted
    key: str  # its range, under tune.search
    present: float
    low: float
    high: float
    log: bool

    def rounded(self, value: float) -> float:
        """The value as it is tried and written: the present one, or one of few digits."""
        return self.present if math.isclose(value, self.present, rel_tol=1e-9) else float(f"{value:.{DIGITS}g}")

    def position(self, value: float) -> float:
        """Where a value lies in the range, 0..1."""
        low, high, at = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return (at - low) / (high - low)

    def edge(self, value: float) -> Literal["lower", "upper"] | None:
        """The end of the range at which a value lies, where the range could have gone on: a part ends at 0 and 1."""
        if self.position(value) >= 1 - EDGE and (self.log or self.high < 1):
            return "upper"
        return "lower" if self.position(value) <= EDGE and self.low > 0 else None


def tuned_experiments(tune: TuneConfig, run: Iterable[str], defined: Iterable[str]) -> list[str]:
    """The names of the experiments that are tuned.

    Raises:
        UserError: one is not defined, or stands there twice.
    """
    names = tune.experiments or list(run)
    for name in names:
        if name not in set(defined):
            raise UserError(f"tune.experiments: '{name}' is not defined under experiments{nearest(name, defined)}")
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"tune.experiments: repeats '{repeated}'; each may stand there once")
    return names


def trial_protocol(tune: TuneConfig, distill: DistillConfig) -> DistillConfig:
    """How a trial trains: as stage ``distill`` does, with a budget in iterations.

    Raises:
        UserError: there is none.
    """
    iterations = tune.iterations or distill.train.iterations
    if iterations is None:
        raise UserError(
            "tune.iterations: null, but distill.train has its budget in seconds, which trials that train together"
            " cannot keep apart; give the iterations of a trial"
        )
    return replace(distill, train=replace(distill.train, iterations=iterations, seconds=None))


def parameters(name: str, settings: ExperimentConfig, search: SearchConfig) -> list[Parameter]:
    """What is searched for an experiment, whose settings are spelled out.

    Raises:
        UserError: an end of a range is no value that may stand there.
    """
    searched: list[Parameter] = []

    def add(path: str, key: str, present: float | None) -> None:
        bounds = getattr(search, key)
        parts = key in ("warmup", "ramp")
        if bounds is None or present is None or not (present or parts):
            return
        low, high = bounds if parts else (bounds[0] * present, bounds[1] * present)
        searched.append(Parameter(path, key, present, min(low, present), max(high, present), log=not parts))

    for student, training in settings.students.items():
        optimizer = training.optimizer
        add(f"students.{student}.optimizer.lr", "learning_rate", optimizer.lr)
        add(f"students.{student}.optimizer.weight_decay", "weight_decay", optimizer.weight_decay)
        if isinstance(optimizer.schedule, PolySchedule):
            add(f"students.{student}.optimizer.schedule.warmup_fraction", "warmup", optimizer.schedule.warmup_fraction)
    for index, (method, own) in enumerate(parse_methods(name, settings)[1]):
        values = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
        helpers = {f"{term}_weight" for term in method.helper_terms}
        terms = [key for key, value in values.items() if key.endswith("_weight") and key not in helpers and value]
        for key in terms if search.terms and len(terms) > 1 and own.weight else ["weight"]:
            add(f"methods.{index}.{key}", "weight", values[key])
        for key in values:
            if key == "temperature" or key.endswith("_temperature"):
                add(f"methods.{index}.{key}", "temperature", values[key])
        add(f"methods.{index}.ramp", "ramp", own.ramp if own.weight else None)
    return [parameter for parameter in searched if _may_vary(name, settings, parameter)]


def _may_vary(name: str, settings: ExperimentConfig, parameter: Parameter) -> bool:
    """Whether the range may be searched; not where another setting of the method does without the value.

    Raises:
        UserError: an end of the range is no value that may stand there, and a little change of the present one is.
    """

    def refusal(value: float) -> UserError | None:
        try:
            with_values(name, settings, {parameter.path: value})
        except UserError as error:
            return error
        return None

    reason = refusal(parameter.low) or refusal(parameter.high)
    # The present value may be the least or the greatest that is allowed.
    if reason and not all(refusal(parameter.present * factor) for factor in (0.99, 1.01)):
        raise UserError(f"tune.search.{parameter.key}: reaches too far: {reason}")
    return reason is None


def with_values(name: str, settings: ExperimentConfig, values: Mapping[str, float]) -> ExperimentConfig:
    """The settings with some values in place of the present ones, by dotted path."""
    data = to_dict(settings)
    for path, value in values.items():
        _put(data, path, value)
    changed: ExperimentConfig = parse(ExperimentConfig, data, f"experiments.{name}")
    parse_methods(name, changed)
    return changed


def with_tuned_values(text: str, tuned: Mapping[str, Mapping[str, float]]) -> str:
    """The text of a params file with other values for some experiments; comments, and what is not tuned, stay.

    An experiment's students are written out, since those that share them by an anchor are tuned apart.
    """
    yaml = round_trip_yaml()
    data = yaml.load(text)
    for name, values in tuned.items():
        if values:
            experiment = data["experiments"][name] = _unshared(data["experiments"][name])
            for path, value in values.items():
                _put(experiment, path, value)
    written = io.StringIO()
    yaml.dump(data, written)
    return written.getvalue()


def round_trip_yaml() -> Any:
    """A reader and writer of params files that keeps their comments, order and style."""
    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.emitter.brace_single_entry_mapping_in_flow_sequence = True
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    return yaml


def _unshared(node: Any) -> Any:
    """A copy, comments included, in which nothing is an anchor."""
    copied = copy.deepcopy(node)
    waiting = [copied]
    while waiting:
        part = waiting.pop()
        if hasattr(part, "anchor"):
            part.yaml_set_anchor(None)
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return copied


def _put(data: Any, path: str, value: float) -> None:
    """Sets the value at a dotted path of nested mappings and lists; a mapping that is not there is made."""
    *parents, last = path.split(".")
    for part in parents:
        data = data[int(part)] if isinstance(data, list) else data.setdefault(part, {})
    data[last] = value
