"""What a task asks of the cluster. None of it has an effect where the pipeline runs locally.

The number of GPUs is fixed when the pipeline is compiled. As a parameter of the pipeline it would compile too, but
kfp 2.17.0 forgets to hand it into the loop, and the jobs would fail on the cluster.
"""

import os

from kfp import dsl, kubernetes

from segdistill.errors import UserError

GPU = "nvidia.com/gpu"  # the resource, and by custom also the taint of the nodes that have it
SHARED_MEMORY = "8Gi"  # /dev/shm, through which data workers hand over batches; it counts as memory of the pod
SETTINGS = "segdistill"  # the config map that says where MLflow is


def on_cpu(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Tells the task which pipeline run it belongs to, and where MLflow is."""
    kubernetes.use_field_path_as_env(task, "SEGDISTILL_PIPELINE_RUN", "metadata.labels['pipeline/runid']")
    kubernetes.use_config_map_as_env(task, SETTINGS, {"mlflow_tracking_uri": "MLFLOW_TRACKING_URI"})
    return task


def on_gpu(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """As :func:`on_cpu`, on a node with as many GPUs as ``SEGDISTILL_GPUS`` says, or one."""
    task.set_accelerator_type(GPU).set_accelerator_limit(_gpus())
    kubernetes.add_toleration(task, key=GPU, operator="Exists", effect="NoSchedule")
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=SHARED_MEMORY)
    return on_cpu(task)


def _gpus() -> int:
    text = os.environ.get("SEGDISTILL_GPUS") or "1"
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"SEGDISTILL_GPUS: '{text}' is not a number of GPUs; allowed: 1, 2, ...")
    return int(text)
