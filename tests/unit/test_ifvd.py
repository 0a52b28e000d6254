"""Intra-class feature variation: the term against slow loops, and the invariants of its specification."""

from typing import Any

import _reference as reference
import pytest
import torch
from torch import Tensor

from segdistill.methods import parse_method
from segdistill.methods.ifvd import IntraClassVariation
from segdistill.models.outputs import ModelInfo, Outputs

CLASSES = 4
STUDENT, TEACHER = (ModelInfo(CLASSES, (3,) * 4, (4, 8, 16, 32), width, 8, 8, "cnn") for width in (5, 7))


def build(**changes: Any) -> IntraClassVariation:
    method, config = parse_method({"name": "ifvd", **changes}, "methods.0")
    return method(config, STUDENT, TEACHER)


def variation(student: Tensor, teacher: Tensor, target: Tensor, **changes: Any) -> Tensor:
    """Of features given as the last ones; nothing else of the outputs may be looked at."""
    nothing = torch.empty(0)
    return build(**changes)(Outputs(nothing, (), student), Outputs(nothing, (), teacher), target)["variation"]


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def labels(batch: int = 2, size: tuple[int, int] = (4, 6)) -> Tensor:
    """Three of the four classes, some pixels without label."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(CLASSES - 1, (batch, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.25] = 255
    return target


def cosine(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum() / torch.sqrt((first * first).sum() * (second * second).sum())


def slow_cosines(features: Tensor, target: Tensor) -> dict[tuple[int, int, int], Tensor]:
    """Of every valid pixel and the centre of its class in its image."""
    found = {}
    for image, i, j in reference.pixels(features):
        if target[image, i, j] != 255:
            members = [
                features[image, :, k, m]
                for other, k, m in reference.pixels(features)
                if other == image and target[other, k, m] == target[image, i, j]
            ]
            found[image, i, j] = cosine(features[image, :, i, j], reference.mean(members))
    return found


def published(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The form of the public codes: a map of centres in which an ignored pixel is its own, then the mean over all."""
    total = torch.zeros((), dtype=torch.float64)
    cosines = []
    for features in (student, teacher):
        centres = {(b, i, j): features[b, :, i, j] for b, i, j in reference.pixels(features)}
        for image in range(len(features)):
            for label in range(CLASSES):
                members = [at for at in centres if at[0] == image and target[at] == label]
                centre = reference.mean([features[b, :, i, j] for b, i, j in members])
                centres |= dict.fromkeys(members, centre)
        cosines.append({(b, i, j): cosine(features[b, :, i, j], centre) for (b, i, j), centre in centres.items()})
    for at, ours in cosines[0].items():
        total = total + (ours - cosines[1][at].detach()) ** 2
    return total / target.numel()


@pytest.mark.parametrize("keep_ignored", [True, False])
@pytest.mark.parametrize("size", [(4, 6), (3, 4), (7, 9)])
def test_value_and_gradient_equal_the_slow_loop_at_any_size(size: tuple[int, int], keep_ignored: bool) -> None:
    student, teacher, target = draw(2, 5, *size), draw(2, 7, 4, 6, seed=1), labels(size=(8, 11))
    small = reference.nearest(target, (4, 6))
    ours = slow_cosines(reference.resized(student, (4, 6)), small)
    theirs = slow_cosines(teacher.detach(), small)
    squares = [(ours[pixel] - theirs[pixel]) ** 2 for pixel in ours]
    slow = sum(squares) / (small.numel() if keep_ignored else len(squares))
    fast = variation(student, teacher, target, keep_ignored_in_mean=keep_ignored)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=0)
    expected, found = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (slow, fast))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    fast.backward()
    assert teacher.grad is None


def test_the_compatibility_switch_gives_the_published_form_and_ours_is_that_over_the_valid_share() -> None:
    student, teacher, target = draw(2, 5, 4, 6), draw(2, 7, 4, 6, seed=1), labels()
    reproduced = variation(student, teacher, target, keep_ignored_in_mean=True)
    expected = published(student, teacher, target)
    torch.testing.assert_close(reproduced, expected, rtol=1e-10, atol=0)
    gradients = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (reproduced, expected))
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)
    share = (target != 255).double().mean()
    assert share < 0.9
    torch.testing.assert_close(variation(student, teacher, target), expected / share, rtol=1e-10, atol=0)


def test_two_pixels_by_hand() -> None:
    # One class. Student (1, 0) and (0, 1): centre (1/2, 1/2), both cosines 1 / sqrt 2. Teacher (1, 0) twice: cosines 1.
    student = torch.eye(2, dtype=torch.float64).reshape(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
    loss = variation(student, teacher, torch.zeros(1, 1, 2, dtype=torch.int64))
    assert loss.item() == pytest.approx((1 - 0.5**0.5) ** 2, rel=1e-12)


def test_scale_and_rotation_of_either_feature_change_nothing() -> None:
    student, teacher, target = draw(2, 5, 4, 6), draw(2, 7, 4, 6, seed=1), labels()
    plain = variation(student, teacher, target)
    rotation = torch.linalg.qr(draw(5, 5, seed=2).detach())[0]
    turned = torch.einsum("dc,bchw->bdhw", rotation, student)
    for ours, theirs in ((100 * student, 0.01 * teacher), (turned, teacher)):
        torch.testing.assert_close(variation(ours, theirs, target), plain, rtol=1e-10, atol=0)
    assert abs(variation(student + 1, teacher, target) - plain) > 1e-4


def test_features_constant_within_each_class_have_nothing_to_learn() -> None:
    target = labels()
    painted = [draw(CLASSES, width)[target.clamp_max(CLASSES - 1)].movedim(-1, 1) for width in (5, 7)]
    assert variation(*painted, target).item() < 1e-30


def test_the_only_pixel_of_a_class_adds_nothing() -> None:
    student, teacher = draw(1, 5, 1, 3), draw(1, 7, 1, 3, seed=1)
    assert variation(student, teacher, torch.tensor([[[0, 1, 2]]])).item() < 1e-30
    with_pair = torch.tensor([[[0, 1, 1]]])
    pair = variation(student[..., 1:], teacher[..., 1:], with_pair[..., 1:])
    torch.testing.assert_close(variation(student, teacher, with_pair), pair * 2 / 3)


def test_centres_belong_to_one_image() -> None:
    student, teacher, target = draw(2, 5, 4, 6), draw(2, 7, 4, 6, seed=1), labels()
    total = sum(
        variation(student[i : i + 1], teacher[i : i + 1], target[i : i + 1]) * (target[i] != 255).sum()
        for i in range(2)
    )
    torch.testing.assert_close(variation(student, teacher, target), total / (target != 255).sum())


def test_ignored_pixels_shape_no_centre_and_get_no_gradient() -> None:
    student, teacher, target = draw(2, 5, 4, 6), draw(2, 7, 4, 6, seed=1), labels()
    ignored = (target == 255)[:, None]
    spoiled = torch.where(ignored, 9.0, student)
    torch.testing.assert_close(variation(spoiled, teacher, target), variation(student, teacher, target))
    variation(student, teacher, target).backward()
    assert student.grad is not None
    assert bool((student.grad[ignored.expand_as(student)] == 0).all()) and bool((student.grad != 0).any())


def test_a_dead_feature_gives_finite_gradients() -> None:
    student, teacher, target = draw(2, 5, 4, 6), draw(2, 7, 4, 6, seed=1), labels()
    dead = student.detach().clone()
    dead[0] = 0.0  # pixels and centres of an image
    dead[1, :, :2] = 0.0
    loss = variation(dead.requires_grad_(), teacher, target)
    loss.backward()
    assert bool(loss.isfinite()) and dead.grad is not None and float(dead.grad.abs().max()) < 1e3


def test_the_default_weight_is_the_official_codes_and_no_helper_is_built_for_unequal_widths() -> None:
    method = build()
    assert method.weights == {"variation": 200.0} and not list(method.parameters())


def test_another_tap_is_compared() -> None:
    stages = [tuple(draw(2, 3, 4 + stage, 6, seed=10 * who + stage) for stage in range(4)) for who in (1, 2)]
    nothing, target = torch.empty(0), labels()
    one, other = (Outputs(nothing, features, nothing) for features in stages)
    found = build(tap="stage3")(one, other, target)["variation"]
    torch.testing.assert_close(found, variation(stages[0][2], stages[1][2], target))
