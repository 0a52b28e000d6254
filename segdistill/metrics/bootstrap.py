"""What a difference in mIoU between two systems is worth: a paired bootstrap over test images.

Both systems are scored on the same resampled images, so what makes an image hard for both cancels. The mIoU of a
resample comes from its summed counts, as the mIoU of the whole set does; it is never a mean of per-image scores.

What the interval covers: that other test images, drawn like these, might have come. What it does not cover: that
another training seed might have come. Seeds are averaged, not resampled, because two or three of them say next to
nothing about their distribution; their spread is to be read beside the interval. ``resample_seeds`` draws seeds too (a
hierarchical bootstrap); with S seeds there are only S^S draws, so below about five seeds its interval is still too
narrow. Frames of one video resemble each other, so that an interval over them is too narrow as well.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from segdistill.metrics.confusion import iou_from_counts, mean_over_present

RESAMPLES_AT_ONCE = 256  # bounds memory: [256, N] weights and [256, S, 3, K] counts


@dataclass(frozen=True)
class Difference:
    """``system - reference`` in mIoU (0..1), mean over seeds, with a percentile interval."""

    mean: float
    low: float
    high: float
    per_seed: tuple[float, ...]

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def iou_counts(per_image: NDArray[np.integer]) -> NDArray[np.float64]:
    """What the IoU of each class depends on: pixels in the intersection, in the truth, in the prediction.

    float64 holds these integers exactly up to 2^53, and its matrix product is the fast one.

    Shape:
        per_image: [..., K, K] confusion matrices; result: [..., 3, K].
    """
    intersection = np.diagonal(per_image, axis1=-2, axis2=-1)
    return np.stack([intersection, per_image.sum(axis=-1), per_image.sum(axis=-2)], axis=-2).astype(np.float64)


def paired_difference(
    system: NDArray[np.integer],
    reference: NDArray[np.integer],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    resample_seeds: bool = False,
) -> Difference:
    """The difference in mIoU, mean over seeds, with its paired bootstrap interval.

    Args:
        system: per-image confusion matrices, for each training seed.
        reference: the same of the other system; image n and seed s of both belong together.
        resamples: how often the images are drawn anew, with replacement.
        confidence: share of the resampled differences inside the interval.
        seed: of the generator that draws images; the same seed gives the same interval.
        resample_seeds: draw training seeds with replacement too. See the module for what that is worth.

    Shape:
        system, reference: [S, N, K, K].
    """
    return paired_difference_of_counts(
        iou_counts(system),
        iou_counts(reference),
        resamples=resamples,
        confidence=confidence,
        seed=seed,
        resample_seeds=resample_seeds,
    )


def paired_difference_of_counts(
    system: NDArray[np.float64],
    reference: NDArray[np.float64],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    resample_seeds: bool = False,
) -> Difference:
    """:func:`paired_difference` from :func:`iou_counts`, which are K times smaller than the matrices.

    Shape:
        system, reference: [S, N, 3, K].
    """
    if system.shape != reference.shape or system.ndim != 4:
        raise ValueError(f"expected two equal shapes [S, N, ...], not {system.shape} and {reference.shape}")
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f"confidence {confidence} must lie between 0 and 1, resamples {resamples} be at least 1")
    seeds, images = system.shape[:2]
    whole = np.ones((1, images))
    per_seed = (_mean_ious(system, whole) - _mean_ious(reference, whole))[0]  # [S]
    if np.isnan(per_seed).any():
        raise ValueError("no counted pixel in the test images of a system")

    generator = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, RESAMPLES_AT_ONCE):
        number = min(RESAMPLES_AT_ONCE, resamples - start)
        # How often each image was drawn: [R, N]. Drawing N of N with replacement is one multinomial.
        weights = generator.multinomial(images, np.full(images, 1 / images), size=number).astype(np.float64)
        differences = _mean_ious(system, weights) - _mean_ious(reference, weights)  # [R, S]
        if resample_seeds:
            chosen = generator.integers(seeds, size=(number, seeds))
            differences = np.take_along_axis(differences, chosen, axis=1)
        drawn.append(differences.mean(axis=1))
    tail = (1 - confidence) / 2
    # nan: a draw of images without a single counted pixel, which says nothing.
    low, high = np.nanquantile(np.concatenate(drawn), [tail, 1 - tail])
    return Difference(float(per_seed.mean()), float(low), float(high), tuple(per_seed.tolist()))


def _mean_ious(counts: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """mIoU of each weighting of the images, for each seed: [S, N, 3, K], [R, N] -> [R, S]."""
    seeds, images, kinds, classes = counts.shape
    flat = counts.transpose(1, 0, 2, 3).reshape(images, -1)
    intersection, truth, prediction = np.moveaxis((weights @ flat).reshape(-1, seeds, kinds, classes), 2, 0)
    return mean_over_present(iou_from_counts(intersection, truth, prediction))
