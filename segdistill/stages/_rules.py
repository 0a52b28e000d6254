"""What a data set must fulfil: three tables of facts, the expectations on them, and the words for a row that fails."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segdistill.adapters.gx import Expectation
from segdistill.data.checks import INDEX_MASKS, FileFacts, outside_class_list, size_mismatch
from segdistill.data.layouts import SPLITS, Layout

if TYPE_CHECKING:
    from segdistill.stages.validate import Config

Row = dict[str, Any]
Tables = dict[str, list[Row]]
SHOWN = 3  # stray files named in one sentence


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
                   lambda row: f"{row['mask_kind']} where an index mask is due (8-bit grey or palette, value = class)"),
        _file_rule("Every mask has the size of its image", "ExpectColumnPairValuesToBeEqual",
                   {"column_A": "image_size", "column_B": "mask_size", "ignore_row_if": "either_value_is_missing"},
                   "mask", lambda row: row["size_problem"]),
        _file_rule("Every label is in the class list", "ExpectColumnValuesToBeBetween",
                   {"column": "unknown_pixels", "max_value": 0}, "mask", lambda row: row["label_problem"]),
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
                         f"validate.min_samples.{row['split']} asks for {row['required']}"),
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
                    lambda row: row["masks"], lambda row: row["strays"], max_value=0),
        _file_rule("Every mask has a labelled pixel", "ExpectColumnValuesToBeBetween",
                   {"column": "classes_present", "min_value": 1}, "mask",
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
            "label_problem": outside_class_list(unknown, layout.label_map) if unknown else None,
            "ignore_fraction": fact.ignore_fraction,
            "classes_present": None if fact.class_pixels is None else sum(pixels > 0 for pixels in fact.class_pixels),
            "image_sha256": fact.image_sha256, "same_as": others[0] if others else None,
            "copies": Counter(other.split for other in equal)[fact.split],
        })  # fmt: skip
    return rows


def _split(split: str, facts: Sequence[FileFacts], layout: Layout, config: "Config") -> Row:
    fractions = [fact.ignore_fraction for fact in facts if fact.ignore_fraction is not None]
    images, masks = (folder.relative_to(layout.root).as_posix() for folder in layout.folders(split))
    strays = layout.strays(split)
    names = [f"{path.relative_to(layout.root).as_posix()} ({_kind(path, layout, split)})" for path in strays[:SHOWN]]
    word = f"{len(strays)} file{'s' if len(strays) > 1 else ''}"
    more = f" and {len(strays) - SHOWN} more" if len(strays) > SHOWN else ""
    return {
        "split": split, "images": images, "masks": masks, "samples": len(facts),
        "required": getattr(config.min_samples, split),
        "ignore_fraction": sum(fractions) / len(fractions) if fractions else None,
        "stray_files": len(strays), "strays": f"{word} of no sample: {', '.join(names)}{more}" if strays else None,
    }  # fmt: skip


def _kind(path: Path, layout: Layout, split: str) -> str:
    return (
        "a mask without an image" if path.parent == layout.folders(split)[1] else "not a JPEG or PNG file of a sample"
    )


def _classes(facts: Sequence[FileFacts], layout: Layout) -> list[Row]:
    pixels = {
        split: [fact.class_pixels for fact in facts if fact.split == split and fact.class_pixels] for split in SPLITS
    }
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
