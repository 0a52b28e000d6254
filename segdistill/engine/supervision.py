"""What labels teach, the same for every network and method: named losses, and how much a pixel of each class counts."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn, tensor

from segdistill.data.shards import read_class_pixels, read_dataset_info
from segdistill.engine.settings import EffectiveNumberConfig, GivenWeightsConfig, LossConfig
from segdistill.errors import UserError, nearest
from segdistill.geometry import size_of
from segdistill.losses.blocks import resized_in_one_block
from segdistill.losses.supervised import cross_entropy, dice, hard_cross_entropy, label_mass, lovasz_softmax


class Supervision(nn.Module):
    """Terms of logits against labels: ``ce`` always, ``dice`` and ``lovasz`` where they have a weight.

    Args:
        config: weights, and over which pixels the cross-entropy is taken.
        class_weights: see :func:`class_weights`; None counts all alike.
    """

    class_weights: Tensor | None

    def __init__(self, config: LossConfig | None = None, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        self.config = config or LossConfig()
        self.register_buffer("class_weights", None if class_weights is None else tensor(class_weights), False)
        others = {"dice": self.config.dice, "lovasz": self.config.lovasz}
        self.factors = {"ce": self.config.cross_entropy} | {term: weight for term, weight in others.items() if weight}

    def mass(self, target: Tensor) -> Tensor:
        """What the cross-entropy's sum over these labels is divided by for their mean; see :func:`label_mass`."""
        return label_mass(target, self.class_weights)

    def forward(self, logits: Tensor, target: Tensor, mass: Tensor | None = None) -> dict[str, Tensor]:
        """The raw terms.

        Args:
            mass: of an average piece of the batch, if this is a piece; hard pixels, Dice and Lovasz go by the piece.

        Shape:
            logits: [B, K, h, w]; target: [B, H, W] int64; mass: scalar; returns scalars.
        """
        (logits,), weights = resized_in_one_block([logits], size_of(target)), self.class_weights
        ohem = self.config.ohem
        if ohem is None:
            terms = {"ce": cross_entropy(logits, target, mass, class_weights=weights)}
        else:
            terms = {
                "ce": hard_cross_entropy(
                    logits, target, threshold=ohem.threshold, min_kept=ohem.min_kept, class_weights=weights
                )
            }
        if self.config.dice:
            terms["dice"] = dice(logits, target)
        if self.config.lovasz:
            terms["lovasz"] = lovasz_softmax(logits, target)
        return terms


def class_weights(config: LossConfig, prepared: Path, where: str) -> list[float] | None:
    """How much a pixel of each class counts in the cross-entropy; None if all count alike.

    Args:
        prepared: the data, whose training split is counted where the rule asks for it.
        where: the dotted path of ``config``, for messages.

    Raises:
        UserError: a class that is none of the data's, no class with a weight above 0, or nothing to count.
    """
    rule, key = config.class_weights, f"{where}.class_weights"
    if rule is None:
        return None
    if isinstance(rule, GivenWeightsConfig):
        names = [entry.name for entry in read_dataset_info(prepared).classes]
        require_known(rule.weights, names, key)
        weights = [rule.weights.get(name, 1.0) for name in names]
        if not any(weights):
            raise UserError(f"{key}.weights: 0 for every class; give one of them a weight above 0")
        return weights
    pixels = read_class_pixels(prepared, "train")
    if not pixels.any():
        raise UserError(f"{key}: {rule.name} counts the labels of {prepared}, whose training images have none")
    if isinstance(rule, EffectiveNumberConfig):
        return effective_number(pixels, rule.beta)
    return median_frequency(pixels)


def require_known(weights: Iterable[str], names: Sequence[str], key: str) -> None:
    """Raises a UserError for a weight of a class that the data set has not."""
    for name in weights:
        if name not in names:
            raise UserError(f"{key}.weights: '{name}' is no class of the data set{nearest(name, names)}")


def median_frequency(pixels: np.ndarray) -> list[float]:
    """median(f) / f(c), with f(c) the pixels of class c over all labelled pixels of the images that have it.

    A class that no image has is left out of the median, and has a weight of 0.

    Shape:
        pixels: [N, K], those of each class in each image.

    Reference:
        Eigen and Fergus, ICCV 2015, arXiv:1411.4734.
    """
    there = pixels.any(0)
    of_images = ((pixels > 0) * pixels.sum(1, keepdims=True)).sum(0)  # [K]
    frequencies = pixels.sum(0)[there] / of_images[there]
    weights = np.zeros(pixels.shape[1])
    weights[there] = np.median(frequencies) / frequencies
    return weights.tolist()


def effective_number(pixels: np.ndarray, beta: float | None) -> list[float]:
    """(1 - beta) / (1 - beta^n(c)) with n(c) the pixels of class c, scaled to a mean of 1 over the classes that are.

    A class that no image has is left out, and has a weight of 0.

    Args:
        beta: None: (N - 1) / N with N the pixels of a mean class, so that it does not depend on the images' size.

    Shape:
        pixels: [N, K], those of each class in each image.

    Reference:
        Cui et al., CVPR 2019, arXiv:1901.05555.
    """
    there, counts = pixels.any(0), pixels.sum(0)
    if beta is None:
        beta = 1 - 1 / max(2.0, counts[there].mean())
    weights = np.zeros(pixels.shape[1])
    weights[there] = 1 / -np.expm1(counts[there] * math.log(beta))
    return (weights / weights[there].mean()).tolist()
