"""The step after the stages, whatever became of them: the pipeline's run in MLflow gets its true status."""

from kfp import dsl
from kfp.dsl import PipelineTaskFinalStatus

from components.images import DATA


@dsl.component(base_image=DATA, install_kfp_package=False)
def finish(status: PipelineTaskFinalStatus) -> None:
    """Close the pipeline's run in MLflow.

    Args:
        status: How the run ended, as Kubeflow says.
    """
    from segdistill.kubeflow.tasks import run_finish

    run_finish(status.state)
