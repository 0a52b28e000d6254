"""DIST: every term against the slow loop, and the invariants of its specification."""

from itertools import product
from typing import Any

import _reference as reference
import pytest
import torch
from torch import Tensor

from segdistill.methods import parse_method
from segdistill.methods.dist import Correlation, inter_distance, intra_distance
from segdistill.models.outputs import ModelInfo, Outputs

CLASSES = 4
TERMS = ("inter", "intra")


def info(aux: bool = True) -> ModelInfo:
    return ModelInfo(CLASSES, (4, 4, 4, 4), (4, 8, 16, 32), 4, 4, 4, "cnn", aux=aux)


def build(student_aux: bool = True, teacher_aux: bool = True, **changes: Any) -> Correlation:
    method, config = parse_method({"name": "dist", **changes}, "methods.0")
    return method(config, info(student_aux), info(teacher_aux))


def draw(*size: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(2, CLASSES, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(size: tuple[int, int], aux_size: tuple[int, int], seed: int) -> Outputs:
    logits, aux = draw(*size, seed=seed), draw(*aux_size, seed=seed + 100)
    return Outputs(logits.requires_grad_(), (), logits, aux.requires_grad_())


def distil(student: Tensor, teacher: Tensor, target: Tensor, **changes: Any) -> dict[str, Tensor]:
    one, other = (Outputs(logits, (), logits) for logits in (student, teacher))
    return build(student_aux=False, **changes)(one, other, target)


def labels(size: tuple[int, int] = (4, 6)) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(CLASSES, (2, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = 255
    return target


def correlation(first: Tensor, second: Tensor) -> Tensor:
    first, second = first - first.sum() / len(first), second - second.sum() / len(second)
    lengths = torch.sqrt((first * first).sum()) * torch.sqrt((second * second).sum())
    return (first * second).sum() / (lengths + 1e-8)


def slow(student: Tensor, teacher: Tensor, target: Tensor | None, temperature: float) -> dict[str, Tensor]:
    """From the table of the distributions of the pixels that count, a pixel a row."""
    rows = [at for at in reference.pixels(student) if target is None or target[at] != 255]
    ours, theirs = (
        torch.stack([reference.log_softmax(logits[b, :, i, j] / temperature).exp() for b, i, j in rows])
        for logits in (student, teacher.detach())
    )
    inter = [correlation(ours[row], theirs[row]) for row in range(len(rows))]
    intra = [correlation(ours[:, label], theirs[:, label]) for label in range(CLASSES)]
    return {"inter": 1 - reference.mean(inter), "intra": 1 - reference.mean(intra)}


@pytest.mark.parametrize(("mask_ignore", "upsample"), product([True, False], repeat=2))
def test_terms_and_their_gradients_equal_the_slow_loop_at_any_size(mask_ignore: bool, upsample: bool) -> None:
    student, teacher, target = outputs((3, 5), (2, 3), 1), outputs((4, 4), (2, 2), 2), labels((9, 7))
    method = build(
        mask_ignore=mask_ignore,
        upsample=upsample,
        temperature=2.0,
        squared_temperature=True,
        inter_weight=0.5,
        intra_weight=3.0,
    )
    found = method(student, teacher, target)
    assert student.aux_logits is not None and teacher.aux_logits is not None
    expected = {}
    for name, ours, theirs, size in (
        ("main", student.logits, teacher.logits, (4, 4)),
        ("aux", student.aux_logits, teacher.aux_logits, (2, 2)),
    ):
        common = (9, 7) if upsample else size
        expected[name] = slow(
            reference.resized(ours, common),
            reference.resized(theirs, common),
            reference.nearest(target, common) if mask_ignore else None,
            temperature=2.0,
        )
    wanted = {term: 4 * loss for term, loss in expected["main"].items()}
    wanted["aux"] = 4 * (0.5 * expected["aux"]["inter"] + 3.0 * expected["aux"]["intra"])
    assert set(found) == set(wanted)
    for term, loss in wanted.items():
        leaf = student.aux_logits if term == "aux" else student.logits
        torch.testing.assert_close(found[term], loss, rtol=1e-10, atol=0)
        gradient, slow_gradient = (torch.autograd.grad(one, leaf, retain_graph=True)[0] for one in (found[term], loss))
        torch.testing.assert_close(gradient, slow_gradient, rtol=1e-8, atol=1e-12)
    sum(found.values()).backward()
    assert teacher.logits.grad is None and teacher.aux_logits.grad is None


def test_the_squared_temperature_is_a_factor_and_off_by_default() -> None:
    student, teacher, target = draw(4, 6, seed=1), draw(4, 6, seed=2), labels()
    plain = distil(student, teacher, target, temperature=3.0)
    squared = distil(student, teacher, target, temperature=3.0, squared_temperature=True)
    for term in TERMS:
        torch.testing.assert_close(squared[term], 9 * plain[term])
        assert abs(plain[term] - distil(student, teacher, target)[term]) > 1e-3  # the logits are divided either way


def test_two_pixels_by_hand() -> None:
    # Two classes. Teacher (0.9, 0.1), (0.2, 0.8); student (0.6, 0.4), (0.7, 0.3). Over two entries a correlation is
    # the sign of the differences: +1 at the first pixel, -1 at the second, so inter = 1 - 0; the teacher's columns
    # fall and rise, the student's rise and fall, so both correlate with -1 and intra = 1 + 1.
    teacher, student = (
        torch.tensor(rows, dtype=torch.float64).T.reshape(1, 2, 1, 2)
        for rows in ([[0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.7, 0.3]])
    )
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    assert inter_distance(student, teacher, valid).item() == pytest.approx(1.0, abs=1e-6)
    assert intra_distance(student, teacher, valid).item() == pytest.approx(2.0, abs=1e-5)


def test_the_distance_to_itself_is_almost_zero() -> None:
    logits, target = draw(4, 6), labels()
    for loss in distil(logits, logits, target).values():
        assert 0 <= loss.item() < 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_distances_lie_between_zero_and_two(seed: int) -> None:
    teacher, target = draw(4, 6, seed=seed), labels()
    for student in (draw(4, 6, seed=seed + 10), -teacher, 5 * teacher):
        for loss in distil(student, teacher, target).values():
            assert -1e-12 < loss.item() < 2 + 1e-12


def test_a_common_permutation_of_the_pixels_changes_nothing() -> None:
    student, teacher, target = draw(4, 6, seed=1), draw(4, 6, seed=2), labels()
    order = torch.randperm(2 * 24, generator=torch.Generator().manual_seed(0))

    def shuffle(maps: Tensor) -> Tensor:
        pixels = maps.movedim(1, -1).flatten(0, 2)[order]
        return pixels.unflatten(0, (2, 4, 6)).movedim(-1, 1)

    shuffled = distil(shuffle(student), shuffle(teacher), shuffle(target[:, None])[:, 0])
    plain = distil(student, teacher, target)
    for term in TERMS:  # also across images: the whole batch is one row
        torch.testing.assert_close(shuffled[term], plain[term])
    halves = [distil(student[i : i + 1], teacher[i : i + 1], target[i : i + 1]) for i in range(2)]
    assert abs((halves[0]["intra"] + halves[1]["intra"]) / 2 - plain["intra"]) > 1e-3


def test_a_constant_per_pixel_changes_nothing() -> None:
    student, teacher, target = draw(4, 6, seed=1), draw(4, 6, seed=2), labels()
    plain, shifted = distil(student, teacher, target), distil(student + draw(4, 6, seed=5)[:, :1], teacher - 3, target)
    for term in TERMS:
        torch.testing.assert_close(shifted[term], plain[term])


@pytest.mark.parametrize("distance", [inter_distance, intra_distance])
def test_a_positive_affine_map_of_the_probabilities_changes_nothing(distance: Any) -> None:
    student, teacher = draw(4, 6, seed=1).softmax(1), draw(4, 6, seed=2).softmax(1)
    valid = labels() != 255
    plain = distance(student, teacher, valid)
    torch.testing.assert_close(distance(0.3 * student + 2, 7 * teacher - 1, valid), plain, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(distance(-student, teacher, valid), 2 - plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("term", TERMS)
def test_a_masked_pixel_counts_as_little_as_one_that_is_not_there(term: str) -> None:
    student, teacher, target = draw(4, 6, seed=1), draw(4, 6, seed=2), labels()
    target[:] = 0
    target[:, :, 4:] = 255
    cropped = distil(student[..., :4], teacher[..., :4], target[..., :4], mask_ignore=False)
    torch.testing.assert_close(distil(student, teacher, target)[term], cropped[term], rtol=1e-12, atol=0)
    unmasked = distil(student, teacher, target, mask_ignore=False)
    assert abs(unmasked[term] - cropped[term]) > 1e-3


def test_a_class_that_never_varies_adds_its_share_to_intra() -> None:
    teacher, valid = draw(4, 6).softmax(1), labels() != 255
    flat = teacher.clone()
    flat[:, 0] = 0.25
    assert intra_distance(flat, teacher, valid).item() == pytest.approx(1 / CLASSES, abs=1e-5)


def test_one_valid_pixel_and_none_give_finite_gradients() -> None:
    for count in (0, 1):
        student, target = draw(4, 6, seed=1).requires_grad_(), torch.full((2, 4, 6), 255)
        target[0, 0, :count] = 1
        found = distil(student, draw(4, 6, seed=2), target)
        sum(found.values()).backward()
        assert student.grad is not None and bool(student.grad.isfinite().all())
        assert found["intra"].item() == float(count)  # of one pixel nothing correlates
        assert bool((student.grad != 0).any()) == bool(count)


@pytest.mark.parametrize(("student_aux", "teacher_aux"), product([True, False], repeat=2))
def test_auxiliary_heads_are_compared_only_where_both_networks_have_one(student_aux: bool, teacher_aux: bool) -> None:
    method = build(student_aux, teacher_aux)
    expected = {"inter": 1.0, "intra": 1.0} | ({"aux": 0.4} if student_aux and teacher_aux else {})
    assert method.weights == expected


def test_a_switch_that_is_off_for_the_logits_is_off_for_the_auxiliary_head() -> None:
    student, teacher, target = outputs((4, 6), (4, 6), 1), outputs((4, 6), (4, 6), 2), labels()
    assert student.aux_logits is not None and teacher.aux_logits is not None
    found = build(inter_weight=0.0, intra_weight=2.0)(student, teacher, target)
    assert set(found) == {"intra", "aux"}
    torch.testing.assert_close(found["aux"], 2 * distil(student.aux_logits, teacher.aux_logits, target)["intra"])
    assert build(inter_weight=0.0, intra_weight=0.0).weights == {}
    assert set(build(aux_weight=0.0)(student, teacher, target)) == set(TERMS)
