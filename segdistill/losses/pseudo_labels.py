"""The classes that networks themselves give to pixels for which nobody drew one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from segdistill.geometry import size_of
from segdistill.losses.blocks import images_in_blocks
from segdistill.losses.masks import UNLABELLED
from segdistill.losses.precision import in_float32


@torch.no_grad()
@in_float32
def with_pseudo_labels(target: Tensor, logits: Sequence[Tensor], *, threshold: float) -> Tensor:
    """The labels, in which an unlabelled pixel has the class that is most probable by the mean of the networks.

    Args:
        logits: of one network or several.
        threshold: a pixel whose most probable class is less probable than this stays unlabelled.

    Shape:
        target: [B, H, W] int64, returned as such; logits: [B, K, h, w] each.
    """

    def labels(*tensors: Tensor) -> Tensor:
        *logits, target = tensors
        probabilities = torch.stack([each.softmax(1) for each in logits]).mean(0)  # [B, K, H, W]
        confidence, classes = probabilities.max(1)
        return torch.where((target == UNLABELLED) & (confidence >= threshold), classes, target)

    return torch.cat(images_in_blocks(labels, logits, [target], size_of(target)))
