"""Writes down what decides the teacher and every cohort, so that a slip is found before anything is trained."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segdistill.config import to_dict
from segdistill.files import new_folder
from segdistill.plan import TEACHER, TeacherConfig, cohort_plan, cohorts, teacher_plan

Config = TeacherConfig
TEACHERS = Path("teachers")  # what dvc.yaml names: of its files, those of the imported teacher decide the plan
logger = logging.getLogger(__name__)


def run(
    config: TeacherConfig,
    *,
    distill: Mapping[str, Any],
    experiments: Mapping[str, Any],
    run: list[str],
    seeds: list[int],
    plan: Path,
) -> None:
    """Writes ``plan``: ``teacher.json``, and one file a cohort.

    Args:
        config: section ``train_teacher``.
        distill: section ``distill``.
        experiments: all that are defined.
        run: the experiments of the matrix.
        seeds: its seeds; all jobs of one are a cohort.
        plan: the folder to write.
    """
    for folder in config.folders:
        if not folder.resolve().is_relative_to(TEACHERS.resolve()):
            logger.warning(
                "train_teacher.import_from: %s is not below %s, which is all that DVC watches; after a change of its"
                " files: dvc repro --force plan", folder, TEACHERS
            )  # fmt: skip
    texts = {TEACHER: as_text(teacher_plan(to_dict(config)))}
    for name, jobs in cohorts(run, seeds).items():
        texts[name] = as_text(cohort_plan(distill, experiments, jobs))
    with new_folder(plan) as partial:
        for name, text in texts.items():
            (partial / f"{name}.json").write_text(text)


def as_text(planned: Any) -> str:
    """The content of a plan's file."""
    return json.dumps(to_dict(planned), indent=1) + "\n"
