"""Where a student is wrong: the classes that it takes for others, and the images on which it is worst."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segdistill.metrics.confusion import iou_from_counts, mean_over_present
from segdistill.report.inputs import Measured

LEAST = 0.005  # of the pixels of a class; rarer mistakes are none to speak of
PAIRS = 10


@dataclass(frozen=True)
class Confusion:
    """Pixels of one class that are taken for another, as a share of the class's test pixels, all seeds."""

    truth: str
    prediction: str
    share: float
    twin: float | None  # of the same student undistilled, where there is one


@dataclass(frozen=True)
class HardImage:
    """A test image on which the student is bad: mIoU over the classes in its truth or prediction, first seed."""

    sample: str
    miou: float
    twin: float | None  # of the same student undistilled, of the same seed, where there is one


def most_confused(
    networks: Sequence[Measured], twins: Sequence[Measured], class_names: Sequence[str]
) -> tuple[Confusion, ...]:
    """The pairs of classes with the largest shares, largest first.

    Args:
        networks: the student's, one a seed.
        twins: the same of the undistilled student; none where there is no such.
        class_names: the classes.
    """
    shares = _shares(networks)
    others = _shares(twins) if twins else None
    pairs = [divmod(int(place), len(shares)) for place in np.argsort(-shares, axis=None, kind="stable")[:PAIRS]]
    return tuple(
        Confusion(
            class_names[truth],
            class_names[prediction],
            float(shares[truth, prediction]),
            None if others is None else float(others[truth, prediction]),
        )
        for truth, prediction in pairs
        if shares[truth, prediction] >= LEAST
    )


def hardest_images(network: Measured, twin: Measured | None, number: int) -> tuple[HardImage, ...]:
    """At most so many images, the worst first; those without any label are not among them."""
    scores = _mious(network)
    others = _mious(twin) if twin else None
    samples = list(network.accuracies)
    order = [int(place) for place in np.argsort(scores, kind="stable")[:number] if not np.isnan(scores[place])]
    return tuple(
        HardImage(samples[place], float(scores[place]), None if others is None else float(others[place]))
        for place in order
    )


def _shares(networks: Sequence[Measured]) -> NDArray[np.float64]:
    """Of the pixels of each true class (row), the share that is taken for each other class: [K, K]."""
    confusion = np.sum([network.confusion for network in networks], axis=0)
    shares = np.asarray(confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1), dtype=np.float64)
    np.fill_diagonal(shares, 0)
    return shares


def _mious(network: Measured) -> NDArray[np.float64]:
    """Of each image, nan without a label: [N]."""
    return mean_over_present(iou_from_counts(*np.moveaxis(network.counts, 1, 0)))
