"""params.yaml as a whole."""

import argparse

from segdistill import execution
from segdistill.config import read_yaml


def command(arguments: argparse.Namespace) -> None:
    """Checks it, methods and networks included."""
    execution.check_params(read_yaml(arguments.params), here=True)
    print(f"{arguments.params}: in order")
