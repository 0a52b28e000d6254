"""The stage ``evaluate`` as a component: one job of the matrix."""

from kfp import dsl
from kfp.dsl import Artifact, ClassificationMetrics, Dataset, Input, Metrics, Model, Output

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def evaluate(
    params: str,
    experiment: str,
    seed: int,
    prepared: Input[Dataset],
    model: Input[Model],
    evaluation: Output[Artifact],
    scores: Output[Metrics],
    confusion: Output[ClassificationMetrics],
    accelerator: str = "",
    accelerators: str = "0",
) -> None:
    """Measure one job's students on the test split, at original resolution."""
    from segdistill.kubeflow.tasks import run_component

    paths = {"prepared": prepared.path, "model": model.path, "evaluation": evaluation.path}
    shown = {"scores": scores, "confusion": confusion}
    run_component(
        "evaluate",
        params,
        paths=paths,
        shown=shown,
        experiment=experiment,
        seed=seed,
        accelerator=accelerator,
        accelerators=accelerators,
    )
