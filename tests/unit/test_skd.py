"""Structured distillation: both halves against slow loops, and the invariants of the specification."""

import math
from copy import deepcopy
from itertools import product
from typing import Any

import _reference as reference
import pytest
import torch
from torch import Tensor, nn

from segdistill.config import to_dict
from segdistill.losses.blocks import sum_over_blocks
from segdistill.methods import parse_method, skd
from segdistill.methods.skd import Structured
from segdistill.models.outputs import ModelInfo, Outputs

CLASSES = 4
STUDENT, TEACHER = (ModelInfo(CLASSES, (3,) * 4, (4, 8, 16, 32), width, 8, 8, "cnn") for width in (5, 7))
HOLISTIC = {"holistic_weight": 0.001, "critic_channels": 6}
LABELS = torch.zeros(2, 8, 8, dtype=torch.int64)
NOTHING = torch.empty(0)


def build(**changes: Any) -> Structured:
    torch.manual_seed(0)
    method, config = parse_method({"name": "skd", **changes}, "methods.0")
    return method(config, STUDENT, TEACHER).double()


def draw(channels: int, size: tuple[int, int] = (4, 6), seed: int = 0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64).requires_grad_()


def pairwise(student: Tensor, teacher: Tensor, **changes: Any) -> Tensor:
    """Of features given as the last ones; logits and labels may not be looked at."""
    one, other = (Outputs(NOTHING, (), features) for features in (student, teacher))
    return build(**changes)(one, other, NOTHING)["pairwise"]


# -- pair-wise --------------------------------------------------------------------------------------------------------


def slow_nodes(features: Tensor, window: tuple[int, int], detach_norm: bool) -> list[list[Tensor]]:
    """Unit vectors of each image's windows, the last row and column of windows as large as the map allows."""
    height, width = features.shape[-2:]
    images = []
    for image in features:
        vectors = []
        for top, left in product(range(0, height, window[0]), range(0, width, window[1])):
            patch = image[:, top : top + window[0], left : left + window[1]]
            vector = torch.stack([channel.max() for channel in patch])
            length = torch.sqrt((vector * vector).sum())
            vectors.append(vector / (length.detach() if detach_norm else length))
        images.append(vectors)
    return images


def slow_pairwise(student: Tensor, teacher: Tensor, grid: str, detach_norm: bool) -> Tensor:
    height, width = teacher.shape[-2:]
    window = (2, 2) if grid == "stride2" else (max(height // 2, 1), max(width // 2, 1))
    images = []
    for ours, theirs in zip(*(slow_nodes(each, window, detach_norm) for each in (student, teacher)), strict=True):
        pairs = product(range(len(ours)), repeat=2)
        squares = [(ours[i] @ ours[j] - (theirs[i] @ theirs[j]).detach()) ** 2 for i, j in pairs]
        images.append(sum(squares) / len(ours) ** 2)
    return reference.mean(images)


@pytest.mark.parametrize("grid", ["2x2", "stride2"])
@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize(
    ("student_size", "teacher_size"), [((4, 6), (4, 6)), ((5, 7), (5, 7)), ((3, 4), (7, 5)), ((1, 1), (1, 1))]
)
def test_value_and_gradient_equal_the_slow_loop_on_even_and_odd_maps(
    grid: str, detach_norm: bool, student_size: tuple[int, int], teacher_size: tuple[int, int]
) -> None:
    student, teacher = draw(5, student_size), draw(7, teacher_size, seed=1)
    fast = pairwise(student, teacher, grid=grid, detach_norm=detach_norm, block_rows=3)
    slow = slow_pairwise(reference.resized(student, teacher_size, False), teacher, grid, detach_norm)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-14)
    expected, found = (torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (slow, fast))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    fast.backward()
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("grid", "size", "count"),
    [
        ("2x2", (64, 128), 4),
        ("2x2", (65, 65), 9),
        ("2x2", (4, 5), 6),
        ("2x2", (1, 1), 1),
        ("stride2", (64, 128), 2048),
        ("stride2", (65, 65), 1089),
        ("stride2", (1, 1), 1),
    ],
)
def test_a_grid_has_the_published_number_of_nodes(grid: Any, size: tuple[int, int], count: int) -> None:
    assert skd.nodes(torch.zeros(2, 3, *size), grid=grid, detach_norm=True).shape == (2, count, 3)


def test_four_nodes_by_hand() -> None:
    # A 2 x 2 map, so each pixel is a node. Student: e1 everywhere, A = 1. Teacher: e1, e1, e1, e2: A is 0 for the pairs
    # of the last node with the three others, in both orders: 6 of 16 pairs differ by 1.
    student = torch.zeros(1, 2, 2, 2, dtype=torch.float64)
    student[:, 0] = 3.0
    teacher = student.clone()
    teacher[0, :, 1, 1] = torch.tensor([0.0, 5.0])
    assert pairwise(student, teacher).item() == pytest.approx(6 / 16, rel=1e-12)


@pytest.mark.parametrize("grid", ["2x2", "stride2"])
def test_rotated_channels_and_scaled_nodes_change_nothing(grid: Any) -> None:
    student, teacher = draw(5), draw(7, seed=1)
    plain = pairwise(student, teacher, grid=grid)
    torch.testing.assert_close(pairwise(100 * student, 0.01 * teacher, grid=grid), plain, rtol=1e-10, atol=0)
    ours, theirs = (
        torch.nn.functional.max_pool2d(each, 2, ceil_mode=True).flatten(2).mT for each in (student, teacher)
    )
    rotation = torch.linalg.qr(draw(5, (5, 1), batch=1)[0, :, :, 0])[0]
    lengths = 0.1 + torch.rand(2, ours.shape[1], 1, dtype=torch.float64)
    unit, turned, other = (
        nn.functional.normalize(rows, dim=-1) for rows in (ours, lengths * ours @ rotation.T, theirs)
    )
    distances = (skd.pairwise_distance(rows, other, block_rows=4) for rows in (turned, unit))
    torch.testing.assert_close(*distances, rtol=1e-10, atol=0)


def test_the_distance_is_zero_for_equal_maps_and_at_most_four() -> None:
    student = draw(5)
    assert pairwise(student, student).item() < 1e-28
    opposite = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64).reshape(1, 1, 2, 2)
    # One channel: signs. Equal signs against opposite ones differ by 2 for 8 of 16 pairs.
    assert pairwise(opposite.abs(), opposite).item() == pytest.approx(4 * 8 / 16)
    for seed in range(3):
        assert 0 < pairwise(draw(5, seed=seed), draw(7, seed=seed + 9), grid="stride2").item() < 4


@pytest.mark.parametrize("block", [1, 4, 7, 1000])
def test_blocks_change_neither_value_nor_gradient(block: int) -> None:
    ours, theirs = (draw(channels, (7, 9), seed=channels) for channels in (5, 7))
    results = []
    for rows in (block, 10**6):
        loss = pairwise(ours, theirs, grid="stride2", block_rows=rows)
        results.append((loss, torch.autograd.grad(loss, ours)[0]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-16)


def test_without_blocks_channels_give_the_same_value_and_gradient() -> None:
    student, teacher = draw(5, (7, 9)), draw(7, (7, 9), seed=1)
    results = []
    for rows in (None, 512):
        loss = pairwise(student, teacher, grid="stride2", block_rows=rows)
        results.append((loss, torch.autograd.grad(loss, student)[0]))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    close, other = (each.detach().float().abs() for each in (student, student + 1e-3 * draw(5, (7, 9), seed=2)))
    near, exact = (pairwise(close, other, grid="stride2", block_rows=rows).item() for rows in (None, 512))
    assert near == pytest.approx(exact, abs=2e-6)  # similarities near 1, and almost equal: the worst case in float32


def test_no_more_rows_than_a_block_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(term: Any, rows: Any, *whole: Any, block: int, dim: int) -> Tensor:
        def watch(*tensors: Tensor) -> Tensor:
            seen.append(tensors[0].shape[1])
            return term(*tensors)

        return sum_over_blocks(watch, rows, *whole, block=block, dim=dim)

    monkeypatch.setattr(skd, "sum_over_blocks", watched)
    pairwise(draw(5, (7, 9)), draw(7, (7, 9)), grid="stride2", block_rows=6).backward()
    assert max(seen) == 6 and sum(seen) == 2 * 20  # 20 nodes, once forward and once for the gradient


def test_a_dead_feature_gives_finite_gradients() -> None:
    for detach_norm in (True, False):
        dead = draw(5).detach()
        dead[0] = 0.0
        loss = pairwise(dead.requires_grad_(), draw(7), detach_norm=detach_norm)
        loss.backward()
        assert bool(loss.isfinite()) and dead.grad is not None and float(dead.grad.abs().max()) < 1e3


def test_another_tap_is_compared() -> None:
    stages = [tuple(draw(3, (8 >> stage, 8), seed=10 * who + stage) for stage in range(4)) for who in (1, 2)]
    one, other = (Outputs(NOTHING, features, NOTHING) for features in stages)
    found = build(tap="stage2")(one, other, NOTHING)["pairwise"]
    torch.testing.assert_close(found, pairwise(stages[0][1], stages[1][1]))


# -- weights and switches ---------------------------------------------------------------------------------------------


def test_each_grid_has_its_published_weight_unless_one_is_given() -> None:
    assert build().weights == {"pairwise": 0.5}
    assert build(grid="stride2").weights == {"pairwise": 10.0}
    assert build(grid="stride2", pairwise_weight=1.0).weights == {"pairwise": 1.0}
    assert build(weight=2.0, **HOLISTIC).weights == pytest.approx({"pairwise": 1.0, "holistic": 0.002, "critic": 0.1})


def test_the_defaults_are_the_released_scripts_with_cirkds_critic() -> None:
    assert to_dict(parse_method({"name": "skd"}, "methods.0")[1]) == {
        "name": "skd", "weight": 1.0, "ramp": 0.0, "pairwise_weight": None, "holistic_weight": 0.0,
        "critic_weight": 0.1, "tap": "last_feature", "grid": "2x2", "detach_norm": True, "block_rows": 512,
        "adversarial": "hinge", "gradient_penalty": 10.0, "critic_channels": 64,
        "critic_lr": 4e-4, "critic_betas": [0.9, 0.99],
    }  # fmt: skip


def test_without_the_holistic_term_there_is_no_critic_and_no_look_at_the_logits() -> None:
    method = build()
    assert not list(method.parameters()) and not list(method.buffers()) and method.own_optimizers() == {}
    assert set(method(Outputs(NOTHING, (), draw(5)), Outputs(NOTHING, (), draw(7)), NOTHING)) == {"pairwise"}


def test_a_critic_without_weight_stays_as_drawn() -> None:
    method = build(**HOLISTIC, critic_weight=0.0, pairwise_weight=0.0)
    assert set(method.weights) == {"holistic"} and method.own_optimizers() == {}
    student, teacher = scene()
    method(student, teacher, LABELS)["holistic"].backward()
    assert student.logits.grad is not None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in method.parameters())


# -- holistic ---------------------------------------------------------------------------------------------------------


def scene(size: tuple[int, int] = (9, 7), seed: int = 0) -> tuple[Outputs, Outputs]:
    student, teacher = (draw(CLASSES, each, seed=seed + who) for who, each in enumerate([size, (8, 8)]))
    return Outputs(student, (), draw(5, seed=seed + 2)), Outputs(teacher, (), draw(7, seed=seed + 3))


class Linear(nn.Module):
    """A critic whose slope is known: D(p) = <weight, p>."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, probabilities: Tensor) -> Tensor:
        return (self.weight * probabilities).sum((1, 2, 3))


def test_the_losses_of_a_linear_critic_by_hand() -> None:
    # One pixel, two classes, D(p) = 3 p_0 - 4 p_1, slope 5. Students (1, 0), (0.5, 0.5): D = 3, -0.5. Teachers (0, 1),
    # (0.6, 0.4): D = -4, 0.2. Hinge: mean(1 + 4, 1 - 0.2) + mean(1 + 3, 1 - 0.5) = 2.9 + 2.25.
    # Wasserstein: 1.25 - (-1.9) = 3.15, and 10 * (5 - 1)^2 = 160 whatever the mixture.
    critic = Linear(torch.tensor([3.0, -4.0], dtype=torch.float64).reshape(2, 1, 1))
    student, teacher = (
        torch.tensor(rows, dtype=torch.float64).reshape(2, 2, 1, 1)
        for rows in ([[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.6, 0.4]])
    )
    hinge = skd.critic_loss(student, teacher, critic, adversarial="hinge", gradient_penalty=10.0)
    assert hinge.item() == pytest.approx(5.15)
    for penalty, expected in ((0.0, 3.15), (10.0, 163.15)):
        loss = skd.critic_loss(student, teacher, critic, adversarial="wgan_gp", gradient_penalty=penalty)
        assert loss.item() == pytest.approx(expected)
    assert skd.holistic_gain(student, teacher, critic).item() == pytest.approx(-1.9 - 1.25)


def test_the_slope_penalty_and_its_gradient_are_those_of_a_double_backward_pass() -> None:
    critic = build(**HOLISTIC).critic
    assert critic is not None
    critic.eval()  # the same spectral norm both times
    image = draw(CLASSES, (8, 8)).softmax(1).detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(image).sum(), image, create_graph=True)
    slow = reference.mean([(torch.sqrt((one * one).sum()) - 1) ** 2 for one in slope])
    fast = skd.slope_penalty(image.detach(), critic)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=0)
    for name, parameter in critic.named_parameters():
        wanted, found = (
            torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)[0] for loss in (slow, fast)
        )
        assert (wanted is None) == (found is None), name
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("adversarial", ["hinge", "wgan_gp"])
def test_each_term_trains_its_own_side_alone(adversarial: str) -> None:
    expected = {"pairwise": {"feature"}, "holistic": {"logits"}, "critic": {"critic"}}
    for term, trained in expected.items():
        method, (student, teacher) = build(**HOLISTIC, adversarial=adversarial), scene()
        found = method(student, teacher, LABELS)
        assert set(found) == set(expected)
        found[term].backward()
        assert teacher.logits.grad is None and teacher.last_feature.grad is None
        sides = {"feature": [student.last_feature], "logits": [student.logits], "critic": list(method.parameters())}
        for side, leaves in sides.items():
            for leaf in leaves:
                assert (leaf.grad is not None) == (side in trained), (term, side)
                assert leaf.grad is None or bool((leaf.grad != 0).any()), (term, side)


@pytest.mark.parametrize("adversarial", ["hinge", "wgan_gp"])
def test_one_backward_pass_of_the_sum_equals_alternate_steps_on_the_same_batch(adversarial: str) -> None:
    def train(joint: bool) -> list[Tensor]:
        method, (student, teacher) = build(**HOLISTIC, adversarial=adversarial), scene()
        ((own, settings),) = method.own_optimizers().values()
        assert settings == {"name": "adam", "lr": 4e-4, "betas": [0.9, 0.99], "weight_decay": 0.0}
        adam, sgd = torch.optim.Adam(own, lr=1e-2), torch.optim.SGD([student.logits, student.last_feature], lr=10.0)
        for _ in range(3):
            found = method(student, teacher, LABELS)
            adam.zero_grad()
            sgd.zero_grad()
            weighted = {term: method.weights[term] * loss for term, loss in found.items()}
            if joint:
                sum(weighted.values()).backward()
                sgd.step()
                adam.step()
            else:
                critic = weighted.pop("critic")
                sum(weighted.values()).backward()
                sgd.step()
                critic.backward()
                adam.step()
        return [student.logits, student.last_feature, *method.parameters()]

    for together, apart in zip(train(joint=True), train(joint=False), strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-14)


def test_the_holistic_gradient_is_that_of_the_critics_negative_score_at_the_teachers_size() -> None:
    method, (student, teacher) = build(**HOLISTIC), scene(size=(5, 6))
    assert method.critic is not None
    method.eval()
    holistic = method(student, teacher, LABELS)["holistic"]
    published = -method.critic(reference.resized(student.logits, (8, 8), False).softmax(1)).mean()
    gradients = (torch.autograd.grad(loss, student.logits)[0] for loss in (holistic, published))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-15)
    constant = method.critic(teacher.logits.softmax(1)).mean()
    torch.testing.assert_close(holistic, published + constant)


def test_equal_predictions_leave_nothing_to_gain() -> None:
    method, (student, _) = build(**HOLISTIC), scene(size=(8, 8))
    found = method(student, student, LABELS)
    assert abs(found["holistic"].item()) < 1e-14
    assert found["critic"].item() == pytest.approx(2.0, abs=0.2)  # hinge at scores near 0: 1 + 1


@pytest.mark.parametrize("adversarial", ["hinge", "wgan_gp"])
def test_the_critic_learns_to_tell_and_the_student_to_deceive(adversarial: str) -> None:
    method, (student, teacher) = build(**HOLISTIC, pairwise_weight=0.0, adversarial=adversarial), scene()

    def steps(leaves: list[Tensor], term: str, rate: float) -> tuple[float, float]:
        optimizer, values = torch.optim.Adam(leaves, lr=rate), []
        for _ in range(12):
            found = method(student, teacher, LABELS)
            values.append(found["holistic"].item())
            optimizer.zero_grad()
            found[term].backward()
            optimizer.step()
        return values[0], values[-1]

    before, after = steps(list(method.parameters()), "critic", 1e-2)
    assert after > before + 0.02
    deceived_before, deceived = steps([student.logits], "holistic", 1e-1)
    assert deceived < deceived_before - 0.02


def test_the_critics_state_survives_a_checkpoint() -> None:
    method, (student, teacher) = build(**HOLISTIC, adversarial="wgan_gp"), scene()
    for _ in range(2):
        method(student, teacher, LABELS)  # moves the spectral norm's estimates
    restored = build(**HOLISTIC, adversarial="wgan_gp")
    fresh = deepcopy(restored)
    restored.load_state_dict(method.state_dict())
    values = []
    for each in (method, restored, fresh):
        torch.manual_seed(3)
        values.append(each(student, teacher, LABELS))
    assert all(torch.equal(values[0][term], values[1][term]) for term in values[0])
    assert not torch.equal(values[0]["critic"], values[2]["critic"])


@pytest.mark.parametrize("adversarial", ["hinge", "wgan_gp"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 8)])
def test_any_size_and_half_precision_give_finite_float32_terms(adversarial: str, size: tuple[int, int]) -> None:
    method = build(**HOLISTIC, adversarial=adversarial).float()
    student, teacher = (
        Outputs(draw(CLASSES, size, seed=who).detach().half(), (), draw(5, size, seed=who).detach().half())
        for who in range(2)
    )
    student.logits.requires_grad_()
    student.last_feature.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = method(student, teacher, LABELS)
    sum(found.values()).backward()
    assert all(loss.dtype == torch.float32 and math.isfinite(loss.item()) for loss in found.values())
    assert student.logits.grad is not None and bool(student.logits.grad.isfinite().all())


@pytest.mark.parametrize("adversarial", ["hinge", "wgan_gp"])
def test_the_critic_asks_the_device_for_no_value(adversarial: str) -> None:
    method = build(**HOLISTIC, adversarial=adversarial).to("meta")
    student, teacher = (
        Outputs(one.logits.detach().to("meta").requires_grad_(), (), one.last_feature.detach().to("meta"))
        for one in scene()
    )
    sum(method(student, teacher, LABELS.to("meta")).values()).backward()


def test_without_a_gradient_the_penalty_can_still_be_reported() -> None:
    method, (student, teacher) = build(**HOLISTIC, adversarial="wgan_gp"), scene()
    with torch.no_grad():
        found = method(student, teacher, LABELS)
    assert found["critic"].item() > 0 and not found["critic"].requires_grad
