"""How often the intervals of a comparison hold, and how often they see what is not there. Prints Markdown.

    python benchmarks/coverage.py [--trials 800] [--seeds 3 5] [--rows 6] [--images 120]

It takes three minutes of one core.

A trial is a made-up run: an undistilled student and some rows of the same network, all of them equally good, scored on
images that are harder for one row than for another. Networks differ by seed (a standard deviation of a point of mIoU,
and a third of a point that all rows of a seed share), and rows by image. What is special, the line says:

* *alike*: every row scatters as much as every other over the seeds.
* *unlike*: row by row, half, the same, and twice as much.
* *noisy reference*: the undistilled student scatters twice as much as the rest.
* *drives*: what an image is to a row resembles what the one before it was (correlation 0.9), as in a video; the
  interval leaves out blocks of so many images.

The intervals: that of the comparison (``segdistill/report/intervals.py``), one whose variance between seeds is each
row's own, and percentiles of a paired bootstrap that draws images and seeds (hierarchical), or images alone. Columns:
how many of the 95 % intervals of single rows hold the truth, zero; in how many runs at least one row is said to differ,
intervals corrected for the number of rows (Bonferroni), which should be at most 5 %; half the width of a corrected
interval, median. After each share stands its Monte-Carlo standard error.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from _table import markdown
from numpy.typing import NDArray
from scipy.special import stdtrit

from segdistill.metrics.confusion import iou_from_counts
from segdistill.report.intervals import combined, differences, jackknife_variance, leave_one_out

CONFIDENCE, CLASSES, RESAMPLES = 0.95, 3, 1000
POINT = 0.01  # of mIoU


@dataclass(frozen=True)
class World:
    """What is true of the runs of a scenario."""

    reference: float = 1.0  # scatter over seeds of the undistilled student, in points of mIoU
    rows: tuple[float, ...] = (1.0,)  # of the rows, over and over
    correlation: float = 0.0  # of one image with the one before
    block: int = 1  # images that the interval leaves out together

    def draw(self, generator: np.random.Generator, rows: int, seeds: int, images: int) -> NDArray[np.float64]:
        """Counts of a run, as ``iou_counts`` gives them; the first row is the reference: [1 + rows, S, N, 3, K]."""
        scatter = np.array([self.reference, *(self.rows[row % len(self.rows)] for row in range(rows))])
        shape = (rows + 1, seeds, images, CLASSES)
        by_seed = POINT * scatter[:, None] * generator.standard_normal((rows + 1, seeds))
        by_seed += POINT / 3 * generator.standard_normal((1, seeds))
        by_image = 0.05 * generator.standard_normal((images, CLASSES))  # the same for all: pairing takes it out
        distance = np.abs(np.subtract.outer(np.arange(images), np.arange(images)))
        memory = np.linalg.cholesky(self.correlation**distance)  # of one image for those before it
        by_row = 0.03 * (memory @ generator.standard_normal((rows + 1, images, CLASSES)))
        noise = 0.03 * generator.standard_normal(shape)
        right = 0.7 + by_seed[..., None, None] + by_image + by_row[:, None] + noise
        pixels = generator.gamma(2.0, 500.0, size=(images, CLASSES))
        counts = np.broadcast_to(pixels, (*shape[:2], 3, images, CLASSES)).swapaxes(2, 3).copy()  # truth, prediction
        # IoU = right / (2 - right): so drawn that the mIoU itself is 0.7 and moves with what was added.
        counts[..., 0, :] *= 2 * right / (1 + right)
        return counts


WORLDS = {
    "alike": World(),
    "unlike": World(rows=(0.5, 1.0, 2.0)),
    "noisy reference": World(reference=2.0),
    "drives, blocks of 1": World(correlation=0.9),
    "drives, blocks of 10": World(correlation=0.9, block=10),
    "drives, blocks of 20": World(correlation=0.9, block=20),
}
Bounds = tuple[NDArray[np.float64], NDArray[np.float64]]  # low and high of every row
Interval = Callable[
    [NDArray[np.float64], int, int], Bounds
]  # from counts, block, and the number of rows to correct for


def of_the_comparison(counts: NDArray[np.float64], block: int, rows: int) -> Bounds:
    """The intervals of the comparison, for ``rows`` rows."""
    networks = {row: dict(enumerate(seeds)) for row, seeds in enumerate(counts)}
    # Bonferroni divides by the rows given; a single row's interval is that at another confidence.
    confidence = 1 - (1 - CONFIDENCE) * (len(counts) - 1) / rows
    intervals = differences(networks, dict.fromkeys(range(1, len(counts)), 0), confidence=confidence, block=block)
    return np.array([one.low for one in intervals.values()]), np.array([one.high for one in intervals.values()])


def of_each_row_alone(counts: NDArray[np.float64], block: int, rows: int) -> Bounds:
    """Seeds' variance from the row's own differences alone."""
    low, high = [], []
    scores, without = _mious(counts.sum(axis=2)), np.array([[leave_one_out(c, block) for c in row] for row in counts])
    for row in range(1, len(counts)):
        per_seed, images = scores[row] - scores[0], (without[row] - without[0]).mean(axis=0)
        seeds = (float(per_seed.var(ddof=1)) / len(per_seed), len(per_seed) - 1)
        error, degrees = combined([seeds, (jackknife_variance(images), len(images) - 1)])
        half = stdtrit(degrees, 1 - (1 - CONFIDENCE) / 2 / rows) * error
        low.append(per_seed.mean() - half)
        high.append(per_seed.mean() + half)
    return np.array(low), np.array(high)


def of_a_bootstrap(counts: NDArray[np.float64], block: int, rows: int, *, seeds_too: bool) -> Bounds:
    """Percentiles of a paired bootstrap over images, and over seeds if asked (hierarchical)."""
    generator = np.random.default_rng(0)
    _, seeds, images, *_ = counts.shape
    weights = generator.multinomial(images, np.full(images, 1 / images), size=RESAMPLES).astype(float)
    drawn = np.einsum("rn,msnkc->rmskc", weights, counts, optimize=True)
    gains = _mious(drawn)
    gains = gains[:, 1:] - gains[:, :1]  # [R, M, S]
    if seeds_too:
        chosen = generator.integers(seeds, size=(RESAMPLES, 1, seeds))
        gains = np.take_along_axis(gains, np.broadcast_to(chosen, gains.shape), axis=2)
    tail = (1 - CONFIDENCE) / 2 / rows
    low, high = np.quantile(gains.mean(axis=2), [tail, 1 - tail], axis=0)
    return low, high


def _mious(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    return iou_from_counts(*np.moveaxis(counts, -2, 0)).mean(axis=-1)


INTERVALS: dict[str, Interval] = {
    "comparison": of_the_comparison,
    "each row alone": of_each_row_alone,
    "bootstrap of images and seeds": functools.partial(of_a_bootstrap, seeds_too=True),
    "bootstrap of images": functools.partial(of_a_bootstrap, seeds_too=False),
}


@dataclass(frozen=True)
class Measurement:
    """Of an interval in a world."""

    coverage: float  # of single rows
    false_alarms: float  # runs in which any row is said to differ
    half_width: float  # corrected, median, in points of mIoU
    coverage_error: float
    alarm_error: float


def measure(
    world: World, interval: str, *, trials: int, rows: int, seeds: int, images: int, seed: int = 0
) -> Measurement:
    """Many runs in which nothing differs."""
    generator = np.random.default_rng(seed)
    holds, alarms, widths = [], [], []
    for _ in range(trials):
        counts = world.draw(generator, rows, seeds, images)
        low, high = INTERVALS[interval](counts, world.block, 1)
        holds.append(np.mean((low <= 0) & (high >= 0)))
        low, high = INTERVALS[interval](counts, world.block, rows)
        alarms.append(np.any((low > 0) | (high < 0)))
        widths.append((high - low) / 2)
    errors = (float(np.std(values, ddof=1)) / trials**0.5 for values in (holds, alarms))
    width = float(np.median(widths)) / POINT
    return Measurement(float(np.mean(holds)), float(np.mean(alarms)), width, *errors)


def row_of(measured: Measurement) -> list[str]:
    """Its cells of the table."""
    shares = (
        (measured.coverage, measured.coverage_error),
        (measured.false_alarms, measured.alarm_error),
    )
    return [*(f"{100 * share:.1f} ± {100 * error:.1f}" for share, error in shares), f"{measured.half_width:.2f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=800, help="runs; a fifth of them for a bootstrap")
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--rows", type=int, default=6, help="rows of one student in a run")
    parser.add_argument("--images", type=int, default=120)
    given = parser.parse_args(arguments)
    print(f"{given.rows} rows without a true difference, {given.images} test images, {given.trials} runs a line.\n")
    header = ["seeds: world", "interval", "95 % intervals that hold, %", "runs with a false alarm, %", "width, points"]
    table: list[list[str]] = []
    for seeds in given.seeds:
        for name, world in WORLDS.items():
            for interval in INTERVALS:
                is_bootstrap = interval.startswith("bootstrap")
                if is_bootstrap and world != World():
                    continue  # slow, and refuted by the first world
                trials = max(2, given.trials // 5) if is_bootstrap else given.trials
                measured = measure(world, interval, trials=trials, rows=given.rows, seeds=seeds, images=given.images)
                table.append([f"{seeds}: {name}", interval, *row_of(measured)])
    print(markdown(header, table))


if __name__ == "__main__":
    main()
