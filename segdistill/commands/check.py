"""params.yaml as a whole."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segdistill import execution
from segdistill.config import read_yaml
from segdistill.errors import UserError
from segdistill.stages import BY_NAME


def command(arguments: argparse.Namespace) -> None:
    """Checks it, methods and networks included."""
    params = read_yaml(arguments.params)
    execution.check_params(params, here=True)
    _check_data(params)
    print(f"{arguments.params}: in order")


def _check_data(params: Mapping[str, Any]) -> None:
    """Whether the data set, if it is here, has the images without labels, and the classes, that are asked for."""
    from segdistill.data.layouts import WITHOUT_MASKS, open_layout
    from segdistill.engine.supervision import require_known

    folder, wanted = Path(BY_NAME["prepare"].inputs["data"]), params["distill"]["train"].get("unlabelled", 0)
    all_labelled = params["prepare"].get("labelled", 1.0) == 1.0
    weights = {
        f"{section}.train.loss.class_weights": (params[section]["train"].get("loss", {}).get("class_weights") or {})
        for section in ("train_teacher", "distill")
    }
    named = any(rule.get("weights") for rule in weights.values())
    if not ((wanted and all_labelled) or named) or not folder.is_dir():
        return
    layout = open_layout(params["prepare"]["layout"], folder)
    if wanted and all_labelled and WITHOUT_MASKS not in layout.splits:
        raise UserError(
            f"distill.train.unlabelled: {wanted}, but {folder} has no images in the split '{WITHOUT_MASKS}'; give the"
            " data set some, lower prepare.labelled, or set it to 0"
        )
    for key, rule in weights.items():
        require_known(rule.get("weights", {}), [entry.name for entry in layout.classes], key)
