"""Pixel-wise distillation: invariants, the method against the slow loop, and published weights in our reduction."""

from typing import Any

import _reference as reference
import pytest
import torch
from torch import Tensor

from segdistill.methods import parse_method
from segdistill.models.outputs import ModelInfo, Outputs

CLASSES = 5
INFO = ModelInfo(CLASSES, (4, 4, 4, 4), (4, 8, 16, 32), 4, 4, 4, "cnn")


def distil(student: Tensor, teacher: Tensor, target: Tensor, **changes: Any) -> Tensor:
    method, config = parse_method({"name": "kd", **changes}, "methods.0")
    one, other = (Outputs(logits, (), logits[:, :4]) for logits in (student, teacher))
    return method(config, INFO, INFO)(one, other, target)["kl"]


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scene(batch: int = 2, size: tuple[int, int] = (4, 6)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    target = torch.randint(CLASSES, (batch, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.25] = 255
    student, teacher = 2 * draw(batch, CLASSES, *size, seed=1), 2 * draw(batch, CLASSES, *size, seed=2)
    return student.requires_grad_(), teacher, target


@pytest.mark.parametrize("mask_ignore", [True, False])
@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize("align_corners", [True, False])
def test_the_method_equals_the_slow_loop_at_any_size(mask_ignore: bool, upsample: bool, align_corners: bool) -> None:
    student, teacher = draw(2, CLASSES, 3, 5, seed=1).requires_grad_(), draw(2, CLASSES, 4, 4, seed=2)
    target = torch.randint(CLASSES, (2, 9, 7), generator=torch.Generator().manual_seed(3))
    target[:, 2:5] = 255
    size = (9, 7) if upsample else (4, 4)
    changes = {"mask_ignore": mask_ignore, "upsample": upsample, "align_corners": align_corners, "temperature": 2.0}
    fast = distil(student, teacher, target, **changes)
    slow = reference.pixel_kl(
        reference.resized(student, size, align_corners),
        reference.resized(teacher, size, align_corners),
        reference.nearest(target, size) if mask_ignore else None,
        temperature=2.0,
    )
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=0)
    expected, found = (torch.autograd.grad(loss, student)[0] for loss in (slow, fast))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_a_constant_per_pixel_changes_nothing_and_one_per_channel_does() -> None:
    student, teacher, target = scene()
    plain = distil(student, teacher, target)
    torch.testing.assert_close(distil(student + draw(2, 1, 4, 6, seed=7), teacher, target), plain)
    torch.testing.assert_close(distil(student, teacher + draw(2, 1, 4, 6, seed=7), target), plain)
    assert abs(distil(student + draw(2, CLASSES, 1, 1, seed=7), teacher, target) - plain) > 1e-2
    assert abs(distil(teacher + draw(2, 1, 4, 6, seed=7), teacher, target)) < 1e-12


def test_duplicating_the_batch_changes_nothing() -> None:
    tensors = scene()
    twice = (torch.cat([tensor, tensor]) for tensor in tensors)
    torch.testing.assert_close(distil(*twice), distil(*tensors))


def test_the_teacher_comes_first_in_the_divergence() -> None:
    student, teacher, target = scene()
    assert abs(distil(student, teacher, target) - distil(teacher, student, target)) > 1e-2


def test_at_high_temperature_it_becomes_the_distance_of_centred_logits() -> None:
    student, teacher, target = scene()
    distance = student - teacher
    limit = ((distance - distance.mean(1, keepdim=True)) ** 2).sum(1) / (2 * CLASSES)
    valid = target != 255
    hot = distil(student, teacher, target, temperature=1e3)
    torch.testing.assert_close(hot, limit[valid].mean(), rtol=1e-2, atol=0)


def test_the_gradient_is_zero_at_ignored_pixels() -> None:
    student, teacher, target = scene()
    distil(student, teacher, target).backward()
    ignored = (target == 255)[:, None].expand_as(student)
    assert bool((student.grad[ignored] == 0).all()) and bool((student.grad[~ignored] != 0).all())
