"""Mutual learning: the method against the slow loop, and its invariants."""

from typing import Any

import _reference as reference
import pytest
import torch
from _flat import flat
from torch import Tensor

from segdistill.errors import UserError
from segdistill.methods import parse_method
from segdistill.models.outputs import ModelInfo, Outputs

CLASSES = 4
INFO = ModelInfo(CLASSES, (4, 4, 4, 4), (4, 8, 16, 32), 4, 4, 4, "cnn")


def mutual(logits: dict[str, Tensor], target: Tensor, **changes: Any) -> dict[str, Tensor]:
    method, config = parse_method({"name": "dml", **changes}, "methods.0")
    peers = {name: Outputs(value, (), value) for name, value in logits.items()}
    return flat(method(config, dict.fromkeys(peers, INFO))(peers, target))


def scene(*sizes: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = ("cnn", "vit", "third")
    logits = {
        name: torch.randn(2, CLASSES, *size, generator=generator, dtype=torch.float64).requires_grad_()
        for name, size in zip(names, sizes, strict=False)
    }
    target = torch.randint(CLASSES, (2, 12, 16), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = 255
    return logits, target


@pytest.mark.parametrize("upsample", [True, False])
@pytest.mark.parametrize("sizes", [((3, 4), (3, 4)), ((3, 4), (6, 8)), ((6, 8), (2, 3), (3, 4))])
def test_every_peer_gets_the_mean_divergence_from_the_others_at_the_finest_size(
    sizes: tuple[tuple[int, int], ...], upsample: bool
) -> None:
    logits, target = scene(*sizes)
    found = mutual(logits, target, temperature=3.0, upsample=upsample)
    size = (12, 16) if upsample else max(sizes)
    labels = reference.nearest(target, size)
    fitted = {name: reference.resized(value, size, False) for name, value in logits.items()}
    for name, value in logits.items():
        others = [peer for peer in logits if peer != name]
        slow = reference.mean([reference.pixel_kl(fitted[name], fitted[peer], labels, 3.0) for peer in others])
        torch.testing.assert_close(found[f"{name}/kl"], slow, rtol=1e-10, atol=0)
        expected = torch.autograd.grad(slow, value, retain_graph=True)[0]
        gradient = torch.autograd.grad(found[f"{name}/kl"], value, retain_graph=True)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)


def test_a_peers_loss_has_no_gradient_to_the_others() -> None:
    logits, target = scene((3, 4), (6, 8), (3, 4))
    for name, loss in mutual(logits, target).items():
        for peer, value in logits.items():
            gradient = torch.autograd.grad(loss, value, retain_graph=True, allow_unused=True)[0]
            assert (gradient is None) == (peer != name.split("/")[0])


def test_peers_that_agree_have_nothing_to_learn() -> None:
    logits, target = scene((3, 4))
    shifted = logits["cnn"] + torch.randn(2, 1, 3, 4, dtype=torch.float64)
    for loss in mutual({"cnn": logits["cnn"], "vit": shifted}, target).values():
        assert abs(loss.item()) < 1e-12


def test_swapping_the_peers_swaps_their_terms_and_keeps_the_sum() -> None:
    logits, target = scene((3, 4), (6, 8))
    plain = mutual(logits, target)
    swapped = mutual({"cnn": logits["vit"], "vit": logits["cnn"]}, target)
    torch.testing.assert_close(swapped["cnn/kl"], plain["vit/kl"])
    torch.testing.assert_close(swapped["vit/kl"], plain["cnn/kl"])


def test_ignored_pixels_count_when_the_mask_is_switched_off() -> None:
    logits, target = scene((12, 16), (12, 16))
    found = mutual(logits, target, mask_ignore=False)
    slow = reference.pixel_kl(logits["cnn"], logits["vit"], None, 1.0)
    torch.testing.assert_close(found["cnn/kl"], slow)
    assert abs(found["cnn/kl"] - mutual(logits, target)["cnn/kl"]) > 1e-4


def test_one_peer_is_refused() -> None:
    method, config = parse_method({"name": "dml"}, "methods.0")
    with pytest.raises(UserError, match=r"dml needs at least two students .* \['cnn'\]"):
        method(config, {"cnn": INFO})
