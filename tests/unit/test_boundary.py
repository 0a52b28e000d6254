"""Boundary IoU against erosion class by class, as its paper's code has it."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion

from segdistill.metrics.boundary import boundary_counts, near_edges


def regions(seed: int, size: tuple[int, int], classes: int) -> np.ndarray:
    """Blocks of eight pixels and some single ones, two images: [2, H, W]."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, classes, (2, -(-size[0] // 8), -(-size[1] // 8)))
    fine = coarse.repeat(8, 1).repeat(8, 2)[:, : size[0], : size[1]]
    return np.where(random.random(fine.shape) < 0.01, random.integers(0, classes, fine.shape), fine)


def boundary(mask: np.ndarray, distance: int) -> np.ndarray:
    return mask & ~binary_erosion(mask, np.ones((3, 3)), iterations=distance, border_value=0)


@pytest.mark.parametrize("size", [(40, 56), (33, 120), (5, 9)])
def test_counts_are_those_of_eroding_each_class_of_each_image(size: tuple[int, int]) -> None:
    truth, guess = regions(0, size, 4), regions(1, size, 4)
    truth[:, :3, :5] = 255
    distance = max(1, round(0.02 * math.hypot(*size)))
    expected = np.zeros((3, 4), dtype=np.int64)
    for one, other in zip(truth, guess, strict=True):
        for index in range(4):
            edges, found = boundary(one == index, distance), boundary(other == index, distance) & (one != 255)
            expected[:, index] += [(edges & found).sum(), edges.sum(), found.sum()]
    counts = boundary_counts(torch.from_numpy(guess), torch.from_numpy(truth).to(torch.uint8), 4)
    assert counts.numpy().tolist() == expected.tolist()


def test_all_of_a_small_region_is_near_its_edge_and_the_middle_of_a_large_one_is_not() -> None:
    classes = torch.zeros(1, 20, 20, dtype=torch.uint8)
    classes[0, 9:11, 9:11] = 1
    near = near_edges(classes, 2)[0]
    assert near[9:11, 9:11].all() and near[7:13, 7:13].all() and near[:2].all() and not near[3:6, 3:6].any()
