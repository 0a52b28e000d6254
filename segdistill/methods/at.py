"""Attention transfer: the student looks where the teacher looks."""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from segdistill.config import config
from segdistill.errors import UserError
from segdistill.geometry import average
from segdistill.losses.precision import in_float32
from segdistill.losses.vectors import unit
from segdistill.methods.method import MethodConfig, NonNegative, OfflineMethod
from segdistill.models.outputs import ModelInfo, Outputs, Tap

Pool = Literal["feature", "attention"]
Reduction = Literal["sum", "mean"]


@config
class ATConfig(MethodConfig):
    """Attention transfer at one tap or several."""

    name: Literal["at"] = "at"
    weight: NonNegative = 1.2
    """Factor of the squared distance of attention maps, as ``reduction`` takes it; 1.2 is CIRKD's 10000 as a sum."""
    taps: Annotated[tuple[Tap, ...], Field(min_length=1)] = ("last_feature",)
    """Where attention maps are compared; the distances of several taps are added."""
    reduction: Reduction = "sum"
    """What is done over the positions of a map: sum (portable) or mean (as published; depends on the map's size)."""
    pool: Pool = "feature"
    """What is averaged down where sizes differ: the larger side's feature, or its attention map."""


@in_float32
def attention(features: Tensor) -> Tensor:
    """The mean over channels of the squared feature.

    Shape:
        features: [B, C, h, w]; returns [B, 1, h, w].
    """
    return features.square().mean(1, keepdim=True)


@in_float32
def attention_distance(
    student: Tensor, teacher: Tensor, *, pool: Pool = "feature", reduction: Reduction = "sum"
) -> Tensor:
    """Mean over images of the squared distance of the two unit attention maps: between 0 and 2 as a sum.

    The teacher's side is detached. A dead map, all zero, stays zero and gets no gradient. Sizes may differ: what is
    larger is averaged down, along each axis.

    Shape:
        student: [B, C, h, w]; teacher: [B, D, h', w'].
    """
    size = min(student.shape[-2], teacher.shape[-2]), min(student.shape[-1], teacher.shape[-1])
    maps = []
    for features in (student, teacher.detach()):
        looks = attention(average(features, size)) if pool == "feature" else average(attention(features), size)
        maps.append(unit(looks.flatten(1), dim=1))  # [B, h * w]
    distance = (maps[0] - maps[1]).square()
    return distance.sum(1).mean() if reduction == "sum" else distance.mean()


class AttentionTransfer(OfflineMethod[ATConfig]):
    """Attention transfer (AT), with the activation-based attention map of exponent 2.

    Example:
        at_deep:
          students: {cnn: *cnn}
          methods: [{name: kd}, {name: at, taps: [stage4, last_feature]}]

    Formula:
        A = mean over channels of f^2, a = A / |A| over the h x w positions;
        L = sum over taps of mean over images of sum over positions of (a_student - a_teacher)^2.
        Each tap's part lies between 0 and 2. No projection: widths need not agree.

    Weights:
        Published codes take the mean over positions too, which is bounded by 2 / (h w): the natural weight then grows
        with the resolution. The weight here that equals a published w is w / (h w):

            CIRKD, last feature, 10000        1.2 at 64 x 128, 2.4 at 64 x 64, 4.9 at 45 x 45
            classification, stages, 1000      0.32 at 56 x 56, 1.3 at 28 x 28, 5.1 at 14 x 14

        Stages of different sizes have no common factor: ``reduction: mean`` with the published number reproduces them.

    Masks:
        None: no label enters, ignored pixels and images without labels are compared like the others.

    Inferred:
        Where sizes differ, the larger *feature* is pooled before it is squared, as public code does; ``pool:
        attention`` pools the map, in which opposite signs do not cancel. Both average the cells in each coarser cell.

    Reference:
        Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928. For segmentation, the
        default is the setting of CIRKD (Yang et al., CVPR 2022).
    """

    paper = "Zagoruyko and Komodakis, ICLR 2017"
    needs = "last feature, or several stages"
    evidence = "public code"
    term = "attention"

    def __init__(self, config: ATConfig, student: ModelInfo, teacher: ModelInfo) -> None:
        super().__init__(config, student, teacher)
        if len(set(config.taps)) < len(config.taps):
            raise UserError(f"at: a tap is named twice in {list(config.taps)}; every tap counts once")
        for tap in config.taps:
            teacher.require(tap)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        first, *others = (
            attention_distance(
                student.tap(tap), teacher.tap(tap), pool=self.config.pool, reduction=self.config.reduction
            )
            for tap in self.config.taps
        )
        return {"attention": sum(others, start=first)}
