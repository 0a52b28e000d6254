"""The decoupled divergence of C2VKD: the labelled class against everything else, pulled between teacher and label.

With m the logit of the labelled class minus the logsumexp of all others, a pixel's two-way distribution is sigmoid(m)
and sigmoid(-m). Logarithms come from log-sigmoid: exact at either end, never log(0), and nothing to clamp.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from segdistill.losses import in_float32, labelled_mask, masked_mean
from segdistill.losses.fused import fused


@fused
@in_float32
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
        student_logits, teacher_logits: [B, K, h, w], K at least 2; labels: [B, h, w] int64.
    """
    valid = labelled_mask(labels)
    index = labels.masked_fill(~valid, 0)[:, None]
    student, teacher = _log_odds(student_logits, index), _log_odds(teacher_logits.detach(), index)  # [B, h, w]
    log_s_target, log_s_other = F.logsigmoid(student), F.logsigmoid(-student)
    log_q_target, log_q_other = teacher.sigmoid().log1p(), F.logsigmoid(-teacher)
    halved = math.log(2) if normalized else 0.0
    target = log_s_target.exp() * (log_s_target - log_q_target + halved)
    other = log_s_other.exp() * (log_s_other - log_q_other + halved)
    return masked_mean(target_factor * target + other_factor * other, valid)


def _log_odds(logits: Tensor, index: Tensor) -> Tensor:
    """How far the labelled class stands above all others together: [B, h, w]."""
    others = logits.scatter(1, index, -torch.inf)
    return logits.gather(1, index)[:, 0] - others.logsumexp(1)
