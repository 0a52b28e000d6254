"""The stage ``tune_report`` as a component."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Markdown, Model, Output

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def tune_report(
    plan: str,
    prepared: Input[Dataset],
    teacher: Input[Model],
    trials: Input[list[Artifact]],
    report: Output[Artifact],
    page: Output[HTML],
    summary: Output[Markdown],
) -> None:
    """Write the tuned parameters and the page, once all trials are done.

    Args:
        plan: The whole of params.yaml.
        prepared: The data as Arrow shards.
        teacher: The trained teacher.
        trials: What each worker did.
    """
    from segdistill.kubeflow.tasks import run_component

    paths = {
        "prepared": prepared.path,
        "teacher": teacher.path,
        "trials": [folder.path for folder in trials],
        "report": report.path,
    }
    run_component("tune_report", paths=paths, shown={"page": page, "summary": summary}, plan=plan)
