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
    """Train rounds of trials until no other worker has left any.

    Args:
        plan: The whole of params.yaml.
        cohort: The worker's name.
        prepared: The data as Arrow shards.
        teacher: The trained teacher.
        accelerator: The resource that the task asks for, such as nvidia.com/gpu.
        accelerators: How many of it; 0 is the CPU.
    """
    from segdistill.kubeflow.tasks import run_component

    paths = {"prepared": prepared.path, "teacher": teacher.path, "trials": trials.path}
    run_component("tune", paths=paths, plan=plan, cohort=cohort, accelerator=accelerator, accelerators=accelerators)
