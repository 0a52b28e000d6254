"""The losses against the labels and the weights of classes: against slow loops, libraries, and cases done by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import _reference as reference
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmentation_models_pytorch.losses import DiceLoss, LovaszLoss
from torch import Tensor
from torch.nn import functional as F

from segdistill.config import parse
from segdistill.engine import supervision
from segdistill.engine.settings import LossConfig
from segdistill.engine.supervision import Supervision, class_weights, effective_number, median_frequency
from segdistill.errors import UserError
from segdistill.geometry import size_of
from segdistill.losses import align, masks, supervised
from segdistill.losses.masks import IGNORE_INDEX, UNLABELLED

CLASSES = 5
WEIGHTS = [0.5, 2.0, 0.0, 1.0, 30.0]
Loss = Callable[[Tensor, Tensor], Tensor]


def hard(threshold: float, min_kept: int, weights: list[float] | None = None) -> tuple[Loss, Loss]:
    given_weights = None if weights is None else torch.tensor(weights)
    return (
        lambda logits, target: supervised.hard_cross_entropy(
            logits, target, threshold=threshold, min_kept=min_kept, class_weights=given_weights
        ),
        lambda logits, target: reference.hard_cross_entropy(logits, target, threshold, min_kept, weights),
    )


# Name -> the loss, and the same as a slow loop.
LOSSES: dict[str, tuple[Loss, Loss]] = {
    "weighted": (
        lambda logits, target: supervised.cross_entropy(logits, target, class_weights=torch.tensor(WEIGHTS)),
        lambda logits, target: reference.weighted_cross_entropy(logits, target, WEIGHTS),
    ),
    "hard": hard(0.3, 2),
    "hardest": hard(0.0, 3),
    "hard weighted": hard(0.3, 2, WEIGHTS),
    "dice": (supervised.dice, reference.dice),
    "lovasz": (supervised.lovasz_softmax, reference.lovasz_softmax),
}


def scene(seed: int = 0, void: float = 0.3, size: tuple[int, int] = (4, 5)) -> tuple[Tensor, Tensor]:
    """Logits, and labels in which the class 3 is absent and some pixels are void or unlabelled."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, CLASSES, *size, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, (2, *size), generator=generator)
    target[target == 3] = 1
    chance = torch.rand(target.shape, generator=generator)
    target[chance < void] = IGNORE_INDEX
    target[chance < void / 2] = UNLABELLED
    return logits.requires_grad_(), target


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), void=st.sampled_from([0.0, 0.3, 0.95, 1.0]))
def test_a_loss_and_its_gradient_equal_the_slow_loop(name: str, seed: int, void: float) -> None:
    fast, slow = LOSSES[name]
    logits, target = scene(seed, void)
    expected = slow(logits, target)
    torch.testing.assert_close(fast(logits, target), expected.to(logits), rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(fast(logits, target), logits)[0]
    wanted = torch.autograd.grad(expected, logits)[0] if expected.requires_grad else torch.zeros_like(logits)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-12)
    narrow = fast(logits.detach().float(), target)
    torch.testing.assert_close(narrow, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_labels_gives_zero_with_a_gradient_of_zero(name: str) -> None:
    logits, target = scene()
    target = torch.where(target % 2 == 0, UNLABELLED, IGNORE_INDEX)
    value = LOSSES[name][0](logits, target)
    assert value.shape == () and value.item() == 0.0
    (65536 * value).backward()  # as fp16 scales it
    assert logits.grad is not None and bool((logits.grad == 0).all())


@pytest.mark.parametrize("name", LOSSES)
def test_logits_are_brought_to_the_labels_by_the_one_rule(name: str) -> None:
    logits, _ = scene()
    _, target = scene(1, size=(8, 10))
    large = align.resize_logits(logits, size_of(target))
    torch.testing.assert_close(LOSSES[name][0](logits, target), LOSSES[name][0](large, target), rtol=0, atol=0)


def test_a_weighted_mean_is_torchs_own() -> None:
    logits, target = scene()
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)
    expected = F.cross_entropy(logits, masks.labelled_only(target), weights, ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(supervised.cross_entropy(logits, target, class_weights=weights), expected)


def test_dice_and_lovasz_are_the_librarys_where_that_is_defined() -> None:
    logits, target = scene()
    labels = masks.labelled_only(target)
    lovasz = LovaszLoss("multiclass", ignore_index=IGNORE_INDEX)(logits.float(), labels)
    torch.testing.assert_close(supervised.lovasz_softmax(logits.float(), target), lovasz, rtol=1e-5, atol=1e-6)
    # The library takes the mean over all classes, the absent one with 0.
    dice = DiceLoss("multiclass", ignore_index=IGNORE_INDEX)(logits, labels) * CLASSES / (CLASSES - 1)
    torch.testing.assert_close(supervised.dice(logits, target), dice)


def test_two_pixels_by_hand() -> None:
    # Two classes, one pixel of each; p of the own class is 3/4 and 1/2.
    logits = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log().reshape(2, 2, 1, 1)
    target = torch.tensor([0, 1]).reshape(2, 1, 1)
    # Dice: class 0: 1 - 2 * 3/4 / (3/4 + 1/2 + 1) = 1/3; class 1: 1 - 2 * 1/2 / (1/4 + 1/2 + 1) = 3/7.
    assert supervised.dice(logits, target).item() == pytest.approx((1 / 3 + 3 / 7) / 2)
    # Lovasz: class 0 has errors 1/2 (not its pixel: J 0 -> 1/2) and 1/4 (its pixel: 1/2 -> 1): 3/8; class 1 has
    # 1/2 (its pixel: 0 -> 1) and 1/4 (1 -> 1): 1/2.
    assert supervised.lovasz_softmax(logits, target).item() == pytest.approx((3 / 8 + 1 / 2) / 2)
    # Hard below 0.6: the second pixel alone.
    ohem = supervised.hard_cross_entropy(logits, target, threshold=0.6, min_kept=1)
    assert ohem.item() == pytest.approx((-np.log(0.75) - np.log(0.5)) / 2), "at least one an image"
    ohem = supervised.hard_cross_entropy(logits[1:], target[1:], threshold=0.6, min_kept=1)
    assert ohem.item() == pytest.approx(-np.log(0.5))


def test_a_perfect_prediction_has_neither_dice_nor_lovasz_loss() -> None:
    _, target = scene()
    logits = 200.0 * F.one_hot(target.where(target < CLASSES, 0), CLASSES).permute(0, 3, 1, 2).double()
    for loss in (supervised.dice, supervised.lovasz_softmax):
        assert loss(logits, target).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_mean_over_parts_is_that_over_the_batch_for_the_cross_entropy_with_class_weights(
    weights: list[float] | None,
) -> None:
    logits, target = scene()
    target[1, 1:] = IGNORE_INDEX
    labels = Supervision(class_weights=weights)
    mass = torch.stack([labels.mass(part) for part in target]).sum() / 2
    parts = [labels(logits[[part]], target[[part]], mass)["ce"] for part in range(2)]
    torch.testing.assert_close(sum(parts) / 2, labels(logits, target)["ce"])


def test_what_the_config_does_not_ask_for_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError

    for name in ("dice", "lovasz_softmax", "hard_cross_entropy"):
        monkeypatch.setattr(supervision, name, computed)
    logits, target = scene()
    terms = Supervision()(logits, target)
    assert list(terms) == ["ce"] and torch.equal(terms["ce"], supervised.cross_entropy(logits, target))
    assert Supervision().factors == {"ce": 1.0} and not list(Supervision().buffers())


def test_terms_and_factors_are_those_of_the_config() -> None:
    config: LossConfig = parse(
        LossConfig,
        {"cross_entropy": 0.0, "dice": 0.5, "lovasz": 2.0, "ohem": {"threshold": 0.7, "min_kept": 3}},
        "loss",
    )
    labels = Supervision(config, WEIGHTS)
    logits, target = scene()
    terms, weights = labels(logits, target), torch.tensor(WEIGHTS)
    assert labels.factors == {"ce": 0.0, "dice": 0.5, "lovasz": 2.0} and not labels.state_dict()
    assert torch.equal(terms["dice"], supervised.dice(logits, target))
    assert torch.equal(terms["lovasz"], supervised.lovasz_softmax(logits, target))
    ohem = supervised.hard_cross_entropy(logits, target, threshold=0.7, min_kept=3, class_weights=weights)
    assert torch.equal(terms["ce"], ohem)


def test_many_pixels_leave_the_lovasz_gradient_its_digits_in_float32() -> None:
    # Differences of fractions near 1 are wrong by 1e-3 at this size, and by 2e-2 at 1024 x 1024.
    torch.manual_seed(0)
    logits, target = torch.randn(1, 2, 256, 256, dtype=torch.float64), torch.randint(2, (1, 256, 256))
    gradients = []
    for leaf in (logits.requires_grad_(), logits.detach().float().requires_grad_()):
        supervised.lovasz_softmax(leaf, target).backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad.double())
    error = (gradients[1] - gradients[0]).abs().mean() / gradients[0].abs().mean()
    assert error < 1e-5


# -- weights of classes ------------------------------------------------------------------------------------------------

PIXELS = np.array([[60, 40, 0, 0], [90, 0, 10, 0]])  # two images; of the last class there is none


def test_median_frequency_by_hand() -> None:
    # f: 150 / 200, 40 / 100, 10 / 100; their median is 0.4.
    assert median_frequency(PIXELS) == pytest.approx([0.4 / 0.75, 1.0, 4.0, 0.0])


@pytest.mark.parametrize("beta", [0.9, 0.999, None])
def test_the_effective_number_is_the_papers_and_has_a_mean_of_one(beta: float | None) -> None:
    used = 1 - 1 / (200 / 3) if beta is None else beta
    raw = [(1 - used) / (1 - used**count) for count in (150, 40, 10)]
    assert effective_number(PIXELS, beta) == pytest.approx([*(value * 3 / sum(raw) for value in raw), 0.0])


def test_the_effective_number_by_default_does_not_depend_on_the_size_of_images() -> None:
    large = effective_number(10_000 * PIXELS, None)
    assert effective_number(100 * PIXELS, None) == pytest.approx(large, rel=1e-2) and large[2] > 5 * large[0]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data with three classes, of which nobody reads more than names and counts."""
    classes = [type("ClassInfo", (), {"name": name}) for name in ("road", "car", "sky")]
    monkeypatch.setattr(supervision, "read_dataset_info", lambda _: type("DatasetInfo", (), {"classes": classes}))
    monkeypatch.setattr(supervision, "read_class_pixels", lambda *_: np.zeros((2, 3), np.int64))
    return tmp_path


def of_rule(rule: Any) -> LossConfig:
    return parse(LossConfig, {"class_weights": rule}, "distill.train.loss")  # type: ignore[no-any-return]


def test_given_weights_go_by_name_and_others_are_one(prepared: Path) -> None:
    config = of_rule({"name": "given", "weights": {"sky": 0.0, "car": 2.5}})
    assert class_weights(config, prepared, "distill.train.loss") == [1.0, 2.5, 0.0]
    assert class_weights(LossConfig(), prepared, "distill.train.loss") is None


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ({"name": "given", "weights": {"raod": 1.0}},
         "distill.train.loss.class_weights.weights: 'raod' is no class of the data set; did you mean 'road'?"),
        ({"name": "given", "weights": {"road": 0, "car": 0, "sky": 0}},
         "distill.train.loss.class_weights.weights: 0 for every class; give one of them a weight above 0"),
        ({"name": "given", "weights": {"road": -1}},
         "distill.train.loss.class_weights.weights.road: input should be greater than or equal to 0, not -1"),
        ({"name": "given", "weights": {}},
         "distill.train.loss.class_weights.weights: dictionary should have at least 1 item"),
        ({"name": "median"},
         "distill.train.loss.class_weights.name: unknown name 'median'; "),
        ({"name": "effective_number", "beta": 1},
         "distill.train.loss.class_weights.beta: input should be less than 1, not 1"),
        ({"name": "median_frequency"},
         "distill.train.loss.class_weights: median_frequency counts the labels of "),
    ],
)  # fmt: skip
def test_a_mistake_in_the_weights_is_one_sentence(prepared: Path, rule: Any, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        class_weights(of_rule(rule), prepared, "distill.train.loss")
    assert str(caught.value).startswith(sentence)


def test_a_loss_without_any_weight_is_refused() -> None:
    with pytest.raises(UserError, match=r"^loss: cross_entropy, dice and lovasz are all 0: nothing would learn"):
        parse(LossConfig, {"cross_entropy": 0}, "loss")
