"""The stage ``validate`` as a component."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Output

from components.images import DATA


@dsl.component(base_image=DATA, install_kfp_package=False)
def validate(params: str, data: Input[Dataset], report: Output[Artifact]) -> None:
    """Check every file of the data set before anything is built on it."""
    from segdistill.execution import run_component

    run_component("validate", params, paths={"data": data.path, "report": report.path})
