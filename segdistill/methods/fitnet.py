"""Feature regression: the student's feature, through a 1x1 convolution, imitates the teacher's."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from segdistill.config import config
from segdistill.geometry import resize, resize_labels, size_of
from segdistill.losses.align import Projection, projection
from segdistill.losses.masks import masked_mean, valid_mask
from segdistill.losses.precision import in_float32
from segdistill.methods.method import MethodConfig, NonNegative, OfflineMethod
from segdistill.models.outputs import ModelInfo, Outputs, Tap


@config
class FitNetConfig(MethodConfig):
    """Feature regression; the defaults are CIRKD's."""

    name: Literal["fitnet"] = "fitnet"
    weight: NonNegative = 10.0
    """Factor of the mean squared difference."""
    tap: Tap = "last_feature"
    """The feature that is compared."""
    always_project: bool = False
    """Build the 1x1 convolution also where widths are equal, as CIRKD does."""
    mask_ignore: bool = False
    """Leave out ignored pixels; public codes do not."""
    standardize: bool = False
    """Bring each channel of the teacher's feature to zero mean and unit variance over the batch of the process: its
    scale then does not matter."""


@in_float32
def feature_regression(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over valid pixels and channels of (student - teacher)^2; the teacher's side is detached.

    Args:
        valid: the pixels that count; None for all of them.

    Shape:
        student, teacher: [B, C, h, w]; valid: [B, h, w] bool.
    """
    if valid is None:
        return F.mse_loss(student, teacher.detach())
    return masked_mean((student - teacher.detach()).square().mean(1), valid)


@in_float32
def standardized(features: Tensor, valid: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """A feature with zero mean and unit variance in every channel, over the valid pixels of the batch.

    Shape:
        features: [B, C, h, w]; valid: [B, h, w] bool, None for all pixels.
    """
    counted = torch.ones_like(features[:, :1], dtype=torch.bool) if valid is None else valid[:, None]
    pixels = counted.sum().clamp_min(1)
    mean = torch.where(counted, features, 0.0).sum((0, 2, 3), keepdim=True) / pixels
    deviations = features - mean
    variance = torch.where(counted, deviations, 0.0).square().sum((0, 2, 3), keepdim=True) / pixels
    return deviations * (variance + eps).rsqrt()


class FeatureRegression(OfflineMethod[FitNetConfig]):
    """Feature regression (FitNet): the mean squared distance of two features.

    Example:
        fitnet_kd:
          students: {cnn: *cnn}
          methods: [{name: kd}, {name: fitnet, tap: stage4, standardize: true}]

    Formula:
        L = mean over images, channels and positions of (R(f_student) - f_teacher)^2,
        R a 1x1 convolution without bias from the student's width to the teacher's, the identity where they are equal;
        R(f_student) is resized to the teacher's size.

    Weights:
        The published reduction is this mean, so weights carry over: 10 at the last feature, beside pixel-wise KD of
        weight 1 (CIRKD, the default); 100 in classification, on CIFAR. The loss grows with the square of the feature's
        scale, so a teacher whose tap has no normalisation or ReLU needs another weight, or ``standardize``.

    Masks:
        Off by default, as published: no label enters. With ``mask_ignore`` the mean, and the statistics of
        ``standardize``, are over the valid pixels, and a batch without any gives zero. Images without labels are
        compared like the others.

    Inferred:
        CIRKD builds R also between equal widths; so does ``always_project``. ``standardize`` and ``mask_ignore``
        are ours. The original trained the layers up to the hint first; here all is trained at once.

    Reference:
        Romero et al.: FitNets: Hints for Thin Deep Nets, ICLR 2015, arXiv:1412.6550. Defaults are those of CIRKD
        (Yang et al., CVPR 2022).
    """

    paper = "Romero et al., ICLR 2015"
    needs = "last feature or a stage, 1x1 projection"
    evidence = "public code"
    term = "regression"

    def __init__(self, config: FitNetConfig, student: ModelInfo, teacher: ModelInfo) -> None:
        super().__init__(config, student, teacher)
        build = Projection if config.always_project else projection
        self.projection = build(student.channels(config.tap), teacher.channels(config.tap))

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        goal = teacher.tap(self.config.tap).detach()
        feature = resize(self.projection(student.tap(self.config.tap)), size_of(goal))
        valid = valid_mask(resize_labels(target, size_of(goal))) if self.config.mask_ignore else None
        if self.config.standardize:
            goal = standardized(goal, valid)
        return {"regression": feature_regression(feature, goal, valid)}
