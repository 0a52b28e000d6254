"""The stage ``compare`` as a component."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Markdown, Metrics, Model, Output

from components.images import TRAIN


@dsl.component(base_image=TRAIN, install_kfp_package=False)
def compare(
    params: str,
    prepared: Input[Dataset],
    teacher: Input[Model],
    teacher_evaluation: Input[Artifact],
    students: Input[list[Model]],
    evaluations: Input[list[Artifact]],
    report: Output[Artifact],
    metrics: Output[Artifact],
    scores: Output[Metrics],
    page: Output[HTML],
    summary: Output[Markdown],
) -> None:
    """Compare every student with its undistilled twin, over all seeds, in one report.

    Args:
        params: This stage's part of params.yaml, as JSON.
        prepared: The data as Arrow shards.
        teacher: The trained teacher.
        teacher_evaluation: The teacher's test scores.
        students: The trained students.
        evaluations: The students' test scores.
    """
    from segdistill.kubeflow.tasks import run_component

    paths = {
        "prepared": prepared.path,
        "teacher": teacher.path,
        "teacher_evaluation": teacher_evaluation.path,
        "students": [folder.path for folder in students],
        "evaluations": [folder.path for folder in evaluations],
        "report": report.path,
        "metrics": metrics.path,
    }
    shown = {"scores": scores, "page": page, "summary": summary}
    run_component("compare", params, paths=paths, shown=shown)
