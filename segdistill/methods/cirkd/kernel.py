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
    ours = tl.load(student + place, inside, other=-float("inf")) * scale
    theirs = tl.load(teacher + place, inside, other=-float("inf")) * scale
    if ABSENT:
        left_out = tl.load(absent + group * width + column, inside, other=0) & inside
        ours = tl.where(left_out, -1e9, ours)
        theirs = tl.where(left_out, -1e9, theirs)
    ours -= tl.max(ours, 0)
    theirs -= tl.max(theirs, 0)
    # Exponentials are taken twice: to keep them would take registers, and so rows that are worked on at a time.
    ours -= tl.log(tl.sum(tl.exp(ours), 0))
    theirs -= tl.log(tl.sum(tl.exp(theirs), 0))
    share = tl.exp(theirs)
    divergence = tl.sum(tl.where(inside, share * (theirs - ours), 0.0), 0)
    slope = (tl.exp(ours) - share) * scale
    if COUNTED:
        counts = tl.load(counted + row)
        divergence = tl.where(counts, divergence, 0.0)
        slope = tl.where(counts, slope, 0.0)
    tl.store(sums + row * groups + group, divergence)
    if LEARN:
        tl.store(slopes + place, slope.to(slopes.dtype.element_ty), inside)
