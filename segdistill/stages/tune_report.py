"""What all workers of a tuning came to: the tuned parameters, the page, and every trial."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segdistill.config import read_yaml
from segdistill.errors import UserError
from segdistill.report.highlights import Highlights
from segdistill.stages.tune import Tuning


def run(*, plan: Path, prepared: Path, teacher: Path, report: Path) -> None:
    """Writes ``report`` from the store of the trials.

    Args:
        plan: the parameters as a whole, as params.yaml has them; ``report/params.yaml`` is this file, tuned.
        prepared, teacher: by which, with the parameters, the search is known.
        report: the folder to write.

    Raises:
        UserError: trials are not done.
    """
    tuning = Tuning(read_yaml(plan), prepared, teacher, device="cpu")
    if (done := tuning.settled()) < tuning.trials:
        raise UserError(
            f"search {tuning.name}: {done} of {tuning.trials} trials are done; run the pipeline again, which goes on"
        )
    tuning.write(plan.read_text(encoding="utf-8-sig"), report)


def highlights(paths: Mapping[str, Any]) -> Highlights:
    """The page and its findings."""
    report = Path(paths["report"])
    return Highlights(
        page=(report / "report.html").read_text(encoding="utf-8"),
        summary=(report / "report.md").read_text(encoding="utf-8"),
    )
