"""Numbers and sentences of the comparison as people read them: on the terminal, in Markdown, on the page."""

from collections.abc import Sequence

from segdistill.report.intervals import Difference, Estimate
from segdistill.report.results import Comparison, Protocol, Row, Spread

NOTHING = "–"
BY_VALIDATION = "by validation (mean over seeds)"  # `register` chooses a single run by it
VIEWS = {"flip": "with flip", "multi_scale": "multi-scale", "boundary": "boundary IoU"}


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


def is_shown(gain: Difference | None) -> bool:
    """Whether an interval shows a gain or a loss."""
    return gain is not None and gain.verdict != "not shown"


def interval(gain: Difference) -> str:
    """``[+0.40, +2.21]``."""
    return f"[{points(gain.low)}, {points(gain.high)}]"


def difference(gain: Difference) -> str:
    """``+1.31 [+0.40, +2.21]``."""
    return f"{points(gain.mean)} {interval(gain)}"


def gain(row: Row) -> str:
    """Difference and interval, or why there is none."""
    if row.gain:
        return difference(row.gain)
    return "no reference" if row.distilled and row.seeds else NOTHING


def estimate(value: Estimate | None) -> str:
    """``61.2 [59.8, 62.6]`` in percent."""
    return NOTHING if value is None else f"{percent(value.mean)} [{percent(value.low)}, {percent(value.high)}]"


def out_of_domain(comparison: Comparison) -> str:
    """What stands under the column of the second test set; empty without one."""
    second = comparison.protocol.out_of_domain
    if second is None:
        return ""
    gains = [row.out_of_domain_gain for row in comparison.rows]
    return (
        f"Out of domain: mIoU over {plural(len(second.classes), 'class', 'classes')} on "
        f"{plural(second.samples, 'image')} of a second test set (content {second.content[:12]}), by which nothing is "
        f"chosen: no epoch, no student, no champion. [low, high] of a score is a {confidence(comparison.protocol)} "
        f"interval by itself{'; of differences, ' + family(gains, comparison.protocol) if any(gains) else ''}."
    )


def equal_time(row: Row) -> str:
    """Difference and interval to a student that trained as long, or why there is none."""
    if row.equal_time_gain:
        return difference(row.equal_time_gain)
    return "no seed in common" if row.equal_time_reference else "none trained as long"


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
    """``41 s``, ``2.5 min``, ``12 min``, ``3.4 h``."""
    if value is None:
        return NOTHING
    if value < 120:
        return f"{value:.0f} s"
    return f"{rounded(value / 60)} min" if value < 7200 else f"{value / 3600:.1f} h"


def milliseconds(value: float | None) -> str:
    """``152``, from seconds."""
    return rounded(None if value is None else 1000 * value)


def share(value: float) -> str:
    """``2.5 %``."""
    return f"{100 * value:.1f} %" if value >= 0.001 or value == 0 else "< 0.1 %"


def plural(number: int, word: str, words: str = "") -> str:
    """``1 seed``, ``2 seeds``; ``words`` where an s does not do."""
    return f"{number} {word if number == 1 else words or word + 's'}"


def confidence(protocol: Protocol) -> str:
    """``95 %``."""
    return f"{100 * protocol.confidence:g} %"


def name(row: Row) -> str:
    """``kd (cnn)``."""
    return f"{row.experiment} ({row.student})"


def timed(comparison: Comparison) -> list[Row]:
    """The rows of the second table: distilled, and with a training time."""
    return [row for row in comparison.rows if row.distilled and row.busy_seconds is not None]


def family(gains: Sequence[Difference | None], protocol: Protocol) -> str:
    """For how many rows the intervals hold, and over what."""
    number = sum(gain is not None for gain in gains)
    several = len({seed for gain in gains if gain for seed in gain.seeds}) > 1
    over = "other seeds and other test images" if several else "other test images, but not other seeds"
    if number == 1:
        return f"[low, high] is a {confidence(protocol)} interval over {over}"
    return f"[low, high] are intervals over {over}; all {number} of the table hold at once with {confidence(protocol)}"


def caption(comparison: Comparison) -> str:
    """What stands under every table."""
    facts = comparison.protocol
    spread_of = f"± is the standard deviation over {len(facts.seeds)} seeds. " if len(facts.seeds) > 1 else ""
    gains = [row.gain for row in comparison.rows]
    if not any(gains):
        return spread_of.strip()
    verdict = "A row gains or loses where its interval excludes zero; else nothing is shown."
    return f"{spread_of}{family(gains, facts)}. {verdict}"


def confused_caption(comparison: Comparison) -> str:
    """What stands under the mistakes."""
    beside = "; beside it the same student undistilled" if comparison.confused[0].twin is not None else ""
    return f"Share of the test pixels of the class, all seeds{beside}. Single pairs have no interval."


def hardest_caption(comparison: Comparison) -> str:
    """What stands with the worst images."""
    beside = ", and that of the same student undistilled" if comparison.hardest[0].twin is not None else ""
    return (
        "The test images with the lowest mIoU of its first seed, over the classes that an image or its prediction has"
        f"{beside}. They are its worst, so they say nothing about which of two students is better."
    )


def _clock(protocol: Protocol) -> str:
    return {
        "CPU": "that of the CPU, all threads together, to which other programs on the machine add nothing",
        "GPU": "the GPU's own, from when it was done with what came before",
    }.get(protocol.clock, "the clock's on the wall, which a busy machine lengthens")


def equal_time_caption(comparison: Comparison) -> str:
    """What stands under the second table."""
    gains = [row.equal_time_gain for row in comparison.rows]
    sentence = (
        "Each row against the same student undistilled that trained as long, or least longer: one with a larger "
        f"budget. Time is {_clock(comparison.protocol)}. An online method's time trains all of its students."
    )
    return f"{sentence} {family(gains, comparison.protocol)}." if any(gains) else sentence


NAMED = 3  # students in the headline; all of them are in what follows it
VERDICTS = {"gains": "Better than the same student undistilled", "loses": "Worse", "not shown": "Not shown either way"}


def headline(comparison: Comparison) -> str:
    """The finding in one sentence."""
    gains = [row.gain for row in comparison.rows if row.gain]
    if not gains:
        return (
            "No distilled student has an undistilled reference in this run, so nothing can be said about what "
            "distillation did."
        )
    gaining = [(row, row.gain) for row in comparison.rows if row.gain and row.gain.verdict == "gains"]
    gaining.sort(key=lambda pair: -pair[1].mean)
    names = [f"{name(row)} {points(gain.mean)}" for row, gain in gaining]
    losing, unsure = (sum(gain.verdict == verdict for gain in gains) for verdict in ("loses", "not shown"))
    rest = [f"{losing} {'loses' if losing == 1 else 'lose'}"] if losing else []
    rest += [f"{unsure} {'is' if unsure == 1 else 'are'} not shown to differ"] if unsure else []
    rest += ["a single seed may be luck"] if len(comparison.protocol.seeds) == 1 else []
    same = "the same student undistilled"
    if names:
        verb = "gains" if len(names) == 1 else "gain"
        start = (
            f"{len(names)} of {plural(len(gains), 'distilled student')} {verb} over {same}, "
            f"{'most of all ' if len(names) > NAMED else ''}{', '.join(names[:NAMED])} points"
        )
    else:
        start = f"No distilled student is shown to be better than {same}"
    return "; ".join([start, ", ".join(rest)] if rest else [start]) + "."


def findings(comparison: Comparison) -> list[str]:
    """A sentence for each verdict."""
    sentences = []
    for verdict, words in VERDICTS.items():
        members = [row for row in comparison.rows if row.gain and row.gain.verdict == verdict]
        if members:
            differences = (f"{name(row)} {difference(row.gain)}" for row in members if row.gain)
            sentences.append(f"{words}, in points: {'; '.join(differences)}.")
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
        ("Classes", _classes(comparison)),
        (
            "Score",
            "mIoU from one confusion matrix over the whole test split, at the resolution of the labels, to which "
            "logits are resized bilinearly (align_corners false)",
        ),
        ("Interval", _interval(comparison)),
    ]
    if comparison.teacher.ece:
        stated.append(
            ("ECE", "expected calibration error of the top probability over all labelled test pixels, 15 equal bins")
        )
    if weights:
        stated.insert(2, ("Weights", weights))
    if facts.input_size:
        size = f"{facts.input_size[0]} x {facts.input_size[1]}"
        stated.append(("Cost", f"parameters, multiply-accumulates and the fastest forward pass of one {size} image"))
    stated.append(("Provenance", provenance(comparison)))
    return stated


def _classes(comparison: Comparison) -> str:
    """How many there are, and which of them have no score."""
    names = comparison.protocol.classes
    absent = [name for name in names if all(row.per_class_iou.get(name) is None for row in comparison.scored)]
    of_these = f"; {len(absent)} of them have no pixel in the test split ({', '.join(absent)})" if absent else ""
    return f"{len(names)}{of_these}; a class absent from truth and prediction is left out of the mean"


def _interval(comparison: Comparison) -> str:
    """How an interval is computed, over what, and how it is corrected."""
    facts = comparison.protocol
    gains = [row.gain for row in comparison.rows if row.gain]
    evenly = -(-facts.splits["test"] // facts.block)
    blocks = facts.blocks or evenly
    images = f"{blocks} blocks of {facts.block} test images" if facts.block > 1 else plural(blocks, "test image")
    if blocks > evenly:
        images = f"{blocks} blocks of at most {facts.block} test images, each of one sequence"
    parts = [f"the jackknife over {images}"]
    if any(len(gain.seeds) > 1 for gain in gains):
        parts.insert(
            0,
            "what seeds leave unexplained in the rows of one student (the same for all of them, or the row's own if "
            "that is more)",
        )
    return (
        f"Student's, of the mean over seeds of the paired differences; variance: {' plus '.join(parts)}; for each row "
        f"at 1 - {1 - facts.confidence:g} / {max(len(gains), 1)} (Bonferroni), so that all hold at once with "
        f"{confidence(facts)}"
    )


def origin(comparison: Comparison) -> list[tuple[str, str]]:
    """From which data, code and teacher the page is, shortened; how the result is found again."""
    facts = comparison.protocol
    versions = [
        ("data version", facts.data_md5), ("data content", facts.data_content), ("commit", facts.git_commit),
        ("teacher", facts.teacher_sha256),
    ]  # fmt: skip
    return [(name, value[:12]) for name, value in versions if value]


def training(protocol: Protocol) -> str:
    """What the column of training times is called, by whose clock it is."""
    return {"CPU": "CPU time of training", "GPU": "GPU time of training"}.get(protocol.clock, "training, wall time")


def provenance(comparison: Comparison) -> str:
    """From which data, teacher and code each student came, in hashes; ``results.json`` has them whole."""
    protocol = comparison.protocol
    codes = dict.fromkeys(seed.code[:8] for row in comparison.rows for seed in row.seeds if seed.code)
    identities = {
        name(row): " ".join(seed.identity[:8] for seed in row.seeds if seed.identity) for row in comparison.rows
    }
    network = f" ({protocol.teacher_network})" if protocol.teacher_network else ""
    parts = [f"data {protocol.data_content}", f"teacher {protocol.teacher_sha256[:8]}{network}"]
    parts += [f"second test set {protocol.out_of_domain.content}"] if protocol.out_of_domain else []
    parts += [f"code {' '.join(codes)}"] if codes else []
    named = ", ".join(f"{student} {identity}" for student, identity in identities.items() if identity)
    return ", ".join(parts) + (f"; identities by seed: {named}" if named else "")


def limits(comparison: Comparison) -> list[str]:
    """What the intervals do not cover."""
    facts, number = comparison.protocol, len(comparison.protocol.seeds)
    sentences = ["Other data, another teacher, another budget: the intervals are of this run's."]
    if number == 1:
        sentences.append(
            "Other seeds: with one there is no telling what another would have given, so that a gain may be luck. Use "
            "three."
        )
    else:
        sentences.append(
            f"With {number} seeds the rows of one student are taken to scatter alike. Where the undistilled student "
            "scatters much more than the rest, false gains are about twice as frequent as promised "
            "(docs/results/coverage.md)."
        )
    if facts.block == 1:
        sentences.append(
            "Every test image counts as a scene of its own. Where they are frames of a video, the intervals are too "
            "narrow; `compare.block` makes blocks of them."
        )
    sentences.append("A row without a shown gain is not shown to be without one: more seeds narrow the interval.")
    return sentences
