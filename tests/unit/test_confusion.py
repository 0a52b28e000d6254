import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from sklearn.metrics import jaccard_score

from segdistill.metrics.confusion import (
    confusion_matrix_per_image,
    iou,
    mean_iou,
    per_class_iou,
    pixel_accuracy,
)
from segdistill.report.confusion import confusion_map


def confusion_matrix(prediction: torch.Tensor, target: torch.Tensor, *settings: int, **more: int) -> torch.Tensor:
    """Over all pixels, whatever the shape."""
    return confusion_matrix_per_image(prediction[None], target[None], *settings, **more)[0]


def random_case(seed: int, classes: int, shape: tuple[int, ...] = (4, 9, 7)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction = torch.randint(0, classes, shape, generator=generator)
    target = torch.randint(0, classes, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < 0.2] = 255
    return prediction, target


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("classes", [2, 11])
def test_matrix_and_scores_agree_with_scikit_learn(seed: int, classes: int) -> None:
    prediction, target = random_case(seed, classes)
    valid = target != 255
    truth, guess = target[valid].numpy(), prediction[valid].numpy()
    ours = confusion_matrix(prediction, target, classes).numpy()
    np.testing.assert_array_equal(ours, sklearn_confusion_matrix(truth, guess, labels=range(classes)))
    expected = jaccard_score(truth, guess, labels=range(classes), average=None)
    np.testing.assert_allclose(iou(ours), expected, rtol=1e-12)
    np.testing.assert_allclose(mean_iou(ours), expected.mean(), rtol=1e-12)
    np.testing.assert_allclose(pixel_accuracy(ours), (truth == guess).mean(), rtol=1e-12)


def test_two_by_two_case_worked_by_hand() -> None:
    # truth       0 0 0 1 1 -      three right of five counted
    # prediction  0 0 1 1 0 1
    target = torch.tensor([0, 0, 0, 1, 1, 255])
    prediction = torch.tensor([0, 0, 1, 1, 0, 1])
    matrix = confusion_matrix(prediction, target, 2)
    assert matrix.tolist() == [[2, 1], [1, 1]]  # rows are the truth
    assert iou(matrix.numpy()).tolist() == [2 / 4, 1 / 3]
    assert mean_iou(matrix.numpy()) == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert pixel_accuracy(matrix.numpy()) == 3 / 5


@pytest.mark.parametrize("sizes", [[6], [1, 5], [2, 2, 2], [1, 1, 1, 1, 1, 1]])
def test_splitting_into_any_batches_gives_the_same_matrix(sizes: list[int]) -> None:
    prediction, target = random_case(0, 5, (6, 8, 8))
    whole = confusion_matrix(prediction, target, 5)
    batches = zip(prediction.split(sizes), target.split(sizes), strict=True)
    assert torch.equal(torch.stack([confusion_matrix(p, t, 5) for p, t in batches]).sum(0), whole)


def test_batched_matrices_are_those_of_each_image() -> None:
    prediction, target = random_case(1, 5)
    expected = torch.stack([confusion_matrix(p, t, 5) for p, t in zip(prediction, target, strict=True)])
    assert torch.equal(confusion_matrix_per_image(prediction, target, 5), expected)


def test_an_all_ignored_image_changes_nothing() -> None:
    prediction, target = random_case(2, 3)
    target[1] = 255
    matrices = confusion_matrix_per_image(prediction, target, 3)
    assert matrices[1].sum() == 0
    kept = [0, 2, 3]
    assert torch.equal(matrices.sum(0), confusion_matrix(prediction[kept], target[kept], 3))
    assert np.isnan(mean_iou(matrices[1].numpy()))
    assert np.isnan(pixel_accuracy(matrices[1].numpy()))


def test_another_ignore_label_and_byte_labels_are_counted_alike() -> None:
    prediction, target = random_case(3, 4)
    expected = confusion_matrix(prediction, target, 4)
    minus_one = torch.where(target == 255, -1, target)
    assert torch.equal(confusion_matrix(prediction, minus_one, 4, ignore_index=-1), expected)
    assert torch.equal(confusion_matrix(prediction.byte(), target.byte(), 4), expected)
    assert torch.equal(confusion_matrix(prediction.int(), target.to(torch.int16), 4), expected)


def test_pairs_do_not_wrap_around_with_many_classes_in_bytes() -> None:
    target = torch.full((3,), 149, dtype=torch.uint8)
    matrix = confusion_matrix(torch.full((3,), 148, dtype=torch.uint8), target, 150)
    assert matrix[149, 148] == 3
    assert matrix.sum() == 3


def test_a_class_absent_from_truth_and_prediction_is_left_out_of_the_mean() -> None:
    matrix = np.array([[4, 0, 0], [0, 0, 0], [2, 0, 2]])
    np.testing.assert_array_equal(iou(matrix), [4 / 6, np.nan, 2 / 4])
    assert mean_iou(matrix) == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert per_class_iou(matrix, ["sky", "fence", "car"]) == {"sky": 4 / 6, "fence": None, "car": 0.5}


def test_a_class_that_is_only_predicted_counts_as_zero() -> None:
    matrix = np.array([[3, 1], [0, 0]])
    assert iou(matrix).tolist() == [0.75, 0.0]
    assert mean_iou(matrix) == 0.375


def test_counts_stay_exact_beyond_float32() -> None:
    one = confusion_matrix(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), 2)
    large = torch.tensor([[2**24, 0], [0, 2**40]])
    total = (large + one).numpy()
    assert one.dtype == torch.int64
    assert total[0, 0] == 2**24 + 1
    missed = np.array([[2**24, 1], [0, 2**40]])
    assert iou(missed)[0] == 2**24 / (2**24 + 1) < 1


def test_iou_is_computed_over_leading_dimensions() -> None:
    matrices = confusion_matrix_per_image(*random_case(4, 3), num_classes=3).numpy()
    np.testing.assert_array_equal(iou(matrices), [iou(matrix) for matrix in matrices])


def test_a_label_outside_the_classes_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"labels \[12\].*allowed: 0\.\.10 and 255"):
        confusion_matrix(torch.tensor([0, 0]), torch.tensor([12, 255]), 11)


def test_shapes_that_differ_are_an_error() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        confusion_matrix(torch.zeros(2, 3), torch.zeros(3, 2), 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counting_on_a_gpu_does_not_wait_for_it() -> None:
    prediction, target = random_case(5, 19, (2, 64, 64))
    expected = confusion_matrix_per_image(prediction, target, 19)
    prediction, target = prediction.cuda(), target.cuda()
    confusion_matrix_per_image(prediction, target, 19)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        matrices = confusion_matrix_per_image(prediction, target, 19)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(matrices.cpu(), expected)


def test_a_map_of_many_classes_is_drawn_without_an_image_of_floats(tmp_path: Path) -> None:
    names = [f"class {number}" for number in range(20)]
    confusion_map(np.eye(2), names[:2], tmp_path / "first.png")  # what is imported once
    tracemalloc.start()
    confusion_map(np.eye(20) * 100, names, tmp_path / "map.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with Image.open(tmp_path / "map.png") as image:
        assert image.size == (1080, 1080) and peak < 10e6  # of floats: 41e6
