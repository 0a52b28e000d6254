"""What masks without a class list mean, and which samples train, validate and test: a data set from loose pairs."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from segdistill.data.checks import read_file, value_counts
from segdistill.data.decoding import COLOUR_MASKS, INDEX_MASKS, BadFile, decode_image, decode_mask, mask_kind
from segdistill.data.layouts import IGNORE_INDEX, SPLITS, UNKNOWN, WITHOUT_MASKS, ClassInfo, Legend, Sample
from segdistill.data.layouts.folder import check_names, read_classes
from segdistill.data.layouts.layout import SHOWN, describe_values, hue
from segdistill.data.pairing import UNDECIDED
from segdistill.data.parallel import ordered_map, progress, workers_for
from segdistill.errors import UserError

Colour = tuple[int, int, int]
SHARES = (70, 15, 15)  # per cent of labelled images for train, val and test, unless somebody says otherwise
_CLASS = re.compile(r"(?P<name>[^=,]+?)\s*(?:=\s*#(?P<colour>[0-9a-fA-F]{6}))?")


@dataclass(frozen=True)
class Wishes:
    """What somebody says of pairs that do not say it themselves.

    Args:
        shares: per cent for train, val and test; None keeps the splits that the pairs name.
        classes: ``name`` or ``name=#RRGGBB``, in the order of their values; None is ``classes.json``, or the values.
        ignore: the value, or ``#RRGGBB``, that means "no label"; None is 255.
        group: a regular expression; images for whose path it finds the same text stay in one split.
        seed: of the split.
    """

    shares: tuple[int, int, int] | None = None
    classes: str | None = None
    ignore: str | None = None
    group: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class MaskFacts:
    """What one mask stores: values and their pixels, or, of a colour mask, its colours and theirs."""

    counts: dict[Any, int]
    palette: tuple[Colour, ...]


@dataclass(frozen=True)
class Sorted:
    """Samples of which each has a split, and what their masks mean."""

    samples: list[Sample]
    classes: tuple[ClassInfo, ...]
    legend: Legend
    notes: tuple[str, ...]  # what was decided without being asked, in words


def parse_shares(text: str) -> tuple[int, int, int]:
    """``70/15/15`` as numbers.

    Raises:
        UserError: no three parts of a hundred.
    """
    parts = [int(part) for part in text.split("/") if part.isdecimal()]
    if text.count("/") != 2 or len(parts) != 3 or sum(parts) != 100 or min(parts) < 1:
        raise UserError(f"--split: '{text}' is no TRAIN/VAL/TEST in per cent, such as 70/15/15")
    return parts[0], parts[1], parts[2]


def sort_samples(samples: Sequence[Sample], root: Path, wishes: Wishes, *, workers: int | None = None) -> Sorted:
    """Gives loose pairs their classes and splits.

    Args:
        samples: of :mod:`segdistill.data.pairing`.
        root: the folder whose ``classes.json`` counts, if it is there, and from which --group reads paths.
        wishes: see there.
        workers: processes; 0 = all cores; None goes by the number of files.

    Raises:
        UserError: a mask that cannot be read, or classes or splits that do not fit the samples.
    """
    labelled = [sample for sample in samples if sample.mask]
    workers = workers_for(len(labelled)) if workers is None else workers
    facts = ordered_map(_mask_facts, [sample.mask for sample in labelled if sample.mask], workers=workers)
    try:
        masks = list(progress(facts, "masks", len(labelled)))
    except BadFile as problem:
        raise UserError(str(problem)) from None
    classes, legend, notes = _classes(masks, root, wishes)
    if without := [sample for sample in samples if sample.mask is None]:
        names = ", ".join(sample.image.name for sample in without[:SHOWN])
        more = f" and {len(without) - SHOWN} more" if len(without) > SHOWN else ""
        notes += (f"without a mask, so in the split '{WITHOUT_MASKS}': {names}{more}",)
    splits = {sample.split for sample in labelled}
    if wishes.shares is None and splits != {UNDECIDED}:
        if missing := [split for split in SPLITS if split not in splits]:
            raise UserError(
                f"{root}: no image with a mask in the split {' or '.join(missing)}; --split 70/15/15 splits all anew"
            )
        if UNDECIDED in splits:
            loose = next(sample for sample in labelled if sample.split == UNDECIDED)
            raise UserError(f"{loose.image}: in no split, where others are; move it, or split all anew by --split")
        return Sorted(list(samples), classes, legend, notes)
    shares = wishes.shares or SHARES
    members = _groups(labelled, root, wishes.group)
    present = np.zeros((len(members), len(classes)), dtype=np.int64)  # [G, K] images that show a class
    for row, numbers in enumerate(members):
        for number in numbers:
            present[row] += _shows(masks[number], legend, len(classes))
    sizes = np.array([len(numbers) for numbers in members])
    if len(members) < len(SPLITS):
        word = "images with masks" if wishes.group is None else "groups"
        raise UserError(f"{root}: {len(members)} {word}; train, val and test need one each")
    chosen = assign_splits(present, sizes, np.array(shares) / 100, wishes.seed)
    split_of = {number: SPLITS[chosen[row]] for row, numbers in enumerate(members) for number in numbers}
    divided = [replace(sample, split=split_of[number]) for number, sample in enumerate(labelled)]
    grouped = "" if wishes.group is None else f", {len(members)} groups kept together"
    notes += (f"split {'/'.join(map(str, shares))} by classes, seed {wishes.seed}{grouped}",)
    return Sorted(divided + without, classes, legend, notes)


def assign_splits(present: np.ndarray, sizes: np.ndarray, shares: np.ndarray, seed: int) -> list[int]:
    """A split for each group, such that every class, and all images, come near their shares.

    The rarest class that is left goes first, each of its groups to the split that lacks most of it.

    Shape:
        present: [G, K] images of a group that show a class; sizes: [G] images of it; shares: [S], whose sum is 1.

    Reference:
        Sechidis, Tsoumakas, Vlahavas: On the Stratification of Multi-Label Data, ECML PKDD 2011.
    """
    draw = np.random.default_rng(seed)
    lacking = np.outer(shares, present.sum(0)).astype(float)  # [S, K]
    room = shares * sizes.sum()  # [S]
    waiting, chosen = set(range(len(sizes))), [-1] * len(sizes)
    order = draw.permutation(len(sizes))
    empty = set(range(len(shares)))
    while waiting:
        left = present[sorted(waiting)].sum(0)
        rare = int(np.argmin(np.where(left > 0, left, np.inf))) if left.any() else None
        groups = [int(g) for g in order if g in waiting and (rare is None or present[g, rare])]
        for group in sorted(groups, key=lambda g: -int(sizes[g])):
            allowed = sorted(empty) if len(empty) >= len(waiting) else range(len(shares))
            split = max(allowed, key=lambda s: (lacking[s, rare] if rare is not None else 0.0, room[s], draw.random()))
            chosen[group] = split
            lacking[split] -= present[group]
            room[split] -= sizes[group]
            waiting.discard(group)
            empty.discard(split)
    return chosen


def _groups(labelled: Sequence[Sample], root: Path, pattern: str | None) -> list[list[int]]:
    """The numbers of the samples that stay together."""
    if pattern is None:
        return [[number] for number in range(len(labelled))]
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--group: '{pattern}' is no regular expression: {error}") from None
    groups: dict[str, list[int]] = defaultdict(list)
    for number, sample in enumerate(labelled):
        path = sample.image.relative_to(root) if sample.image.is_relative_to(root) else sample.image
        match = expression.search(path.as_posix())
        if match is None:
            raise UserError(f"--group: '{pattern}' finds nothing in {path.as_posix()}")
        groups[match[1] if expression.groups else match[0]].append(number)
    return list(groups.values())


def _shows(mask: MaskFacts, legend: Legend, classes: int) -> np.ndarray:
    present = np.zeros(classes, dtype=np.int64)
    for stored in mask.counts:
        value = stored if isinstance(stored, int) else legend.mask_colors.get(stored, UNKNOWN)
        if (label := legend.label(value)) < classes:
            present[label] = 1
    return present


def _mask_facts(path: Path) -> MaskFacts:
    try:
        content = read_file(path)
        if mask_kind(content) not in COLOUR_MASKS:
            mask = decode_mask(content)
            return MaskFacts(value_counts(mask.values), mask.palette)
        pixels = decode_image(content).getcolors(4096)
        if pixels is None:
            raise BadFile("more than 4096 colours: a photo, or a mask that was smoothed or scaled")
        return MaskFacts({colour: count for count, colour in pixels}, ())
    except BadFile as problem:
        raise BadFile(f"{path}: {problem}") from None


def _classes(
    masks: Sequence[MaskFacts], root: Path, wishes: Wishes
) -> tuple[tuple[ClassInfo, ...], Legend, tuple[str, ...]]:
    """The classes, what masks store for them, and what had to be guessed."""
    total = Counter[Any]()
    for mask in masks:
        total.update(mask.counts)
    values = sorted(value for value in total if isinstance(value, int))
    colours = [colour for colour, _ in total.most_common() if isinstance(colour, tuple)]
    if wishes.classes is None and (root / "classes.json").is_file():
        if wishes.ignore is not None:
            raise UserError(f"--ignore: {root / 'classes.json'} says what is ignored")
        classes, labels = read_classes(root / "classes.json")
        return classes, _legend(classes, labels, {}), ()
    ignored_value, ignored_colour = _ignored(wishes.ignore)
    names, given, notes = _names(values, colours, ignored_value, wishes.classes)
    if colours and (unknown := [colour for colour in colours if colour not in (*given, ignored_colour)]):
        named = ", ".join(f"{_hex(colour)}" for colour in unknown[:12])
        raise UserError(
            f"{root}: its masks are pictures in colours that no class has: {named}; say each class's colour, such as"
            f" --classes road={_hex(unknown[0])},..., and the colour of no label by --ignore"
        )
    stored = [value for value in range(256) if value != ignored_value][: len(names)]
    if values == [0, 255] and len(names) == 2 and wishes.ignore is None:
        stored, ignored_value = [0, 255], -1
        notes += (f"value 255 is '{names[1]}': the masks store 0 and 255 alone",)
    labels = {value: number for number, value in enumerate(stored)}
    labels |= {ignored_value: IGNORE_INDEX} if ignored_value >= 0 else {}
    if outside := [value for value in values if value not in labels]:
        allowed = ", ".join(f"{value} {name}" for value, name in zip(stored[:20], names, strict=False))
        raise UserError(
            f"{root}: its masks store {describe_values(outside)}, which is no class ({allowed}); name more classes,"
            " give the value of no label by --ignore, or write a classes.json with 'values' (docs/datasets.md)"
        )
    palette = next((mask.palette for mask in masks if mask.palette), ())
    drawn = [palette[value] for value in stored if value < len(palette)]
    usable = len(drawn) == len(names) == len(set(drawn))
    pictured = [colour or (drawn[n] if usable else hue(n)) for n, colour in enumerate(given)]
    classes = tuple(map(ClassInfo, names, pictured))
    mask_colours = {colour: stored[n] for n, colour in enumerate(given) if colour}
    if ignored_colour:
        mask_colours[ignored_colour] = IGNORE_INDEX
        labels[IGNORE_INDEX] = IGNORE_INDEX
    return classes, _legend(classes, labels, mask_colours), notes


def _names(
    values: Sequence[int], colours: Sequence[Colour], ignored: int, classes: str | None
) -> tuple[list[str], list[Colour | None], tuple[str, ...]]:
    """The classes' names, the colours that were said with them, and a note where both were guessed."""
    if classes is None:
        binary = list(values) == [0, 255]
        highest = 1 if binary else max((value for value in values if value != ignored), default=0)
        count = max(2, highest + (1 if binary or not 0 <= ignored <= highest else 0))
        names = [f"class_{number}" for number in range(count)] if values else []
        return names, [None] * len(names), (f"{count} classes by the values of masks; --classes names them",)
    matches = [_CLASS.fullmatch(part.strip()) for part in classes.split(",")]
    for part, match in zip(classes.split(","), matches, strict=True):
        if match is None:
            raise UserError(f"--classes: '{part}' is no class; expected NAME or NAME=#RRGGBB, such as road=#804080")
    names = [match["name"] for match in matches if match]
    try:
        check_names(names)
    except UserError as error:
        raise UserError(f"--classes: {str(error).removeprefix('classes: ')}") from None
    given = [_colour(match["colour"]) if match and match["colour"] else None for match in matches]
    repeated = [colour for colour, count in Counter(filter(None, given)).items() if count > 1]
    if repeated:
        raise UserError(f"--classes: {_hex(repeated[0])} stands there twice; each class needs its own")
    return names, given, ()


def _ignored(text: str | None) -> tuple[int, Colour | None]:
    if text is None:
        return IGNORE_INDEX, None
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text):
        return IGNORE_INDEX, _colour(text[1:])
    if not text.isdecimal() or int(text) > 255:
        raise UserError(f"--ignore: '{text}' is neither a value of a mask, 0 to 255, nor a colour, #RRGGBB")
    return int(text), None


def _legend(classes: Sequence[ClassInfo], labels: Mapping[int, int], mask_colors: Mapping[Colour, int]) -> Legend:
    table = np.full(256, UNKNOWN, dtype=np.uint8)
    for value, label in labels.items():
        table[value] = label
    kinds = (*INDEX_MASKS, *COLOUR_MASKS) if mask_colors else INDEX_MASKS
    return Legend(table, tuple(info.color for info in classes), mask_colors, kinds)


def _colour(digits: str) -> Colour:
    return int(digits[:2], 16), int(digits[2:4], 16), int(digits[4:], 16)


def _hex(colour: Colour) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
