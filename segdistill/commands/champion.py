"""The champion of the registry: which version it is and why, and the way back to the one before."""

import argparse

from rich.console import Console
from rich.table import Table

from segdistill.config import read_yaml
from segdistill.errors import UserError


def command(arguments: argparse.Namespace) -> None:
    """Shows the versions with an alias, or makes the previous one champion again."""
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
    for column in ("alias", "version", "student", "test mIoU", "val mIoU", "data", "decision"):
        table.add_column(column, overflow="fold")
    for alias, tags in sorted(versions.items()):
        scores = (f"{100 * float(tags[key]):.2f}" if key in tags else "" for key in ("test_miou", "val_miou"))
        student = f"{tags.get('student', '')} of {tags.get('experiment', '')}, seed {tags.get('seed', '')}"
        data = tags.get("data_content", "")[:12]
        table.add_row(alias, tags["version"], student, *scores, data, tags.get("decision", ""))
    console.print(table)


def _name_of(arguments: argparse.Namespace) -> str:
    try:
        return str(read_yaml(arguments.params)["register"]["model_name"])
    except (KeyError, TypeError):
        raise UserError(f"{arguments.params}: no register.model_name; give --name") from None
