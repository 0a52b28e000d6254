"""Knowledge distillation for semantic segmentation, from a versioned data set to a registered student."""

__version__ = "0.1.0"
