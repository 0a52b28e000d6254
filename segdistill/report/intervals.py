"""What a difference in mIoU is worth: an interval that covers other training seeds and other test images.

A system and its reference are paired: same seeds, same images, so what makes a seed or an image hard for both cancels.
The mIoU of a set comes from its summed counts; it is never a mean of per-image scores. The variance of a row's mean
difference is the sum of two parts:

* **seeds**: the rows with one reference, and the reference, are a table of rows by seeds whose residual variance v (a
  randomised block design, as for Dunnett's test) has (rows - 1)(seeds - 1) degrees of freedom. The mean difference over
  S seeds has variance 2 v / S. So rows of one student are taken to scatter alike, since two or three seeds of a row say
  next to nothing about its own scatter; but a row whose differences scatter more than that keeps its own variance.
* **images**: the jackknife, which leaves out one block of consecutive images at a time. Frames of a drive resemble
  each other; a block is a stretch of them, and ends where a sequence ends.

The interval is Student's, with Satterthwaite's degrees of freedom, at a confidence that Bonferroni divides among the
rows: where nothing differs, the chance that any row of the table excludes zero is 1 - confidence. With one seed there
is no first part, and the interval covers images alone. ``benchmarks/coverage.py`` measures what is promised here.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from segdistill.errors import UserError
from segdistill.metrics.confusion import iou_from_counts, mean_over_present

Name = TypeVar("Name", bound=Hashable)
Seed = int | None


@dataclass(frozen=True)
class Difference:
    """``system - reference`` in mIoU (0..1), mean over the seeds that both have, with its interval."""

    mean: float
    low: float
    high: float
    standard_error: float
    degrees_of_freedom: float
    seeds: tuple[Seed, ...]
    per_seed: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """What the interval shows, and nothing else decides: ``gains``, ``loses`` or ``not shown``."""
        return "gains" if self.low > 0 else "loses" if self.high < 0 else "not shown"


@dataclass(frozen=True)
class Estimate:
    """A score in mIoU (0..1), mean over seeds, with its interval by itself."""

    mean: float
    low: float
    high: float


def estimate(
    seeds: Sequence[NDArray[Any]], *, confidence: float, block: int, sequences: Sequence[str | None] = ()
) -> Estimate:
    """The mIoU of a row, with an interval over other seeds and other images; see :func:`differences`.

    Shape:
        seeds: [N, 3, K] each.
    """
    from scipy.special import stdtrit

    per_seed = np.array([_miou(counts.sum(axis=0)) for counts in seeds])  # [S]
    without = np.mean([leave_one_out(counts, block, sequences) for counts in seeds], axis=0)  # [G]
    parts = [(jackknife_variance(without), len(without) - 1)]
    if len(seeds) > 1:
        parts.append((float(per_seed.var(ddof=1)) / len(seeds), len(seeds) - 1))
    error, degrees = combined(parts)
    half, mean = float(stdtrit(degrees, (1 + confidence) / 2)) * error, float(per_seed.mean())
    return Estimate(mean, mean - half, mean + half)


def differences(
    networks: Mapping[Name, Mapping[Seed, NDArray[Any]]],
    references: Mapping[Name, Name],
    *,
    confidence: float = 0.95,
    block: int = 1,
    sequences: Sequence[str | None] = (),
) -> dict[Name, Difference]:
    """The difference of each row to its reference, where both have a seed in common.

    Args:
        networks: by row and seed, :func:`segdistill.metrics.confusion.iou_counts` of the same images in the same order.
        references: the row with which each row is compared.
        confidence: that all intervals hold at once.
        block: consecutive images that count as one; there must be two blocks at least.
        sequences: the drive or film of each image, where that is known.

    Shape:
        networks: [N, 3, K] each.

    Raises:
        UserError: fewer than two blocks have a labelled pixel.
    """
    from scipy.special import stdtrit  # not for those who only read a comparison

    scores = {
        name: {
            seed: (_miou(counts.sum(axis=0)), leave_one_out(counts, block, sequences)) for seed, counts in seeds.items()
        }
        for name, seeds in networks.items()
    }
    common = {name: [seed for seed in scores[name] if seed in scores[other]] for name, other in references.items()}
    rows = [name for name, seeds in common.items() if seeds]
    results = {}
    for reference in dict.fromkeys(references[name] for name in rows):
        members = [name for name in rows if references[name] == reference]
        table = [{seed: float(score[0]) for seed, score in scores[name].items()} for name in (reference, *members)]
        residual, freedom = residual_variance(table)
        for name in members:
            pairs = [(scores[name][seed], scores[reference][seed]) for seed in common[name]]
            per_seed = np.array([system[0] - other[0] for system, other in pairs])  # [S]
            without = np.mean([system[1] - other[1] for system, other in pairs], axis=0)  # [G]
            own = float(per_seed.var(ddof=1)) if len(pairs) > 1 else 0.0
            parts = [(jackknife_variance(without), len(without) - 1)]
            if freedom:
                parts.append((max(own, 2 * residual) / len(pairs), freedom))
            error, degrees = combined(parts)
            half = float(stdtrit(degrees, 1 - (1 - confidence) / 2 / len(rows))) * error
            mean = float(per_seed.mean())
            interval = {"mean": mean, "low": mean - half, "high": mean + half, "standard_error": error}
            results[name] = Difference(
                **interval,
                degrees_of_freedom=degrees,
                seeds=tuple(common[name]),
                per_seed=tuple(per_seed.tolist()),
            )
    return {name: results[name] for name in rows}


def block_starts(images: int, block: int, sequences: Sequence[str | None] = ()) -> list[int]:
    """The first image of each block: after ``block`` images, and where another sequence begins."""
    starts = [0]
    for image in range(1, images):
        if image - starts[-1] == block or (sequences and sequences[image] != sequences[image - 1]):
            starts.append(image)
    return starts


def leave_one_out(counts: NDArray[Any], block: int, sequences: Sequence[str | None] = ()) -> NDArray[np.float64]:
    """The mIoU of all images but those of one block, for each of G blocks: [N, 3, K] -> [G]."""
    blocks = np.add.reduceat(counts, block_starts(len(counts), block, sequences), axis=0)  # [G, 3, K]
    return _miou(counts.sum(axis=0) - blocks)


def jackknife_variance(without: NDArray[np.float64]) -> float:
    """The variance of a statistic from its G values without one block each."""
    return float((len(without) - 1) * without.var())


def residual_variance(table: Sequence[Mapping[Seed, float]]) -> tuple[float, int]:
    """What rows and seeds leave unexplained in a table of rows by seeds, which may have holes.

    Returns:
        The variance and its degrees of freedom; (0, 0) where there are none.
    """
    cells = [(row, seed, value) for row, seeds in enumerate(table) for seed, value in seeds.items()]
    columns = list(dict.fromkeys(seed for _, seed, _ in cells))
    design = np.zeros((len(cells), len(table) + len(columns)))
    for number, (row, seed, _) in enumerate(cells):
        design[number, [row, len(table) + columns.index(seed)]] = 1
    values = np.array([value for _, _, value in cells])
    effects, _, rank, _ = np.linalg.lstsq(design, values)
    freedom = len(cells) - int(rank)
    residuals = values - design @ effects
    return (float(residuals @ residuals) / freedom, freedom) if freedom else (0.0, 0)


def combined(parts: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """Standard error and Satterthwaite's degrees of freedom of a sum of (variance, its degrees of freedom)."""
    total = sum(variance for variance, _ in parts)
    uncertainty = sum(variance**2 / freedom for variance, freedom in parts)
    return total**0.5, total**2 / uncertainty if uncertainty else float(parts[0][1])


def _miou(counts: NDArray[Any]) -> NDArray[np.float64]:
    """mIoU of summed counts: [..., 3, K] -> [...]."""
    miou = mean_over_present(iou_from_counts(*np.moveaxis(counts, -2, 0)))
    if np.isnan(miou).any():
        raise UserError("test split: no labelled pixel in it, or in but one block of its images; intervals need two")
    return miou
