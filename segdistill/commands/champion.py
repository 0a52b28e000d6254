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
    for column in ("alias", "version", "student", "data", *(title for _, title, _, _ in NUMBERS)):
        table.add_column(column, overflow="fold")
    for alias, tags in sorted(versions.items()):
        student = f"{tags.get('student', '')} of {tags.get('experiment', '')}, seed {tags.get('seed', '')}"
        numbers = (f"{scale * float(tags[key]):.{digits}f}" if key in tags else "" for key, _, scale, digits in NUMBERS)
        table.add_row(alias, tags["version"], student, tags.get("data_content", "")[:8], *numbers)
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
