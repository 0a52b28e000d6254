"""A training stage on several nodes, as a TrainJob of Kubeflow Trainer v2: all of it that no task changes.

The API is ``trainer.kubeflow.org/v1alpha1`` as of Trainer 2.3. What belongs to the pods stands in ``runtimePatches``,
which Trainer 2.2 brought in the place of ``podTemplateOverrides``. The API server is asked to refuse a field that it
does not know: by default it drops it, and on an older Trainer the job would run without its volume.
"""

from typing import Any

from components.images import TRAIN
from pipelines.cluster import Cluster
from segdistill import environment
from segdistill.kubeflow.trainjob import NODE

OURS = {"app.kubernetes.io/managed-by": "segdistill"}
MANAGER = "pipelines.segdistill/task"  # Trainer's webhook asks for a domain and a path, which the CRD does not say
SOONER = 600  # seconds before the end of an attempt, at which the job ends


def manifest(asked: Cluster) -> dict[str, Any]:
    """The job as the API takes it, but for what ``segdistill.kubeflow.nodes`` adds for a task."""
    accelerator, train = asked.accelerator, asked.tasks.train
    assert accelerator is not None  # or it would not be on nodes
    patch = {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": _pod(asked)}}}]}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(asked, asked.queue_labels("train")),
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": accelerator.runtime,
            },
            "trainer": {
                "image": TRAIN,
                "numNodes": accelerator.nodes,
                "resourcesPerNode": {
                    "requests": {"cpu": train.cpu_request, "memory": train.memory_request},
                    "limits": {"cpu": train.cpu_limit, "memory": train.memory_limit},
                },
                "env": _environment(asked),
            },
            "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": patch}}}],
            # It also ends a job that nobody waits for any more.
            "activeDeadlineSeconds": max(1, train.timeout_seconds - SOONER),
        },
    }  # fmt: skip


def _metadata(asked: Cluster, labels: dict[str, str]) -> dict[str, Any]:
    """Of the job or of its pods, with labels of its own."""
    metadata: dict[str, Any] = {"labels": {**asked.labels, **labels, **OURS}}
    return metadata | ({"annotations": asked.annotations} if asked.annotations else {})


def _environment(asked: Cluster) -> list[dict[str, Any]]:
    assert asked.workspace is not None
    literal = {"SEGDISTILL_WORK": f"{asked.workspace.path}/work"}
    literal |= asked.certificates.environment if asked.certificates else {}
    variables: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in literal.items()]
    # KFP's plugin gives its variables to the pods of KFP. The waiting one hands them on, but for a name and a password.
    left_out = environment.OF_KFP if asked.mlflow == "injected" else ()
    secrets = [part for one in asked.secrets if "train" in one.tasks and (part := one.without(left_out))]
    for kind, references in (
        ("configMapKeyRef", asked.referred(asked.config_maps, "train")), ("secretKeyRef", secrets),
    ):  # fmt: skip
        for item in references:
            for key, variable in item.keys.items():
                source = {kind: {"name": item.name, "key": key, "optional": item.optional}}
                variables.append({"name": variable, "valueFrom": source})
    return variables


def _pod(asked: Cluster) -> dict[str, Any]:
    accelerator, workspace = asked.accelerator, asked.workspace
    assert accelerator is not None and workspace is not None
    volumes: list[dict[str, Any]] = [
        {"name": "workspace", "persistentVolumeClaim": {"claimName": workspace.claim}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": asked.shared_memory}},
    ]
    mounts = [
        {"name": "workspace", "mountPath": workspace.path}, {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]  # fmt: skip
    if asked.certificates:
        volumes.append({"name": "certificates", "configMap": {"name": asked.certificates.config_map}})
        mounts.append({"name": "certificates", "mountPath": asked.certificates.path})
    spec: dict[str, Any] = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": asked.security.user,
            "runAsGroup": asked.security.group,
            "fsGroup": asked.security.group,
            "fsGroupChangePolicy": "OnRootMismatch",  # not file by file on each start
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": volumes,
        "containers": [
            {
                "name": NODE,
                "volumeMounts": mounts,
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    }
    if asked.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in asked.image_pull_secrets]
    if accelerator.node_selector:
        spec["nodeSelector"] = accelerator.node_selector
    if accelerator.tolerations:
        spec["tolerations"] = [
            {"key": taint.key, "operator": taint.operator, "effect": taint.effect}
            | ({} if taint.value is None else {"value": taint.value})
            for taint in accelerator.tolerations
        ]
    # A mesh's proxy would stand between the processes, and never end.
    return {"metadata": _metadata(asked, {"sidecar.istio.io/inject": "false"}), "spec": spec}
