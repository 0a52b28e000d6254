"""What could not be sent to MLflow while its server was away."""

import argparse

from segdistill.adapters.mlflow_tracking import sync
from segdistill.errors import UserError


def command(arguments: argparse.Namespace) -> None:
    """Sends it, and says what is left."""
    folder = arguments.folder
    results = sync(folder)
    for result in results:
        reason = f" ({result.error})" if result.error else ""
        refused = f", refused for good: {result.refused}" if result.refused else ""
        print(f"{result.name}: {result.sent} records sent, {result.left} left{reason}{refused}")
    left = [result for result in results if result.left or result.error]
    if left:
        raise UserError(f"{folder}: {len(left)} of {len(results)} runs could not be sent whole; try again later")
