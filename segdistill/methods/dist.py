"""DIST: the student's probabilities need only correlate with the teacher's, pixel by pixel and class by class."""

from typing import Literal

import torch
from torch import Tensor

from segdistill.config import config
from segdistill.geometry import resize_labels, size_of
from segdistill.losses.align import resize_logits
from segdistill.losses.masks import masked_mean, valid_mask
from segdistill.losses.precision import in_float32
from segdistill.methods.method import MethodConfig, NonNegative, OfflineMethod, Temperature
from segdistill.models.outputs import Outputs

EPS = 1e-8  # official code: added to the product of the norms


@config
class DISTConfig(MethodConfig):
    """Correlation of the predictions; the defaults are the official code's."""

    name: Literal["dist"] = "dist"
    weight: NonNegative = 1.0
    """Factor of all terms."""
    inter_weight: NonNegative = 1.0
    """beta, of the correlation over the classes at each pixel; 0 is off."""
    intra_weight: NonNegative = 1.0
    """gamma, of the correlation over the batch's pixels for each class; 0 is off."""
    aux_weight: NonNegative = 0.4
    """Factor of the same two between the auxiliary heads, if both networks have one; 0 is off."""
    temperature: Temperature = 1.0
    """Divides both logits."""
    squared_temperature: bool = False
    """Multiply by the squared temperature, as the classification code does and the segmentation code does not."""
    mask_ignore: bool = True
    """Leave out ignored pixels; the official code does not."""
    upsample: bool = False
    """Compare at label size and not at the teacher's logit size."""


@in_float32
def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """softmax(z / T) over classes, [B, K, h, w]."""
    return (logits / temperature).softmax(1)


@in_float32
def inter_distance(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    """1 - mean over valid pixels of the correlation, over classes, of the two distributions; 0 without a valid pixel.

    Shape:
        student, teacher: [B, K, h, w] probabilities; valid: [B, h, w] bool, None for all pixels.
    """
    student, teacher = (maps - maps.mean(1, keepdim=True) for maps in (student, teacher.detach()))
    return masked_mean(1 - _cosine(student, teacher, dim=[1]), valid)


@in_float32
def intra_distance(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    """1 - mean over classes of the correlation, over all valid pixels of the batch; 0 without a valid pixel.

    Pixels are left out by a factor of 0 after centring on the valid ones' mean: that is the correlation of the valid
    pixels alone, without the host having to know how many there are.

    Shape:
        student, teacher: [B, K, h, w] probabilities; valid: [B, h, w] bool, None for all pixels.
    """
    pixels = [0, 2, 3]
    if valid is None:
        student, teacher = (maps - maps.mean(pixels, keepdim=True) for maps in (student, teacher.detach()))
        return 1 - _cosine(student, teacher, dim=pixels).mean()
    counts = valid[:, None].to(student.dtype)  # [B, 1, h, w]
    number = counts.sum().clamp_min(1)
    student, teacher = (
        (maps - (maps * counts).sum(pixels, keepdim=True) / number) * counts for maps in (student, teacher.detach())
    )
    return torch.where(valid.any(), 1 - _cosine(student, teacher, dim=pixels).mean(), 0.0)


class Correlation(OfflineMethod[DISTConfig]):
    """DIST: knowledge distillation from a stronger teacher, by correlation instead of divergence.

    Example:
        dist_soft:
          students: {cnn: *cnn}
          methods: [{name: dist, inter_weight: 1.0, intra_weight: 2.0, temperature: 2.0}]

    Formula:
        p = softmax(z / T) over classes, rho the Pearson correlation (centre, then cosine, 1e-8 added to the norms):

        inter  1 - mean over valid pixels of rho(p_student[v, :], p_teacher[v, :])
        intra  1 - mean over classes of rho(p_student[:, c], p_teacher[:, c]), all valid pixels of the batch in one row
        aux    inter_weight * inter + intra_weight * intra of the auxiliary heads' logits

    Weights:
        The official code's numbers are those of this reduction. At T = 1, as published, ``squared_temperature`` is
        without effect.

    Masks:
        The official code masks nothing (``mask_ignore: false``). Images without labels are correlated like the others.
        A class that is absent has an almost constant probability; the 1e-8 takes its correlation to 0, so it adds up
        to 1 / K to intra. With several processes each correlates its own part of the batch.

    Inferred:
        The mask is ours (re-implementation). The published comparison also trains with a floor under the learning
        rate, which is not part of this loss.

    Reference:
        Huang et al.: Knowledge Distillation from A Stronger Teacher, NeurIPS 2022, arXiv:2205.10536.
    """

    paper = "Huang et al., NeurIPS 2022"
    needs = "logits; auxiliary logits where both networks have them"
    evidence = "official code"

    def term_weights(self) -> dict[str, float]:
        weights = super().term_weights()
        if not (self.student_info.aux and self.teacher_info.aux and (weights["inter"] or weights["intra"])):
            weights["aux"] = 0.0
        return weights

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        terms = self._distances(student.logits, teacher.logits, target)
        if "aux" in self.weights:
            assert student.aux_logits is not None and teacher.aux_logits is not None
            distances = self._distances(student.aux_logits, teacher.aux_logits, target)
            factors = self.term_weights()
            terms["aux"] = torch.stack([factors[term] * loss for term, loss in distances.items()]).sum()
        return terms

    def _distances(self, student: Tensor, teacher: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The two distances that are switched on, between logits of any size."""
        config = self.config
        size = size_of(target if config.upsample else teacher)
        student, teacher = (
            probabilities(resize_logits(logits, size), config.temperature) for logits in (student, teacher.detach())
        )
        labels = resize_labels(target, size)
        valid = valid_mask(labels) if config.mask_ignore else None
        scale = config.temperature**2 if config.squared_temperature else 1.0
        distances = {"inter": inter_distance, "intra": intra_distance}
        return {
            term: scale * distance(student, teacher, valid)
            for term, distance in distances.items()
            if term in self.weights
        }


def _cosine(first: Tensor, second: Tensor, dim: list[int]) -> Tensor:
    lengths = torch.linalg.vector_norm(first, dim=dim) * torch.linalg.vector_norm(second, dim=dim)
    return (first * second).sum(dim) / (lengths + EPS)
