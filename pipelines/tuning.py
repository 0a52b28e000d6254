"""The graph of a tuning for Kubeflow Pipelines: to a teacher as the other one, then workers that share the trials.

A trial is nobody's until a worker takes it from the store, so that there are no cohorts to plan: the loop has a worker
an iteration, and who is done early takes more. No task is taken from KFP's cache, which knows nothing of the store; a
search that is complete takes each of them seconds.
"""

from kfp import dsl
from kfp.dsl import Collected, ExitHandler, ParallelFor
from kfp.dsl.graph_component import GraphComponent

from components import finish, tune, tune_report
from pipelines.distillation import until_teacher
from pipelines.placement import Placement


def pipeline(place: Placement) -> GraphComponent:
    """The pipeline; ``place`` says what each kind of task asks of the cluster."""

    @dsl.pipeline(name="segdistill-tune", description="From a version of a data set to tuned parameters")
    def tuning(
        repository: str,
        revision: str,
        teacher_plan: str,
        workers: list[str],
        params_file: str,
        validate_params: str,
        prepare_params: str,
        accelerator_type: str,
        accelerator_count: str,
    ) -> None:
        """Trains a teacher, searches every experiment's settings alike, and writes the parameters anew.

        Args:
            repository: Git's address of the repository that has data.dvc.
            revision: Of the data set; a commit, since KFP's cache knows only the name.
            teacher_plan: All that decides the teacher, as JSON.
            workers: The names of the tasks that share the trials.
            params_file: The text of params.yaml, comments included.
            validate_params: The stage validate's part of params.yaml, as JSON.
            prepare_params: The stage prepare's part of params.yaml, as JSON.
            accelerator_type: The resource that tasks which train ask for, such as nvidia.com/gpu.
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
            given = {"plan": params_file, "prepared": prepared, "teacher": teacher}
            with ParallelFor(workers, parallelism=place.parallelism) as worker:
                searching = place.with_trials(place.train(tune(cohort=worker, **given, **on)))
            place.with_trials(place.report(tune_report(trials=Collected(searching.outputs["trials"]), **given)))

    return tuning
