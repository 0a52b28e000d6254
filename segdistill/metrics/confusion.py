"""The confusion matrix, and every score that is read from it.

One int64 matrix is summed over the whole set (rows: truth, columns: prediction); scores are computed once, at the end.
Counting runs in torch on the device of the predictions, the final arithmetic in numpy, so that a report needs no torch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


def confusion_matrix_per_image(
    prediction: "Tensor", target: "Tensor", num_classes: int, ignore_index: int = 255
) -> "Tensor":
    """Counts of (truth, prediction) pairs for each image of a batch, without waiting for the device.

    Pixels whose label is ``ignore_index`` count nowhere, whatever was predicted there.

    Shape:
        prediction, target: [B, ...], classes below K, of the target or ``ignore_index``; result: [B, K, K] int64 on the
            device of ``prediction``.

    Raises:
        ValueError: the shapes differ, or a label is neither a class nor ``ignore_index`` (on a GPU such a label is a
            device-side index error instead, since looking for it would mean waiting).
    """
    import torch

    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    truth = target.flatten(1).to(device=prediction.device, dtype=torch.int64)  # [B, P]
    pair = truth * num_classes + prediction.flatten(1)
    # Bin 0 takes the ignored pixels. Boolean indexing and bincount would both ask the device for a size, and wait.
    bins = torch.where(truth == ignore_index, 0, pair + 1)
    counts = torch.zeros(len(truth), num_classes**2 + 1, dtype=torch.int64, device=bins.device)
    try:
        counts.scatter_add_(1, bins, torch.ones((), dtype=torch.int64, device=bins.device).expand_as(bins))
    except RuntimeError as error:
        if "out of bounds" not in str(error):
            raise
        labels = truth[(truth != ignore_index) & ((truth < 0) | (truth >= num_classes))].unique().tolist()
        allowed = f"0..{num_classes - 1} and {ignore_index} (ignored)"
        raise ValueError(f"labels {labels} in the target are not allowed; allowed: {allowed}") from None
    return counts[:, 1:].reshape(-1, num_classes, num_classes)


def iou(confusion: NDArray[np.integer]) -> NDArray[np.float64]:
    """Intersection over union of each class; nan for a class that neither truth nor prediction has.

    Shape:
        confusion: [..., K, K]; result: [..., K].
    """
    return iou_from_counts(*iou_counts(confusion))


def iou_counts(confusion: Any) -> tuple[Any, Any, Any]:
    """What the IoU of each class depends on: pixels in the intersection, in the truth, in the prediction.

    Shape:
        confusion: [..., K, K], an array or a tensor; results: [..., K], as it is.
    """
    return confusion.diagonal(0, -2, -1), confusion.sum(-1), confusion.sum(-2)


def iou_from_counts(intersection: NDArray[Any], truth: NDArray[Any], prediction: NDArray[Any]) -> NDArray[np.float64]:
    """:func:`iou` from the three pixel counts of each class that it depends on; all [..., K]."""
    union = np.asarray(truth + prediction - intersection, dtype=np.float64)
    result = np.full(union.shape, np.nan)
    np.divide(intersection, union, out=result, where=union > 0)
    return result


def mean_iou(confusion: NDArray[np.integer]) -> float:
    """Mean of :func:`iou` over the classes that occur in one [K, K] matrix; nan if none does."""
    return float(mean_over_present(iou(confusion)))


def mean_over_present(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis without its nans; nan, and no warning, where there is nothing else."""
    present = ~np.isnan(values)
    number = present.sum(axis=-1)
    total = np.where(present, values, 0.0).sum(axis=-1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)


def pixel_accuracy(confusion: NDArray[np.integer]) -> float:
    """Share of the counted pixels of one [K, K] matrix that are right; nan if none was counted."""
    total = int(confusion.sum())
    return int(np.trace(confusion)) / total if total else float("nan")


def per_class_iou(confusion: NDArray[np.integer], class_names: Sequence[str]) -> dict[str, float | None]:
    """:func:`iou` of one [K, K] matrix by class name, as JSON can hold it: None for an absent class."""
    values = iou(confusion).tolist()
    return {name: None if np.isnan(value) else value for name, value in zip(class_names, values, strict=True)}
