"""A stage as a task of Kubeflow Pipelines: its marks, volumes, processes, and jobs over several nodes."""
