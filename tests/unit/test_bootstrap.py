import numpy as np
import pytest
from numpy.typing import NDArray

from segdistill.metrics import iou_counts, mean_iou, paired_difference, paired_difference_of_counts

Matrices = NDArray[np.int64]


def fake_system(accuracy: float, seed: int, seeds: int = 2, images: int = 40, classes: int = 4) -> Matrices:
    """Per-image matrices of a system that is right with this probability, on images of varied content: [S, N, K, K]."""
    content = np.random.default_rng(0).integers(0, 200, size=(images, classes))  # the same images for every system
    errors = np.random.default_rng(seed)
    chances = np.full((classes, classes), (1 - accuracy) / (classes - 1))
    np.fill_diagonal(chances, accuracy)
    rows = [errors.multinomial(content[:, k], chances[k], size=(seeds, images)) for k in range(classes)]
    return np.stack(rows, axis=2)


def test_identical_systems_have_an_interval_of_exactly_zero() -> None:
    system = fake_system(0.8, seed=1)
    result = paired_difference(system, system.copy(), resamples=200)
    assert (result.mean, result.low, result.high) == (0.0, 0.0, 0.0)
    assert not result.excludes_zero


def test_a_large_difference_excludes_zero_and_has_its_sign() -> None:
    good, bad = fake_system(0.9, seed=1), fake_system(0.7, seed=2)
    better, worse = paired_difference(good, bad), paired_difference(bad, good)
    assert 0.1 < better.low < better.mean < better.high
    assert better.excludes_zero and worse.excludes_zero
    assert worse.mean == pytest.approx(-better.mean)
    assert worse.high < 0


def test_the_mean_is_the_plain_difference_of_the_mious_over_all_images() -> None:
    a, b = fake_system(0.8, seed=1), fake_system(0.7, seed=2)
    result = paired_difference(a, b, resamples=10)
    expected = np.array([mean_iou(a[s].sum(0)) - mean_iou(b[s].sum(0)) for s in range(2)])
    np.testing.assert_allclose(result.per_seed, expected, rtol=1e-12)
    assert result.mean == pytest.approx(expected.mean(), rel=1e-12)


def test_it_agrees_with_a_slow_loop() -> None:
    a, b = fake_system(0.8, seed=1, images=9), fake_system(0.75, seed=2, images=9)
    result = paired_difference(a, b, resamples=300, confidence=0.9, seed=7)
    generator = np.random.default_rng(7)
    weights = [generator.multinomial(9, np.full(9, 1 / 9), size=size) for size in (256, 44)]
    differences = []
    for draw in np.concatenate(weights):
        images = [image for image, times in enumerate(draw) for _ in range(times)]
        per_seed = [mean_iou(a[s, images].sum(0)) - mean_iou(b[s, images].sum(0)) for s in range(2)]
        differences.append(np.mean(per_seed))
    np.testing.assert_allclose([result.low, result.high], np.quantile(differences, [0.05, 0.95]), rtol=1e-10)


def test_the_generator_seed_decides_the_interval() -> None:
    a, b = fake_system(0.8, seed=1), fake_system(0.78, seed=2)
    assert paired_difference(a, b, seed=3) == paired_difference(a, b, seed=3)
    assert paired_difference(a, b, seed=3).low != paired_difference(a, b, seed=4).low


def test_more_confidence_gives_a_wider_interval() -> None:
    a, b = fake_system(0.8, seed=1), fake_system(0.78, seed=2)
    narrow, wide = paired_difference(a, b, confidence=0.5), paired_difference(a, b, confidence=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_equal_systems_are_covered_about_as_often_as_promised() -> None:
    covered = 0
    for trial in range(100):
        a = fake_system(0.8, seed=2 * trial + 1, seeds=1)
        b = fake_system(0.8, seed=2 * trial + 2, seeds=1)
        result = paired_difference(a, b, resamples=200, confidence=0.9, seed=trial)
        covered += not result.excludes_zero
    assert 80 <= covered <= 98  # about 90; four standard deviations are 12


def test_pairing_makes_the_interval_narrower_than_shuffled_images_do() -> None:
    # Images of very different difficulty, which both systems share.
    difficulty = np.random.default_rng(0).uniform(0.3, 0.95, size=40)
    counts = (difficulty * 1000).astype(np.int64)

    def system(shift: int) -> Matrices:
        right = counts + shift
        return np.stack([[right, 1000 - right], [1000 - right, right]], axis=0).transpose(2, 0, 1)[None]

    better, reference = system(10), system(0)
    shuffled = reference[:, np.random.default_rng(1).permutation(40)]
    paired = paired_difference(better, reference)
    unpaired = paired_difference(better, shuffled)
    assert paired.mean == pytest.approx(unpaired.mean)
    assert paired.high - paired.low < 0.1 * (unpaired.high - unpaired.low)
    assert paired.excludes_zero and not unpaired.excludes_zero


def test_resampling_seeds_adds_their_spread() -> None:
    lucky, unlucky = fake_system(0.9, seed=1, seeds=1), fake_system(0.7, seed=2, seeds=1)
    system = np.concatenate([lucky, unlucky])
    reference = fake_system(0.8, seed=3, seeds=2)
    plain = paired_difference(system, reference)
    hierarchical = paired_difference(system, reference, resample_seeds=True)
    assert hierarchical.mean == plain.mean
    assert hierarchical.high - hierarchical.low > 3 * (plain.high - plain.low)


def test_a_class_that_some_draws_lack_gives_no_nan() -> None:
    a, b = fake_system(0.8, seed=1), fake_system(0.7, seed=2)
    a[:, 1:, 3], a[:, 1:, :, 3], b[:, 1:, 3], b[:, 1:, :, 3] = 0, 0, 0, 0  # class 3 lives in image 0 only
    result = paired_difference(a, b)
    assert np.isfinite([result.mean, result.low, result.high]).all()


def test_counts_beyond_float32_stay_exact() -> None:
    matrix = np.array([[2**40, 1], [0, 2**40]])
    np.testing.assert_array_equal(iou_counts(matrix), [[2**40, 2**40], [2**40 + 1, 2**40], [2**40, 2**40 + 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [({"confidence": 1.0}, "confidence 1.0"), ({"resamples": 0}, "resamples 0")],
)
def test_settings_that_make_no_sense_are_errors(change: dict[str, float], message: str) -> None:
    system = iou_counts(fake_system(0.8, seed=1))
    with pytest.raises(ValueError, match=message):
        paired_difference_of_counts(system, system, **change)  # type: ignore[arg-type]


def test_systems_that_saw_other_images_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        paired_difference(fake_system(0.8, seed=1, images=5), fake_system(0.8, seed=1, images=6))


def test_systems_without_a_counted_pixel_are_an_error() -> None:
    empty = np.zeros((1, 3, 2, 2), dtype=np.int64)
    with pytest.raises(ValueError, match="no counted pixel"):
        paired_difference(empty, empty)
