"""The comparison as Markdown and as one self-contained HTML page: no script, no request, light and dark."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from segdistill.report import charts as drawing
from segdistill.report import details, text
from segdistill.report.overlays import Scene
from segdistill.report.results import Comparison, Row
from segdistill.report.style import CSS

VIEWS = {"flip": "with flip", "multi_scale": "multi-scale"}


def markdown(comparison: Comparison) -> str:
    """The finding, the table and how it came about."""
    rows = (comparison.teacher, *comparison.rows)
    head = ["experiment", "student", "test mIoU", "to undistilled", "params (M)", "GMACs", "images/s"]
    lines = ["# Comparison", "", text.headline(comparison), "", _line(head), _line(["---"] * 2 + ["---:"] * 5)]
    for row in rows:
        student = text.NOTHING if row is comparison.teacher else row.student
        difference = f"**{text.gain(row)}**" if row.gain and row.gain.is_evidence else text.gain(row)
        cost = [text.millions(row.params), text.giga(row.macs), text.rate(row.images_per_second)]
        lines.append(_line([row.experiment, student, text.score(row), difference, *cost]))
    lines += ["", text.caption(comparison.protocol), ""]
    lines += [f"> {warning}" for warning in comparison.warnings]
    lines += ["", "## Protocol", "", *(f"- {name}: {value}" for name, value in protocol(comparison))]
    lines += ["", "## What it does not show", "", *(f"- {limit}" for limit in text.limits(comparison.protocol)), ""]
    return "\n".join(lines)


def protocol(comparison: Comparison) -> list[tuple[str, str]]:
    """The facts under which the numbers hold."""
    facts = comparison.protocol
    budgets = ", ".join(f"{value:,}" for value in facts.iterations) or "not recorded"
    same = "the same for every student" if len(facts.iterations) == 1 else "not the same for every student"
    weights = {"best": "those with the best validation score of the run", "last": "those at the end of the run"}.get(
        facts.selection or ""
    )
    found = [
        ("Budget", f"{budgets} training iterations, {same}"),
        ("Seeds", ", ".join(str(seed) for seed in facts.seeds) + "; the same for every student"),
        ("Data", ", ".join(f"{name} {number:,}" for name, number in facts.splits.items()) + " images"),
        ("Classes", f"{len(facts.classes)}; a class absent from truth and prediction is left out of the mean"),
        ("Score", "mIoU from one confusion matrix over the whole test split, at the resolution of the labels"),
        (
            "Interval",
            f"paired bootstrap, {facts.resamples:,} draws of the {facts.splits['test']:,} test images (generator seed "
            f"{facts.bootstrap_seed}), the same draw for both systems and all seeds, mIoU of each draw averaged over "
            f"seeds, {text.confidence(facts)} percentiles",
        ),
    ]
    if weights:
        found.insert(2, ("Weights", weights))
    if facts.input_size:
        size = f"{facts.input_size[0]} x {facts.input_size[1]}"
        found.append(("Cost", f"parameters, multiply-accumulates and the fastest forward pass of one {size} image"))
    found.append(("Data version", f"content {facts.data_content}"))
    return found


def page(
    comparison: Comparison,
    confusion: Any,
    charts: Mapping[str, Any],
    scenes: Sequence[Scene],
    colors: Sequence[tuple[int, int, int]],
) -> str:
    """The whole report.

    Args:
        comparison: what is reported.
        confusion: counts [K, K] of the best student, all seeds.
        charts: figures by name.
        scenes: pictures.
        colors: of the classes.
    """
    parts = [
        _head(comparison),
        _gains(comparison, charts),
        _table(comparison),
        _chart(
            "Accuracy against cost",
            "Top left is better: more accurate, smaller. Vertical lines span the seeds.",
            charts.get("scatter"),
        ),
        _chart(
            "Validation while training",
            "Thick: mean over seeds; thin: each seed. Dashed grey: without distillation.",
            charts.get("curves"),
        ),
        details.classes(comparison, confusion, colors),
        details.confusion(comparison, confusion),
        details.pictures(comparison, scenes, colors),
        _protocol(comparison),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Distillation compared</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _head(comparison: Comparison) -> str:
    facts = comparison.protocol
    version = f", data <code>{escape(facts.data_content[:12])}</code>"
    experiments = len({row.experiment for row in comparison.rows})
    sentences = "".join(f"<p>{escape(part)}</p>" for part in text.findings(comparison))
    warned = "".join(f'<div class="warning">{escape(item)}</div>' for item in comparison.warnings)
    return (
        "<h1>Distillation compared</h1>"
        f'<p class="quiet">{text.plural(experiments, "experiment")} with {text.plural(len(facts.seeds), "seed")}, '
        f"{text.plural(facts.splits['test'], 'test image')}, {len(facts.classes)} classes{version}</p>"
        f'<div class="finding">{sentences}</div>{_facts(comparison)}{warned}'
    )


def _facts(comparison: Comparison) -> str:
    teacher = comparison.teacher
    best = next(row for row in comparison.rows if (row.experiment, row.student) == comparison.best)
    cells = [
        (text.mean(teacher.test_miou), f"teacher, test mIoU (%), {text.millions(teacher.params)} M parameters"),
        (text.mean(best.test_miou), f"best student on validation, {text.name(best)}, test mIoU (%)"),
    ]
    if teacher.params and best.params:
        cells.append((f"{_times(teacher.params / best.params)}", f"fewer parameters: {text.millions(best.params)} M"))
    if teacher.latency_ms and best.latency_ms:
        latency = f"{text.milliseconds(teacher.latency_ms)} → {text.milliseconds(best.latency_ms)} ms an image"
        cells.append((f"{_times(teacher.latency_ms / best.latency_ms)}", f"faster: {latency}"))
    tiles = "".join(f'<div class="fact"><b>{escape(big)}</b><span>{escape(small)}</span></div>' for big, small in cells)
    return f'<div class="facts">{tiles}</div>'


def _times(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio < 10 else f"{ratio:.0f}×"


def _gains(comparison: Comparison, charts: Mapping[str, Any]) -> str:
    note = (
        f"Dot: mean over seeds; bar: {text.confidence(comparison.protocol)} interval over test images; small strokes: "
        "the seeds. A hollow dot is not evidence: its interval includes zero, or its seeds disagree about the sign."
    )
    return _chart("What distillation gained", note, charts.get("gains"))


def _chart(title: str, note: str, figure: Any) -> str:
    if figure is None:
        return ""
    drawn = f'<div class="scroll">{drawing.svg(figure, title)}</div>'
    return f'<section><h2>{title}</h2><p class="quiet">{note}</p>{drawn}</section>'


def _table(comparison: Comparison) -> str:
    views = [view for view in VIEWS if any(view in row.views for row in (comparison.teacher, *comparison.rows))]
    head = ["experiment", "student", "test mIoU, %", "to undistilled", *(VIEWS[view] for view in views)]
    head += ["val mIoU, %", "params, M", "GMACs", "latency, ms", "images/s", "training"]
    cells = "".join(f"<th{' class=text' if index < 2 else ''}>{name}</th>" for index, name in enumerate(head))
    palette = drawing.Palette(comparison)
    body = "".join(_table_row(row, comparison, palette, views) for row in (comparison.teacher, *comparison.rows))
    return (
        '<section><h2>All numbers</h2><div class="scroll"><table class="main">'
        f"<thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>"
        f'<p class="quiet" style="margin-top:12px">{escape(text.caption(comparison.protocol))}</p></section>'
    )


def _table_row(row: Row, comparison: Comparison, palette: drawing.Palette, views: Sequence[str]) -> str:
    is_teacher = row is comparison.teacher
    kind = "teacher" if is_teacher else "best" if (row.experiment, row.student) == comparison.best else ""
    color = drawing.VARIABLES[palette.color(row.experiment)]
    each = ", ".join(text.percent(item.test_miou) for item in row.seeds) if len(row.seeds) > 1 else ""
    small = f'<span class="small">{each}</span>' if each else ""
    small += f'<span class="small wide">{escape(row.divergence)}</span>' if row.divergence else ""
    cells = [
        f'<td><span class="dot" style="background:{color}"></span>{escape(row.experiment)}</td>',
        f'<td class="text">{text.NOTHING if is_teacher else escape(row.student)}</td>',
        f"<td>{text.spread(row.test_miou)}{small}</td>",
        f"<td>{_difference(row)}</td>",
        *(f"<td>{text.spread(row.views[view]) if view in row.views else text.NOTHING}</td>" for view in views),
    ]
    numbers = [
        text.spread(row.val_miou),
        text.millions(row.params),
        text.giga(row.macs),
        text.milliseconds(row.latency_ms),
        text.rate(row.images_per_second),
        text.seconds(row.training_seconds),
    ]
    return f'<tr class="{kind}">{"".join(cells)}{"".join(f"<td>{number}</td>" for number in numbers)}</tr>'


def _difference(row: Row) -> str:
    if row.gain is None:
        return text.gain(row)
    sure = f"sure {'up' if row.gain.mean > 0 else 'down'}" if row.gain.is_evidence else ""
    return f'<span class="{sure}">{text.difference(row)}</span><span class="small">{text.interval(row)}</span>'


def _protocol(comparison: Comparison) -> str:
    facts = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in protocol(comparison))
    limits = "".join(f"<li>{escape(limit)}</li>" for limit in text.limits(comparison.protocol))
    return f"<section><h2>Protocol</h2><dl>{facts}</dl><h2>What this does not show</h2><ul>{limits}</ul></section>"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
