"""Segmentation scores from integer counts, and what their differences are worth."""

from segdistill.metrics.bootstrap import Difference, iou_counts, paired_difference, paired_difference_of_counts
from segdistill.metrics.confusion import (
    confusion_matrix,
    confusion_matrix_per_image,
    iou,
    mean_iou,
    per_class_iou,
    pixel_accuracy,
)

__all__ = [
    "Difference",
    "confusion_matrix",
    "confusion_matrix_per_image",
    "iou",
    "iou_counts",
    "mean_iou",
    "paired_difference",
    "paired_difference_of_counts",
    "per_class_iou",
    "pixel_accuracy",
]
