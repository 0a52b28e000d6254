"""What a data set must fulfil: three tables of facts, the expectations on them, and the words for a row that fails."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from segdistill.adapters.gx import Expectation, Severity
from segdistill.data.checks import FileFacts, outside_class_list, size_mismatch
from segdistill.data.decoding import not_of_these
from segdistill.data.layouts import IGNORE_INDEX, SPLITS, UNKNOWN, Layout

if TYPE_CHECKING:
    from segdistill.stages.validate import Config

Row = dict[str, Any]
Tables = dict[str, list[Row]]


NULL, BETWEEN, UNIQUE = "ExpectColumnValuesToBeNull", "ExpectColumnValuesToBeBetween", "ExpectCompoundColumnsToBeUnique"
IN_SET, EQUAL = "ExpectColumnValuesToBeInSet", "ExpectColumnPairValuesToBeEqual"
AT_LEAST = "ExpectColumnPairValuesAToBeGreaterThanB"


@dataclass(frozen=True)
class Rule:
    """An expectation, and what is said of a row that fails it."""

    title: str
    table: str
    kind: str
    arguments: Row
    subject: str  # the column that names a row
    problem: Callable[[Row], str]
    severity: Severity = "critical"
    notes: str = ""  # instead of the title

    @property
    def expectation(self) -> Expectation:
        """What Great Expectations checks."""
        return Expectation(self.table, self.kind, self.arguments, self.severity, self.notes or self.title)


def tables(layout: Layout, facts: Sequence[FileFacts], config: "Config") -> Tables:
    """The tables ``files``, ``splits`` and ``classes``; names of files are relative to the data folder."""
    return {
        "files": _files(facts, layout),
        "splits": [
            _split(split, [fact for fact in facts if fact.split == split], layout, config) for split in layout.splits
        ],
        "classes": _classes(facts, layout),
    }


def rules(config: "Config", mask_kinds: Sequence[str]) -> list[Rule]:
    """Every rule, the most telling first; masks may be of the kinds given."""
    rarest, most_ignored = config.min_class_share, config.max_ignore_fraction
    return [
        Rule("Every image can be read", "files", NULL, {"column": "image_problem"}, "image",
             itemgetter("image_problem")),
        Rule("Every image has the channels and bits of the others", "files", NULL,
             {"column": "pixels_problem"}, "image", itemgetter("pixels_problem")),
        Rule("Every image has a mask that can be read", "files", NULL, {"column": "mask_problem"}, "mask",
             lambda row: row["mask_problem"] + _of_image(row)),
        Rule("Every mask holds class indices", "files", IN_SET,
             {"column": "mask_kind", "value_set": list(mask_kinds)}, "mask",
             lambda row: not_of_these(row["mask_kind"], mask_kinds)),
        Rule("Every mask has the size of its image", "files", EQUAL,
             {"column_A": "image_size", "column_B": "mask_size", "ignore_row_if": "either_value_is_missing"}, "mask",
             itemgetter("size_problem")),
        Rule("Every label is in the class list", "files", BETWEEN, {"column": "unknown_pixels", "max_value": 0}, "mask",
             itemgetter("label_problem")),
        Rule("No palette contradicts the class list", "files", NULL, {"column": "palette_problem"}, "mask",
             itemgetter("palette_problem")),
        Rule("No image is in two splits", "files", NULL, {"column": "same_as"}, "image",
             lambda row: f"the same image as {row['same_as']}; an image may be in one split only"),
        Rule("No two images of a split have the same name", "files", UNIQUE, {"column_list": ["split", "sample_id"]},
             "image", lambda row: f"another image of {row['split']} is called '{row['sample_id']}' too"),
        Rule("Every split has enough samples", "splits", AT_LEAST,
             {"column_A": "samples", "column_B": "required", "or_equal": True}, "images",
             lambda row: f"{row['samples'] or 'no'} samples in the split '{row['split']}'; "
                         f"validate.min_samples.{row['split']} asks for {row['required']}"
                         + (f"; there is {row['strays']}" if row["strays"] and not row["samples"] else "")),
        Rule("Every split has labels of enough classes", "splits", AT_LEAST,
             {"column_A": "classes_seen", "column_B": "classes_needed", "or_equal": True,
              "ignore_row_if": "either_value_is_missing"}, "masks", _too_few_classes,
             notes="Two classes in train, for there is nothing to learn from one; one elsewhere"),
        Rule("Not too many pixels are ignored", "splits", BETWEEN,
             {"column": "ignore_fraction", "max_value": most_ignored}, "masks",
             lambda row: f"{row['ignore_fraction']:.1%} of the pixels are ignored on average; "
                         f"validate.max_ignore_fraction allows {most_ignored:.1%}"),
        Rule("Every split has the samples of the official release", "splits", EQUAL,
             {"column_A": "samples", "column_B": "official_samples", "ignore_row_if": "either_value_is_missing"},
             "images", _not_the_release, "warning"),
        Rule("The test split has samples of its own", "splits", NULL, {"column": "tested_on"}, "images",
             lambda row: f"the split 'test' has the samples of '{row['tested_on']}', as in the literature, since the "
                         "labels of the official test split are not public; what is chosen by "
                         f"'{row['tested_on']}' is chosen by the test: report the last step (train.select: last)",
             "warning"),
        Rule("Every class is seen in train", "classes", BETWEEN, {"column": "train_images", "min_value": 1}, "name",
             lambda row: "never seen in train; it cannot be learnt", "warning"),
        Rule("No class is too rare in train", "classes", BETWEEN, {"column": "train_share", "min_value": rarest},
             "name", lambda row: f"{row['train_share']:.3%} of the labelled train pixels; "
                         f"validate.min_class_share is {rarest:.3%}", "warning"),
        Rule("Every file belongs to a sample", "splits", BETWEEN, {"column": "stray_files", "max_value": 0}, "masks",
             _strays, "warning"),
        Rule("Every mask has a labelled pixel", "files", BETWEEN,
             {"column": "ignore_fraction", "max_value": 1, "strict_max": True}, "mask",
             lambda row: "every pixel is ignored", "warning"),
        Rule("No image is there twice", "files", BETWEEN, {"column": "copies", "max_value": 1}, "image",
             lambda row: f"one of {row['copies']} equal images in {row['split']}", "warning"),
    ]  # fmt: skip


def _not_the_release(row: Row) -> str:
    samples, official = row["samples"], row["official_samples"]
    words = f"{official - samples} are missing" if official > samples else f"{samples - official} are not of it"
    return f"{samples} samples in the split '{row['split']}', but the official release has {official}: {words}"


def _strays(row: Row) -> str:
    return f"{row['stray_files']} file{'s' if row['stray_files'] > 1 else ''} of no sample: {row['strays']}"


def _too_few_classes(row: Row) -> str:
    if row["classes_seen"] == 0:
        words = "every pixel is ignored; the split cannot be scored, or learnt from"
    else:
        words = f"'{row['one_class']}' is the only class with labels; at least two are needed to learn from"
    if row["pixels_255"]:
        share = f"{row['pixels_255']:.1%} of the pixels store 255, which is read as 'no label'"
        words += f"; {share}: if it is a class, say so under 'values' in classes.json"
    return words


def _of_image(row: Row) -> str:
    return f", but its image {row['image']} is there" if row["mask_problem"] == "missing" else ""


def _files(facts: Sequence[FileFacts], layout: Layout) -> list[Row]:
    same: dict[str, list[FileFacts]] = defaultdict(list)
    for fact in facts:
        if fact.image_sha256:
            same[fact.image_sha256].append(fact)
    rows, repeated = [], {layout.tested_on, "test"}
    usual = usual_pixels(facts)
    for fact in facts:
        equal = same[fact.image_sha256] if fact.image_sha256 else [fact]
        others = [other.image for other in equal if other.split != fact.split and {other.split, fact.split} != repeated]
        unknown = fact.unknown_labels
        row = vars(fact) | {"image_size": _size(fact.image_size), "mask_size": _size(fact.mask_size)}
        row["size_problem"] = _size_problem(fact)
        row["pixels_problem"] = (
            f"{fact.image_pixels}, but most images have {usual}: all of a data set must have the same"
            if fact.image_pixels not in (None, usual) else None
        )  # fmt: skip
        row["unknown_pixels"] = None if unknown is None else sum(unknown.values())
        row["label_problem"] = outside_class_list(unknown, layout.legend) if unknown else None
        row["same_as"] = others[0] if others else None
        row["copies"] = Counter(other.split for other in equal)[fact.split]
        rows.append(row)
    return rows


def usual_pixels(facts: Sequence[FileFacts]) -> str | None:
    """Channels and bits of most images, of the first of them where two are as frequent; None if none can be read."""
    counts = Counter(fact.image_pixels for fact in facts if fact.image_pixels)
    return counts.most_common(1)[0][0] if counts else None


def _split(split: str, facts: Sequence[FileFacts], layout: Layout, config: "Config") -> Row:
    fractions = [fact.ignore_fraction for fact in facts if fact.ignore_fraction is not None]
    images, masks = (folder.relative_to(layout.root).as_posix() for folder in layout.folders(split))
    # Where labels outside the list are to be mended first, nothing is said of what would be left without them.
    known = not any(fact.unknown_labels for fact in facts)
    seen = [sum(pixels) > 0 for pixels in zip(*_class_pixels(facts, split), strict=True)] if known else []
    strays, stored = layout.strays(split), Counter[int]()
    for fact in facts:
        stored.update(fact.values or {})
    ignored_255 = stored[255] / stored.total() if layout.legend.label_map[255] == IGNORE_INDEX and stored else 0.0
    return {
        "split": split, "images": images, "masks": masks, "samples": len(facts),
        "required": getattr(config.min_samples, split, 0),
        "ignore_fraction": sum(fractions) / len(fractions) if fractions else None,
        "classes_seen": sum(seen) if seen else None, "classes_needed": 2 if split == "train" else 1,
        "one_class": layout.classes[seen.index(True)].name if any(seen) else None, "pixels_255": ignored_255,
        "tested_on": layout.tested_on if split not in layout.own_splits else None,
        "official_samples": layout.official_samples.get(split),
        "stray_files": len(strays), "strays": layout.describe_strays(strays, split),
    }  # fmt: skip


def values(layout: Layout, facts: Sequence[FileFacts]) -> list[Row]:
    """What each stored value is read as, and in how many pixels it occurs."""
    stored: dict[str, Counter[int]] = {split: Counter() for split in layout.splits}
    for fact in facts:
        stored[fact.split].update(fact.values or {})
    legend = layout.legend
    occurring = set().union(*stored.values())
    names = {IGNORE_INDEX: "no label", UNKNOWN: "unknown", **{n: info.name for n, info in enumerate(layout.classes)}}
    return [
        {
            "value": value,
            "read_as": names[legend.label(value)],
            **{f"{split}_pixels": stored[split][value] for split in SPLITS},
        }
        for value in sorted(occurring.union(layout.raw_labels))
    ]


def _class_pixels(facts: Sequence[FileFacts], split: str) -> list[tuple[int, ...]]:
    return [fact.class_pixels for fact in facts if fact.split == split and fact.class_pixels]


def _classes(facts: Sequence[FileFacts], layout: Layout) -> list[Row]:
    pixels = {split: _class_pixels(facts, split) for split in SPLITS}
    total = sum(map(sum, pixels["train"]))
    rows = []
    for number, info in enumerate(layout.classes):
        seen = sum(counts[number] for counts in pixels["train"])
        images = {f"{split}_images": sum(counts[number] > 0 for counts in pixels[split]) for split in SPLITS}
        # A class never seen has no share: that it is rare would be said twice.
        rows.append({"name": info.name, **images, "train_share": seen / total if seen else None})
    return rows


def _size_problem(fact: FileFacts) -> str | None:
    if fact.image_size is None or fact.mask_size is None or fact.mask_size == fact.image_size:
        return None
    return size_mismatch(fact.mask_size, fact.image_size)


def _size(size: tuple[int, int] | None) -> str | None:
    return f"{size[0]}x{size[1]}" if size else None
