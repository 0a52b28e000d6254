"""The stage ``evaluate_teacher`` as a component."""

from kfp import dsl
from kfp.dsl import Artifact, ClassificationMetrics, Dataset, Input, Metrics, Model, Output

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def evaluate_teacher(
    params: str,
    prepared: Input[Dataset],
    model: Input[Model],
    evaluation: Output[Artifact],
    scores: Output[Metrics],
    confusion: Output[ClassificationMetrics],
    accelerator: str = "",
    accelerators: str = "0",
) -> None:
    """Measure the teacher on the test split, at original resolution.

    Args:
        params: This stage's part of params.yaml, as JSON.
        prepared: The data as Arrow shards.
        model: The trained teacher.
        accelerator: The resource that the task asks for, such as nvidia.com/gpu.
        accelerators: How many of it; 0 is the CPU.
    """
    from segdistill.kubeflow.tasks import run_component

    paths = {"prepared": prepared.path, "model": model.path, "evaluation": evaluation.path}
    run_component(
        "evaluate_teacher",
        params,
        paths=paths,
        shown={"scores": scores, "confusion": confusion},
        accelerator=accelerator,
        accelerators=accelerators,
    )
