"""Decoupled knowledge distillation at every pixel: the labelled class against the rest, and the rest among itself."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from segdistill.config import config
from segdistill.errors import UserError
from segdistill.losses.blocks import align_logits, mean_over_pixels
from segdistill.losses.divergence import divergence
from segdistill.losses.masks import LEFT_OUT, labelled_mask
from segdistill.losses.precision import in_float32
from segdistill.methods.method import MethodConfig, NonNegative, OfflineMethod, Temperature
from segdistill.models.outputs import ModelInfo, Outputs


@config
class DKDConfig(MethodConfig):
    """Decoupled distillation of the logits; a warm-up of the paper's kind is ``ramp``."""

    name: Literal["dkd"] = "dkd"
    weight: NonNegative = 1.0
    """Factor of both terms, means over valid pixels."""
    target_weight: NonNegative = 1.0
    """alpha, of the divergence between labelled class and rest (TCKD); 0 is off."""
    non_target_weight: NonNegative = 1.0
    """beta, of the divergence within the rest (NCKD); 0 is off. To be tuned in 0.5, 1, 2, 8."""
    temperature: Temperature = 1.0
    """Divides both logits; the squared temperature multiplies the loss."""
    upsample: bool = False
    """Compare at label size and not at the teacher's logit size."""


@in_float32
def target_kl(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """T^2 * mean over valid pixels of KL([b, 1 - b] || [a, 1 - a]), b and a the labelled class's probabilities.

    The log-odds u = z_label - logsumexp of the other logits give log b = log sigmoid(u) and log(1 - b) =
    log sigmoid(-u): no probability is subtracted from 1, and none is rounded to 0 before its logarithm.

    Shape:
        student_logits, teacher_logits: [B, K, ., .], resized to the labels; labels: [B, h, w].
    """

    def values(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        labelled = _labelled(labels, student.shape[1])
        odds = (_log_odds(logits / temperature, labelled) for logits in (student, teacher))
        student, teacher = (torch.stack([F.logsigmoid(each), F.logsigmoid(-each)]) for each in odds)  # [2, B, h, w]
        return divergence(student, teacher, 0)

    logits = [student_logits, teacher_logits.detach()]
    return mean_over_pixels(values, logits, [labels], labelled_mask(labels)) * temperature**2


@in_float32
def non_target_kl(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """T^2 * mean over valid pixels of KL(teacher || student) among the classes other than the labelled one.

    Shape:
        student_logits, teacher_logits: [B, K, ., .], resized to the labels; labels: [B, h, w].
    """

    def values(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        labelled = _labelled(labels, student.shape[1])
        student, teacher = (
            (logits / temperature).masked_fill(labelled, LEFT_OUT).log_softmax(1) for logits in (student, teacher)
        )
        return divergence(student, teacher, 1)

    logits = [student_logits, teacher_logits.detach()]
    return mean_over_pixels(values, logits, [labels], labelled_mask(labels)) * temperature**2


class Decoupled(OfflineMethod[DKDConfig]):
    """Decoupled knowledge distillation (DKD), pixel-wise.

    Example:
        dkd_strong:
          students: {cnn: *cnn}
          methods: [{name: dkd, target_weight: 1.0, non_target_weight: 8.0, temperature: 4.0, ramp: 0.083}]

    Formula:
        At a valid pixel with label y let b = p_teacher[y] and a = p_student[y], p = softmax(z / T), and let q be p
        without y, renormalised over the K - 1 other classes.

        target      TCKD = T^2 * mean over valid pixels of KL([b, 1 - b] || [a, 1 - a])
        non_target  NCKD = T^2 * mean over valid pixels of KL(q_teacher || q_student)

        L = alpha TCKD + beta NCKD. Plain KD is TCKD + (1 - b) NCKD at each pixel: beta frees the second part from
        the teacher's confidence.

    Weights:
        All published losses are means over samples, here over valid pixels, so their numbers carry over:

            C2VKD's repository (segmentation)   alpha 0.5, beta 0.5, T 1: weight 0.5 here
            mdistiller, ImageNet                alpha 1, beta 0.5, T 1
            mdistiller, CIFAR-100               alpha 1, beta 8, T 4, warm-up over 20 of 240 epochs: ramp 0.083

        No default is accepted for segmentation. Ours is alpha = beta = 1: the even balance of the one public setting
        for segmentation, at the scale of plain KD. A large beta needs the warm-up.

    Masks:
        Pixels without a label are always left out, since both terms need the label; images without labels teach
        nothing here, unless they have ``pseudo_labels``.

    Inferred:
        The paper classifies images. One pixel as one sample is a re-implementation in the manner of later
        segmentation code.

    Reference:
        Zhao et al.: Decoupled Knowledge Distillation, CVPR 2022, arXiv:2203.08679.
    """

    paper = "Zhao et al., CVPR 2022"
    needs = "logits, labels"
    evidence = "official code"

    def __init__(self, config: DKDConfig, student: ModelInfo, teacher: ModelInfo) -> None:
        super().__init__(config, student, teacher)
        if student.num_classes < 2:
            raise UserError(f"dkd parts the labelled class from the others and needs two, not {student.num_classes}")

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        config = self.config
        aligned = align_logits(student.logits, teacher.logits, target, upsample=config.upsample)
        losses = {"target": target_kl, "non_target": non_target_kl}
        return {term: losses[term](*aligned, temperature=config.temperature) for term in self.weights}


def _labelled(labels: Tensor, num_classes: int) -> Tensor:
    """True at each pixel's labelled class, [B, K, h, w]; at an ignored pixel, which is masked later, at some class."""
    classes = torch.arange(num_classes, device=labels.device)[:, None, None]
    return labels.clamp_max(num_classes - 1)[:, None] == classes


def _log_odds(logits: Tensor, labelled: Tensor) -> Tensor:
    """Of the labelled class against all others, [B, h, w]."""
    return torch.where(labelled, logits, 0.0).sum(1) - logits.masked_fill(labelled, LEFT_OUT).logsumexp(1)
