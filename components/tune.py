"""The stage ``tune`` as a component: one of the workers that share the trials."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def tune(
    plan: str,
    cohort: str,
    prepared: Input[Dataset],
    teacher: Input[Model],
    trials: Output[Artifact],
    accelerator: str = "",
    accelerators: str = "0",
) -> None:
    """Train rounds of trials until no other worker has left any."""
    from segdistill.kubeflow.tasks import run_component

    paths = {"prepared": prepared.path, "teacher": teacher.path, "trials": trials.path}
    run_component("tune", paths=paths, plan=plan, cohort=cohort, accelerator=accelerator, accelerators=accelerators)
