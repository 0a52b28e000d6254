"""The graph for Kubeflow Pipelines: the stages of ``segdistill.stages``, as ``dvc.yaml`` has them too.

The lists of all cohorts' students and evaluations go to tasks that stand beside the loop, and into no graph within the
graph (a condition, a loop, a pipeline of its own): what such a graph is handed, the released servers keep by name, one
artifact a name (kubeflow/pipelines#13900). So ``register`` always runs, and reads for itself whether to register. Each
reader has a ``Collected`` of its own, since kfp 2.17.0 changes it as it compiles.
"""

from typing import Any

from kfp import dsl
from kfp.dsl import Collected, ExitHandler, ParallelFor
from kfp.dsl.graph_component import GraphComponent

from components import (
    compare,
    distill,
    evaluate,
    evaluate_teacher,
    fetch,
    finish,
    prepare,
    register,
    train_teacher,
    validate,
)
from pipelines.placement import Placement


def until_teacher(
    place: Placement,
    *,
    repository: str,
    revision: str,
    teacher_plan: str,
    validate_params: str,
    prepare_params: str,
    **on: str,
) -> tuple[Any, Any]:
    """The tasks from the data set to a teacher; the prepared data and the teacher."""
    data = place.data(fetch(repository=repository, revision=revision)).outputs["data"]
    report = place.data(validate(params=validate_params, data=data)).outputs["report"]
    prepared = place.data(prepare(params=prepare_params, data=data, report=report)).outputs["prepared"]
    teaching = place.train(train_teacher(plan=teacher_plan, prepared=prepared, **on))
    return prepared, teaching.outputs["teacher"]


def pipeline(place: Placement) -> GraphComponent:
    """The pipeline; ``place`` says what each kind of task asks of the cluster."""

    @dsl.pipeline(name="segdistill", description="From a version of a data set to a registered student")
    def distillation(
        repository: str,
        revision: str,
        teacher_plan: str,
        cohorts: list[dict],
        validate_params: str,
        prepare_params: str,
        evaluate_params: str,
        compare_params: str,
        register_params: str,
        accelerator_type: str,
        accelerator_count: str,
    ) -> None:
        """Trains a teacher, distills every cohort's students from it, compares them, and registers the best.

        Args:
            repository: Git's address of the repository that has data.dvc.
            revision: Of the data set; a commit, since KFP's cache knows only the name.
            teacher_plan: All that decides the teacher, as JSON.
            cohorts: The matrix: for each cohort its name and plan, which decides its students.
            validate_params: The stage validate's part of params.yaml, as JSON.
            prepare_params: The stage prepare's part of params.yaml, as JSON.
            evaluate_params: The stage evaluate's part of params.yaml, as JSON.
            compare_params: The stage compare's part of params.yaml, as JSON.
            register_params: The stage register's part of params.yaml, as JSON.
            accelerator_type: The resource that tasks which train or evaluate ask for, such as nvidia.com/gpu.
            accelerator_count: How many of it each task gets; 0 is the CPU.
        """
        on = {"accelerator": accelerator_type, "accelerators": accelerator_count}
        closing = place.data(finish()).set_caching_options(False)
        with ExitHandler(closing):
            prepared, teacher = until_teacher(
                place,
                repository=repository,
                revision=revision,
                teacher_plan=teacher_plan,
                validate_params=validate_params,
                prepare_params=prepare_params,
                **on,
            )
            taught = place.train(evaluate_teacher(params=evaluate_params, prepared=prepared, model=teacher, **on))
            with ParallelFor(cohorts, parallelism=place.parallelism) as item:
                which = {"cohort": item.cohort, "prepared": prepared, **on}
                students = place.train(distill(plan=item.plan, teacher=teacher, **which)).outputs["students"]
                measured = place.train(evaluate(params=evaluate_params, students=students, **which))
            compared = place.report(
                compare(
                    params=compare_params,
                    prepared=prepared,
                    teacher=teacher,
                    teacher_evaluation=taught.outputs["evaluation"],
                    students=Collected(students),
                    evaluations=Collected(measured.outputs["evaluations"]),
                )
            )
            registered = place.report(
                register(
                    params=register_params,
                    comparison=compared.outputs["report"],
                    prepared=prepared,
                    students=Collected(students),
                )
            )
            registered.set_caching_options(False)  # the registry may have changed since

    return distillation
