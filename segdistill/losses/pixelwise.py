"""The divergence between two networks' class distributions, pixel by pixel."""

from torch import Tensor

from segdistill.losses.fused import fused
from segdistill.losses.masks import masked_mean
from segdistill.losses.precision import in_float32


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
    divergence = (teacher.exp() * (teacher - student)).sum(1)  # [B, h, w]
    return masked_mean(divergence, valid) * temperature**2
