"""The comparison as Markdown and as one self-contained HTML page: no script, no request, light and dark."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from segdistill.report import charts as drawing
from segdistill.report import text
from segdistill.report.overlays import Scene
from segdistill.report.results import Comparison
from segdistill.report.templates import template

NUMBERS_UP_TO = 30  # classes; a larger confusion matrix shows colours only


def markdown(comparison: Comparison) -> str:
    """The finding, the table and how it came about."""
    return _render("report.md.jinja", comparison)


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
    rows = (comparison.teacher, *comparison.rows)
    pixels = confusion.sum(axis=1)  # of each true class
    return _render(
        "page.html.jinja",
        comparison,
        best=next(row for row in rows if (row.experiment, row.student) == comparison.best),
        views=[view for view in text.VIEWS if any(view in row.views for row in rows)],
        charts=charts,
        svg=drawing.svg,
        palette=drawing.Palette(comparison),
        variables=drawing.VARIABLES,
        colors=colors,
        pixels=(pixels / max(pixels.sum(), 1)).tolist(),
        shares=(confusion / np.maximum(pixels[:, None], 1)).tolist(),
        numbers=len(colors) <= NUMBERS_UP_TO,
        scenes=scenes,
    )


def _render(name: str, comparison: Comparison, **values: Any) -> str:
    rows = (comparison.teacher, *comparison.rows)
    return template(name).render(
        text=text,
        comparison=comparison,
        rows=rows,
        by_name={(row.experiment, row.student): row for row in rows},
        teacher=comparison.teacher,
        protocol=comparison.protocol,
        **values,
    )
