"""What a tuning came to, as Markdown, as one self-contained HTML page, and for programs."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from segdistill.report import charts
from segdistill.report.templates import template
from segdistill.report.text import percent, points
from segdistill.search import Parameter, TuneConfig

if TYPE_CHECKING:
    from segdistill.adapters.optuna_store import Trial

WORDS = {
    "lr": "learning rate", "weight_decay": "weight decay", "warmup_fraction": "warm-up", "ramp": "ramp",
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """The trials of one experiment.

    Args:
        name: the experiment.
        parameters: what was searched.
        trials: all of them.
        importances: the share of each parameter in the variance of the scores; None where trials were too few to tell.
    """

    name: str
    parameters: Sequence[Parameter]
    trials: Sequence["Trial"]
    importances: Mapping[str, float] | None

    @cached_property
    def finished(self) -> list["Trial"]:
        """Those that came to their end, which gives a score."""
        return [trial for trial in self.trials if trial.score is not None]

    @property
    def scores(self) -> list[float]:
        """Validation mIoU of those, 0..1."""
        return [trial.score for trial in self.finished if trial.score is not None]

    @property
    def ended_early(self) -> list["Trial"]:
        """Those that were pruned, or diverged."""
        return [trial for trial in self.trials if trial.state in ("pruned", "diverged")]

    @property
    def present(self) -> "Trial | None":
        """The trial of the present settings, if it has a score."""
        return next((trial for trial in self.finished if trial.present), None)

    @property
    def best(self) -> "Trial | None":
        """The first of those with the best score."""
        return max(self.finished, key=lambda trial: trial.score or 0.0, default=None)

    @property
    def tuned(self) -> dict[str, float]:
        """The values that are better than the present ones, by path; none if no trial was better."""
        if self.best is None or self.best.present:
            return {}
        return {each.path: self.value(each, self.best) for each in self.parameters}

    @property
    def gain(self) -> float | None:
        """Of the best trial over the present settings, in mIoU."""
        if self.present is None or self.best is None:
            return None
        return (self.best.score or 0.0) - (self.present.score or 0.0)

    def percent(self, trial: "Trial") -> float:
        """The score of a finished trial."""
        assert trial.score is not None
        return 100 * trial.score

    def value(self, parameter: Parameter, trial: "Trial") -> float:
        """What a trial had."""
        return parameter.rounded(trial.values[parameter.path])

    def count(self, state: str) -> int:
        """How many trials ended so."""
        return sum(trial.state == state for trial in self.trials)

    @property
    def edges(self) -> list[str]:
        """A sentence for each best value at the end of its range."""
        sentences = []
        for each in self.parameters if self.best is not None else ():
            value = self.value(each, self.best)  # type: ignore[arg-type]
            if edge := each.edge(value):
                sentences.append(
                    f"{self.name}: the best {label(each.path)}, {number(value)}, lies at the {edge} edge of its range "
                    f"{bounds(each)}: a better one may lie beyond; widen tune.search.{each.key}"
                )
        return sentences


@dataclass(frozen=True)
class Report:
    """The whole of a tuning."""

    search: str
    config: TuneConfig
    iterations: int
    results: Sequence[Result]

    @property
    def ended_early(self) -> list["Trial"]:
        """Trials without a score."""
        return [trial for result in self.results for trial in result.ended_early]

    @property
    def edges(self) -> list[str]:
        """See :attr:`Result.edges`."""
        return [sentence for result in self.results for sentence in result.edges]

    @property
    def findings(self) -> list[str]:
        """What to read first."""
        better = [result for result in self.results if result.tuned and result.gain is not None]
        gains = listed(f"{result.name} {signed(result.gain)}" for result in better) if better else ""
        sentences = [
            f"Tuning found better settings than the present ones for {len(better)} of {len(self.results)} experiments: "
            + (f"{gains} points of validation mIoU." if better else "the present settings stay.")
        ]
        if lost := [result.name for result in self.results if result.best is None]:
            sentences.append(f"No trial of {listed(lost)} came to its end: the present settings stay.")
        if saved := [result.name for result in self.results if result.best is not None and result.present is None]:
            sentences.append(f"The present settings of {listed(saved)} diverged, and the tuned ones did not.")
        sentences.append(
            "Each gain is that of the best of several scores on the images that chose it, and so too large; what it is "
            "worth, the comparison on the test split tells, with seeds that the search has not seen."
        )
        return sentences


def label(path: str) -> str:
    """``students.cnn.optimizer.lr`` as ``cnn learning rate``."""
    kind, which, *rest = path.split(".")
    words = WORDS.get(rest[-1], rest[-1].replace("_", " "))
    return f"{which} {words}" if kind == "students" else words if which == "0" else f"method {int(which) + 1} {words}"


def number(value: float | None) -> str:
    """Three digits, or a dash."""
    return "–" if value is None else f"{value:.3g}"


def signed(value: float | None) -> str:
    """A difference of shares in points, or a dash."""
    return points(value, 1)


def bounds(parameter: Parameter) -> str:
    """The range of a parameter."""
    return f"{number(parameter.low)} to {number(parameter.high)}"


def listed(words: Iterable[str]) -> str:
    """``a, b and c``."""
    *rest, last = words
    return f"{', '.join(rest)} and {last}" if rest else last


def spread(result: Result) -> str:
    """Least, middle and greatest score."""
    scores = result.scores
    return (
        " / ".join(percent(value) for value in (min(scores), statistics.median(scores), max(scores))) if scores else "–"
    )


def markdown(report: Report) -> str:
    """The findings and the tables."""
    return _render("tuning.md.jinja", report)


def page(report: Report) -> str:
    """The whole page."""
    import matplotlib

    with matplotlib.rc_context(charts.STYLE):
        drawn = {"trials": _trials(report)}
        drawn |= {result.name: figure for result in report.results if (figure := _values(result)) is not None}
    return _render("tuning.html.jinja", report, charts=drawn, svg=charts.svg)


def as_json(report: Report) -> dict[str, Any]:
    """All trials, with their values as they were tried."""
    return {
        "search": report.search,
        "trials": report.config.trials,
        "iterations": report.iterations,
        "experiments": {
            result.name: {
                "trials": len(result.trials),
                "present": result.present and result.present.score,
                "best": result.best and result.best.score,
                "tuned": result.tuned,
                "importances": result.importances,
                "each": [
                    {
                        "number": trial.number, "state": trial.state, "score": trial.score,
                        "why": trial.notes.get("why"),
                        "values": {each.path: result.value(each, trial) for each in result.parameters},
                    }
                    for trial in result.trials
                ],
            }
            for result in report.results
        },
    }  # fmt: skip


def _render(name: str, report: Report, **values: Any) -> str:
    functions = {each.__name__: each for each in (label, number, percent, signed, bounds, spread, listed)}
    return template(name).render(report=report, **functions, **values)


def _trials(report: Report) -> Any:
    """The score of every finished trial, a row an experiment."""
    figure = charts.empty_figure(9, 0.9 + 0.42 * len(report.results))
    axes = figure.add_subplot()
    for y, result in enumerate(report.results):
        others = [result.percent(trial) for trial in result.finished if not trial.present]
        axes.scatter(others, [y] * len(others), s=30, color=charts.SERIES[0], alpha=0.65, linewidth=0, zorder=3)
        if result.present is not None:
            style = {"s": 75, "marker": "D", "color": "none", "edgecolor": charts.SERIES[1], "linewidth": 2}
            axes.scatter([result.percent(result.present)], [y], zorder=4, **style)
        if result.best is not None:
            axes.scatter([result.percent(result.best)], [y], s=130, color="none", edgecolor=charts.INK, linewidth=1.4,
                         zorder=5)  # fmt: skip
    axes.set_yticks(range(len(report.results)), [result.name for result in report.results])
    axes.tick_params(axis="y", labelcolor=charts.INK)
    axes.set_ylim(len(report.results) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set_xlabel("validation mIoU, %")
    axes.spines["left"].set_visible(False)
    return figure


def _values(result: Result) -> Any:
    """The score against each parameter's value; None without any."""
    if not result.parameters or not result.finished:
        return None
    columns = 3
    rows = -(-len(result.parameters) // columns)
    figure = charts.empty_figure(9, 0.3 + 1.75 * rows)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for axes, each in zip(panels, result.parameters, strict=False):
        for trial in result.finished:
            value = result.value(each, trial)
            style = (
                {"marker": "D", "s": 50, "color": "none", "edgecolor": charts.SERIES[1], "linewidth": 1.8}
                if trial.present
                else {"marker": "o", "s": 24, "color": charts.SERIES[0], "alpha": 0.75, "linewidth": 0}
            )
            axes.scatter([value], [result.percent(trial)], zorder=3, **style)
            if trial is result.best:
                axes.scatter([value], [result.percent(trial)], s=105, color="none", edgecolor=charts.INK, zorder=4)
        axes.set_xscale("log" if each.log else "linear")
        margin = 1.15 if each.log else 0.05 * (each.high - each.low)
        axes.set_xlim(*((each.low / margin, each.high * margin) if each.log
                        else (each.low - margin, each.high + margin)))  # fmt: skip
        axes.margins(y=0.15)
        _three_ticks(axes, each)
        axes.grid()
        axes.set_title(label(each.path), fontsize=10)
    for axes in list(figure.axes)[len(result.parameters) :]:
        axes.set_visible(False)
    figure.axes[0].set_ylabel("validation mIoU, %")
    return figure


def _three_ticks(axes: Any, parameter: Parameter) -> None:
    """The ends of the range and its middle."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = parameter.low, parameter.high
    middle = (low * high) ** 0.5 if parameter.log else (low + high) / 2
    axes.xaxis.set_major_locator(FixedLocator([low, middle, high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
