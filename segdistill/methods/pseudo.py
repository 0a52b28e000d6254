"""Pseudo-labels: the teacher's most probable class at every pixel, as if somebody had drawn it."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from segdistill.config import Fraction, config
from segdistill.geometry import size_of
from segdistill.losses.blocks import align_logits, sum_over_images
from segdistill.losses.masks import valid_mask
from segdistill.losses.precision import in_float32
from segdistill.methods.method import MethodConfig, NonNegative, OfflineMethod
from segdistill.models.outputs import Outputs


@config
class PseudoConfig(MethodConfig):
    """Cross-entropy to the teacher's hard labels."""

    name: Literal["pseudo"] = "pseudo"
    weight: NonNegative = 1.0
    """Factor of the mean over pixels of the cross-entropy."""
    threshold: Fraction = 0.0
    """Leave out the pixels at which the teacher's most probable class is less probable than this."""
    upsample: bool = False
    """Compare at label size and not at the teacher's logit size."""


@in_float32
def hard_label_loss(student_logits: Tensor, teacher_logits: Tensor, valid: Tensor, *, threshold: float) -> Tensor:
    """Mean of -log p_student[c] over the valid pixels where c, the teacher's best class, is at least so probable.

    Shape:
        student_logits, teacher_logits: [B, K, ., .], resized to ``valid``; valid: [B, h, w] bool.
    """

    def sums(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
        confidence, classes = teacher.softmax(1).max(1)
        valid = valid & (confidence >= threshold)
        losses = torch.where(valid, F.cross_entropy(student, classes, reduction="none"), 0.0)
        return torch.stack([losses.sum(), valid.sum().to(losses)])

    logits = [student_logits, teacher_logits.detach()]
    total, count = sum_over_images(sums, logits, [valid], size_of(valid))
    return total / count.clamp_min(1)


class PseudoLabels(OfflineMethod[PseudoConfig]):
    """Pseudo-labels: cross-entropy to the teacher's hard labels, the simplest way to learn from images without labels.

    Example:
        pseudo_sure:
          students: {cnn: *cnn}
          methods: [{name: pseudo, threshold: 0.9}]

    Formula:
        ce = mean over valid pixels v with max_k p_teacher[v, k] >= threshold of -log p_student[v, c(v)], with
        c(v) = argmax_k p_teacher[v, k] and p = softmax(z) over classes. Without such a pixel ce is 0. Its least value
        is not where student and teacher agree, but where the student is sure of the teacher's class.

    Weights:
        1 makes a pixel of the teacher's count as one of the labels' does. Self-training in the literature sets the
        student's loss on images without labels to the same weight.

    Masks:
        Ignored pixels are left out. Images without labels count like the others; on labelled images the teacher's
        label stands beside the drawn one.

    Reference:
        Lee: Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks, ICML
        Workshop, 2013; with a teacher of its own: Xie et al., CVPR 2020, arXiv:1911.04252.
    """

    paper = "Lee, ICML Workshop 2013"
    needs = "logits"
    evidence = "public code"
    term = "ce"

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        config = self.config
        ours, theirs, labels = align_logits(student.logits, teacher.logits, target, upsample=config.upsample)
        return {"ce": hard_label_loss(ours, theirs, valid_mask(labels), threshold=config.threshold)}
