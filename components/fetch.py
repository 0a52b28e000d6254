"""The step before the stages: a version of the data set, by git revision, from its DVC remote."""

from typing import NamedTuple

from kfp import dsl
from kfp.dsl import Dataset, Output

from components.images import DATA


@dsl.component(base_image=DATA, install_kfp_package=False)
def fetch(repository: str, revision: str, data: Output[Dataset]) -> NamedTuple(
    "Version", [("data_md5", str), ("data_commit", str)]
):
    """Bring the data of a git revision from its DVC remote, verified file by file.

    Args:
        repository: Git's address of the repository that has data.dvc.
        revision: Of the data set; a commit, since KFP's cache knows only the name.
    """
    from segdistill.kubeflow.tasks import run_fetch

    version = run_fetch(repository, revision, data=data.path)
    data.metadata.update(version)
    return version["data_md5"], version["data_commit"]
