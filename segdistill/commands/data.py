"""A data set made, imported or fetched."""

import argparse


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
    else:
        from segdistill.data.importing import import_dataset

        import_dataset(arguments.layout, arguments.source, arguments.out)
