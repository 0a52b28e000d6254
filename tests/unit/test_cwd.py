"""Channel-wise distillation: the terms against the slow loop, the specification's invariants, published weights."""

import math
from collections.abc import Callable
from typing import Any

import _reference as reference
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from segdistill.config import to_dict
from segdistill.losses.align import Projection
from segdistill.methods import parse_method
from segdistill.methods.cwd import ChannelWise, channel_kl
from segdistill.models.outputs import ModelInfo, Outputs

CLASSES = 5
STUDENT, TEACHER = (ModelInfo(CLASSES, (3, 4, 6, 8), (4, 8, 16, 32), width, 8, 8, "cnn") for width in (4, 7))


def build(student: ModelInfo = STUDENT, teacher: ModelInfo = TEACHER, **changes: Any) -> ChannelWise:
    torch.manual_seed(0)
    method, config = parse_method({"name": "cwd", **changes}, "methods.0")
    return method(config, student, teacher).double()


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(width: int, size: tuple[int, int] = (4, 6), seed: int = 0) -> Outputs:
    features = tuple(draw(2, channels, *size, seed=seed + 9).requires_grad_() for channels in (3, 4, 6, 8))
    logits, last = 2 * draw(2, CLASSES, *size, seed=seed), 2 * draw(2, width, *size, seed=seed + 1)
    return Outputs(logits.requires_grad_(), features, last.requires_grad_())


def labels(size: tuple[int, int] = (4, 6)) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    target = torch.randint(CLASSES, (2, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = 255
    return target


def slow_channel_kl(student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float) -> Tensor:
    """Image by image and channel by channel; images without a valid pixel are left out."""
    images = []
    for b in range(len(student)):
        seen = [(i, j) for _, i, j in reference.pixels(student[:1]) if target is None or target[b, i, j] != 255]
        if seen:
            channels = [
                reference.kl(
                    *(torch.stack([maps[b, c][at] for at in seen]) / temperature for maps in (teacher, student))
                )
                for c in range(student.shape[1])
            ]
            images.append(reference.mean(channels))
    return temperature**2 * reference.mean(images)


@pytest.mark.parametrize("mask_ignore", [True, False])
@pytest.mark.parametrize(
    ("tap", "student_size"), [("last_feature", (3, 5)), ("stage2", (4, 6)), ("last_feature", (8, 7))]
)
def test_both_terms_and_their_gradients_equal_the_slow_loop(
    mask_ignore: bool, tap: Any, student_size: tuple[int, int]
) -> None:
    method = build(feature_weight=50, tap=tap, temperature=2.0, mask_ignore=mask_ignore)
    student, teacher, target = outputs(4, student_size), outputs(7, seed=3), labels((9, 13))
    small = reference.nearest(target, (4, 6)) if mask_ignore else None
    assert method.projection is not None
    projected = method.projection(student.tap(tap))
    pairs = {"logits": (student.logits, teacher.logits), "feature": (projected, teacher.tap(tap))}
    fast = method(student, teacher, target)
    assert set(fast) == set(pairs)
    for term, (ours, theirs) in pairs.items():
        slow = slow_channel_kl(reference.resized(ours, (4, 6)), theirs, small, 2.0)
        torch.testing.assert_close(fast[term], slow, rtol=1e-9, atol=0)
        leaves = [student.logits] if term == "logits" else [student.tap(tap), *method.projection.parameters()]
        expected, found = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (slow, fast[term]))
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-11)


def test_the_gradient_is_that_of_the_specification_and_sums_to_zero_over_space() -> None:
    student, teacher = draw(2, 3, 4, 6).requires_grad_(), draw(2, 3, 4, 6, seed=1)
    (gradient,) = torch.autograd.grad(channel_kl(student, teacher, temperature=4.0), student)
    ours, theirs = ((maps.flatten(2) / 4).softmax(-1).view_as(maps) for maps in (student, teacher))
    torch.testing.assert_close(gradient, 4 / (2 * 3) * (ours - theirs))
    torch.testing.assert_close(gradient.sum((2, 3)), torch.zeros(2, 3, dtype=torch.float64))


def test_one_channel_of_two_positions_by_hand() -> None:
    # T = 1: the teacher's (log 3, 0) is (3/4, 1/4), the student's (0, 0) is (1/2, 1/2), so
    # KL = 3/4 log(3/2) + 1/4 log(1/2) = 0.30410 - 0.17329 = 0.13081. A second channel, equal on both sides, halves it.
    student = torch.zeros(1, 2, 1, 2, dtype=torch.float64)
    teacher = torch.tensor([[[[math.log(3), 0.0]], [[5.0, 5.0]]]], dtype=torch.float64)
    assert channel_kl(student[:, :1], teacher[:, :1], temperature=1.0).item() == pytest.approx(0.130812, abs=1e-6)
    assert channel_kl(student, teacher, temperature=1.0).item() == pytest.approx(0.130812 / 2, abs=1e-6)


# -- invariants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False])
def test_a_constant_per_channel_changes_nothing_and_one_per_pixel_does(masked: bool) -> None:
    student, teacher = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)
    valid = labels() != 255 if masked else None

    def value(one: Tensor, other: Tensor) -> Tensor:
        return channel_kl(one, other, valid, temperature=2.0)

    plain = value(student, teacher)
    torch.testing.assert_close(value(student + draw(2, 3, 1, 1, seed=7), teacher), plain)
    torch.testing.assert_close(value(student, teacher + draw(2, 3, 1, 1, seed=7)), plain)
    assert abs(value(student + draw(2, 1, 4, 6, seed=7), teacher) - plain) > 1e-2


def test_one_permutation_of_space_on_both_sides_changes_nothing() -> None:
    student, teacher, valid = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1), labels() != 255
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))

    def shuffled(maps: Tensor) -> Tensor:
        return maps.flatten(-2)[..., order].view_as(maps)

    for mask in (None, valid):
        plain = channel_kl(student, teacher, mask, temperature=4.0)
        other = None if mask is None else shuffled(mask)
        torch.testing.assert_close(channel_kl(shuffled(student), shuffled(teacher), other, temperature=4.0), plain)
    assert abs(channel_kl(shuffled(student), teacher, temperature=4.0) - plain) > 1e-3


def test_enlarging_both_sides_by_nearest_neighbour_changes_nothing() -> None:
    student, teacher = draw(2, 3, 4, 6), draw(2, 3, 4, 6, seed=1)
    large = (F.interpolate(maps, scale_factor=2, mode="nearest") for maps in (student, teacher))
    torch.testing.assert_close(channel_kl(*large, temperature=4.0), channel_kl(student, teacher, temperature=4.0))


def test_duplicating_the_batch_changes_nothing_and_the_teacher_comes_first() -> None:
    student, teacher = 2 * draw(2, 3, 4, 6), 2 * draw(2, 3, 4, 6, seed=1)
    plain = channel_kl(student, teacher, temperature=1.0)
    twice = [torch.cat([maps, maps]) for maps in (student, teacher)]
    torch.testing.assert_close(channel_kl(*twice, temperature=1.0), plain)
    assert abs(channel_kl(teacher, student, temperature=1.0) - plain) > 1e-2


# -- masks ------------------------------------------------------------------------------------------------------------


def test_with_mask_ignore_pixels_without_label_have_no_effect_and_no_gradient_and_by_default_they_have() -> None:
    student, teacher, target = outputs(4), outputs(7, seed=3), labels()
    ignored = (target == 255)[:, None]
    spoiled = student._replace(logits=torch.where(ignored, 30 * draw(2, CLASSES, 4, 6, seed=8), student.logits))
    for masked in (True, False):
        method = build(mask_ignore=masked)
        plain, other = (method(one, teacher, target)["logits"] for one in (student, spoiled))
        assert (abs(plain - other) < 1e-9) == masked
        (gradient,) = torch.autograd.grad(plain, student.logits)
        assert bool((gradient[ignored.expand_as(gradient)] == 0).all()) == masked
        assert bool((gradient[~ignored.expand_as(gradient)] != 0).all())


def test_an_image_without_label_is_left_out_and_a_batch_without_label_gives_zero_with_a_graph() -> None:
    method, target = build(mask_ignore=True, feature_weight=1), labels()
    student, teacher = outputs(4), outputs(7, seed=3)
    target[1] = 255
    found = method(student, teacher, target)
    first = channel_kl(student.logits[:1], teacher.logits[:1], target[:1] != 255, temperature=4.0)
    torch.testing.assert_close(found["logits"], first)
    found = method(student, teacher, torch.full_like(target, 255))
    assert all(loss.item() == 0 for loss in found.values())
    sum(found.values()).backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in (student.logits, student.last_feature))
    assert all(parameter.grad is not None for parameter in method.parameters())


def test_by_default_no_label_enters() -> None:
    method, student, teacher = build(feature_weight=1), outputs(4), outputs(7, seed=3)
    plain, empty = (method(student, teacher, target) for target in (labels(), torch.full((2, 4, 6), 255)))
    assert plain == empty and plain["logits"] > 0


@pytest.mark.parametrize("masked", [True, False])
def test_extreme_logits_in_float32_stay_finite(masked: bool) -> None:
    student = (1e4 * draw(2, 3, 4, 6).float()).requires_grad_()
    teacher = 1e4 * draw(2, 3, 4, 6, seed=1).float()
    loss = channel_kl(student, teacher, labels() != 255 if masked else None, temperature=1.0)
    loss.backward()
    assert loss.isfinite() and student.grad is not None and bool(student.grad.isfinite().all())


# -- weights and switches ---------------------------------------------------------------------------------------------


def kl_sum(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    ours, theirs = (maps.flatten(2) / temperature for maps in (student, teacher))
    return temperature**2 * F.kl_div(ours.log_softmax(-1), theirs.softmax(-1), reduction="sum")


# Published reductions, on a student's map before and after its projection: (formula, T, their weight, our weight).
IMAGES, NARROW, WIDE = 2, 4, 8
PUBLISHED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor, float], Tensor], float, float, float]] = {
    "torchdistiller": (lambda _, s, t, T: kl_sum(s, t, T) / (IMAGES * s.shape[1]), 4.0, 3.0, 3.0),
    "mmrazor": (lambda _, s, t, T: kl_sum(s, t, T) / (s.shape[1] * IMAGES), 1.0, 5.0, 5.0),
    "cirkd feature": (lambda raw, s, t, T: kl_sum(s, t, T) / (IMAGES * raw.shape[1]), 4.0, 50.0, 50.0 * WIDE / NARROW),
}


@pytest.mark.parametrize("code", PUBLISHED)
def test_a_published_weight_translates_to_the_same_loss_and_gradient(code: str) -> None:
    formula, temperature, weight, ours = PUBLISHED[code]
    raw, teacher = draw(IMAGES, NARROW, 4, 6).requires_grad_(), draw(IMAGES, WIDE, 4, 6, seed=1)
    torch.manual_seed(0)
    projected = Projection(NARROW, WIDE).double()(raw)
    losses = (
        weight * formula(raw, projected, teacher, temperature),
        ours * channel_kl(projected, teacher, temperature=temperature),
    )
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, raw, retain_graph=True)[0] for loss in losses))


def test_the_defaults_are_the_released_commands() -> None:
    assert to_dict(parse_method({"name": "cwd"}, "methods.0")[1]) == {
        "name": "cwd", "weight": 1.0, "ramp": 0.0, "logits_weight": 3.0, "feature_weight": 0.0, "tap": "last_feature",
        "temperature": 4.0, "mask_ignore": False,
    }  # fmt: skip


def test_a_term_that_is_off_is_neither_built_nor_weighed() -> None:
    student, teacher, target = outputs(4), outputs(7, seed=3), labels()
    logits, feature = build(), build(logits_weight=0, feature_weight=50, weight=0.5)
    assert logits.weights == {"logits": 3.0} and set(logits(student, teacher, target)) == {"logits"}
    assert not list(logits.parameters())
    assert feature.weights == {"feature": 25.0} and set(feature(student, teacher, target)) == {"feature"}
    assert [tuple(parameter.shape) for parameter in feature.parameters()] == [(7, 4, 1, 1)]  # no bias
    assert not list(build(TEACHER, feature_weight=50).parameters())  # equal widths: no projection
