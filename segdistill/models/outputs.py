"""What every segmenter gives, and what a method may know of a segmenter before it has run."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """One forward pass of a segmenter.

    Shape:
        logits: [B, K, h, w], before upsampling to the image.
        features: four encoder stages, shallow to deep, each [B, C_i, h_i, w_i].
        last_feature: [B, D, h', w'], the tensor that enters the 1x1 classifier.
        aux_logits: [B, K, h'', w''] of the auxiliary head, or None where there is none.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    last_feature: Tensor
    aux_logits: Tensor | None = None


@dataclass(frozen=True)
class ModelInfo:
    """Channels and strides of a segmenter's taps, so that a method can build its projections without a forward pass."""

    num_classes: int
    feature_channels: tuple[int, ...]  # of the four encoder stages
    feature_strides: tuple[int, ...]
    last_channels: int  # of last_feature
    last_stride: int
    logits_stride: int
    kind: str  # "cnn" or "vit"
