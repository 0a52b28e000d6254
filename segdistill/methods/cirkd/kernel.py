"""Softmax, divergence and gradient of two sides' products in one pass over them, as a Triton kernel.

What it gives is what :mod:`segdistill.methods.cirkd.relations` computes with torch's own operations, in a dozen passes.
Only its :func:`~segdistill.methods.cirkd.relations.kernels` imports this module, where Triton works: it comes with
torch for CUDA and compiles on first use.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 32768
"""Columns a group may have: a row of a group is held in registers, on both sides."""
PER_WARP = 512


def divergence_and_slopes(
    student: Tensor,
    teacher: Tensor,
    sums: Tensor,
    slopes: Tensor | None,
    *,
    groups: int,
    counted: Tensor | None,
    absent: Tensor | None,
    temperature: float,
) -> None:
    """Writes each row's divergence in each group, and its slopes for the student's products.

    Args:
        slopes: where they go, in whichever precision it has; it may be ``student`` itself. None: nobody learns.

    Shape:
        student, teacher: [n, M] products, contiguous float32; sums: [n, groups] float32; slopes: [n, M], contiguous;
        counted: [n] bool; absent: [M] bool.
    """
    rows, columns = student.shape
    width = columns // groups
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(student):
        _divergence_and_slopes[(rows, groups)](
            student, teacher, sums, student if slopes is None else slopes,
            student if counted is None else counted, student if absent is None else absent,
            width, groups, 1 / temperature, slopes is not None, counted is not None, absent is not None, block,
            num_warps=min(max(block // PER_WARP, 1), 16),
        )  # fmt: skip


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def _divergence_and_slopes(  # type: ignore[no-untyped-def]
    student, teacher, sums, slopes, counted, absent, width, groups, scale,
    LEARN: tl.constexpr, COUNTED: tl.constexpr, ABSENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * (groups * width) + group * width + column
    log_student = tl.load(student + place, inside, other=-float("inf")) * scale
    log_teacher = tl.load(teacher + place, inside, other=-float("inf")) * scale
    if ABSENT:
        left_out = tl.load(absent + group * width + column, inside, other=0) & inside
        log_student = tl.where(left_out, -1e9, log_student)  # losses.LEFT_OUT
        log_teacher = tl.where(left_out, -1e9, log_teacher)
    log_student -= tl.max(log_student, 0)
    log_teacher -= tl.max(log_teacher, 0)
    # Exponentials are taken twice: to keep them would take registers, and so rows that are worked on at a time.
    log_student -= tl.log(tl.sum(tl.exp(log_student), 0))
    log_teacher -= tl.log(tl.sum(tl.exp(log_teacher), 0))
    share = tl.exp(log_teacher)
    divergence = tl.sum(tl.where(inside, share * (log_teacher - log_student), 0.0), 0)
    slope = (tl.exp(log_student) - share) * scale
    if COUNTED:
        counts = tl.load(counted + row)
        divergence = tl.where(counts, divergence, 0.0)
        slope = tl.where(counts, slope, 0.0)
    tl.store(sums + row * groups + group, divergence)
    if LEARN:
        tl.store(slopes + place, slope.to(slopes.dtype.element_ty), inside)
