"""The stage ``validate`` as a component."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Markdown, Output

from components.images import DATA


@dsl.component(base_image=DATA, install_kfp_package=False)
def validate(
    params: str, data: Input[Dataset], report: Output[Artifact], page: Output[HTML], summary: Output[Markdown]
) -> None:
    """Check every file of the data set before anything is built on it.

    Args:
        params: This stage's part of params.yaml, as JSON.
        data: The data set in its own layout.
    """
    from segdistill.kubeflow.tasks import run_component

    paths = {"data": data.path, "report": report.path}
    run_component("validate", params, paths=paths, shown={"page": page, "summary": summary})
