"""The stage ``register`` as a component."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Markdown, Model, Output

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def register(
    params: str,
    comparison: Input[Artifact],
    prepared: Input[Dataset],
    students: Input[list[Model]],
    registration: Output[Artifact],
    summary: Output[Markdown],
) -> None:
    """Register the best student if one passed the gate, and move the alias if it beats the champion.

    Args:
        params: This stage's part of params.yaml, as JSON.
        comparison: What compare wrote: the table, and which student is best.
        prepared: The data as Arrow shards.
        students: The trained students.
    """
    from segdistill.kubeflow.tasks import run_component

    paths = {
        "comparison": comparison.path,
        "prepared": prepared.path,
        "students": [folder.path for folder in students],
        "registration": registration.path,
    }
    run_component("register", params, paths=paths, shown={"summary": summary})
