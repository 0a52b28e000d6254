"""The stage ``distill`` as a component: one cohort of the matrix."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def distill(
    plan: str,
    cohort: str,
    prepared: Input[Dataset],
    teacher: Input[Model],
    students: Output[Model],
    scores: Output[Metrics],
    accelerator: str = "",
    accelerators: str = "0",
) -> None:
    """Train the students of one cohort, by one pass of the teacher.

    Args:
        plan: All that decides what is trained, as JSON.
        cohort: The cohort's name: jobs of one seed that train together.
        prepared: The data as Arrow shards.
        teacher: The trained teacher.
        accelerator: The resource that the task asks for, such as nvidia.com/gpu.
        accelerators: How many of it; 0 is the CPU.
    """
    from segdistill.kubeflow.tasks import run_component

    paths = {"prepared": prepared.path, "teacher": teacher.path, "students": students.path}
    run_component(
        "distill",
        paths=paths,
        shown={"scores": scores},
        plan=plan,
        cohort=cohort,
        accelerator=accelerator,
        accelerators=accelerators,
    )
