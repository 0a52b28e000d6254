"""The stage ``train_teacher`` as a component."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Metrics, Model, Output

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def train_teacher(
    plan: str,
    prepared: Input[Dataset],
    teacher: Output[Model],
    scores: Output[Metrics],
    accelerator: str = "",
    accelerators: str = "0",
) -> None:
    """Train the teacher, or import a checkpoint, and record its validation score.

    Args:
        plan: All that decides what is trained, as JSON.
        prepared: The data as Arrow shards.
        accelerator: The resource that the task asks for, such as nvidia.com/gpu.
        accelerators: How many of it; 0 is the CPU.
    """
    from segdistill.kubeflow.tasks import run_component

    paths = {"prepared": prepared.path, "teacher": teacher.path}
    run_component(
        "train_teacher",
        paths=paths,
        shown={"scores": scores},
        plan=plan,
        accelerator=accelerator,
        accelerators=accelerators,
    )
