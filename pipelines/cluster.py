"""What a task asks of the cluster. None of it has an effect where the pipeline runs locally."""

from kfp import dsl, kubernetes

GPU = "nvidia.com/gpu"  # the resource, and by custom also the taint of the nodes that have it
SHARED_MEMORY = "8Gi"  # /dev/shm, through which data workers hand over batches; it counts as memory of the pod
SETTINGS = "segdistill"  # the config map that says where MLflow is


def on_cpu(task: dsl.PipelineTask) -> dsl.PipelineTask:
    """Tells the task which pipeline run it belongs to, and where MLflow is."""
    kubernetes.use_field_path_as_env(task, "SEGDISTILL_PIPELINE_RUN", "metadata.labels['pipeline/runid']")
    kubernetes.use_config_map_as_env(task, SETTINGS, {"mlflow_tracking_uri": "MLFLOW_TRACKING_URI"})
    return task


def on_gpu(task: dsl.PipelineTask, count: int) -> dsl.PipelineTask:
    """As :func:`on_cpu`, on a node with a GPU.

    Args:
        count: how many GPUs; may be a parameter of the pipeline.
    """
    task.set_accelerator_type(GPU).set_accelerator_limit(count)
    kubernetes.add_toleration(task, key=GPU, operator="Exists", effect="NoSchedule")
    kubernetes.empty_dir_mount(task, "shared-memory", "/dev/shm", medium="Memory", size_limit=SHARED_MEMORY)
    return on_cpu(task)
