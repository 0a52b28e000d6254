"""The stage ``evaluate`` as a component: one cohort of the matrix."""

from kfp import dsl
from kfp.dsl import Artifact, ClassificationMetrics, Dataset, Input, Metrics, Model, Output

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def evaluate(
    params: str,
    cohort: str,
    prepared: Input[Dataset],
    students: Input[Model],
    evaluations: Output[Artifact],
    scores: Output[Metrics],
    confusion: Output[ClassificationMetrics],
    accelerator: str = "",
    accelerators: str = "0",
) -> None:
    """Measure the students of one cohort on the test split, at original resolution.

    Args:
        params: This stage's part of params.yaml, as JSON.
        cohort: The cohort's name: jobs of one seed that train together.
        prepared: The data as Arrow shards.
        students: The trained students.
        accelerator: The resource that the task asks for, such as nvidia.com/gpu.
        accelerators: How many of it; 0 is the CPU.
    """
    from segdistill.kubeflow.tasks import run_component

    paths = {"prepared": prepared.path, "students": students.path, "evaluations": evaluations.path}
    shown = {"scores": scores, "confusion": confusion}
    run_component(
        "evaluate",
        params,
        paths=paths,
        shown=shown,
        cohort=cohort,
        accelerator=accelerator,
        accelerators=accelerators,
    )
