"""Tasks on a cluster: what ``pipelines/cluster.yaml`` says, as KFP has it.

All of it is fixed when the pipeline is compiled, but for the accelerator's type and count, which a run may change: of
those it has the defaults.
"""

import json
from dataclasses import replace

from kfp import dsl, kubernetes

from pipelines import trainjob
from pipelines.cluster import Cluster, Kind, Reader, Task

# By default KFP tries nothing again once an hour has passed since the first attempt began. Training takes longer; what
# bounds it is the number of attempts, and the timeout of each.
RETRY_WINDOW = f"{30 * 24 * 3600}s"


class Placement:
    """Puts tasks on a cluster, each by its kind; without a cluster, leaves them as they are."""

    def __init__(self, cluster: Cluster | None, *, caching: bool = True) -> None:
        self.cluster, self.caching = cluster, caching

    @property
    def parameters(self) -> dict[str, str]:
        """The pipeline's parameters that are a matter of the cluster.

        KFP's server reads both as text, and sets no limit where the type is empty.
        """
        asked = self.cluster.accelerator if self.cluster else None
        return {
            "accelerator_type": asked.type if asked else "",
            "accelerator_count": str(asked.count) if asked else "0",
        }

    @property
    def parallelism(self) -> int | None:
        """How many cohorts run at a time; None: as many as there is room for."""
        return self.cluster.parallel_cohorts if self.cluster else None

    def data(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A task that reads the data set."""
        return self._place(task, self.cluster, "data") if self.cluster else task

    def report(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A task that reads results."""
        return self._place(task, self.cluster, "report") if self.cluster else task

    def train(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A task that trains or evaluates, on the ``accelerators`` that are among its inputs.

        kfp 2.17.0 hands a parameter into a loop for a task's inputs, and not for its resources alone.
        """
        asked = self.cluster
        if asked is None:
            return task
        if asked.on_nodes and asked.workspace is not None:  # this pod only starts the others, and waits
            job = {"volume": asked.workspace.path, "manifest": trainjob.manifest(asked)}
            task.set_env_variable("SEGDISTILL_TRAINJOB", json.dumps(job, sort_keys=True))
            waiting = replace(asked.tasks.report, timeout_seconds=asked.tasks.train.timeout_seconds)
            return self._place(task, replace(asked, queue=None), "train", waiting)  # the job waits in the queue, not it
        if asked.accelerator is not None:
            for label, value in asked.accelerator.node_selector.items():
                kubernetes.add_node_selector(task, label, value)
            for taint in asked.accelerator.tolerations:
                kubernetes.add_toleration(task, taint.key, taint.operator, taint.value, taint.effect)
        task.set_accelerator_type(task.inputs["accelerator"]).set_accelerator_limit(task.inputs["accelerators"])
        kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=asked.shared_memory)
        if asked.workspace is not None:
            task.set_env_variable("SEGDISTILL_WORK", f"{asked.workspace.path}/work")
        return self._place(task, asked, "train")

    def with_trials(self, task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A task, placed already, that reads the store of a tuning's trials, which KFP's cache knows nothing of."""
        if self.cluster:
            _refer(task, self.cluster, "tune")
        return task.set_caching_options(False)

    def _place(
        self, task: dsl.PipelineTask, asked: Cluster, kind: Kind, resources: Task | None = None
    ) -> dsl.PipelineTask:
        resources = resources or getattr(asked.tasks, kind)
        task.set_cpu_request(resources.cpu_request).set_cpu_limit(resources.cpu_limit)
        task.set_memory_request(resources.memory_request).set_memory_limit(resources.memory_limit)
        task.set_caching_options(self.caching)
        kubernetes.set_timeout(task, resources.timeout_seconds)
        task.set_retry(
            asked.retries.count,
            backoff_duration=f"{asked.retries.wait_seconds}s",
            backoff_factor=asked.retries.factor,
            backoff_max_duration=RETRY_WINDOW,
        )
        if asked.workspace is not None and (kind == "train" or asked.workspace.share_data):
            kubernetes.mount_pvc(task, asked.workspace.claim, asked.workspace.path)
        if asked.workspace is not None and asked.workspace.share_data:
            task.set_env_variable("SEGDISTILL_SHARED", f"{asked.workspace.path}/shared")
        kubernetes.set_image_pull_policy(task, asked.pull_policy)
        if asked.image_pull_secrets:
            kubernetes.set_image_pull_secrets(task, asked.image_pull_secrets)
        for name, value in (asked.labels | asked.queue_labels(kind)).items():
            kubernetes.add_pod_label(task, name, value)
        for name, value in asked.annotations.items():
            kubernetes.add_pod_annotation(task, name, value)
        if asked.certificates is not None:
            kubernetes.use_config_map_as_volume(task, asked.certificates.config_map, asked.certificates.path)
            for name, value in asked.certificates.environment.items():
                task.set_env_variable(name, value)
        if asked.mlflow == "injected":
            task.set_env_variable("SEGDISTILL_MLFLOW", "injected")
        kubernetes.set_security_context(task, asked.security.user, asked.security.group, run_as_non_root=True)
        kubernetes.use_field_path_as_env(task, "SEGDISTILL_PIPELINE_RUN", "metadata.labels['pipeline/runid']")
        _refer(task, asked, kind)
        return task


def _refer(task: dsl.PipelineTask, asked: Cluster, reader: Reader) -> None:
    """Gives a task the variables that are by reference."""
    for item in asked.referred(asked.config_maps, reader):
        kubernetes.use_config_map_as_env(task, item.name, item.keys, optional=item.optional)
    for item in asked.referred(asked.secrets, reader):
        kubernetes.use_secret_as_env(task, item.name, item.keys, optional=item.optional)
