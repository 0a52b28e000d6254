"""Feature regression: the student's feature, through a 1x1 convolution, imitates the teacher's."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from segdistill.config import config
from segdistill.geometry import resize, resize_labels, size_of
from segdistill.losses.align import Projection, projection
from segdistill.losses.masks import masked_mean, valid_mask
from segdistill.losses.precision import in_float32
from segdistill.methods.method import Count, MethodConfig, NonNegative, OfflineMethod
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
    """Bring each channel of the teacher's feature to zero mean and unit variance: its scale then does not matter."""
    warmup_steps: Count = 200
    """Forward passes over which the means and variances of ``standardize`` are gathered; then they are frozen."""


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


class Standardize(nn.Module):
    """Gives a frozen network's feature zero mean and unit variance in every channel.

    Means and variances are those of all pixels seen in the first ``steps`` forward passes in training mode, by all
    processes; a pass during that time uses what has been gathered so far, itself included. They are buffers, so a
    resumed run goes on with them. Whether they are frozen is decided on the device: the host never waits.
    """

    def __init__(self, channels: int, steps: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.steps, self.eps = steps, eps
        self.mean: Tensor
        self.variance: Tensor
        self.passes: Tensor
        self.pixels: Tensor
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pixels", torch.zeros((), dtype=torch.int64))

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """The feature, standardised, in float32.

        Shape:
            features: [B, C, h, w]; valid: [B, h, w] bool, None for all pixels.
        """
        features = features.detach()
        if self.training:
            self._gather(features, valid)
        return _standardized(features, self.mean, self.variance + self.eps)

    @torch.no_grad()
    def _gather(self, features: Tensor, valid: Tensor | None) -> None:
        pixels, mean, squares = channel_moments(features, valid)
        pixels = torch.where(self.passes < self.steps, pixels, 0)
        share = pixels / (self.pixels + pixels).clamp_min(1)  # of the newcomers; 0 once frozen or without valid pixel
        variance = squares / pixels.clamp_min(1)
        apart = mean - self.mean
        # The variance of two groups together: that within them, and that between their means.
        self.variance.copy_((1 - share) * self.variance + share * variance + share * (1 - share) * apart.square())
        self.mean.add_(share * apart)
        self.pixels.add_(pixels)
        self.passes.add_(1)


@in_float32
def channel_moments(features: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Number of valid pixels, and each channel's mean and sum of squared deviations, over all processes.

    Shape:
        features: [B, C, h, w]; valid: [B, h, w] bool; returns [] int64, [C], [C].
    """
    counts = features.new_ones((), dtype=torch.bool) if valid is None else valid[:, None]
    counts = counts.expand(features.shape[0], 1, *features.shape[-2:])
    pixels = _over_processes(counts.sum())
    mean = _over_processes(torch.where(counts, features, 0.0).sum((0, 2, 3))) / pixels.clamp_min(1)
    deviations = torch.where(counts, features - mean[:, None, None], 0.0)
    return pixels, mean, _over_processes(deviations.square().sum((0, 2, 3)))


@in_float32
def _standardized(features: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return (features - mean[:, None, None]) * variance.rsqrt()[:, None, None]


def _over_processes(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


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
        CIRKD builds R also between equal widths; so does ``always_project``. ``standardize``, its 200 passes and
        ``mask_ignore`` are ours. The original trained the layers up to the hint first; here all is trained at once.

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
        standardize = config.standardize
        self.standardize = Standardize(teacher.channels(config.tap), config.warmup_steps) if standardize else None

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        goal = teacher.tap(self.config.tap)
        feature = resize(self.projection(student.tap(self.config.tap)), size_of(goal))
        valid = valid_mask(resize_labels(target, size_of(goal))) if self.config.mask_ignore else None
        if self.standardize is not None:
            goal = self.standardize(goal, valid)
        return {"regression": feature_regression(feature, goal, valid)}
