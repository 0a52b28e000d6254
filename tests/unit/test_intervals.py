"""The intervals of a comparison; how often they hold is ``test_benchmarks``' and docs/results/coverage.md's."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from segdistill.errors import UserError
from segdistill.metrics import confusion
from segdistill.metrics.confusion import mean_iou
from segdistill.report.intervals import (
    block_starts,
    combined,
    differences,
    jackknife_variance,
    leave_one_out,
    residual_variance,
)

Matrices = NDArray[np.int64]


def fake_system(accuracy: float, seed: int, images: int = 40, classes: int = 4) -> Matrices:
    """Per-image matrices of a system that is right with this probability, on images of varied content: [N, K, K]."""
    content = np.random.default_rng(0).integers(1, 200, size=(images, classes))  # the same images for every system
    errors = np.random.default_rng(seed)
    chances = np.full((classes, classes), (1 - accuracy) / (classes - 1))
    np.fill_diagonal(chances, accuracy)
    return np.stack([errors.multinomial(content[:, k], chances[k]) for k in range(classes)], axis=1)


def iou_counts(matrices: Matrices) -> NDArray[np.int64]:
    return np.stack(confusion.iou_counts(matrices), axis=-2)


def seeds_of(*accuracies: float, first: int) -> dict[int | None, NDArray[np.int64]]:
    return {seed: iou_counts(fake_system(accuracy, first + seed)) for seed, accuracy in enumerate(accuracies)}


def test_identical_systems_have_an_interval_of_zero() -> None:
    system = seeds_of(0.8, 0.82, first=1)
    (result,) = differences({"a": system, "b": system}, {"a": "b"}).values()
    assert (result.mean, result.low, result.high) == pytest.approx((0, 0, 0), abs=1e-12)
    assert result.verdict == "not shown"


def test_a_large_difference_is_a_gain_for_one_and_a_loss_for_the_other() -> None:
    networks = {"good": seeds_of(0.9, 0.91, 0.9, first=1), "bad": seeds_of(0.7, 0.71, 0.7, first=5)}
    better, worse = differences(networks, {"good": "bad", "bad": "good"}).values()
    assert 0.1 < better.low < better.mean < better.high and worse.high < 0
    assert (better.verdict, worse.verdict) == ("gains", "loses")
    assert worse.mean == pytest.approx(-better.mean)


def test_the_mean_is_that_of_the_mious_over_all_images_on_the_seeds_that_both_have() -> None:
    matrices = {
        name: {seed: fake_system(0.7, seed=seed + add) for seed in range(3)} for name, add in (("a", 1), ("b", 9))
    }
    del matrices["b"][1]
    networks = {name: {seed: iou_counts(one) for seed, one in seeds.items()} for name, seeds in matrices.items()}
    result = differences(networks, {"a": "b"})["a"]
    expected = [mean_iou(matrices["a"][seed].sum(0)) - mean_iou(matrices["b"][seed].sum(0)) for seed in (0, 2)]
    assert result.seeds == (0, 2)
    assert result.per_seed == pytest.approx(expected, rel=1e-12) and result.mean == pytest.approx(np.mean(expected))


def test_rows_without_a_common_seed_have_no_interval_and_do_not_count() -> None:
    networks = {"a": seeds_of(0.8, 0.8, first=1), "b": seeds_of(0.8, 0.8, first=5), "c": {7: seeds_of(0.8, first=1)[0]}}
    assert differences(networks, {"a": "b", "c": "b"}) == differences(networks, {"a": "b"})


def test_one_row_on_images_that_say_all_is_the_paired_t_test() -> None:
    # Every image alike: the jackknife sees no variance, and what is left is the seeds'.
    networks: dict[str, dict[int | None, NDArray[np.float64]]] = {"a": {}, "b": {}}
    for name, rights in {"a": (80, 84, 85), "b": (78, 79, 84)}.items():
        for seed, right in enumerate(rights):
            matrix = np.array([[right, 100 - right], [100 - right, right]])
            networks[name][seed] = iou_counts(np.broadcast_to(matrix, (5, 2, 2)))
    result = differences(networks, {"a": "b"})["a"]
    scores = [[right / (200 - right) for right in rights] for rights in ((80, 84, 85), (78, 79, 84))]
    expected = stats.ttest_rel(*scores).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), rel=1e-6)
    assert result.degrees_of_freedom == pytest.approx(2)


def test_residuals_of_a_full_table_are_those_of_a_two_way_analysis_of_variance() -> None:
    values = np.random.default_rng(0).normal(size=(4, 3))
    table = [dict[int | None, float](enumerate(row)) for row in values]
    residuals = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    variance, freedom = residual_variance(table)
    assert freedom == 3 * 2 and variance == pytest.approx((residuals**2).sum() / 6)
    del table[1][2]
    assert residual_variance(table)[1] == 5
    assert residual_variance([{0: 0.1}, {0: 0.3}]) == (0.0, 0)


def test_the_jackknife_of_a_mean_is_its_variance() -> None:
    values = np.random.default_rng(0).normal(size=30)
    without = (values.sum() - values) / 29
    assert jackknife_variance(without) == pytest.approx(values.var(ddof=1) / 30)


def test_leaving_out_a_block_is_scoring_the_rest() -> None:
    matrices = fake_system(0.7, seed=1, images=7)
    without = leave_one_out(iou_counts(matrices), 3)
    rest = [[3, 4, 5, 6], [0, 1, 2, 6], [0, 1, 2, 3, 4, 5]]
    assert without == pytest.approx([mean_iou(matrices[images].sum(0)) for images in rest])


def test_a_block_ends_where_a_sequence_ends() -> None:
    assert block_starts(7, 3) == block_starts(7, 3, [None] * 7) == [0, 3, 6]
    assert block_starts(7, 3, [*"aaaabbb"]) == [0, 3, 4]
    assert block_starts(4, 100, [*"abca"]) == [0, 1, 2, 3]
    matrices = fake_system(0.7, seed=1, images=4)
    without = leave_one_out(iou_counts(matrices), 3, [*"abbb"])
    assert without == pytest.approx([mean_iou(matrices[1:].sum(0)), mean_iou(matrices[:1].sum(0))])


def test_degrees_of_freedom_are_those_of_the_part_that_matters() -> None:
    assert combined([(4.0, 8)]) == pytest.approx((2.0, 8))
    assert combined([(4.0, 8), (0.0, 100)]) == pytest.approx((2.0, 8))
    assert combined([(2.0, 8), (2.0, 8)]) == pytest.approx((2.0, 16))
    assert combined([(0.0, 5)]) == (0.0, 5)


def test_a_single_seed_leaves_the_images() -> None:
    networks = {"a": seeds_of(0.8, first=1), "b": seeds_of(0.7, first=2)}
    result = differences(networks, {"a": "b"})["a"]
    assert result.degrees_of_freedom == 39 and result.verdict == "gains"


def test_rows_lend_each_other_their_scatter_and_keep_their_own_if_it_is_larger() -> None:
    steady, wild = (0.80, 0.801, 0.799), (0.72, 0.88, 0.80)
    networks = {"none": seeds_of(*steady, first=1), "steady": seeds_of(*steady, first=11)}
    alone = differences(networks, {"steady": "none"}, confidence=0.95)["steady"]
    beside = differences(
        networks | {"wild": seeds_of(*wild, first=21)}, {"steady": "none", "wild": "none"}, confidence=0.90
    )  # two rows share what one had
    assert beside["steady"].standard_error > 2 * alone.standard_error
    assert beside["wild"].standard_error > beside["steady"].standard_error
    assert alone.degrees_of_freedom < 45 and beside["wild"].degrees_of_freedom == pytest.approx(4, abs=0.5)


def test_more_rows_make_every_interval_wider_though_none_of_them_changes() -> None:
    networks = {name: seeds_of(0.8, 0.8, 0.8, first=first) for name, first in (("none", 1), ("a", 11), ("far", 21))}
    networks["other"] = seeds_of(0.8, 0.8, 0.8, first=31)  # a student of another reference does not scatter with a
    one, both = (differences(networks, pairs)["a"] for pairs in ({"a": "none"}, {"a": "none", "far": "other"}))
    assert one.standard_error == both.standard_error
    assert both.high - both.low > 1.1 * (one.high - one.low)


def test_pairing_takes_out_what_is_hard_for_both() -> None:
    difficulty = np.random.default_rng(0).uniform(0.3, 0.95, size=40)  # of images, shared by both systems
    counts = (difficulty * 1000).astype(np.int64)

    def system(shift: int) -> Matrices:
        right = counts + shift
        return np.array([[right, 1000 - right], [1000 - right, right]]).transpose(2, 0, 1)

    better, reference = ({0: iou_counts(system(shift))} for shift in (10, 0))
    shuffled = {0: reference[0][np.random.default_rng(1).permutation(40)]}
    paired, unpaired = (differences({"a": better, "b": other}, {"a": "b"})["a"] for other in (reference, shuffled))
    assert paired.mean == pytest.approx(unpaired.mean)
    assert paired.standard_error < 0.1 * unpaired.standard_error
    assert (paired.verdict, unpaired.verdict) == ("gains", "not shown")


def test_blocks_of_frames_that_resemble_each_other_widen_the_interval() -> None:
    networks = {
        name: {0: iou_counts(fake_system(0.8, seed=seed, images=12)).repeat(5, axis=0)}
        for name, seed in (("a", 1), ("b", 2))
    }
    frames, drives = (differences(networks, {"a": "b"}, block=block)["a"] for block in (1, 5))
    assert drives.standard_error > 2 * frames.standard_error
    assert drives.degrees_of_freedom == 11


def test_a_class_that_lives_in_one_image_gives_no_nan() -> None:
    a, b = fake_system(0.8, seed=1), fake_system(0.7, seed=2)
    for matrices in (a, b):
        matrices[1:, 3], matrices[1:, :, 3] = 0, 0
    result = differences({"a": {0: iou_counts(a)}, "b": {0: iou_counts(b)}}, {"a": "b"})["a"]
    assert np.isfinite([result.mean, result.low, result.high]).all()


def test_labels_in_a_single_block_are_too_few() -> None:
    counts = iou_counts(fake_system(0.8, seed=1, images=4))
    counts[2:] = 0
    with pytest.raises(UserError, match="in but one block"):
        differences({"a": {0: counts}, "b": {0: counts}}, {"a": "b"}, block=2)


def test_counts_beyond_float32_stay_exact() -> None:
    matrix = np.array([[2**40, 1], [0, 2**40]])
    np.testing.assert_array_equal(iou_counts(matrix), [[2**40, 2**40], [2**40 + 1, 2**40], [2**40, 2**40 + 1]])
