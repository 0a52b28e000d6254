"""The model card of a student: what it is, where it comes from, how good it is and where not, and how to load it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from segdistill.images import of_contract
from segdistill.report import text
from segdistill.report.results import Comparison, Row, SeedResult

DESCRIPTION_LIMIT = 4900  # characters; MLflow's databases keep 5000 of a version's description


@dataclass(frozen=True)
class Format:
    """What one format of a network gives and takes."""

    name: str
    megabytes: float
    val_miou: float  # share (0..1)
    latency_ms: float  # fastest of warm passes on the CPU

    def __str__(self) -> str:
        return f"{self.megabytes:.1f} MB, val mIoU {100 * self.val_miou:.2f} %, {self.latency_ms:.1f} ms"


@dataclass(frozen=True)
class Formats:
    """One network in several formats: the size of the image that was timed, the CPU's threads, and why int8 is none."""

    size: tuple[int, int]
    threads: int
    formats: tuple[Format, ...]
    refused: str = ""

    @property
    def conditions(self) -> str:
        """Of which image and with how many threads the times are."""
        return f"one image of {_size(self.size)} on the CPU with {text.plural(self.threads, 'thread')}"

    def lines(self) -> list[str]:
        """A table in Markdown."""
        rows = [
            f"| {one.name} | {one.megabytes:.1f} | {100 * one.val_miou:.2f} | {one.latency_ms:.1f} |"
            for one in self.formats
        ]
        caption = f"The time is the fastest of warm passes of {self.conditions}."
        refused = ["", f"There is no int8: {self.refused}."] if self.refused else []
        return ["| format | MB | validation mIoU, % | ms |", "|---|---|---|---|", *rows, "", caption, *refused]


def find(results: Comparison, experiment: str, student: str, seed: int) -> tuple[Row, SeedResult]:
    """The row of a student, and what this seed gave."""
    row = next(row for row in results.rows if (row.experiment, row.student) == (experiment, student))
    return row, next(one for one in row.seeds if one.seed == seed)


def model_card(
    results: Comparison,
    row: Row,
    seed: SeedResult,
    *,
    contract: Mapping[str, Any],
    model: Mapping[str, Any],
    data_md5: str | None,
    data_licence: str | None,
    name: str,
    files: Mapping[str, str],
    formats: Formats | None = None,
) -> str:
    """The card as Markdown; why the student is champion is added when that is known (:func:`decided`).

    Args:
        results: the comparison that it comes from.
        row: the student's.
        seed: of its seeds.
        contract: what its file says of itself (models/portable.py).
        model: its architecture.
        data_md5: the version of the data, where it is known.
        data_licence: under which they may be used, where that is stated.
        name: of the registered model.
        files: what lies beside the model: path in the artefact -> what it is.
        formats: what the formats among them give and take.
    """
    protocol, teacher = results.protocol, results.teacher
    classes = [entry["name"] for entry in contract["classes"]]
    images = of_contract(contract)
    twin = next((other for other in results.rows if other.experiment == row.reference and not other.distilled), None)
    lines = [f"# {name}: '{row.student}' of {row.experiment}, seed {seed.seed}", "", method(row), ""]
    lines += [
        "| | |", "|---|---|",
        f"| task | semantic segmentation: a class for each pixel of an image with {images} |",
        f"| classes | {', '.join(classes)} |",
        f"| network | {model['architecture']} over {model['encoder']}, encoder weights: {model['encoder_weights']} |",
        f"| data | content {protocol.data_content[:16]}" + (f", version {data_md5}" if data_md5 else "")
        + f"; {', '.join(f'{count} {split}' for split, count in protocol.splits.items())} images |",
        f"| licence of the data | {data_licence or 'not stated (register.data_licence)'};"
        " it binds the use of this network |",
        f"| licence of the teacher's weights | {protocol.teacher_licence or 'not stated in its file'}; where they were"
        " imported, or first downloaded, it binds the use of this network |",
        f"| teacher | test mIoU {text.mean(teacher.test_miou)} %, {protocol.teacher_network or 'a network'} with"
        f" weights {protocol.teacher_sha256[:16]} |",
        f"| test mIoU | {text.percent(seed.test_miou)} %; over all seeds {text.spread(row.test_miou)} % |",
        f"| validation mIoU | {text.percent(seed.val_miou)} %, by which it was chosen of all single runs |",
        f"| against its undistilled twin | {against(row, twin, protocol.confidence)} |",
        f"| cost | {text.millions(row.params)} million parameters, {text.giga(row.macs)} GMACs and "
        f"{_milliseconds(row.latency_ms)} for an image of {_size(protocol.input_size)} |",
        f"| weights | SHA-256 {seed.weights_sha256} |",
        "", "| class | test IoU, % |", "|---|---|",
        *(f"| {label} | {text.percent(row.per_class_iou.get(label))} |" for label in classes),
        *(["", "## Formats", "", *formats.lines()] if formats else []),
        "", "## Limits", "",
        f"Trained and tested on images like those of its data set, {_size(protocol.input_size)} pixels; of others"
        " nothing is known. Every pixel gets one of the classes above, whatever it shows. Its probabilities were not"
        " calibrated.",
    ]  # fmt: skip
    weak = [label for label in classes if (row.per_class_iou.get(label) or 0.0) < 0.3]
    if weak:
        lines += ["", f"Poor at (IoU below 30 %): {', '.join(weak)}."]
    lines += ["", *(f"* {warning}" for warning in results.warnings)] if results.warnings else []
    lines += [
        "", "## How to load it", "",
        f"    segdistill predict models:/{name}@champion photos/ --out masks", "",
        f"It takes float32 {'RGB' if images.is_rgb else 'channels'} in 0..1,"
        f" [batch, {images.channels}, height, width] of any size; the normalisation is within.",
        *(f"* `{path}`: {what}" for path, what in files.items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def method(row: Row) -> str:
    """By what it was taught, or plainly that it was not."""
    if not row.distilled:
        return (
            "**This student was not distilled**: it was trained on the labels alone, and scored higher on validation"
            " than every distilled student within the budget."
        )
    return f"Distilled by {', '.join(row.methods)}."


def against(row: Row, twin: Row | None, confidence: float) -> str:
    """The gain with its interval, in words."""
    if not row.distilled:
        return "it is the undistilled student"
    if row.gain is None:
        return "none was trained"
    score = f" ({text.mean(twin.test_miou)} %)" if twin and twin.test_miou else ""
    return (
        f"{text.difference(row.gain)} points of '{row.reference}'{score}, mean of seeds with its"
        f" {100 * confidence:g} % interval: {row.gain.verdict}"
    )


def decided(card: str, alias: str, reason: str) -> str:
    """A card with what the registry decided, at its beginning."""
    title, rest = card.split("\n", 1)
    return f"{title}\n\n**{alias.capitalize() or 'No alias'}**: {reason}.\n{rest}"


def description(card: str, where: str) -> str:
    """A card that fits into a registry's database."""
    if len(card) <= DESCRIPTION_LIMIT:
        return card
    return f"{card[:DESCRIPTION_LIMIT].rsplit(chr(10), 1)[0]}\n\nThe rest stands in {where}.\n"


def _milliseconds(value: float | None) -> str:
    return text.NOTHING if value is None else f"{value:.1f} ms"


def _size(size: tuple[int, int] | None) -> str:
    return "unknown size" if size is None else f"{size[0]} x {size[1]}"
