"""The decoupled divergence of C2VKD: the labelled class against everything else, pulled between teacher and label.

With m the logit of the labelled class minus the logsumexp of all others, a pixel's two-way distribution is sigmoid(m)
and sigmoid(-m). Logarithms come from log-sigmoid: exact at either end, never log(0), and nothing to clamp.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from segdistill.losses.blocks import mean_over_pixels
from segdistill.losses.fused import fused
from segdistill.losses.masks import labelled_mask
from segdistill.losses.precision import in_float32


def blended_two_way(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    target_factor: float = 0.5,
    other_factor: float = 0.5,
    normalized: bool = True,
) -> Tensor:
    """Mean over valid pixels of a * s_y log(s_y / q_y) + b * s_n log(s_n / q_n), q = (t + (1, 0)) / 2.

    s and t are the two-way distributions of student and teacher, whose side is detached; (1, 0) is the label's.

    Args:
        normalized: false leaves out the division of q by 2. With a = b this takes a log 2 from the value and nothing
            from the gradient; with a != b the gradient differs too.

    Shape:
        student_logits, teacher_logits: [B, K, ., .], K at least 2, resized to the labels; labels: [B, h, w] int64.
    """
    valid = labelled_mask(labels)
    values = functools.partial(
        _two_way_divergence,
        target_factor=target_factor,
        other_factor=other_factor,
        halved=math.log(2) if normalized else 0.0,
    )
    logits, indices = [student_logits, teacher_logits.detach()], labels.masked_fill(~valid, 0)
    return mean_over_pixels(values, logits, [indices], valid)


@fused
@in_float32
def _two_way_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    target_factor: float,
    other_factor: float,
    halved: float,
) -> Tensor:
    """The values at all pixels, of which the labels are classes: [B, h, w]."""
    index = labels[:, None]
    student, teacher = _log_odds(student_logits, index), _log_odds(teacher_logits, index)  # [B, h, w]
    log_s_target, log_s_other = F.logsigmoid(student), F.logsigmoid(-student)
    log_q_target, log_q_other = teacher.sigmoid().log1p(), F.logsigmoid(-teacher)
    target = log_s_target.exp() * (log_s_target - log_q_target + halved)
    other = log_s_other.exp() * (log_s_other - log_q_other + halved)
    return target_factor * target + other_factor * other


def _log_odds(logits: Tensor, index: Tensor) -> Tensor:
    """How far the labelled class stands above all others together: [B, h, w]."""
    others = logits.scatter(1, index, -torch.inf)
    return logits.gather(1, index)[:, 0] - others.logsumexp(1)
