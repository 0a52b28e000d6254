"""Segmentation scores from integer counts."""

from segdistill.metrics.calibration_error import calibration_gaps, expected_calibration_error
from segdistill.metrics.confusion import (
    confusion_matrix,
    confusion_matrix_per_image,
    iou,
    iou_counts,
    iou_from_counts,
    mean_iou,
    mean_over_present,
    per_class_iou,
    pixel_accuracy,
)

__all__ = [
    "calibration_gaps",
    "confusion_matrix",
    "confusion_matrix_per_image",
    "expected_calibration_error",
    "iou",
    "iou_counts",
    "iou_from_counts",
    "mean_iou",
    "mean_over_present",
    "per_class_iou",
    "pixel_accuracy",
]
