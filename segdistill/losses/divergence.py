"""The divergence between two networks' distributions."""

import functools

import torch
from torch import Tensor

from segdistill.losses.blocks import mean_over_pixels
from segdistill.losses.fused import fused
from segdistill.losses.precision import in_float32


def divergence(log_student: Tensor, log_teacher: Tensor, dim: int) -> Tensor:
    """KL(teacher || student) of log-probabilities along ``dim``, which is summed over and gone; nothing is detached.

    Shape:
        log_student, log_teacher: equal.
    """
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim)


@fused
@in_float32
def pixel_divergence(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """KL(teacher || student) at every pixel, with p = softmax(z / T) over classes; the teacher's side is detached.

    Shape:
        student_logits, teacher_logits: [B, K, h, w]; returns [B, h, w].
    """
    student = (student_logits / temperature).log_softmax(1)
    teacher = (teacher_logits.detach() / temperature).log_softmax(1)
    return divergence(student, teacher, 1)


def pixel_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    valid: Tensor | None = None,
    *,
    temperature: float = 1.0,
    align_corners: bool = False,
) -> Tensor:
    """T^2 * mean over valid pixels of KL(teacher || student), with p = softmax(z / T) over classes.

    The teacher's side is detached. The gradient at a valid pixel is T / M * (p_student - p_teacher) for M valid pixels.

    Args:
        valid: the pixels that count; None for all of the teacher's.

    Shape:
        student_logits, teacher_logits: [B, K, ., .], resized to ``valid``; valid: [B, h, w] bool.
    """
    if valid is None:
        valid = torch.ones_like(teacher_logits[:, 0], dtype=torch.bool)
    values = functools.partial(pixel_divergence, temperature=temperature)
    logits = [student_logits, teacher_logits.detach()]
    return mean_over_pixels(values, logits, [], valid, align_corners=align_corners) * temperature**2
