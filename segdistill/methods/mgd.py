"""Masked generative distillation: a part of the student's feature has to generate the whole of the teacher's."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from segdistill.config import config
from segdistill.geometry import resize, size_of
from segdistill.losses.align import Projection, projection
from segdistill.losses.fused import fused
from segdistill.losses.precision import in_float32
from segdistill.methods.method import MethodConfig, NonNegative, OfflineMethod
from segdistill.models.outputs import ModelInfo, Outputs, Tap

Reduction = Literal["mean", "sum"]
Ratio = Annotated[float, Field(ge=0, lt=1)]


@config
class MGDConfig(MethodConfig):
    """Masked generative distillation; the defaults are the released segmentation config's."""

    name: Literal["mgd"] = "mgd"
    weight: NonNegative = 2e-5
    """Factor of the squared distance, as ``reduction`` takes it; the published 2e-5 belongs to sum."""
    tap: Tap = "stage4"
    """The feature that is masked and generated."""
    mask_ratio: Ratio = 0.75
    """Probability of a position to be masked; the same positions in all channels. Detection has 0.65."""
    reduction: Reduction = "sum"
    """What is done over channels and positions: sum (as published), or mean (its strength knows no crop and width)."""


@fused
@in_float32
def generation_distance(generated: Tensor, teacher: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """Squared distance of two features, the teacher's detached; the mean over images of its mean or sum over the rest.

    Shape:
        generated, teacher: [B, C, h, w].
    """
    mean = nn.functional.mse_loss(generated, teacher.detach())
    return mean if reduction == "mean" else mean * generated[0].numel()


def visible(features: Tensor, mask_ratio: float) -> Tensor:
    """A feature of which every position is kept, in all channels, with probability 1 - mask_ratio, or else zero.

    The draw comes from the default generator of the feature's device. With ratio 0 nothing is drawn.

    Shape:
        features: [B, C, h, w].
    """
    if not mask_ratio:
        return features
    drawn = torch.rand(features.shape[0], 1, *features.shape[-2:], device=features.device)
    return features * (drawn >= mask_ratio)


def generator_of(channels: int) -> nn.Sequential:
    """Two 3x3 convolutions with a ReLU between them."""
    first, second = (Projection(channels, channels, 3, bias=True) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(inplace=True), second)


class MaskedGeneration(OfflineMethod[MGDConfig]):
    """Masked generative distillation (MGD).

    Example:
        mgd_cwd:
          students: {cnn: *cnn}
          methods: [{name: mgd, mask_ratio: 0.75}, {name: cwd}]

    Formula:
        L = mean over images of the sum over channels and positions of (G(m * R(f_student)) - f_teacher)^2,
        R a 1x1 convolution with bias from the student's width to the teacher's, the identity where they are equal, its
        result resized to the teacher's size; m in {0, 1} one draw a position and image, shared by the channels, 0 with
        probability mask_ratio, new at every step; G = 3x3 convolution, ReLU, 3x3 convolution, all of the teacher's
        width. At the teacher's 2048 channels G alone has 75 million parameters.

    Weights:
        The released code sums over channels and positions, means over images, and multiplies by 2e-5: the default. Its
        strength changes with the crop and the width. ``reduction: mean`` has the same strength everywhere; the weight
        that equals the published one is then 2e-5 * C h w of the teacher's feature: 336 for 2048 channels at 64 x 128,
        a crop of 512 x 1024 at stride 8. Those 336 belong to that feature: for a small one they are hundreds of times
        the cross-entropy, and training diverges.

        The released segmentation config adds CWD on the logits (T = 4, weight 3), which explains most of its best
        numbers: list both methods for it, ``[{name: mgd}, {name: cwd}]``, and report both ways.

    Speed:
        What a step costs is the generator's two 3x3 convolutions at the teacher's width and stride: they are the
        method, and nothing of them can be saved.

    Masks:
        No label enters: ignored pixels and images without labels are generated like the others.

    Inferred:
        Resizing to the teacher's size is ours; the released code pairs networks of equal stride. m comes from the
        device's default generator, so it repeats when a run is resumed but differs between devices.

    Reference:
        Yang, Li, Shao, Shi, Yuan, Yuan: Masked Generative Distillation, ECCV 2022, arXiv:2205.01529.
    """

    paper = "Yang et al., ECCV 2022"
    needs = "stage 4, 1x1 projection, a generator of two 3x3 convolutions"
    evidence = "official code"
    term = "generation"

    def __init__(self, config: MGDConfig, student: ModelInfo, teacher: ModelInfo) -> None:
        super().__init__(config, student, teacher)
        width = teacher.channels(config.tap)
        self.projection = projection(student.channels(config.tap), width, bias=True)
        self.generator = generator_of(width)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        goal = teacher.tap(self.config.tap)
        feature = resize(self.projection(student.tap(self.config.tap)), size_of(goal))
        generated = self.generator(visible(feature, self.config.mask_ratio))
        return {"generation": generation_distance(generated, goal, reduction=self.config.reduction)}
