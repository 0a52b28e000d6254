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
    """Measure the students of one cohort on the test split, at original resolution."""
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
