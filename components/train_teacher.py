"""The stage ``train_teacher`` as a component."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def train_teacher(params: str, prepared: Input[Dataset], teacher: Output[Model]) -> None:
    """Train the teacher, or import a checkpoint, and record its validation score."""
    from segdistill.execution import run_component

    run_component("train_teacher", params, paths={"prepared": prepared.path, "teacher": teacher.path})
