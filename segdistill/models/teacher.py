"""A segmenter that is frozen for good."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from segdistill.models.outputs import ModelInfo, Outputs, SegmentationNetwork


class Teacher(nn.Module):
    """Gives a trained segmenter's outputs, and can be neither trained nor saved.

    The segmenter is no submodule: whatever the teacher is part of, ``train()`` does not reach it, DDP does not wrap it,
    an optimiser does not find it and a checkpoint does not hold it. Moves (``to``, ``cuda``, ``float``) do reach it.
    """

    segmenter: SegmentationNetwork

    def __init__(self, segmenter: SegmentationNetwork) -> None:
        super().__init__()
        self.training = False
        segmenter.eval().requires_grad_(False)
        object.__setattr__(self, "segmenter", segmenter)  # past nn.Module, which would register it

    @property
    def info(self) -> ModelInfo:
        """Channels and strides of the taps."""
        return self.segmenter.info

    def forward(self, images: Tensor) -> Outputs:
        """One pass without gradient. Not in inference mode: a loss may save these tensors for its backward pass.

        Shape:
            images: [B, C, H, W], float in 0..1.
        """
        with torch.no_grad():
            return self.segmenter(images)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in eval mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Teacher":
        self.segmenter._apply(fn, recurse)
        return super()._apply(fn, recurse)
