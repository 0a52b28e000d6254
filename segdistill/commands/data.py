"""A data set made, imported or fetched."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from segdistill.errors import UserError

if TYPE_CHECKING:
    from segdistill.data.importing import Imported
    from segdistill.data.sorting import Wishes


def command(arguments: argparse.Namespace) -> None:
    """Does what the action names."""
    if arguments.action == "synth":
        from segdistill import streets

        samples = dict(streets.DEFAULT_SAMPLES)
        samples |= {split: count for split in samples if (count := getattr(arguments, split)) is not None}
        size, classes = tuple(arguments.size), arguments.classes
        streets.write(arguments.out, seed=arguments.seed, size=size, samples=samples, classes=classes)
    elif arguments.action == "fetch":
        from segdistill.adapters.dvc_remote import fetch

        fetch(arguments.repository, arguments.rev, arguments.out, patience=arguments.patience)
    elif arguments.action == "attach":
        from segdistill.data.shards import attach

        attach(arguments.url, arguments.out)
    else:
        from segdistill.data.importing import import_dataset

        wishes = wishes_of(arguments)
        say(arguments.out, import_dataset(arguments.layout, arguments.source, arguments.out, wishes=wishes))


def wishes_of(arguments: argparse.Namespace) -> "Wishes":
    """The options of an import.

    Raises:
        UserError: a seed or shares that are none.
    """
    from segdistill.data.sorting import Wishes, parse_shares

    if arguments.seed < 0:
        raise UserError(f"--seed: {arguments.seed}; allowed: 0 and more")
    shares = parse_shares(arguments.split) if arguments.split else None
    return Wishes(shares, arguments.classes, arguments.ignore, arguments.group, arguments.seed)


def say(out: Path, imported: "Imported") -> None:
    """Prints what was imported, and what was decided on the way."""
    samples = ", ".join(f"{split} {count}" for split, count in imported.samples.items())
    print(f"{out}: {sum(imported.samples.values())} images: {samples}")
    print(f"classes: {', '.join(imported.classes)}")
    for note in imported.notes:
        print(note)
