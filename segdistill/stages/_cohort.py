"""A cohort's folder: one folder an experiment, and a record, written last, of the jobs that it has."""

import contextlib
import json
import shutil
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from segdistill.config import parse, to_dict
from segdistill.errors import UserError
from segdistill.files import SEAL, file_hash, read_json, read_sealed_json, sealed_hashes, write_file
from segdistill.plan import DIVERGED, Job

RECORD = "cohort.json"


def write_record(folder: Path, jobs: Iterable[Job]) -> None:
    """Says that the folder is complete."""
    write_file(folder / RECORD, (json.dumps([to_dict(job) for job in jobs]) + "\n").encode())


def job_folders(cohort: Path, mend: str) -> dict[Job, Path]:
    """The folder of each job of a cohort.

    Raises:
        UserError: the cohort is not complete.
    """
    entries = read_json(cohort / RECORD, mend=mend)
    jobs: list[Job] = parse(list[Job], entries, str(cohort / RECORD))
    return {job: cohort / job.experiment for job in jobs}


def folders_of(matrix: Iterable[Job], cohorts: Sequence[Path], mend: str) -> dict[Job, Path]:
    """The folder of each job of a matrix, in its order, whatever cohorts they were in.

    Raises:
        UserError: a job has no folder, or there is one of a job that the matrix has not.
    """
    folders = {job: folder for cohort in cohorts for job, folder in job_folders(cohort, mend).items()}
    matrix = list(matrix)
    missing = [str(job) for job in matrix if job not in folders]
    beyond = [str(job) for job in folders if job not in matrix]
    if missing or beyond:
        where = ", ".join(str(cohort) for cohort in cohorts)
        what = f"nothing of {', '.join(missing)}" if missing else f"{', '.join(beyond)} are no longer in the matrix"
        raise UserError(f"{where}: {what}; {mend}")
    return {job: folders[job] for job in matrix}


def diverged(folder: Path) -> bool:
    """Whether the job's training diverged, so that there are no students in its folder."""
    return (folder / DIVERGED).is_file()


def made_by(folder: Path, name: str) -> str | None:
    """The identity that a file of a sealed folder names; None where the folder is not there, or not what was sealed."""
    with contextlib.suppress(UserError):
        hashes = sealed_hashes(folder, mend="")
        if all((folder / file).is_file() and file_hash(folder / file) == known for file, known in hashes.items()):
            return str(read_sealed_json(folder, name, mend="").get("identity"))
    return None


def remove_others(cohort: Path, experiments: Collection[str]) -> None:
    """Removes what a former plan has left in a cohort's folder."""
    for folder in cohort.iterdir():
        if folder.is_dir() and (folder / SEAL).is_file() and folder.name not in experiments:
            shutil.rmtree(folder)
