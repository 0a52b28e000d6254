import numpy as np
import pytest
import torch

from segdistill.metrics.calibration_error import calibration_gaps, expected_calibration_error


def slowly(probability: torch.Tensor, right: torch.Tensor, labelled: torch.Tensor) -> float:
    """Equation 3 of the paper, a pixel at a time: 15 bins, each open below and closed above."""
    bins: list[list[tuple[float, float]]] = [[] for _ in range(15)]
    pixels = zip(probability.flatten().tolist(), right.flatten().tolist(), labelled.flatten().tolist(), strict=True)
    for confidence, correct, counts in pixels:
        if counts:
            number = next(m for m in range(1, 16) if confidence <= np.float32(m / 15) or m == 15)
            bins[number - 1].append((confidence, float(correct)))
    total = sum(map(len, bins))
    return sum(
        len(members) / total * abs(np.mean([confidence - correct for confidence, correct in members]))
        for members in bins
        if members
    )


@pytest.mark.parametrize("seed", range(3))
def test_error_agrees_with_a_slow_loop_in_float64(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probability = torch.rand(2, 9, 13, generator=generator) * 0.9 + 0.1
    right = torch.rand(2, 9, 13, generator=generator) < probability**2  # far too sure of itself
    labelled = torch.rand(2, 9, 13, generator=generator) > 0.2
    gaps = calibration_gaps(probability, right, labelled)
    error = expected_calibration_error(gaps.numpy(), int(labelled.sum()))
    assert error == pytest.approx(slowly(probability, right, labelled), abs=1e-6)


def test_four_pixels_worked_by_hand() -> None:
    # 0.9 is in bin 14 of 15 (0.8667, 0.9333]: sure by 0.9 of three, right in two: |2 - 2.7| = 0.7. 0.5 is in bin 8, of
    # one that is wrong: |0 - 0.5| = 0.5. Together 1.2, over 4 pixels 0.3. The fifth has no label.
    probability = torch.tensor([0.9, 0.9, 0.9, 0.5, 0.1])
    gaps = calibration_gaps(
        probability, torch.tensor([True, True, False, False, True]), torch.tensor([True] * 4 + [False])
    )
    assert expected_calibration_error(gaps.numpy(), 4) == pytest.approx(0.3, abs=1e-7)
    assert gaps.nonzero().flatten().tolist() == [7, 13]


def test_gaps_of_parts_add_up_exactly_to_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    probability, right = torch.rand(1000, generator=generator), torch.rand(1000, generator=generator) < 0.5
    labelled = torch.ones(1000, dtype=torch.bool)
    parts = [calibration_gaps(probability[i::3], right[i::3], labelled[i::3]) for i in range(3)]
    assert torch.equal(sum(parts), calibration_gaps(probability, right, labelled))


def test_without_a_labelled_pixel_there_is_no_error_to_tell() -> None:
    none = torch.zeros(3, dtype=torch.bool)
    gaps = calibration_gaps(torch.ones(3), none, none)
    assert np.isnan(expected_calibration_error(gaps.numpy(), 0))
