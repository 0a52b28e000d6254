"""The stage ``distill`` as a component: one job of the matrix."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def distill(
    params: str,
    experiment: str,
    seed: int,
    prepared: Input[Dataset],
    teacher: Input[Model],
    students: Output[Model],
    scores: Output[Metrics],
    accelerator: str = "",
    accelerators: str = "0",
) -> None:
    """Train one experiment's student (or co-trained students) with one seed."""
    from segdistill.kubeflow.tasks import run_component

    paths = {"prepared": prepared.path, "teacher": teacher.path, "students": students.path}
    run_component(
        "distill",
        params,
        paths=paths,
        shown={"scores": scores},
        experiment=experiment,
        seed=seed,
        accelerator=accelerator,
        accelerators=accelerators,
    )
