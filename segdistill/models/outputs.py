"""What every segmenter gives, and what a method may know of a segmenter before it has run."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from segdistill.errors import UserError
from segdistill.images import RGB, ImageFormat

Tap = Literal["stage1", "stage2", "stage3", "stage4", "last_feature"]
"""Where a method takes a feature: an encoder stage, shallow to deep, or what enters the classifier."""


class Outputs(NamedTuple):
    """One forward pass of a segmenter.

    Shape:
        logits: [B, K, h, w], before upsampling to the image.
        features: four encoder stages, shallow to deep, each [B, C_i, h_i, w_i]; none of a teacher without such stages.
        last_feature: [B, D, h', w'], the tensor that enters the 1x1 classifier; D is 0 where there is no such tensor.
        aux_logits: [B, K, h'', w''] of the auxiliary head, or None where there is none.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    last_feature: Tensor
    aux_logits: Tensor | None = None

    def tap(self, name: Tap) -> Tensor:
        """The feature at a tap, [B, C, h, w]."""
        return self.last_feature if name == "last_feature" else self.features[_stage(name)]


@dataclass(frozen=True)
class ModelInfo:
    """Channels and strides of a segmenter's taps, so that a method can build its projections without a forward pass."""

    num_classes: int
    feature_channels: tuple[int, ...]  # of the four encoder stages; empty where there are none
    feature_strides: tuple[int, ...]
    last_channels: int  # of last_feature; 0 where there is none
    last_stride: int
    logits_stride: int
    kind: str  # "cnn" or "vit"
    aux: bool = False  # whether there are aux_logits

    def require(self, tap: Tap) -> None:
        """Raises a UserError where the network has no feature at the tap."""
        if not (self.last_channels if tap == "last_feature" else self.feature_channels):
            has = "last_feature" if self.last_channels else "stage1 to stage4" if self.feature_channels else "logits"
            raise UserError(f"the teacher has no feature '{tap}', of which the method learns; it has {has} alone")

    def channels(self, tap: Tap) -> int:
        """Channels of the feature at a tap, which must be there."""
        self.require(tap)
        return self.last_channels if tap == "last_feature" else self.feature_channels[_stage(tap)]

    def stride(self, tap: Tap) -> int:
        """Image pixels per cell of the feature at a tap, along each axis."""
        return self.last_stride if tap == "last_feature" else self.feature_strides[_stage(tap)]


class Network(nn.Module):
    """Images in, logits out: a segmenter, or a network from a file (:mod:`models.portable`)."""

    info: Any  # has ``logits_stride``: image pixels per cell of the logits

    def logits(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W], float in 0..1, to logits [B, K, h, w]."""
        raise NotImplementedError


class SegmentationNetwork(Network):
    """Images in, :class:`Outputs` out: our own segmenter, or a teacher of another origin (:mod:`models.teachers`)."""

    images: ImageFormat = RGB  # what it is shown
    config: Any  # a config class; what the same network is built from again
    info: ModelInfo
    aux_head: nn.Module | None  # its parameters are not served

    def forward(self, images: Tensor) -> Outputs:
        """One pass.

        Shape:
            images: [B, C, H, W], float in 0..1: the channels of ``images``, RGB if it is not said.
        """
        raise NotImplementedError

    def logits(self, images: Tensor) -> Tensor:
        """The logits of :meth:`forward` alone, which is what serving computes."""
        return self(images).logits  # type: ignore[no-any-return]


def _stage(tap: Tap) -> int:
    return int(tap.removeprefix("stage")) - 1
