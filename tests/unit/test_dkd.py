"""Decoupled distillation: both terms against the slow loop, and the invariants of its specification."""

from typing import Any

import _reference as reference
import pytest
import torch
from torch import Tensor

from segdistill.errors import UserError
from segdistill.losses.divergence import pixel_kl
from segdistill.methods import parse_method
from segdistill.methods.dkd import Decoupled, non_target_kl, target_kl
from segdistill.models.outputs import ModelInfo, Outputs

CLASSES = 5


def build(classes: int = CLASSES, **changes: Any) -> Decoupled:
    info = ModelInfo(classes, (4, 4, 4, 4), (4, 8, 16, 32), 4, 4, 4, "cnn")
    method, config = parse_method({"name": "dkd", **changes}, "methods.0")
    return method(config, info, info)


def distil(student: Tensor, teacher: Tensor, target: Tensor, **changes: Any) -> dict[str, Tensor]:
    one, other = (Outputs(logits, (), logits) for logits in (student, teacher))
    return build(student.shape[1], **changes)(one, other, target)


def scene(
    size: tuple[int, int] = (4, 6), label_size: tuple[int, int] = (4, 6), classes: int = CLASSES
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    student, teacher = (
        2 * torch.randn(2, classes, *each, generator=generator, dtype=torch.float64) for each in (size, (4, 6))
    )
    target = torch.randint(classes, (2, *label_size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.25] = 255
    return student.requires_grad_(), teacher.requires_grad_(), target


def slow(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> dict[str, Tensor]:
    """The two divergences from probabilities, as the paper writes them."""
    target, non_target = [], []
    for image, i, j in reference.pixels(student):
        label = int(labels[image, i, j])
        if label == 255:
            continue
        p_student = reference.log_softmax(student[image, :, i, j] / temperature).exp()
        p_teacher = reference.log_softmax(teacher[image, :, i, j].detach() / temperature).exp()
        a, b = p_student[label], p_teacher[label]
        target.append(b * torch.log(b / a) + (1 - b) * torch.log((1 - b) / (1 - a)))
        rest = [c for c in range(student.shape[1]) if c != label]
        q_student, q_teacher = p_student[rest] / p_student[rest].sum(), p_teacher[rest] / p_teacher[rest].sum()
        non_target.append((q_teacher * torch.log(q_teacher / q_student)).sum())
    return {
        "target": temperature**2 * reference.mean(target),
        "non_target": temperature**2 * reference.mean(non_target),
    }


@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_both_terms_and_their_gradients_equal_the_slow_loop(upsample: bool, temperature: float) -> None:
    student, teacher, target = scene(size=(3, 5), label_size=(7, 9))
    size = (7, 9) if upsample else (4, 6)
    found = distil(student, teacher, target, upsample=upsample, temperature=temperature)
    expected = slow(
        reference.resized(student, size),
        reference.resized(teacher, size),
        reference.nearest(target, size),
        temperature,
    )
    assert set(found) == set(expected)
    for term, loss in expected.items():
        torch.testing.assert_close(found[term], loss, rtol=1e-10, atol=0)
        wanted, gradient = (torch.autograd.grad(one, student, retain_graph=True)[0] for one in (loss, found[term]))
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-12)


def test_one_pixel_by_hand() -> None:
    # Label 0. Teacher (1/2, 1/4, 1/4), student (1/4, 1/2, 1/4).
    # TCKD = 1/2 log(1/2 : 1/4) + 1/2 log(1/2 : 3/4) = 1/2 log 2 + 1/2 log 2/3 = 1/2 log 4/3.
    # NCKD: (1/2, 1/2) against (2/3, 1/3) = 1/2 log 3/4 + 1/2 log 3/2 = 1/2 log 9/8.
    teacher = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64).log().reshape(1, 3, 1, 1)
    student = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64).log().reshape(1, 3, 1, 1)
    found = distil(student, teacher, torch.zeros(1, 1, 1, dtype=torch.int64))
    halved_logs = torch.tensor([4 / 3, 9 / 8], dtype=torch.float64).log() / 2
    torch.testing.assert_close(torch.stack([found["target"], found["non_target"]]), halved_logs)


def test_plain_distillation_is_the_target_term_and_the_rest_by_the_teachers_doubt() -> None:
    student, teacher, target = scene()
    for image, i, j in reference.pixels(student):
        label = target[image, i, j]
        if label == 255:
            continue
        one, other = (logits[image, :, i, j].reshape(1, -1, 1, 1) for logits in (student, teacher))
        labels = label.reshape(1, 1, 1)
        doubt = 1 - other.softmax(1)[0, label, 0, 0]
        parts = target_kl(one, other, labels) + doubt * non_target_kl(one, other, labels)
        torch.testing.assert_close(parts, pixel_kl(one, other), rtol=1e-12, atol=1e-14)


def test_the_labelled_logit_does_not_enter_the_non_target_term() -> None:
    student, teacher, target = scene()
    labelled = torch.arange(CLASSES)[:, None, None] == target[:, None]
    raised = student + torch.where(labelled, 3.0, 0.0)
    plain, other = distil(student, teacher, target), distil(raised, teacher, target)
    torch.testing.assert_close(other["non_target"], plain["non_target"], rtol=1e-12, atol=0)
    assert abs(other["target"] - plain["target"]) > 1e-2
    gradient = torch.autograd.grad(plain["non_target"], student)[0]
    assert bool((gradient[labelled] == 0).all())
    assert bool((gradient[~labelled & (target != 255)[:, None]] != 0).all())


def test_with_two_classes_nothing_is_left_beside_the_target_term() -> None:
    student, teacher, target = scene(classes=2)
    found = distil(student, teacher, target)
    assert found["non_target"].item() == 0.0
    torch.testing.assert_close(found["target"], pixel_kl(student, teacher, target != 255))


def test_pixels_without_label_have_no_gradient_and_the_label_255_picks_no_class() -> None:
    student, teacher, target = scene()
    sum(distil(student, teacher, target).values()).backward()
    ignored = (target == 255)[:, None].expand_as(student)
    assert student.grad is not None and teacher.grad is None
    assert bool((student.grad[ignored] == 0).all()) and bool((student.grad[~ignored] != 0).all())


@pytest.mark.parametrize("confidence", [30.0, 200.0, 1e5])
@pytest.mark.parametrize("label", [0, 1])
def test_a_sure_network_gives_finite_terms_and_gradients_in_float32(confidence: float, label: int) -> None:
    sure = torch.tensor([confidence, 0.0, 0.5]).reshape(1, 3, 1, 1)
    doubtful = torch.tensor([0.1, 0.0, 0.5]).reshape(1, 3, 1, 1)
    for first, second in ((sure, doubtful), (doubtful, sure), (sure, -sure)):
        student = first.clone().requires_grad_()
        found = distil(student, second, torch.full((1, 1, 1), label))
        sum(found.values()).backward()
        assert all(bool(loss.isfinite()) for loss in found.values())
        assert student.grad is not None and bool(student.grad.isfinite().all())


def test_the_rest_of_a_sure_pixel_keeps_its_digits_in_float32() -> None:
    # 1 - p rounds to 0 in float32 at these logits; the divergence is about 2e-9 * log(2e-9 / 5e-18) and still there.
    student, teacher = (torch.tensor([top, 0.0, 0.0]).reshape(1, 3, 1, 1) for top in (40.0, 20.0))
    labels = torch.zeros(1, 1, 1, dtype=torch.int64)
    exact = target_kl(student.double(), teacher.double(), labels)
    assert exact.item() > 1e-8
    torch.testing.assert_close(target_kl(student, teacher, labels).double(), exact, rtol=1e-4, atol=0)


def test_the_defaults_weigh_both_terms_as_plain_distillation_and_half_of_it_is_c2vkds_setting() -> None:
    assert build().weights == {"target": 1.0, "non_target": 1.0}
    assert build(weight=0.5).weights == {"target": 0.5, "non_target": 0.5}
    assert build(non_target_weight=8.0, temperature=4.0, ramp=20 / 240).weights == {"target": 1.0, "non_target": 8.0}


@pytest.mark.parametrize(("off", "left"), [("target_weight", "non_target"), ("non_target_weight", "target")])
def test_either_term_stands_alone(off: str, left: str) -> None:
    student, teacher, target = scene()
    found = distil(student, teacher, target, **{off: 0.0})
    assert set(found) == {left}
    torch.testing.assert_close(found[left], distil(student, teacher, target)[left])


def test_a_network_with_one_class_is_refused() -> None:
    with pytest.raises(UserError, match="dkd parts the labelled class from the others and needs two, not 1"):
        build(classes=1)
