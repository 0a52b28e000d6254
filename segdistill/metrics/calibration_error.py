"""Expected calibration error: how far a network's probabilities are from how often it is right.

The pixels are put into 15 bins of equal width by the probability of the class that was predicted. ECE is the mean over
the bins, by their pixels, of the distance between the mean probability and the share of right pixels; pixels without a
label count nowhere.

Reference: Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, ICML 2017, arXiv:1706.04599, eq. 3.

In a bin with B pixels that distance times B is the sum of (right - probability) over its pixels, without its sign. So
one sum a bin is enough, whatever the number of images. It is kept in whole steps of a probability: integers add up to
the same in any order and over any number of processes.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

BINS = 15  # as the paper has
STEPS = 2**24  # of a probability from 0 to 1: those of float32 between a half and one


def calibration_gaps(probability: "Tensor", right: "Tensor", labelled: "Tensor") -> "Tensor":
    """The sum over each bin's pixels of (right - probability), in steps, without waiting for the device.

    Args:
        probability: of the predicted class, in 0..1.
        right: whether the prediction is the label.
        labelled: whether there is a label; other pixels count nowhere.

    Shape:
        all: any, the same; result: [15] int64. A bin is open below and closed above, as in the paper.
    """
    import torch

    bins = (probability * BINS).ceil().long().sub_(1).clamp_(0, BINS - 1)
    gaps = (right.float() - probability).mul_(STEPS).round_().long().mul_(labelled)
    sums = torch.zeros(BINS, dtype=torch.int64, device=probability.device)
    return sums.scatter_add_(0, bins.flatten(), gaps.flatten())


def expected_calibration_error(gaps: NDArray[np.int64], pixels: int) -> float:
    """ECE as a share (0..1) from :func:`calibration_gaps` and the number of labelled pixels; nan if there is none."""
    return float(np.abs(gaps).sum()) / STEPS / pixels if pixels else float("nan")
