"""The charts of the comparison: drawn once, as a picture for ``dvc plots`` or as SVG that follows the page's theme."""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from segdistill.report.inputs import Curve
from segdistill.report.results import Comparison, Row

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
NEAR, LABEL_SPACING = 70.0, 12.0  # points on paper: labels that could touch, and what keeps them apart
Drawing = Callable[[Any], None]  # draws into a matplotlib figure


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

    def label(self, row: Row) -> str:
        """Short name of a row: the student is named only where there are several."""
        if len(self.students) < 2 or row.student not in self.students:
            return row.experiment
        return f"{row.experiment} · {row.student}"


def gains(comparison: Comparison) -> tuple[Drawing, float] | None:
    """Difference to the undistilled student of every row that has one, and the figure's height in inches."""
    palette = Palette(comparison)
    rows = [row for row in comparison.rows if row.gain is not None]
    if not rows:
        return None

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.axvline(0, color=INK, linewidth=1)
        for position, row in enumerate(rows):
            gain, color = row.gain, palette.color(row.experiment)
            assert gain is not None
            axes.plot([100 * gain.low, 100 * gain.high], [position] * 2, color=color, linewidth=2.5)
            face = color if gain.is_evidence else "none"
            axes.scatter(
                [100 * gain.mean], [position], s=64, marker="o", color=face, edgecolor=color, linewidth=2, zorder=3
            )
            if len(gain.per_seed) > 1:
                seeds = [100 * value for value in gain.per_seed]
                axes.scatter(seeds, [position + 0.27] * len(seeds), s=26, marker="|", color=color, linewidth=1.4)
        axes.set_yticks(range(len(rows)), [palette.label(row) for row in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.margins(x=0.08)
        axes.grid(axis="x")
        axes.set_xlabel("difference in test mIoU to the same student undistilled, percentage points")
        axes.spines["left"].set_visible(False)
        _fix_layout(figure)

    return draw, 0.8 + 0.42 * len(rows)


def cost(comparison: Comparison) -> tuple[Drawing, float]:
    """Test mIoU against parameters and against multiply-accumulates."""
    palette = Palette(comparison)
    rows = [(row, row.test_miou.mean) for row in comparison.scored if row.test_miou]

    def draw(figure: Any) -> None:
        panels, labels = figure.subplots(1, 2, sharey=True), []
        for axes, name, unit, scale in (
            (panels[0], "params", "parameters, millions", 1e6),
            (panels[1], "macs", "GMACs per image", 1e9),
        ):
            points = []
            for row, score in rows:
                value = getattr(row, name)
                if not value:
                    continue
                scores = [100 * item.test_miou for item in row.seeds]
                x, y, color = value / scale, 100 * score, palette.color(row.experiment)
                axes.plot([x, x], [min(scores), max(scores)], color=color, linewidth=1.6, alpha=0.55)
                size = 130 if row is comparison.teacher else 52
                axes.scatter([x], [y], s=size, marker=palette.marker(row.student), color=color, zorder=3, linewidth=0)
                points.append((x, y, palette.label(row)))
            axes.set_xscale("log")
            axes.margins(x=0.32, y=0.12)
            axes.grid()
            axes.set_xlabel(unit + " (log scale)")
            _plain_log_ticks(axes)
            labels.append((axes, points))
        panels[0].set_ylabel("test mIoU, %")
        _place_labels(figure, labels)

    return draw, 4.2


def curves(comparison: Comparison, measured: Sequence[Curve]) -> tuple[Drawing, float] | None:
    """Validation mIoU while training, one panel for each student; thin lines are seeds, thick ones their mean."""
    palette = Palette(comparison)
    shown = [curve for curve in measured if len(curve.steps) > 1 and curve.student in palette.students]
    students = [student for student in palette.students if any(curve.student == student for curve in shown)]
    if not students:
        return None
    columns = min(2, len(students))
    lines = -(-len(students) // columns)

    def draw(figure: Any) -> None:
        panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
        labels: list[Any] = []
        for axes, student in zip(panels, students, strict=False):
            ends = []
            mine = [curve for curve in shown if curve.student == student]
            for experiment in dict.fromkeys(curve.experiment for curve in mine):
                color = palette.color(experiment)
                seeds = [curve for curve in mine if curve.experiment == experiment]
                for curve in seeds:
                    axes.plot(curve.steps, [100 * v for v in curve.values], color=color, linewidth=1, alpha=0.4)
                common = sorted(set.intersection(*(set(curve.steps) for curve in seeds)))
                if not common:
                    continue
                tables = [dict(zip(curve.steps, curve.values, strict=True)) for curve in seeds]
                means = [100 * sum(table[step] for table in tables) / len(tables) for step in common]
                dashes = "-" if palette.color(experiment) != MUTED else (0, (5, 2))
                axes.plot(common, means, color=color, linewidth=2.2, linestyle=dashes)
                ends.append((common[-1], means[-1], experiment))
            axes.set_title(student)
            axes.grid(axis="y")
            axes.margins(x=0.02)
            axes.set_xlabel("iteration")
            ticks, last = axes.get_xticks(), max(curve.steps[-1] for curve in mine)
            axes.set_xlim(right=axes.get_xlim()[1] + 0.22 * last)  # room for the labels
            axes.set_xticks([tick for tick in ticks if 0 <= tick <= last])
            labels.append((axes, ends))
        for axes in list(panels):  # what is left of the grid
            axes.set_visible(False)
        figure.axes[0].set_ylabel("validation mIoU, %")
        _place_labels(figure, labels)

    return draw, 3.3 * lines


def draw_all(comparison: Comparison, measured: Sequence[Curve]) -> dict[str, Any]:
    """Every chart this comparison has data for, as matplotlib figures by name."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawings = {"gains": gains(comparison), "scatter": cost(comparison), "curves": curves(comparison, measured)}
    figures = {}
    with matplotlib.rc_context(STYLE):
        for name, drawing in drawings.items():
            if drawing is not None:
                figures[name] = Figure(figsize=(9, drawing[1]), layout="constrained")
                FigureCanvasAgg(figures[name])
                drawing[0](figures[name])
    return figures


def svg(figure: Any, title: str) -> str:
    """A chart as an inline ``<svg>`` whose colours and font are those of the page."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    body = text.getvalue()
    body = body[body.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{title}">', body, count=1)
    body = re.sub(r'(font: [^;"]*?px) [^;"]*', r"\1 var(--font)", body)
    # Ids of one drawing must not meet those of another in the same page.
    prefix = re.sub(r"\W+", "-", title.lower())
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'(url\(#|href="#)', rf"\1{prefix}-", body)
    for color, variable in VARIABLES.items():
        body = body.replace(color, variable)
    return body


def png(figure: Any, path: Path) -> None:
    """A chart as a picture."""
    figure.savefig(path, format="png", dpi=130)


def _plain_log_ticks(axes: Any) -> None:
    """Two to six round numbers such as 0.5, 1, 2, 5 instead of powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = axes.get_xlim()
    ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks if len(ticks) > 1 else [low, high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


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
