"""Attention transfer: the loss against the slow loop, the specification's invariants, published weights."""

import math
from itertools import product
from typing import Any

import _reference as reference
import pytest
import torch
from torch import Tensor

from segdistill.config import to_dict
from segdistill.errors import UserError
from segdistill.methods import parse_method
from segdistill.methods.at import AttentionTransfer, attention_distance
from segdistill.models.outputs import ModelInfo, Outputs

INFO = ModelInfo(5, (2, 3, 4, 5), (4, 8, 16, 32), 4, 8, 8, "cnn")


def build(**changes: Any) -> AttentionTransfer:
    method, config = parse_method({"name": "at", **changes}, "methods.0")
    return method(config, INFO, INFO)


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_pool(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Cell i of n holds the mean of the cells floor(i m / n) .. ceil((i + 1) m / n) - 1 of m, along both axes."""
    rows, columns = (
        [(index * old // new, -(-(index + 1) * old // new)) for index in range(new)]
        for old, new in zip(maps.shape[-2:], size, strict=True)
    )
    lines = [
        torch.stack([maps[..., top:bottom, left:right].mean((-2, -1)) for left, right in columns], -1)
        for top, bottom in rows
    ]
    return torch.stack(lines, -2)


def slow_map(feature: Tensor, size: tuple[int, int], pool: str) -> list[Tensor]:
    """One image's unit attention map, position by position."""
    if pool == "feature":
        feature = slow_pool(feature, size)
    seen = torch.stack(
        [
            torch.stack([(feature[:, i, j] ** 2).sum() / len(feature) for j in range(feature.shape[2])])
            for i in range(feature.shape[1])
        ]
    )
    if pool == "attention":
        seen = slow_pool(seen, size)
    cells = [seen[i, j] for i in range(size[0]) for j in range(size[1])]
    length = torch.sqrt(sum(cell**2 for cell in cells))
    return [cell / length for cell in cells]


def slow_distance(student: Tensor, teacher: Tensor, pool: str, reduction: str) -> Tensor:
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    images = []
    for ours, theirs in zip(student, teacher, strict=True):
        pairs = zip(slow_map(ours, size, pool), slow_map(theirs, size, pool), strict=True)
        squares = [(one - other) ** 2 for one, other in pairs]
        images.append(sum(squares) if reduction == "sum" else reference.mean(squares))
    return reference.mean(images)


SIZES = {
    "equal": ((4, 5), (4, 5)),
    "finer student": ((8, 7), (4, 5)),
    "finer teacher": ((3, 5), (7, 9)),
    "crossed": ((3, 8), (6, 5)),
}


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize(("pool", "reduction"), product(["feature", "attention"], ["sum", "mean"]))
def test_value_and_gradient_equal_the_slow_loop_at_any_sizes_and_widths(case: str, pool: Any, reduction: Any) -> None:
    one, other = SIZES[case]
    student, teacher = draw(2, 3, *one).requires_grad_(), draw(2, 5, *other, seed=1)
    fast = attention_distance(student, teacher, pool=pool, reduction=reduction)
    slow = slow_distance(student, teacher, pool, reduction)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (fast, slow)), rtol=1e-8, atol=1e-12)


def test_the_two_ways_to_pool_differ_where_signs_cancel() -> None:
    # A checkerboard of signs averages to nothing as a feature, and to a constant as an attention map.
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).repeat(2, 2)[None, None]
    signs = torch.cat([signs, torch.ones_like(signs)], -1).requires_grad_()  # [1, 1, 4, 8]
    teacher = torch.ones(1, 1, 2, 4, dtype=torch.float64)
    assert attention_distance(signs, teacher, pool="attention").item() == pytest.approx(0.0, abs=1e-12)
    # As a feature, half of the map is dead: 4 cells of 1/2 against 8 of 1/sqrt(8), 2 - 2 * 4 / (2 sqrt(8)).
    assert attention_distance(signs, teacher).item() == pytest.approx(2 - 4 / math.sqrt(8))


def test_disjoint_maps_are_at_the_documented_maximum_by_hand() -> None:
    # Unit maps e1 and e2 of two positions: |e1 - e2|^2 = 2, as a mean over hw = 2 positions 1 = 2 / hw.
    student, teacher = (torch.tensor(row, dtype=torch.float64).reshape(1, 1, 1, 2) for row in ([3.0, 0.0], [0.0, -7.0]))
    assert attention_distance(student, teacher).item() == pytest.approx(2.0)
    assert attention_distance(student, teacher, reduction="mean").item() == pytest.approx(1.0)


# -- invariants -------------------------------------------------------------------------------------------------------


def test_scale_sign_and_an_orthogonal_mixture_of_channels_change_nothing() -> None:
    student, teacher = draw(2, 4, 5, 6), draw(2, 3, 5, 6, seed=1)
    plain = attention_distance(student, teacher)
    for factor in (-1.0, 1e-3, 1e3):
        torch.testing.assert_close(attention_distance(factor * student, teacher), plain)
        torch.testing.assert_close(attention_distance(student, factor * teacher), plain)
    torch.testing.assert_close(attention_distance(student[:, [2, 0, 3, 1]], teacher), plain)
    rotation = torch.linalg.qr(draw(4, 4, seed=3)).Q
    torch.testing.assert_close(attention_distance(torch.einsum("dc,bchw->bdhw", rotation, student), teacher), plain)
    assert attention_distance(draw(2, 4, 5, 6, seed=5), teacher).item() != pytest.approx(plain.item(), rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_lies_between_zero_and_two_and_as_a_mean_below_two_over_hw(seed: int) -> None:
    student, teacher = draw(3, 4, 5, 6, seed=seed) ** 5, draw(3, 2, 5, 6, seed=seed + 50) ** 5
    total = attention_distance(student, teacher).item()
    assert 0 < total <= 2
    assert attention_distance(student, teacher, reduction="mean").item() == pytest.approx(total / 30)


@pytest.mark.parametrize("pool", ["feature", "attention"])
def test_a_dead_map_has_finite_loss_and_no_gradient(pool: Any) -> None:
    student = torch.relu(draw(2, 4, 6, 6) - 100 * torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)).float().requires_grad_()
    teacher = draw(2, 3, 3, 3, seed=1).float()
    loss = attention_distance(student, teacher, pool=pool)
    loss.backward()
    assert loss.isfinite() and student.grad is not None and bool(student.grad.isfinite().all())
    assert bool(student.grad[0].any()) and not bool(student.grad[1].any())
    assert attention_distance(student.detach(), 0 * teacher, pool=pool).isfinite()


# -- weights and switches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "size", "ours"),
    [(10000, (64, 128), 1.2), (10000, (64, 64), 2.4), (10000, (45, 45), 4.9), (1000, (28, 28), 1.3)],
)
def test_a_published_weight_on_the_mean_is_the_documented_one_on_the_sum(
    weight: float, size: tuple[int, int], ours: float
) -> None:
    cells = size[0] * size[1]
    assert weight / cells == pytest.approx(ours, abs=0.05)
    student, teacher = draw(1, 2, *size), draw(1, 2, *size, seed=1)
    attentions = [(maps**2).mean(1).flatten(1) for maps in (student, teacher)]
    published = sum(
        sign * seen / seen.norm(dim=1, keepdim=True) for sign, seen in zip((1, -1), attentions, strict=True)
    )
    torch.testing.assert_close(weight / cells * attention_distance(student, teacher), weight * (published**2).mean())
    torch.testing.assert_close(
        weight * attention_distance(student, teacher, reduction="mean"), weight * (published**2).mean()
    )


def outputs(seed: int) -> Outputs:
    features = tuple(
        draw(2, channels, 8 >> level, 8 >> level, seed=seed + level) for level, channels in enumerate((2, 3, 4, 5))
    )
    return Outputs(draw(2, 5, 4, 4, seed=seed), features, draw(2, 4, 4, 4, seed=seed + 9))


def test_several_taps_are_added() -> None:
    student, teacher, target = outputs(0), outputs(20), torch.zeros(2, 8, 8, dtype=torch.int64)

    def value(*taps: str) -> Tensor:
        return build(taps=list(taps))(student, teacher, target)["attention"]

    torch.testing.assert_close(build()(student, teacher, target)["attention"], value("last_feature"))
    together = value("stage2", "stage4", "last_feature")
    torch.testing.assert_close(together, value("stage2") + value("stage4") + value("last_feature"))


def test_no_label_enters() -> None:
    student, teacher, target = outputs(0), outputs(20), torch.zeros(2, 8, 8, dtype=torch.int64)
    method = build()
    assert method(student, teacher, target) == method(student, teacher, torch.full_like(target, 255))


def test_the_defaults_are_cirkds_as_a_sum() -> None:
    assert to_dict(parse_method({"name": "at"}, "methods.0")[1]) == {
        "name": "at", "weight": 1.2, "ramp": 0.0, "taps": ["last_feature"], "reduction": "sum", "pool": "feature",
    }  # fmt: skip


def test_no_tap_an_unknown_one_and_one_named_twice_are_refused() -> None:
    with pytest.raises(UserError, match=r"^methods\.0\.taps: .*at least 1 item"):
        build(taps=[])
    with pytest.raises(UserError, match=r"^methods\.0\.taps\.1: 'stage5' is not allowed; allowed: 'stage1'"):
        build(taps=["stage4", "stage5"])
    with pytest.raises(UserError, match=r"at: a tap is named twice in \['stage4', 'stage4'\]"):
        build(taps=["stage4", "stage4"])
