"""Feature regression: the loss against the slow loop, its invariants, and ``standardize``."""

from typing import Any

import _reference as reference
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from segdistill.config import to_dict
from segdistill.methods import parse_method
from segdistill.methods.fitnet import FeatureRegression, feature_regression, standardized
from segdistill.models.outputs import ModelInfo, Outputs

STUDENT, TEACHER = (ModelInfo(5, (3, 4, 6, width), (4, 8, 16, 32), width, 8, 8, "cnn") for width in (4, 7))


def build(student: ModelInfo = STUDENT, teacher: ModelInfo = TEACHER, **changes: Any) -> FeatureRegression:
    torch.manual_seed(0)
    method, config = parse_method({"name": "fitnet", **changes}, "methods.0")
    return method(config, student, teacher).double()


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(width: int, size: tuple[int, int] = (4, 6), seed: int = 0) -> Outputs:
    features = tuple(draw(2, channels, *size, seed=seed + 9).requires_grad_() for channels in (3, 4, 6, width))
    return Outputs(draw(2, 5, *size), features, draw(2, width, *size, seed=seed).requires_grad_())


def labels(size: tuple[int, int] = (4, 6)) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    target = torch.randint(5, (2, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = 255
    return target


def slow_regression(student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
    return reference.mean(
        [
            (student[b, c, i, j] - teacher[b, c, i, j].detach()) ** 2
            for b, i, j in reference.pixels(student)
            for c in range(student.shape[1])
            if target is None or target[b, i, j] != 255
        ]
    )


@pytest.mark.parametrize("mask_ignore", [True, False])
@pytest.mark.parametrize(("tap", "size"), [("last_feature", (3, 5)), ("stage4", (8, 7)), ("stage2", (4, 6))])
def test_value_and_gradients_equal_the_slow_loop(mask_ignore: bool, tap: Any, size: tuple[int, int]) -> None:
    method = build(tap=tap, mask_ignore=mask_ignore)
    student, teacher, target = outputs(4, size), outputs(7, seed=3), labels((9, 13))
    assert method.projection is not None
    kernels = list(method.projection.parameters())  # [D, C, 1, 1], none where widths are equal
    ours = torch.einsum("dc,bchw->bdhw", kernels[0][..., 0, 0], student.tap(tap)) if kernels else student.tap(tap)
    small = reference.nearest(target, (4, 6)) if mask_ignore else None
    slow = slow_regression(reference.resized(ours, (4, 6)), teacher.tap(tap), small)
    fast = method(student, teacher, target)["regression"]
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=0)
    leaves = [student.tap(tap), *kernels]
    expected, found = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (slow, fast))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    fast.backward()
    assert teacher.tap(tap).grad is None


def test_one_pixel_of_two_channels_by_hand() -> None:
    # ((3 - 1)^2 + (0 - 1)^2) / 2 = 2.5
    student, teacher = (torch.tensor(values).reshape(1, 2, 1, 1) for values in ([3.0, 0.0], [1.0, 1.0]))
    assert feature_regression(student, teacher).item() == 2.5


# -- invariants -------------------------------------------------------------------------------------------------------


def test_it_is_zero_when_the_projection_reaches_the_teacher_and_quadratic_in_a_joint_scale() -> None:
    method, student = build(), outputs(4)
    assert method.projection is not None
    reached = outputs(7)._replace(last_feature=method.projection(student.last_feature))
    assert method(student, reached, labels())["regression"].item() == 0
    teacher = outputs(7, seed=3)
    plain = method(student, teacher, labels())["regression"]
    for scale in (0.1, 3.0):
        one, other = (side._replace(last_feature=scale * side.last_feature) for side in (student, teacher))
        torch.testing.assert_close(method(one, other, labels())["regression"], scale**2 * plain)


def test_duplicating_the_batch_changes_nothing() -> None:
    student, teacher, valid = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1), labels() != 255
    for mask in (None, valid):
        twice = [None if part is None else torch.cat([part, part]) for part in (student, teacher, mask)]
        torch.testing.assert_close(feature_regression(*twice), feature_regression(student, teacher, mask))


def test_the_published_mean_is_ours() -> None:
    student, teacher = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)
    torch.testing.assert_close(10 * feature_regression(student, teacher), 10 * F.mse_loss(student, teacher))
    everywhere = torch.ones(2, 4, 6, dtype=torch.bool)
    torch.testing.assert_close(feature_regression(student, teacher, everywhere), F.mse_loss(student, teacher))


# -- switches ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_cirkds_without_its_projection_between_equal_widths() -> None:
    assert to_dict(parse_method({"name": "fitnet"}, "methods.0")[1]) == {
        "name": "fitnet", "weight": 10.0, "ramp": 0.0, "tap": "last_feature", "always_project": False,
        "mask_ignore": False, "standardize": False,
    }  # fmt: skip
    assert [tuple(parameter.shape) for parameter in build().parameters()] == [(7, 4, 1, 1)]  # no bias
    assert not list(build(STUDENT, STUDENT).parameters()) and not list(build().buffers())
    always = build(STUDENT, STUDENT, always_project=True)
    assert [tuple(parameter.shape) for parameter in always.parameters()] == [(4, 4, 1, 1)]
    student = outputs(4)
    assert always(student, student, labels())["regression"] > 0


def test_pixels_without_label_matter_by_default_and_not_with_mask_ignore() -> None:
    student, teacher, target = outputs(4), outputs(7, seed=3), labels()
    ignored = (target == 255)[:, None]
    spoiled = student._replace(last_feature=torch.where(ignored, 30.0, student.last_feature))
    for masked in (True, False):
        method = build(mask_ignore=masked)
        plain, other = (method(one, teacher, target)["regression"] for one in (student, spoiled))
        assert (abs(plain - other) < 1e-9) == masked
        empty = method(student, teacher, torch.full_like(target, 255))["regression"]
        assert empty.requires_grad and (empty.item() == 0) == masked


# -- standardize ------------------------------------------------------------------------------------------------------


def moments(features: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over the listed pixels [pixels, C]."""
    rows = torch.stack(
        [features[b, :, i, j] for b, i, j in reference.pixels(features) if valid is None or valid[b, i, j]]
    )
    mean = rows.sum(0) / len(rows)
    return mean, ((rows - mean) ** 2).sum(0) / len(rows)


@pytest.mark.parametrize("masked", [True, False])
def test_means_and_variances_are_those_of_the_valid_pixels_of_the_batch(masked: bool) -> None:
    batch = 5 * draw(2, 3, 4, 6) + torch.tensor([0.0, 100.0, -7.0]).reshape(3, 1, 1)
    valid = labels() != 255 if masked else None
    mean, variance = moments(batch, valid)
    expected = (batch - mean[:, None, None]) / torch.sqrt(variance + 1e-5)[:, None, None]
    torch.testing.assert_close(standardized(batch, valid), expected)


def test_the_scale_and_offset_of_the_teachers_channels_do_not_matter_with_standardize() -> None:
    student, teacher = outputs(4), outputs(7, seed=3)
    other = teacher._replace(last_feature=teacher.last_feature * (1 + draw(7, 1, 1).abs()) + draw(7, 1, 1, seed=2))
    plain, changed = (build(standardize=True)(student, one, labels())["regression"] for one in (teacher, other))
    torch.testing.assert_close(plain, changed, rtol=1e-4, atol=0)
    assert (
        abs(build()(student, other, labels())["regression"] - build()(student, teacher, labels())["regression"]) > 0.1
    )


def test_a_dead_channel_a_single_pixel_and_a_batch_without_label_stay_finite() -> None:
    assert bool((standardized(torch.zeros(2, 3, 4, 6)) == 0).all())
    assert standardized(torch.ones(1, 3, 1, 1)).isfinite().all()
    assert standardized(draw(2, 3, 4, 6), torch.zeros(2, 4, 6, dtype=torch.bool)).isfinite().all()
