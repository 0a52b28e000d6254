"""The champion of the registry: which version it is and why, and the way back to the one before."""

import argparse

from rich.console import Console
from rich.table import Table

from segdistill.config import read_yaml
from segdistill.errors import UserError

# Tags of a version that are numbers: title, factor and decimals.
NUMBERS = (
    ("test_miou", "test mIoU", 100.0, 2),
    ("val_miou", "val mIoU", 100.0, 2),
    ("ece", "ECE", 100.0, 1),
    ("params", "params (M)", 1e-6, 2),
    ("latency_ms", "ms an image", 1.0, 1),
)


def command(arguments: argparse.Namespace) -> None:
    """Shows the versions with an alias and why they have it, or makes the previous one champion again."""
    from segdistill.adapters.mlflow_registry import champions, roll_back

    name = arguments.name or _name_of(arguments)
    if arguments.action == "rollback":
        now, before = roll_back(name)
        print(f"{name}: version {now} is champion again; version {before} is now 'previous'")
        return
    console, versions = Console(), champions(name)
    if not versions:
        raise UserError(f"{name}: no version has an alias; the stage 'register' gives them")
    table = Table(title=name, title_justify="left")
    columns = sorted(versions.items())
    for title in ("", *(alias for alias, _ in columns)):  # a version a column: it fits a terminal of 80 characters
        table.add_column(title, overflow="fold")
    every = [tags for _, tags in columns]
    table.add_row("version", *(tags["version"] for tags in every))
    for key in ("student", "experiment", "seed"):
        table.add_row(key, *(tags.get(key, "") for tags in every))
    table.add_row("data", *(tags.get("data_content", "")[:8] for tags in every))
    for key, title, scale, digits in NUMBERS:
        numbers = (f"{scale * float(tags[key]):.{digits}f}" if key in tags else "" for tags in every)
        table.add_row(title, *numbers)
    console.print(table)
    for alias, tags in sorted(versions.items()):
        sentences = (tags.get(key) for key in ("decision", "choice", "evaluated_again"))
        why = ". ".join(f"{text[0].upper()}{text[1:]}" for text in sentences if text)
        console.print(f"{alias}, version {tags['version']}: {why or 'nothing is recorded of why'}.", highlight=False,
                      markup=False)  # fmt: skip


def _name_of(arguments: argparse.Namespace) -> str:
    try:
        return str(read_yaml(arguments.params)["register"]["model_name"])
    except (KeyError, TypeError):
        raise UserError(f"{arguments.params}: no register.model_name; give --name") from None
