"""The stage ``distill`` as a component: one job of the matrix."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Model, Output

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def distill(
    params: str, experiment: str, seed: int, prepared: Input[Dataset], teacher: Input[Model], students: Output[Model]
) -> None:
    """Train one experiment's student (or co-trained students) with one seed."""
    from segdistill.execution import run_component

    paths = {"prepared": prepared.path, "teacher": teacher.path, "students": students.path}
    run_component("distill", params, paths=paths, experiment=experiment, seed=seed)
