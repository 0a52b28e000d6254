"""Masked generative distillation: the loss against the slow loop, the mask, and the translation of its weight."""

from typing import Any

import _reference as reference
import pytest
import torch
from torch import Tensor, nn

from segdistill.config import to_dict
from segdistill.errors import UserError
from segdistill.methods import parse_method
from segdistill.methods.mgd import MaskedGeneration, generation_distance, generator_of, visible
from segdistill.models.outputs import ModelInfo, Outputs

STUDENT, TEACHER = (ModelInfo(5, (3, 4, 6, width), (4, 8, 16, 32), width, 8, 8, "cnn") for width in (2, 3))
TARGET = torch.zeros(2, 9, 9, dtype=torch.int64)


def build(student: ModelInfo = STUDENT, teacher: ModelInfo = TEACHER, **changes: Any) -> MaskedGeneration:
    torch.manual_seed(0)
    method, config = parse_method({"name": "mgd", **changes}, "methods.0")
    return method(config, student, teacher).double()


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(width: int, size: tuple[int, int] = (4, 5), seed: int = 0) -> Outputs:
    features = tuple(draw(2, channels, *size, seed=seed + 9).requires_grad_() for channels in (3, 4, 6, width))
    return Outputs(draw(2, 5, *size), features, draw(2, width, *size, seed=seed).requires_grad_())


def value(method: nn.Module, student: Outputs, teacher: Outputs, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return method(student, teacher, TARGET)["generation"]


def slow_convolution(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3 convolution of one image [C, h, w] with a border of zeros, window by window."""
    channels, height, width = maps.shape
    bordered = torch.zeros(channels, height + 2, width + 2, dtype=maps.dtype)
    bordered[:, 1:-1, 1:-1] = maps
    windows = [bordered[:, i : i + 3, j : j + 3] for i in range(height) for j in range(width)]
    cells = [torch.stack([(kernel * window).sum() for kernel in weight]) + bias for window in windows]
    return torch.stack(cells, -1).reshape(len(weight), height, width)


@pytest.mark.parametrize(("tap", "size"), [("stage4", (3, 7)), ("last_feature", (6, 4)), ("stage2", (4, 5))])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value_and_gradients_equal_the_slow_loop(tap: Any, size: tuple[int, int], reduction: Any) -> None:
    method = build(tap=tap, reduction=reduction, mask_ratio=0.5)
    student, teacher = outputs(2, size), outputs(3, seed=3)
    fast = value(method, student, teacher)
    torch.manual_seed(1)
    mask = torch.rand(2, 1, 4, 5) >= 0.5
    assert 0 < mask.sum() < 40 and method.projection is not None and method.generator is not None
    helpers = dict(method.named_parameters())
    ours = student.tap(tap)
    if tap != "stage2":  # the widths of stage2 are equal
        kernel = helpers["projection.weight"][..., 0, 0]
        ours = torch.einsum("dc,bchw->bdhw", kernel, ours) + helpers["projection.bias"][:, None, None]
    ours = reference.resized(ours, (4, 5))
    images = []
    for b in range(2):
        kept = torch.stack([torch.where(mask[b, 0], channel, 0.0) for channel in ours[b]])
        hidden = slow_convolution(kept, helpers["generator.0.weight"], helpers["generator.0.bias"]).clamp_min(0)
        generated = slow_convolution(hidden, helpers["generator.2.weight"], helpers["generator.2.bias"])
        squares = (generated - teacher.tap(tap)[b].detach()) ** 2
        images.append(squares.sum() if reduction == "sum" else squares.sum() / squares.numel())
    slow = reference.mean(images)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=0)
    leaves = [student.tap(tap), *helpers.values()]
    assert len(leaves) == (5 if tap == "stage2" else 7)
    expected, found = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (slow, fast))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)
    fast.backward()
    assert teacher.tap(tap).grad is None


def test_one_pixel_by_hand() -> None:
    # A 1x1 map meets the middle of each kernel alone: 2 * 3 + 1 = 7, ReLU, -1 * 7 + 2 = -5, teacher 1: 36.
    generator = generator_of(1).double()
    with torch.no_grad():
        for convolution, middle, bias in ((generator[0], 3.0, 1.0), (generator[2], -1.0, 2.0)):
            convolution.weight.fill_(99.0)
            convolution.weight[0, 0, 1, 1] = middle
            convolution.bias.fill_(bias)
    generated = generator(torch.tensor([[[[2.0]]]], dtype=torch.float64))
    assert generation_distance(generated, torch.ones(1, 1, 1, 1, dtype=torch.float64)).item() == 36


# -- the mask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_the_masked_share_is_within_binomial_limits_and_the_same_in_all_channels(ratio: float) -> None:
    torch.manual_seed(0)
    features = 1 + draw(4, 3, 50, 40).abs()
    kept = visible(features, ratio)
    assert torch.equal(kept, torch.where(kept != 0, features, 0.0))
    hidden = kept == 0
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden))
    deviation = (ratio * (1 - ratio) / 8000) ** 0.5
    assert abs(hidden[:, 0].double().mean().item() - ratio) < 4 * deviation
    assert not torch.equal(hidden[0], hidden[1])  # each image has its own


def test_the_draw_follows_the_default_generator_and_is_new_at_every_step() -> None:
    method, student, teacher = build(), outputs(2), outputs(3, seed=3)
    plain, again = (value(method, student, teacher, seed=5) for _ in range(2))
    assert torch.equal(plain, again)
    state = torch.get_rng_state()
    first, second = (method(student, teacher, TARGET)["generation"] for _ in range(2))
    assert len({plain.item(), first.item(), second.item()}) == 3
    torch.set_rng_state(state)
    assert torch.equal(method(student, teacher, TARGET)["generation"], first)


def test_without_masking_the_seed_does_not_matter_and_nothing_is_drawn() -> None:
    method, student, teacher = build(mask_ratio=0), outputs(2), outputs(3, seed=3)
    one, other = (value(method, student, teacher, seed=seed) for seed in (1, 2))
    assert torch.equal(one, other)
    state = torch.get_rng_state()
    method(student, teacher, TARGET)
    assert torch.equal(torch.get_rng_state(), state)


def test_masked_positions_of_the_student_get_no_gradient() -> None:
    features = (1 + draw(1, 3, 6, 6).abs()).requires_grad_()
    torch.manual_seed(2)
    kept = visible(features, 0.5)
    kept.sum().backward()
    assert torch.equal(features.grad, (kept != 0).double())


# -- weights and switches ---------------------------------------------------------------------------------------------


def test_the_published_sum_and_its_mean_are_one_loss() -> None:
    generated, teacher = draw(3, 4, 5, 6), draw(3, 4, 5, 6, seed=1)
    published = 2e-5 / 3 * nn.MSELoss(reduction="sum")(generated, teacher)
    torch.testing.assert_close(2e-5 * generation_distance(generated, teacher, reduction="sum"), published)
    torch.testing.assert_close(2e-5 * 4 * 5 * 6 * generation_distance(generated, teacher), published)
    assert build().weights == {"generation": 2e-5}


def test_the_defaults_are_the_released_segmentation_configs() -> None:
    assert to_dict(parse_method({"name": "mgd"}, "methods.0")[1]) == {
        "name": "mgd", "weight": 2e-5, "ramp": 0.0, "tap": "stage4", "mask_ratio": 0.75, "reduction": "sum",
    }  # fmt: skip
    shapes = {name: tuple(parameter.shape) for name, parameter in build().named_parameters()}
    assert shapes == {
        "projection.weight": (3, 2, 1, 1), "projection.bias": (3,),
        "generator.0.weight": (3, 3, 3, 3), "generator.0.bias": (3,),
        "generator.2.weight": (3, 3, 3, 3), "generator.2.bias": (3,),
    }  # fmt: skip
    assert not any(name.startswith("projection") for name, _ in build(STUDENT, STUDENT).named_parameters())


def test_the_generator_has_75_million_parameters_at_2048_channels() -> None:
    with torch.device("meta"):
        generator = generator_of(2048)
    assert sum(parameter.numel() for parameter in generator.parameters()) // 10**6 == 75


def test_no_label_enters() -> None:
    method, student, teacher = build(), outputs(2), outputs(3, seed=3)
    torch.manual_seed(1)
    unlabelled = method(student, teacher, torch.full_like(TARGET, 255))["generation"]
    assert torch.equal(unlabelled, value(method, student, teacher))


def test_a_student_that_is_wholly_masked_is_refused() -> None:
    with pytest.raises(UserError, match=r"^methods\.0\.mask_ratio: input should be less than 1"):
        build(mask_ratio=1)
