"""One thin Kubeflow component per stage of ``segdistill.stages``; each calls the library once and does nothing else.

Two more stand around the stages: ``fetch`` brings the data set, ``finish`` closes the run in MLflow. A component's body
is copied into the compiled pipeline and runs in our image, where KFP gives it the names of ``kfp.dsl``; that is why its
import stands inside. ``params`` is the stage's part of params.yaml as JSON, one string a stage, and ``plan`` what the
stage ``plan`` writes down for the teacher or for one cohort: so that a change makes only those tasks run again that it
concerns, and so that no integer becomes a float on the way. The plan of a tuning is the whole params.yaml.
"""

from components.compare import compare
from components.distill import distill
from components.evaluate import evaluate
from components.evaluate_teacher import evaluate_teacher
from components.fetch import fetch
from components.finish import finish
from components.prepare import prepare
from components.register import register
from components.train_teacher import train_teacher
from components.tune import tune
from components.tune_report import tune_report
from components.validate import validate

__all__ = [
    "compare",
    "distill",
    "evaluate",
    "evaluate_teacher",
    "fetch",
    "finish",
    "prepare",
    "register",
    "train_teacher",
    "tune",
    "tune_report",
    "validate",
]
