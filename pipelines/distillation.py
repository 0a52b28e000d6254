"""The graph for Kubeflow Pipelines: the stages of ``segdistill.stages``, as ``dvc.yaml`` has them too."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Artifact, Collected, Dataset, ParallelFor
from kfp.dsl.graph_component import GraphComponent

from components import compare, distill, evaluate, evaluate_teacher, prepare, register, train_teacher, validate
from pipelines.cluster import Placement


class Outputs(NamedTuple):
    """What the pipeline leaves for people."""

    report: Artifact
    registration: Artifact


def pipeline(place: Placement) -> GraphComponent:
    """The pipeline; ``place`` says what each kind of task asks of the cluster."""

    @dsl.pipeline(name="segdistill", description="From a version of a data set to a registered student")
    def distillation(
        data_uri: str,  # a folder that never changes: KFP imports a URI once
        jobs: list[dict],  # the matrix: {experiment, seed, params of distill}
        validate_params: str,
        prepare_params: str,
        train_teacher_params: str,
        evaluate_params: str,
        compare_params: str,
        register_params: str,
    ) -> Outputs:
        """Trains a teacher, distills every job's students from it, compares them, and registers the best."""
        data = dsl.importer(artifact_uri=data_uri, artifact_class=Dataset, reimport=not place.caching).output
        report = place.data(validate(params=validate_params, data=data)).outputs["report"]
        prepared = place.data(prepare(params=prepare_params, data=data, report=report)).outputs["prepared"]
        teacher = place.train(train_teacher(params=train_teacher_params, prepared=prepared)).outputs["teacher"]
        taught = place.train(evaluate_teacher(params=evaluate_params, prepared=prepared, model=teacher))

        with ParallelFor(jobs) as job:
            which = {"experiment": job.experiment, "seed": job.seed}
            students = place.train(distill(params=job.params, prepared=prepared, teacher=teacher, **which))
            measured = place.train(
                evaluate(params=evaluate_params, prepared=prepared, model=students.outputs["students"], **which)
            )

        # Each consumer needs a Collected of its own. The library puts the lists in the order of the matrix.
        compared = place.report(
            compare(
                params=compare_params,
                prepared=prepared,
                teacher=teacher,
                teacher_evaluation=taught.outputs["evaluation"],
                students=Collected(students.outputs["students"]),
                evaluations=Collected(measured.outputs["evaluation"]),
            )
        )
        registered = place.report(
            register(
                params=register_params,
                comparison=compared.outputs["report"],
                prepared=prepared,
                students=Collected(students.outputs["students"]),
            )
        )
        registered.set_caching_options(False)  # the registry may have changed since
        return Outputs(report=compared.outputs["report"], registration=registered.outputs["registration"])

    return distillation
