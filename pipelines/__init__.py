"""The graph for Kubeflow Pipelines, and the command that compiles it or runs it here: ``python -m pipelines``."""
