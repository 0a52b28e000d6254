"""Collaborative learning: each ensemble against the slow loop, and its invariants."""

import math
from itertools import pairwise
from typing import Any

import _reference as reference
import pytest
import torch
from _flat import flat
from torch import Tensor

from segdistill.errors import UserError
from segdistill.methods import parse_method
from segdistill.methods.kdcl import linear_weights, min_logit, naive
from segdistill.models.outputs import ModelInfo, Outputs

CLASSES = 4
INFO = ModelInfo(CLASSES, (4, 4, 4, 4), (4, 8, 16, 32), 4, 4, 4, "cnn")
ENSEMBLES = ("naive", "linear", "min_logit")


def learn(logits: dict[str, Tensor], target: Tensor, **changes: Any) -> dict[str, Tensor]:
    method, config = parse_method({"name": "kdcl", **changes}, "methods.0")
    peers = {name: Outputs(value, (), value) for name, value in logits.items()}
    return flat(method(config, dict.fromkeys(peers, INFO))(peers, target))


def scene(*sizes: tuple[int, int], scale: float = 1.0) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("cnn", "vit", "third")
    logits = {
        name: (scale * torch.randn(2, CLASSES, *size, generator=generator, dtype=torch.float64)).requires_grad_()
        for name, size in zip(names, sizes, strict=False)
    }
    target = torch.randint(CLASSES, (2, 8, 10), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = 255
    return logits, target


def stacked(size: tuple[int, int], students: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    logits, target = scene(*[size] * students, scale=scale)
    labels = reference.nearest(target, size)
    return torch.stack([value.detach() for value in logits.values()]), labels, labels != 255


def slow_loss(logits: Tensor, labels: Tensor) -> float:
    return reference.cross_entropy(logits, labels).item()


def slow_weights(students: list[Tensor], labels: Tensor) -> tuple[float, ...]:
    """The best weights by golden section: of two students, or of two for each weight of a third."""

    def best_of(first: Tensor, second: Tensor) -> float:
        low, high, golden = 0.0, 1.0, (math.sqrt(5) - 1) / 2
        while high - low > 1e-6:
            left, right = high - golden * (high - low), low + golden * (high - low)
            if slow_loss(left * first + (1 - left) * second, labels) < slow_loss(
                right * first + (1 - right) * second, labels
            ):
                high = right
            else:
                low = left
        return (low + high) / 2

    weight = best_of(*students)
    return weight, 1 - weight


def slow_ensemble(kind: str, per: str, students: list[Tensor], labels: Tensor) -> Tensor:
    if kind == "linear":
        weights = slow_weights(students, labels)
        return sum(weight * each for weight, each in zip(weights, students, strict=True))
    made = torch.zeros_like(students[0])
    of_image = [[slow_loss(each[b : b + 1], labels[b : b + 1]) for each in students] for b in range(len(made))]
    for b, i, j in reference.pixels(made):
        label = labels[b, i, j]
        if label == 255:
            continue
        if kind == "min_logit":
            for c in range(CLASSES):
                made[b, c, i, j] = min((each[b, c, i, j] - each[b, label, i, j]).item() for each in students)
        else:
            of_pixel = [-reference.log_softmax(each[b, :, i, j])[label].item() for each in students]
            losses = of_image[b] if per == "image" else of_pixel
            made[b, :, i, j] = students[losses.index(min(losses))][b, :, i, j]
    return made


@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize(
    ("ensemble", "per"), [("naive", "pixel"), ("naive", "image"), ("linear", "pixel"), ("min_logit", "pixel")]
)
def test_every_peer_gets_its_divergence_from_the_ensemble_at_the_finest_size(
    ensemble: str, per: str, upsample: bool
) -> None:
    logits, target = scene((3, 4), (4, 5))
    found = learn(logits, target, ensemble=ensemble, naive_per=per, upsample=upsample)
    size = (8, 10) if upsample else (4, 5)
    labels = reference.nearest(target, size)
    fitted = {name: reference.resized(value, size, False) for name, value in logits.items()}
    made = slow_ensemble(ensemble, per, [value.detach() for value in fitted.values()], labels)
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if ensemble == "linear" else {"rtol": 1e-9, "atol": 1e-12}
    for name, value in logits.items():
        slow = reference.pixel_kl(fitted[name], made, labels, 2.0)
        torch.testing.assert_close(found[f"{name}/kl"], slow, **tolerance)
        expected = torch.autograd.grad(slow, value, retain_graph=True)[0]
        gradient = torch.autograd.grad(found[f"{name}/kl"], value, retain_graph=True)[0]
        torch.testing.assert_close(gradient, expected, **tolerance)


def test_three_students_get_one_ensemble_of_all_of_them() -> None:
    logits, target = scene((3, 4), (3, 4), (3, 4))
    labels = reference.nearest(target, (3, 4))
    made = slow_ensemble("min_logit", "pixel", [value.detach() for value in logits.values()], labels)
    for name, loss in learn(logits, target, temperature=3.0).items():
        slow = reference.pixel_kl(logits[name.split("/")[0]], made, labels, 3.0)
        torch.testing.assert_close(loss, slow, rtol=1e-9, atol=0)


def test_a_pixel_worked_by_hand() -> None:
    """Label 0; margins under it: (0, -1, -3) and (0, -2, -1), so the smallest are (0, -2, -3)."""
    logits = torch.tensor([[2.0, 1.0, -1.0], [5.0, 3.0, 4.0]])[:, None, :, None, None]
    labels = torch.zeros(1, 1, 1, dtype=torch.int64)
    made = min_logit(logits, labels, labels != 255).flatten()
    assert made.tolist() == [0.0, -2.0, -3.0]
    # Cross-entropies: log(1 + e^-1 + e^-3) = 0.349 against log(1 + e^-2 + e^-1) = 0.408: the first student.
    assert naive(logits, labels, labels != 255, per="pixel").flatten().tolist() == [2.0, 1.0, -1.0]


@pytest.mark.parametrize("students", [2, 3])
def test_min_logit_is_zero_at_the_label_and_gives_it_at_least_every_students_probability(students: int) -> None:
    logits, labels, valid = stacked((6, 8), students, scale=3.0)
    made = min_logit(logits, labels, valid)
    index = torch.where(valid, labels, 0)[:, None]
    assert bool((made.gather(1, index)[:, 0][valid] == 0).all())
    for temperature in (1.0, 2.0):
        ours = (made / temperature).softmax(1).gather(1, index)[:, 0]
        theirs = (logits / temperature).softmax(2).gather(2, index.expand(students, -1, -1, -1, -1))[:, :, 0]
        assert bool((ours >= theirs - 1e-12)[:, valid].all())


@pytest.mark.parametrize("scale", [0.3, 3.0, 12.0])
@pytest.mark.parametrize("students", [2, 3])
def test_linear_weights_are_on_the_simplex_and_no_other_mixture_of_a_fine_grid_is_better(
    students: int, scale: float
) -> None:
    logits, labels, valid = stacked((8, 10), students, scale=scale)
    helped = logits + scale * torch.nn.functional.one_hot(labels.where(valid, 0), CLASSES).movedim(-1, 1)
    weights = linear_weights(helped, labels, valid, steps=24)
    assert abs(weights.sum().item() - 1) < 1e-12 and bool((weights >= 0).all())

    def loss(mix: Tensor) -> float:
        mixed = torch.einsum("s,sbkhw->bkhw", mix, helped).log_softmax(1)
        return -mixed.gather(1, labels.where(valid, 0)[:, None])[:, 0][valid].mean().item()

    reached = loss(weights)
    ticks = torch.linspace(0, 1, 11, dtype=torch.float64)
    grid = torch.cartesian_prod(*[ticks] * (students - 1)).reshape(-1, students - 1)
    grid = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], 1)
    others = [loss(mix) for mix in grid[grid[:, -1] >= -1e-9]]
    assert reached <= min(others) + 1e-9
    assert reached > min(others) - 0.05 * min(others)  # the grid is fine enough to mean something


@pytest.mark.parametrize("steps", [1, 2, 24])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_linear_mixture_is_never_worse_than_the_best_student(steps: int, scale: float) -> None:
    logits, labels, valid = stacked((6, 8), 3, scale=scale)
    logits[1] += 3 * scale * torch.nn.functional.one_hot(labels.where(valid, 0), CLASSES).movedim(-1, 1)
    weights = linear_weights(logits, labels, valid, steps=steps)
    mixture = slow_loss(torch.einsum("s,sbkhw->bkhw", weights, logits), labels)
    assert mixture <= min(slow_loss(each, labels) for each in logits) + 1e-9


def test_a_step_of_the_search_never_passes_the_minimum_so_the_loss_only_falls() -> None:
    logits, labels, valid = stacked((4, 5), 2, scale=8.0)
    losses = []
    for steps in range(1, 40, 6):
        weights = linear_weights(logits, labels, valid, steps=steps)
        losses.append(slow_loss(torch.einsum("s,sbkhw->bkhw", weights, logits), labels))
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(losses))
    assert losses[-1] < losses[0]


def test_a_search_that_a_plain_newton_step_would_throw_from_end_to_end_finds_the_minimum() -> None:
    """Two kinds of pixels, by their label's margin as the first student's weight t goes from 0 to 1.

    Sixteen go from -30 to -20: a steady pull of 10 each towards t = 1, without curvature. Four go from 90 to -10: flat
    and without curvature up to t = 0.9, then a push of 100 each. With no curvature to see, Newton's step is as long
    as it can be, at either end.
    """
    margins = torch.tensor([[-20.0] * 16 + [-10.0] * 4, [-30.0] * 16 + [90.0] * 4], dtype=torch.float64)
    logits = torch.zeros(2, 1, CLASSES, 4, 5, dtype=torch.float64)
    logits[:, :, 1] = margins.view(2, 1, 4, 5)
    labels = torch.ones(1, 4, 5, dtype=torch.int64)
    weights = linear_weights(logits, labels, labels != 255, steps=24)
    ticks = torch.linspace(0, 1, 1001, dtype=torch.float64).tolist()
    best = min(ticks, key=lambda tick: -(tick * logits[0] + (1 - tick) * logits[1]).log_softmax(1)[:, 1].mean().item())
    assert 0.85 < best < 0.95
    assert abs(weights[0].item() - best) < 2e-3


def test_the_search_goes_on_among_the_others_once_a_student_has_lost_all_its_weight() -> None:
    logits, labels, valid = stacked((8, 10), 3)
    truth = torch.nn.functional.one_hot(labels.where(valid, 0), CLASSES).movedim(-1, 1)
    logits = torch.stack([logits[0] + truth, 1.5 * logits[1] + 0.7 * truth, logits[2] - 4 * truth])
    weights = linear_weights(logits, labels, valid, steps=24)
    without = linear_weights(logits[:2], labels, valid, steps=24)
    assert weights[2] == 0 and 0.1 < without[1] < 0.9
    torch.testing.assert_close(weights[:2], without, rtol=0, atol=1e-9)


def test_with_one_good_student_the_linear_mixture_is_that_student() -> None:
    logits, labels, valid = stacked((6, 8), 3)
    truth = torch.nn.functional.one_hot(labels.where(valid, 0), CLASSES).movedim(-1, 1)
    logits = torch.stack([-2.0 * truth, 1.0 * truth, -1.0 * truth])
    assert linear_weights(logits, labels, valid, steps=24).tolist() == [0, 1, 0]


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_identical_students_reproduce_that_student(ensemble: str) -> None:
    logits, target = scene((3, 4), scale=5.0)
    shifted = logits["cnn"] + torch.randn(2, 1, 3, 4, dtype=torch.float64)
    for loss in learn(
        {"cnn": logits["cnn"], "vit": shifted, "third": logits["cnn"]}, target, ensemble=ensemble
    ).values():
        assert abs(loss.item()) < 1e-12


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_the_ensemble_is_detached_and_ignored_pixels_are_not_in_it(ensemble: str) -> None:
    logits, target = scene((8, 10), (8, 10), (8, 10))
    plain = learn(logits, target, ensemble=ensemble, naive_per="image")
    for name, loss in plain.items():
        for peer, value in logits.items():
            gradient = torch.autograd.grad(loss, value, retain_graph=True, allow_unused=True)[0]
            assert (gradient is None) == (peer != name.split("/")[0])
    spoiled = {name: torch.where((target == 255)[:, None], 30.0, value) for name, value in logits.items()}
    dirty = learn(spoiled, target, ensemble=ensemble, naive_per="image")
    for name, loss in plain.items():
        torch.testing.assert_close(dirty[name], loss)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_the_order_of_the_students_does_not_matter(ensemble: str) -> None:
    logits, target = scene((3, 4), (6, 8), (3, 4))
    plain = learn(logits, target, ensemble=ensemble)
    turned = learn(dict(reversed(logits.items())), target, ensemble=ensemble)
    for name, loss in plain.items():
        torch.testing.assert_close(turned[name], loss, rtol=1e-6, atol=1e-9)


def test_the_squared_temperature_multiplies_the_loss() -> None:
    logits, target = scene((3, 4), (3, 4))
    hot = learn(logits, target, temperature=1.0)
    scaled = learn({name: 4 * value for name, value in logits.items()}, target, temperature=4.0)
    for name, loss in hot.items():
        torch.testing.assert_close(scaled[name], 16 * loss)


def test_one_peer_is_refused() -> None:
    method, config = parse_method({"name": "kdcl"}, "methods.0")
    with pytest.raises(UserError, match=r"kdcl needs at least two students .* \['cnn'\]"):
        method(config, {"cnn": INFO})
