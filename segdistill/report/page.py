"""The comparison as Markdown and as one self-contained HTML page: no request, light and dark.

Its short script sorts tables, moves the border between two pictures and folds tables that are too wide; without it all
is there to be read.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from segdistill.report import charts as drawing
from segdistill.report import text
from segdistill.report.overlays import Scene
from segdistill.report.results import Comparison, Row
from segdistill.report.templates import template

NUMBERS_UP_TO = 30  # classes; a larger confusion matrix shows colours only
LARGEST_GAINS = 12  # classes beside the pictures; the table has all of them


def markdown(comparison: Comparison) -> str:
    """The finding, the table and how it came about."""
    return _render("report.md.jinja", comparison)


def page(
    comparison: Comparison,
    confusion: Any,
    charts: Mapping[str, Mapping[str, Any]],
    scenes: Sequence[Scene],
    colors: Sequence[tuple[int, int, int]],
    few_validations: int = 0,
    hardest: Sequence[Scene] = (),
) -> str:
    """The whole report.

    Args:
        comparison: what is reported.
        confusion: counts [K, K] of the best student, all seeds.
        charts: figures by name, in the shapes "wide" and "narrow".
        scenes: pictures.
        colors: of the classes.
        few_validations: how many validations there were, if too few for curves.
        hardest: pictures of the images on which the best student is worst.
    """
    rows = (comparison.teacher, *comparison.rows)
    pixels = confusion.sum(axis=1)  # of each true class
    pupil = best_distilled(comparison)
    return _render(
        "page.html.jinja",
        comparison,
        pupil=pupil,
        class_gains=_largest(pupil),
        views=[view for view in text.VIEWS if any(view in row.views for row in rows)],
        charts=charts,
        few_validations=few_validations,
        svg=drawing.svg,
        palette=drawing.Palette(comparison),
        variables=drawing.VARIABLES,
        colors=colors,
        pixels=(pixels / max(pixels.sum(), 1)).tolist(),
        shares=(confusion / np.maximum(pixels[:, None], 1)).tolist(),
        numbers=len(colors) <= NUMBERS_UP_TO,
        scenes=list(scenes),
        hardest=list(hardest),
    )


def best_distilled(comparison: Comparison) -> Row | None:
    """The distilled student with the best mean validation score of those that have an undistilled twin."""
    rows = [row for row in comparison.rows if row.gain is not None and row.val_miou is not None]
    return max(rows, key=lambda row: row.val_miou.mean if row.val_miou else 0.0, default=None)


def _largest(row: Row | None) -> list[tuple[str, float]]:
    """The classes in which a student differs most from its twin, in order of the difference; equal ones are none."""
    if row is None or row.gain is None:
        return []
    gains = [(name, gain) for name, gain in row.gain.per_class.items() if gain is not None and abs(gain) >= 0.0005]
    largest = sorted(gains, key=lambda pair: -abs(pair[1]))[:LARGEST_GAINS]
    return sorted(largest, key=lambda pair: -pair[1])


def _render(name: str, comparison: Comparison, **values: Any) -> str:
    rows = (comparison.teacher, *comparison.rows)
    by_name = {(row.experiment, row.student): row for row in rows}
    return template(name).render(
        text=text,
        comparison=comparison,
        rows=rows,
        by_name=by_name,
        best=by_name[comparison.best],
        teacher=comparison.teacher,
        protocol=comparison.protocol,
        **values,
    )
