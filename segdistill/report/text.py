"""Numbers and sentences of the comparison as people read them: on the terminal, in Markdown, on the page."""

from segdistill.report.results import Comparison, Protocol, Row, Spread

NOTHING = "–"
DISPUTED = "†"
VIEWS = {"flip": "with flip", "multi_scale": "multi-scale"}


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


def rounded(value: float | None, whole_from: float = 10) -> str:
    """One decimal, none from ``whole_from`` on."""
    return NOTHING if value is None else f"{value:.{0 if value >= whole_from else 1}f}"


def seconds(value: float | None) -> str:
    """``41 s``, ``12 min``, ``3.4 h``."""
    if value is None:
        return NOTHING
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def share(value: float) -> str:
    """``2.5 %``."""
    return f"{100 * value:.1f} %" if value >= 0.001 or value == 0 else "< 0.1 %"


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
    sentences = [] if better else ["No distilled student is shown to be better than the same student undistilled."]
    for finding, members in (
        ("Better than the same student undistilled: {}.", better),
        ("Worse: {}.", worse),
        ("Open, since the seeds disagree about the sign: {}.", disputed),
        ("Undecided: {}. Differences whose interval includes zero are not evidence.", undecided),
    ):
        if members:
            differences = (f"{name(row)} {points(row.gain.mean)} points {interval(row)}" for row in members if row.gain)
            sentences.append(finding.format("; ".join(differences)))
    return sentences


def protocol(comparison: Comparison) -> list[tuple[str, str]]:
    """The facts under which the numbers hold."""
    facts = comparison.protocol
    budgets = ", ".join(f"{value:,}" for value in facts.iterations) or "not recorded"
    same = "the same for every student" if len(facts.iterations) == 1 else "not the same for every student"
    weights = {"best": "those with the best validation score of the run", "last": "those at the end of the run"}.get(
        facts.selection or ""
    )
    stated = [
        ("Budget", f"{budgets} training iterations, {same}"),
        ("Seeds", ", ".join(str(seed) for seed in facts.seeds) + "; the same for every student"),
        ("Data", ", ".join(f"{name} {number:,}" for name, number in facts.splits.items()) + " images"),
        ("Classes", f"{len(facts.classes)}; a class absent from truth and prediction is left out of the mean"),
        ("Score", "mIoU from one confusion matrix over the whole test split, at the resolution of the labels"),
        (
            "Interval",
            f"paired bootstrap, {facts.resamples:,} draws of the {facts.splits['test']:,} test images (generator seed "
            f"{facts.bootstrap_seed}), the same draw for both systems and all seeds, mIoU of each draw averaged over "
            f"seeds, {confidence(facts)} percentiles",
        ),
    ]
    if weights:
        stated.insert(2, ("Weights", weights))
    if facts.input_size:
        size = f"{facts.input_size[0]} x {facts.input_size[1]}"
        stated.append(("Cost", f"parameters, multiply-accumulates and the fastest forward pass of one {size} image"))
    stated.append(("Provenance", provenance(comparison)))
    return stated


def provenance(comparison: Comparison) -> str:
    """From which data, teacher and code each student came, in hashes; ``results.json`` has them whole."""
    protocol = comparison.protocol
    codes = dict.fromkeys(seed.code[:8] for row in comparison.rows for seed in row.seeds if seed.code)
    identities = {
        name(row): " ".join(seed.identity[:8] for seed in row.seeds if seed.identity) for row in comparison.rows
    }
    parts = [f"data {protocol.data_content}", f"teacher {protocol.teacher_sha256[:8]}"]
    parts += [f"code {' '.join(codes)}"] if codes else []
    named = ", ".join(f"{student} {identity}" for student, identity in identities.items() if identity)
    return ", ".join(parts) + (f"; identities by seed: {named}" if named else "")


def limits(protocol: Protocol) -> list[str]:
    """What the intervals do not cover."""
    number = len(protocol.seeds)
    sentences = [
        f"The {confidence(protocol)} interval says what other test images, drawn like these, could have given. It does "
        f"not cover the choice of training seed: read the seeds' own differences beside it"
        + (", and with a single seed there are none, so that a gain may be luck." if number == 1 else "."),
        f"Each row has its own interval, not widened for the number of rows: of {1 / (1 - protocol.confidence):.0f} "
        "rows without any true difference, about one would exclude zero all the same.",
        "Test images that resemble each other, such as frames of one video, make every interval too narrow.",
    ]
    if number == 2:
        sentences.append(
            "Two seeds show whether a difference repeats at all, not how much it varies; use three or more."
        )
    return sentences
