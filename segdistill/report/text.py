"""Numbers and sentences of the comparison as people read them: on the terminal, in Markdown, on the page."""

from segdistill.report.results import Comparison, Protocol, Row, Spread

NOTHING = "–"
DISPUTED = "†"


def percent(value: float | None, decimals: int = 1) -> str:
    """A share as percent, without the sign of percent."""
    return NOTHING if value is None else f"{100 * value:.{decimals}f}"


def spread(value: Spread | None) -> str:
    """``61.2 ± 0.4`` in percent; a single seed has no spread to show."""
    if value is None:
        return NOTHING
    return percent(value.mean) if value.std is None else f"{percent(value.mean)} ± {percent(value.std)}"


def mean(value: Spread | None) -> str:
    """``61.2``."""
    return percent(value.mean if value else None)


def score(row: Row) -> str:
    """The test score, and which seeds have none because they diverged."""
    return "; ".join(part for part in (spread(row.test_miou) if row.test_miou else "", row.divergence) if part)


def points(value: float | None, decimals: int = 2) -> str:
    """A signed difference in percentage points."""
    if value is None:
        return NOTHING
    text = f"{100 * value:+.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}") if float(text) else f"{0:.{decimals}f}"


def interval(row: Row) -> str:
    """``[+0.40, +2.21]``."""
    return f"[{points(row.gain.low)}, {points(row.gain.high)}]" if row.gain else NOTHING


def difference(row: Row) -> str:
    """``+1.31``, marked where it is disputed."""
    if row.gain is None:
        return NOTHING
    return f"{DISPUTED} {points(row.gain.mean)}" if row.gain.is_disputed else points(row.gain.mean)


def gain(row: Row) -> str:
    """Difference and interval, or why there is none."""
    if row.gain:
        return f"{difference(row)} {interval(row)}"
    return "no reference" if row.distilled and row.seeds else NOTHING


def millions(value: float | None) -> str:
    """``3.42``."""
    return NOTHING if value is None else f"{value / 1e6:.2f}"


def giga(value: float | None) -> str:
    """``0.184``: three digits that count, since small students need them."""
    return NOTHING if value is None else f"{value / 1e9:.3g}"


def rate(value: float | None) -> str:
    """Whole numbers from ten on."""
    return NOTHING if value is None else f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def milliseconds(value: float | None) -> str:
    """One decimal below a hundred."""
    return NOTHING if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def seconds(value: float | None) -> str:
    """``41 s``, ``12 min``, ``3.4 h``."""
    if value is None:
        return NOTHING
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def plural(number: int, word: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{number} {word}{'' if number == 1 else 's'}"


def confidence(protocol: Protocol) -> str:
    """``95 %``."""
    return f"{100 * protocol.confidence:g} %"


def name(row: Row) -> str:
    """``kd (cnn)``."""
    return f"{row.experiment} ({row.student})"


def caption(protocol: Protocol) -> str:
    """What stands under every table."""
    interval_of = (
        f"[low, high] is a {confidence(protocol)} paired bootstrap interval over "
        f"{plural(protocol.splits['test'], 'test image')}, which does not cover the choice of seed. "
    )
    if len(protocol.seeds) == 1:
        return f"{interval_of}A difference whose interval includes zero is not evidence."
    return (
        f"± is the standard deviation over {len(protocol.seeds)} seeds; {interval_of}A difference whose interval "
        f"includes zero is not evidence, nor is one whose sign differs between the seeds ({DISPUTED})."
    )


def headline(comparison: Comparison) -> str:
    """The finding in one honest paragraph."""
    return " ".join(findings(comparison))


def findings(comparison: Comparison) -> list[str]:
    """The finding, a sentence for each kind of result."""
    rows = [row for row in comparison.rows if row.gain]
    if not rows:
        return [
            "No distilled student has an undistilled reference in this run, so nothing can be said about what "
            "distillation did."
        ]
    better = [row for row in rows if row.gain and row.gain.is_evidence and row.gain.mean > 0]
    worse = [row for row in rows if row.gain and row.gain.is_evidence and row.gain.mean < 0]
    disputed = [row for row in rows if row.gain and row.gain.is_disputed]
    undecided = [row for row in rows if row.gain and not row.gain.excludes_zero]
    found = []
    if better:
        found.append(f"Better than the same student undistilled: {_listed(better)}.")
    else:
        found.append("No distilled student is shown to be better than the same student undistilled.")
    if worse:
        found.append(f"Worse: {_listed(worse)}.")
    if disputed:
        found.append(f"Open, since the seeds disagree about the sign: {_listed(disputed)}.")
    if undecided:
        found.append(f"Undecided: {_listed(undecided)}. Differences whose interval includes zero are not evidence.")
    return found


def limits(protocol: Protocol) -> list[str]:
    """What the intervals do not cover."""
    number = len(protocol.seeds)
    found = [
        f"The {confidence(protocol)} interval says what other test images, drawn like these, could have given. It does "
        f"not cover the choice of training seed: read the seeds' own differences beside it"
        + (", and with a single seed there are none, so that a gain may be luck." if number == 1 else "."),
        f"Each row has its own interval, not widened for the number of rows: of {1 / (1 - protocol.confidence):.0f} "
        "rows without any true difference, about one would exclude zero all the same.",
        "Test images that resemble each other, such as frames of one video, make every interval too narrow.",
    ]
    if number == 2:
        found.append("Two seeds show whether a difference repeats at all, not how much it varies; use three or more.")
    return found


def _listed(rows: list[Row]) -> str:
    parts = [f"{name(row)} {points(row.gain.mean)} points {interval(row)}" for row in rows if row.gain]
    return "; ".join(parts)
