"""The lower half of the report: classes, confusion, pictures."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from segdistill.report import charts, text
from segdistill.report.overlays import Scene
from segdistill.report.results import Comparison, Row

NUMBERS_UP_TO = 30  # classes; a larger confusion matrix shows colours only


def classes(comparison: Comparison, confusion: Any, colors: Sequence[tuple[int, int, int]]) -> str:
    """IoU of every class for every row, and its difference to the undistilled student."""
    rows = comparison.scored
    palette = charts.Palette(comparison)
    share = confusion.sum(axis=1) / max(confusion.sum(), 1)
    head = "".join(f"<th>{escape(palette.label(row))}</th>" for row in rows)
    body = []
    for index, name in enumerate(comparison.protocol.classes):
        cells = "".join(_class_cell(row, name) for row in rows)
        body.append(f"<tr><td>{_swatch(colors[index])}{escape(name)}</td><td>{_share(share[index])}</td>{cells}</tr>")
    return (
        "<section><h2>IoU of each class</h2>"
        '<p class="quiet">Percent, mean over seeds; beside it the difference to the undistilled student, in points. '
        "Single classes have no interval here: look for patterns, not for winners.</p>"
        f'<div class="scroll"><table class="heat"><thead><tr><th>class</th><th>test pixels</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _class_cell(row: Row, name: str) -> str:
    value = row.per_class_iou[name]
    change = row.gain.per_class[name] if row.gain else None
    small = "" if change is None else f"<small>{text.points(change, 1)}</small>"
    return f"{_heat(value)}{text.percent(value)}{small}</td>"


def _heat(value: float | None) -> str:
    """The opening of a cell whose colour is a share."""
    if value is None:
        return "<td>"
    strength = round(90 * value)
    return f'<td{" class=strong" if strength > 60 else ""} style="--h:{strength}%">'


def _share(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.001 or value == 0 else "< 0.1 %"


def _swatch(color: tuple[int, int, int]) -> str:
    return f'<span class="swatch" style="background:rgb({color[0]} {color[1]} {color[2]})"></span>'


def confusion(comparison: Comparison, confusion: Any) -> str:
    """Row-normalised counts of the best student."""
    names = comparison.protocol.classes
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = []
    for name, row in zip(names, share, strict=True):
        cells = []
        for other, value in zip(names, row, strict=True):
            shown = f"{100 * value:.0f}" if value >= 0.005 and len(names) <= NUMBERS_UP_TO else ""
            title = f' title="{escape(name)} as {escape(other)}: {100 * value:.2f} %"'
            cells.append(f"{_heat(float(value))[:-1]}{title}>{shown}</td>")
        body.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    experiment, student = comparison.best
    return (
        f"<section><h2>What is taken for what</h2>"
        f'<p class="quiet">{escape(experiment)} ({escape(student)}), the best student on validation: of the pixels of '
        f"each true class (row), the percentage predicted as each class (column), all seeds.</p>"
        f'<div class="scroll"><table class="heat matrix"><thead><tr><th>truth</th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def pictures(comparison: Comparison, scenes: Sequence[Scene], colors: Sequence[tuple[int, int, int]]) -> str:
    """Test images with truth and predictions; radio buttons and style alone change the view."""
    if not scenes:
        return ""
    legend = "".join(
        f"<span>{_swatch(color)}{escape(name)}</span>"
        for name, color in zip(comparison.protocol.classes, colors, strict=True)
    )
    choices = (
        ("blend", "classes over the image"),
        ("classes", "classes alone"),
        ("errors", "wrong pixels of predictions"),
    )
    choice = "".join(
        f'<label><input type="radio" name="view" id="view-{key}"{" checked" if key == "blend" else ""}> {label}</label>'
        for key, label in choices
    )
    shown = "".join(_scene(scene, comparison) for scene in scenes)
    return (
        '<section class="pictures"><h2>Test images</h2><p class="quiet">Spread evenly over the test split, not chosen; '
        "students of the first seed. The number is the share of right pixels of that image.</p>"
        f'<div class="choice">{choice}</div><div class="legend">{legend}</div>{shown}</section>'
    )


def _scene(scene: Scene, comparison: Comparison) -> str:
    width, height = scene.size
    style = f"aspect-ratio:{width}/{height};background-image:var(--photo)"
    figures = [
        f'<figure><div class="picture" style="{style}"></div><figcaption>{escape(scene.sample)}</figcaption></figure>'
    ]
    several = len({row.student for row in comparison.rows}) > 1
    for tile in scene.tiles:
        student = several and tile.student and tile.experiment != comparison.teacher.experiment
        label = f"{tile.experiment} · {tile.student}" if student else tile.experiment
        prediction = " prediction" if tile.errors else ""
        images = f'<img class="classes{prediction}" alt="" src="{tile.classes}">'
        images += f'<img class="errors" alt="" src="{tile.errors}">' if tile.errors else ""
        number = "" if tile.accuracy is None else f"<span>{text.percent(tile.accuracy)} %</span>"
        figures.append(
            f'<figure><div class="picture" style="{style}">{images}</div>'
            f"<figcaption>{escape(label)}{number}</figcaption></figure>"
        )
    return f'<div class="scene" style="--photo:url(\'{scene.photograph}\')">{"".join(figures)}</div>'
