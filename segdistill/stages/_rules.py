"""What a data set must fulfil: three tables of facts, the expectations on them, and the words for a row that fails."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from segdistill.adapters.gx import Expectation
from segdistill.data.checks import FileFacts, outside_class_list, size_mismatch
from segdistill.data.decoding import INDEX_MASKS, not_an_index_mask
from segdistill.data.layouts import IGNORE_INDEX, SPLITS, UNKNOWN, Layout

if TYPE_CHECKING:
    from segdistill.stages.validate import Config

Row = dict[str, Any]
Tables = dict[str, list[Row]]


@dataclass(frozen=True)
class Rule:
    """An expectation, and what a row that fails it is called and said to be."""

    title: str
    expectation: Expectation
    subject: Callable[[Row], str]
    problem: Callable[[Row], str]


def tables(layout: Layout, facts: Sequence[FileFacts], config: "Config") -> Tables:
    """The tables ``files``, ``splits`` and ``classes``; names of files are relative to the data folder."""
    return {
        "files": _files(facts, layout),
        "splits": [_split(split, [fact for fact in facts if fact.split == split], layout, config) for split in SPLITS],
        "classes": _classes(facts, layout),
    }


def rules(config: "Config") -> list[Rule]:
    """Every rule, the most telling first."""
    minimum = config.min_class_share
    return [
        _file_rule("Every image can be read", "ExpectColumnValuesToBeNull", {"column": "image_problem"},
                   "image", lambda row: row["image_problem"]),
        _file_rule("Every image has a mask that can be read", "ExpectColumnValuesToBeNull", {"column": "mask_problem"},
                   "mask", lambda row: row["mask_problem"] + _of_image(row)),
        _file_rule("Every mask holds class indices", "ExpectColumnValuesToBeInSet",
                   {"column": "mask_kind", "value_set": list(INDEX_MASKS)}, "mask",
                   lambda row: not_an_index_mask(row["mask_kind"])),
        _file_rule("Every mask has the size of its image", "ExpectColumnPairValuesToBeEqual",
                   {"column_A": "image_size", "column_B": "mask_size", "ignore_row_if": "either_value_is_missing"},
                   "mask", lambda row: row["size_problem"]),
        _file_rule("Every label is in the class list", "ExpectColumnValuesToBeBetween",
                   {"column": "unknown_pixels", "max_value": 0}, "mask", lambda row: row["label_problem"]),
        _file_rule("No palette contradicts the class list", "ExpectColumnValuesToBeNull",
                   {"column": "palette_problem"}, "mask", lambda row: row["palette_problem"]),
        _file_rule("No image is in two splits", "ExpectColumnValuesToBeNull", {"column": "same_as"}, "image",
                   lambda row: f"the same image as {row['same_as']}; an image may be in one split only"),
        _file_rule("No two images of a split have the same name", "ExpectCompoundColumnsToBeUnique",
                   {"column_list": ["split", "sample_id"]}, "image",
                   lambda row: f"another image of {row['split']} is called '{row['sample_id']}' too"),
        Rule("Every split has enough samples",
             Expectation("splits", "ExpectColumnPairValuesAToBeGreaterThanB",
                         {"column_A": "samples", "column_B": "required", "or_equal": True},
                         notes="Every split has enough samples"),
             lambda row: row["images"],
             lambda row: f"{row['samples'] or 'no'} samples in the split '{row['split']}'; "
                         f"validate.min_samples.{row['split']} asks for {row['required']}"
                         + (f"; there is {row['strays']}" if row["strays"] and not row["samples"] else "")),
        Rule("Every split has labels of enough classes",
             Expectation("splits", "ExpectColumnPairValuesAToBeGreaterThanB",
                         {"column_A": "classes_seen", "column_B": "classes_needed", "or_equal": True,
                          "ignore_row_if": "either_value_is_missing"},
                         notes="Two classes in train, for there is nothing to learn from one; one elsewhere"),
             lambda row: row["masks"], _too_few_classes),
        _bound_rule("Not too many pixels are ignored", "splits", "ignore_fraction", "critical",
                    lambda row: row["masks"],
                    lambda row: f"{row['ignore_fraction']:.1%} of the pixels are ignored on average; "
                                f"validate.max_ignore_fraction allows {config.max_ignore_fraction:.1%}",
                    max_value=config.max_ignore_fraction),
        _bound_rule("Every class is seen in train", "classes", "train_images", "warning", _class_name,
                    lambda row: "never seen in train; it cannot be learnt", min_value=1),
        _bound_rule("No class is too rare in train", "classes", "train_share", "warning", _class_name,
                    lambda row: f"{row['train_share']:.3%} of the labelled train pixels; "
                                f"validate.min_class_share is {minimum:.3%}", min_value=minimum),
        _bound_rule("Every file belongs to a sample", "splits", "stray_files", "warning",
                    lambda row: row["masks"], _strays, max_value=0),
        _file_rule("Every mask has a labelled pixel", "ExpectColumnValuesToBeBetween",
                   {"column": "ignore_fraction", "max_value": 1, "strict_max": True}, "mask",
                   lambda row: "every pixel is ignored", "warning"),
        _file_rule("No image is there twice", "ExpectColumnValuesToBeBetween", {"column": "copies", "max_value": 1},
                   "image", lambda row: f"one of {row['copies']} equal images in {row['split']}", "warning"),
    ]  # fmt: skip


def _file_rule(
    title: str, kind: str, arguments: Row, file: str, problem: Callable[[Row], str], severity: Any = "critical"
) -> Rule:
    return Rule(title, Expectation("files", kind, arguments, severity, title), lambda row: row[file], problem)


def _bound_rule(
    title: str, table: str, column: str, severity: Any, subject: Callable[[Row], str], problem: Callable[[Row], str],
    **bounds: float,
) -> Rule:  # fmt: skip
    arguments = {"column": column, **bounds}
    return Rule(
        title, Expectation(table, "ExpectColumnValuesToBeBetween", arguments, severity, title), subject, problem
    )


def _class_name(row: Row) -> str:
    return f"class '{row['name']}'"


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
    rows = []
    for fact in facts:
        equal = same[fact.image_sha256] if fact.image_sha256 else [fact]
        others = [other.image for other in equal if other.split != fact.split]
        unknown = fact.unknown_labels
        rows.append({
            "sample_id": fact.sample_id, "split": fact.split, "image": fact.image, "mask": fact.mask,
            "image_problem": fact.image_problem, "mask_problem": fact.mask_problem,
            "image_size": _size(fact.image_size), "mask_size": _size(fact.mask_size), "mask_kind": fact.mask_kind,
            "size_problem": _size_problem(fact),
            "label_min": fact.label_min, "label_max": fact.label_max,
            "unknown_pixels": None if unknown is None else sum(unknown.values()),
            "label_problem": outside_class_list(unknown, layout.legend) if unknown else None,
            "ignore_fraction": fact.ignore_fraction, "palette_problem": fact.palette_problem,
            "image_sha256": fact.image_sha256, "same_as": others[0] if others else None,
            "copies": Counter(other.split for other in equal)[fact.split],
        })  # fmt: skip
    return rows


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
        "required": getattr(config.min_samples, split),
        "ignore_fraction": sum(fractions) / len(fractions) if fractions else None,
        "classes_seen": sum(seen) if seen else None, "classes_needed": 2 if split == "train" else 1,
        "one_class": layout.classes[seen.index(True)].name if any(seen) else None, "pixels_255": ignored_255,
        "stray_files": len(strays), "strays": layout.describe_strays(strays, split),
    }  # fmt: skip


def values(layout: Layout, facts: Sequence[FileFacts]) -> list[Row]:
    """What each stored value is read as, and in how many pixels it occurs."""
    stored: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
    for fact in facts:
        stored[fact.split].update(fact.values or {})
    table = layout.legend.label_map
    occurring = set().union(*stored.values())
    names = {IGNORE_INDEX: "no label", UNKNOWN: "unknown", **{n: info.name for n, info in enumerate(layout.classes)}}
    return [
        {
            "value": value,
            "read_as": names[int(table[value])],
            **{f"{split}_pixels": stored[split][value] for split in SPLITS},
        }
        for value in range(256)
        if value in occurring or table[value] != UNKNOWN
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
