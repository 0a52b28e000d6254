"""The divergence between two networks' distributions."""

from torch import Tensor

from segdistill.losses.fused import fused
from segdistill.losses.masks import masked_mean
from segdistill.losses.precision import in_float32


def divergence(log_student: Tensor, log_teacher: Tensor, dim: int) -> Tensor:
    """KL(teacher || student) of log-probabilities along ``dim``, which is summed over and gone; nothing is detached.

    Shape:
        log_student, log_teacher: equal.
    """
    return (log_teacher.exp() * (log_teacher - log_student)).sum(dim)


@fused
@in_float32
def pixel_kl(
    student_logits: Tensor, teacher_logits: Tensor, valid: Tensor | None = None, *, temperature: float = 1.0
) -> Tensor:
    """T^2 * mean over valid pixels of KL(teacher || student), with p = softmax(z / T) over classes.

    The teacher's side is detached. The gradient at a valid pixel is T / M * (p_student - p_teacher) for M valid pixels.

    Args:
        valid: the pixels that count; None for all of them.

    Shape:
        student_logits, teacher_logits: [B, K, h, w]; valid: [B, h, w] bool.
    """
    student = (student_logits / temperature).log_softmax(1)
    teacher = (teacher_logits.detach() / temperature).log_softmax(1)
    return masked_mean(divergence(student, teacher, 1), valid) * temperature**2
