"""The stage ``prepare`` as a component."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Output

from components.images import DATA


@dsl.component(base_image=DATA, install_kfp_package=False)
def prepare(params: str, data: Input[Dataset], report: Input[Artifact], prepared: Output[Dataset]) -> None:
    """Turn the data set into Arrow shards with train ids and a manifest.

    Args:
        params: This stage's part of params.yaml, as JSON.
        data: The data set in its own layout.
        report: What validate found.
    """
    from segdistill.kubeflow.tasks import run_component

    run_component("prepare", params, paths={"data": data.path, "report": report.path, "prepared": prepared.path})
