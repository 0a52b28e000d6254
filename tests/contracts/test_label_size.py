"""What is compared at label size is compared in blocks of images: the same numbers, and no map of all images."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import test_methods as methods
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from segdistill.config import parse
from segdistill.engine.settings import LossConfig
from segdistill.engine.supervision import Supervision
from segdistill.losses import blocks
from segdistill.losses.masks import UNLABELLED
from segdistill.losses.pseudo_labels import with_pseudo_labels
from segdistill.methods import METHODS, load

CLASSES, BATCH, SIZE = 5, 4, (24, 28)
SUPERVISION = {
    "ce": {},
    "ohem": {"ohem": {"threshold": 0.2, "min_kept": 50}},
    "dice": {"dice": 1.0},
    "lovasz": {"lovasz": 1.0},
}
COMPARED: dict[str, dict[str, Any]] = {  # every method that can compare at label size, and its variants that do
    **{name: {} for name in METHODS if "upsample" in load(name).Config.__dataclass_fields__},
    "apd": {"hidden_channels": 8, "out_channels": 8},
    "c2vkd as dkd": {"pdd": "dkd"},
    "hfd_bsd by regions": {"pixel_weight": 0.0},
    "kdcl by images": {"ensemble": "naive", "naive_per": "image"},
    "kdcl linear": {"ensemble": "linear"},
}
WHOLE = {"dist", "kdcl linear"}  # a correlation over the batch's pixels, weights that all of them decide


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def supervised(name: str) -> tuple[Callable[[], dict[str, Tensor]], list[Tensor]]:
    """The terms of labels, and what they are differentiated by."""
    logits = methods.outputs(methods.FIRST, CLASSES, batch=BATCH, dtype=torch.float64).logits
    target = methods.labels(SIZE, CLASSES, batch=BATCH)
    supervision = Supervision(parse(LossConfig, SUPERVISION[name], "loss"), [0.5, 1.0, 2.0, 1.0, 0.0])
    return lambda: supervision(logits, target), [logits]


def compared(case: str) -> tuple[Callable[[], dict[str, Tensor]], list[Tensor]]:
    """The terms of a method, and what they are differentiated by."""
    method = methods.build(case.split()[0], num_classes=CLASSES, upsample=True, **COMPARED[case]).double()
    first, second = (
        methods.outputs(methods.FIRST, CLASSES, batch=BATCH, seed=seed, dtype=torch.float64) for seed in (0, 1)
    )
    target = methods.labels(SIZE, CLASSES, batch=BATCH)
    leaves = [*methods.tensors(first), *methods.tensors(second)]
    return lambda: methods.terms(method, first, second, target), leaves


CASES = [*((supervised, name) for name in SUPERVISION), *((compared, name) for name in COMPARED)]
EVERY = pytest.mark.parametrize(("make", "name"), CASES, ids=[name for _, name in CASES])


@EVERY
@pytest.mark.parametrize("images", [1, 3])
def test_terms_and_gradients_in_blocks_are_those_of_the_whole_batch(
    make: Any, name: str, images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms, leaves = make(name)
    whole = terms()
    monkeypatch.setattr(blocks, "BLOCK", images * CLASSES * SIZE[0] * SIZE[1])
    parts = terms()
    assert list(parts) == list(whole)
    for term in whole:
        torch.testing.assert_close(parts[term], whole[term], rtol=1e-10, atol=1e-12)
        gradients = (
            torch.autograd.grad(each[term], leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            for each in (parts, whole)
        )
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


@EVERY
def test_no_operation_gives_a_map_of_all_images_unless_the_formula_needs_one(
    make: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = CLASSES * SIZE[0] * SIZE[1]
    monkeypatch.setattr(blocks, "BLOCK", one)
    terms, _ = make(name)
    with Largest() as largest:
        torch.stack(list(terms().values())).sum().backward()
    if name == "lovasz" or name in WHOLE:
        assert largest.elements >= BATCH * one
    else:
        assert largest.elements <= 3 * one  # at most the logits of three networks, or sums of two, of one image


def test_pseudo_labels_in_blocks_are_those_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = [methods.outputs(methods.FIRST, CLASSES, batch=BATCH, seed=seed).logits for seed in (0, 1)]
    target = methods.labels(SIZE, CLASSES, batch=BATCH)
    target[:, :12] = UNLABELLED
    whole = with_pseudo_labels(target, logits, threshold=0.4)
    monkeypatch.setattr(blocks, "BLOCK", 1)
    assert torch.equal(with_pseudo_labels(target, logits, threshold=0.4), whole)
    assert 0 < int((whole == UNLABELLED).sum()) < int((target == UNLABELLED).sum())
