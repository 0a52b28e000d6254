"""The charts of the comparison: drawn once, as a picture for ``dvc plots`` or as SVG that follows the page's theme."""

import io
import re
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from segdistill.report.inputs import Measured
from segdistill.report.results import Comparison

# Light values; in the page each becomes its CSS variable, which the dark theme redefines.
SERIES = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300", "#4a3aa7", "#e34948")
INK, MUTED, GRID = "#1a1d21", "#6b7280", "#dfe3e8"
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--grid)",
    **{color: f"var(--series-{number})" for number, color in enumerate(SERIES, 1)},
}
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "segdistill",  # the same numbers give the same bytes
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.major.size": 0,
}
WIDE, NARROW = 9.0, 4.4  # inches
NEAR, LABEL_SPACING = 70.0, 12.0  # points on paper: labels that could touch, and what keeps them apart


class Palette:
    """A colour for every experiment and a marker for every student, the same in all charts.

    What was not distilled is grey, so that colour means distillation; the teacher is ink.
    """

    def __init__(self, comparison: Comparison) -> None:
        distilled = dict.fromkeys(row.experiment for row in comparison.rows if row.distilled)
        self.colors = {name: SERIES[number % len(SERIES)] for number, name in enumerate(distilled)}
        self.colors[comparison.teacher.experiment] = INK
        self.students = list(dict.fromkeys(row.student for row in comparison.rows))

    def color(self, experiment: str) -> str:
        """Hex colour of an experiment."""
        return self.colors.get(experiment, MUTED)

    def marker(self, student: str) -> str:
        """Matplotlib marker of a student; a star for the teacher."""
        return MARKERS[self.students.index(student) % len(MARKERS)] if student in self.students else "*"

    def label(self, experiment: str, student: str) -> str:
        """Short name of a row: the student is named only where there are several."""
        return f"{experiment} · {student}" if len(self.students) > 1 and student in self.students else experiment


def draw_all(comparison: Comparison, networks: Sequence[Measured], *, narrow: bool = False) -> dict[str, Any]:
    """Every chart that this comparison has data for, as matplotlib figures by name; ``narrow`` is for a telephone."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        charts = {
            "gains": _gains(comparison, narrow),
            "scatter": _cost(comparison, narrow),
            "curves": _curves(comparison, networks, narrow),
        }
    return {name: figure for name, figure in charts.items() if figure is not None}


def empty_figure(width: float, height: float) -> Any:
    """An empty figure of a size in inches, which needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _gains(comparison: Comparison, narrow: bool) -> Any:
    """Difference to the undistilled student of every row that has one; None without any."""
    palette = Palette(comparison)
    gains = [(row, row.gain) for row in comparison.rows if row.gain is not None]
    if not gains:
        return None
    figure = empty_figure(NARROW if narrow else WIDE, 0.8 + 0.42 * len(gains))
    axes = figure.add_subplot()
    axes.axvline(0, color=INK, linewidth=1)
    for y, (row, gain) in enumerate(gains):
        color = palette.color(row.experiment)
        axes.plot([100 * gain.low, 100 * gain.high], [y, y], color=color, linewidth=2.5)
        face = "none" if gain.verdict == "not shown" else color
        axes.scatter([100 * gain.mean], [y], s=64, marker="o", color=face, edgecolor=color, linewidth=2, zorder=3)
        if len(gain.per_seed) > 1:
            seeds = [100 * value for value in gain.per_seed]
            axes.scatter(seeds, [y + 0.27] * len(seeds), s=26, marker="|", color=color, linewidth=1.4)
    axes.set_yticks(range(len(gains)), [palette.label(row.experiment, row.student) for row, _ in gains])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(gains) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.grid(axis="x")
    axes.set_xlabel(f"difference in test mIoU to the same student{chr(10) if narrow else ' '}undistilled, points")
    axes.spines["left"].set_visible(False)
    _fix_layout(figure)
    return figure


def _cost(comparison: Comparison, narrow: bool) -> Any:
    """Test mIoU against parameters and against multiply-accumulates."""
    palette, labels = Palette(comparison), []
    figure = empty_figure(*((NARROW, 7.6) if narrow else (WIDE, 4.2)))
    panels = figure.subplots(*((2, 1) if narrow else (1, 2)), sharey=True)
    for axes, name, unit, scale in (
        (panels[0], "params", "parameters, millions", 1e6),
        (panels[1], "macs", "GMACs per image", 1e9),
    ):
        points = []
        for row in comparison.scored:
            cost = getattr(row, name)
            if not cost or row.test_miou is None:
                continue
            scores = [100 * seed.test_miou for seed in row.seeds]
            x, y, color = cost / scale, 100 * row.test_miou.mean, palette.color(row.experiment)
            axes.plot([x, x], [min(scores), max(scores)], color=color, linewidth=1.6, alpha=0.55)
            size = 130 if row is comparison.teacher else 52
            axes.scatter([x], [y], s=size, marker=palette.marker(row.student), color=color, zorder=3, linewidth=0)
            points.append((x, y, palette.label(row.experiment, row.student)))
        axes.set_xscale("log")
        axes.margins(x=0.32, y=0.12)
        axes.grid()
        axes.set_xlabel(unit + " (log scale)")
        _plain_log_ticks(axes.xaxis)
        labels.append((axes, points))
        if narrow or axes is panels[0]:
            axes.set_ylabel("test mIoU, %")
    _place_labels(figure, labels)
    return figure


CURVE_FROM = 3  # points; fewer are no curve
CURVES = (("losses", "cross-entropy of training batches", 1.0), ("curve", "validation mIoU, %", 100.0))


def few_validations(networks: Sequence[Measured]) -> int:
    """How many validations students had, if too few for curves to be drawn of them; else 0."""
    most = max((len(network.curve) for network in networks if network.seed is not None), default=0)
    return most if most < CURVE_FROM else 0


def _curves(comparison: Comparison, networks: Sequence[Measured], narrow: bool) -> Any:
    """What each student learned while it trained, a panel for each quantity; thin lines are seeds, thick their mean.

    None without any curve.
    """
    palette = Palette(comparison)
    panels: list[tuple[str, float, dict[str, list[dict[int, float]]]]] = []
    for student in palette.students:
        for quantity, title, scale in CURVES:
            experiments: dict[str, list[dict[int, float]]] = {}
            for network in networks:
                if network.student == student and len(getattr(network, quantity)) >= CURVE_FROM:
                    experiments.setdefault(network.experiment, []).append(getattr(network, quantity))
            if experiments:
                panels.append((f"{student}: {title}", scale, experiments))
    if not panels:
        return None
    columns = 1 if narrow else min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, labels = empty_figure(NARROW if narrow else WIDE, 3.3 * lines), []
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (title, scale, experiments) in zip(grid, panels, strict=False):
        ends = []
        for experiment, seeds in experiments.items():
            color = palette.color(experiment)
            for curve in seeds:
                axes.plot(
                    curve.keys(), [scale * value for value in curve.values()], color=color, linewidth=1, alpha=0.3
                )
            steps = sorted(set.intersection(*(set(curve) for curve in seeds)))
            if not steps:
                continue
            means = [scale * sum(curve[step] for curve in seeds) / len(seeds) for step in steps]
            axes.plot(steps, means, color=color, linewidth=2.2, linestyle=(0, (5, 2)) if color == MUTED else "-")
            ends.append((steps[-1], means[-1], experiment))
        axes.set_title(title)
        axes.grid(axis="y")
        axes.margins(x=0.02)
        axes.set_xlabel("iteration")
        lowest = min(min(curve.values()) for seeds in experiments.values() for curve in seeds)
        if scale == 1.0 and lowest > 0:  # a loss, which falls by a factor; scores are in percent
            axes.set_yscale("log")
            _plain_log_ticks(axes.yaxis)
        ticks, last = axes.get_xticks(), max(max(curve) for seeds in experiments.values() for curve in seeds)
        axes.set_xlim(right=axes.get_xlim()[1] + 0.22 * last)  # room for the labels
        axes.set_xticks([tick for tick in ticks if 0 <= tick <= last])
        labels.append((axes, ends))
    for axes in figure.axes[len(panels) :]:
        axes.set_visible(False)
    _place_labels(figure, labels)
    return figure


def svg(figure: Any, title: str, shape: str) -> Markup:
    """A chart as an inline ``<svg>`` whose colours and font are those of the page; ``shape`` is its CSS class."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(
            text,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
            bbox_inches="tight",
            pad_inches=0.06,  # a label that is longer than its room makes room
        )
    body = text.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(
        r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>",
        rf'<svg \1 class="{shape}" role="img" aria-label="{title}">',
        body,
        count=1,
    )
    body = re.sub(r'(font: [^;"]*?px) [^;"]*', r"\1 var(--font)", body)
    # Ids of one drawing must not meet those of another in the same page.
    prefix = re.sub(r"\W+", "-", f"{shape} {title}".lower())
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", body)
    for color, variable in VARIABLES.items():
        body = body.replace(color, variable)
    return Markup(body)


def _plain_log_ticks(axis: Any) -> None:
    """Two to six round numbers such as 0.5, 1, 2, 5 instead of powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axis.get_view_interval()
    ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axis.set_major_locator(FixedLocator(ticks if len(ticks) > 1 else [low, high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _fix_layout(figure: Any) -> None:
    """Lays the figure out once and for all: labels need coordinates that stay, and each layout costs a drawing."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def _place_labels(figure: Any, labels: Sequence[tuple[Any, Sequence[tuple[float, float, str]]]]) -> None:
    """Writes labels (x, y, text) right of their points, in each of the axes they belong to."""
    _fix_layout(figure)
    for axes, points in labels:
        groups: list[list[Any]] = []
        for point in sorted((*(axes.transData.transform(p[:2]) * 72 / figure.dpi), *p) for p in points):
            if groups and point[0] - groups[-1][-1][0] < NEAR:
                groups[-1].append(point)
            else:
                groups.append([point])
        for group in groups:
            _place_group(axes, sorted(group, key=lambda point: point[1]))


def _place_group(axes: Any, group: Sequence[tuple[float, float, float, float, str]]) -> None:
    """Labels of points that lie above each other, pushed apart; a line leads to those that moved."""
    heights = [point[1] for point in group]
    wanted = list(heights)
    for index in range(1, len(wanted)):
        wanted[index] = max(wanted[index], wanted[index - 1] + LABEL_SPACING)
    shift = (sum(heights) - sum(wanted)) / len(heights)
    right = max(point[0] for point in group)
    line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 4}
    for (left, height, x, y, text), target in zip(group, wanted, strict=True):
        offset = (right - left + 12, target + shift - height)
        axes.annotate(
            text,
            (x, y),
            xytext=offset,
            textcoords="offset points",
            va="center",
            fontsize=9,
            arrowprops=line if abs(offset[1]) > 4 else None,
        )
