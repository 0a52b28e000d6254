"""The divergence between two sides' relations, value and gradient in one pass over maps that are never whole in memory.

A row's relation is the softmax of its products with all columns of a group. Rows times columns is a map that grows with
the square of the pixels. It is made a block of rows at a time, on both sides, and with it at hand the gradient is one
difference and two more products: nothing is kept for a backward pass, and nothing is computed twice.
"""

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from segdistill.losses.masks import LEFT_OUT
from segdistill.losses.precision import add_product, product

logger = logging.getLogger(__name__)


def relation_kl(
    student_rows: Tensor,
    student_columns: Tensor,
    teacher_rows: Tensor,
    teacher_columns: Tensor,
    *,
    groups: int = 1,
    counted: Tensor | None = None,
    absent: Tensor | None = None,
    temperature: float,
    block_rows: int,
    half: bool = False,
) -> Tensor:
    """The sum over rows and groups of columns of KL(teacher || student), with P = softmax(row . columns / temperature).

    Gradients go to the student's rows and columns, each if it wants one.

    Args:
        groups: how many equal groups the columns fall into; there is a softmax over each.
        counted: the rows that count; None for all.
        absent: the columns that do not exist; None for none.
        block_rows: rows in memory at a time; changes neither value nor gradient.
        half: round the factors of products; see ``losses.precision.product``.

    Shape:
        student_rows: [N, C]; student_columns: [M, C]; teacher_rows: [N, D]; teacher_columns: [M, D]; counted: [N] bool;
        absent: [M] bool; returns a scalar.
    """
    wanted = torch.is_grad_enabled()
    total, _, _ = _relation_kl(
        student_rows, student_columns, teacher_rows.detach(), teacher_columns.detach(), counted, absent, groups,
        temperature, block_rows, half, wanted and student_rows.requires_grad, wanted and student_columns.requires_grad,
    )  # fmt: skip
    return total


@torch.library.custom_op("segdistill::relation_kl", mutates_args=())
def _relation_kl(
    student_rows: Tensor, student_columns: Tensor, teacher_rows: Tensor, teacher_columns: Tensor,
    counted: Tensor | None, absent: Tensor | None, groups: int, temperature: float, block_rows: int, half: bool,
    rows_learn: bool, columns_learn: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum, and its gradients for the student's rows and columns (empty where nobody learns).

    One operator for torch.compile, which would otherwise unroll the loop over blocks.
    """
    total = student_rows.new_zeros(())
    row_slopes = torch.empty_like(student_rows) if rows_learn else student_rows.new_empty(0)
    column_slopes = torch.zeros_like(student_columns) if columns_learn else student_rows.new_empty(0)
    if half:  # once, and not for every block
        student_rows, student_columns, teacher_rows, teacher_columns = (
            vectors.bfloat16() for vectors in (student_rows, student_columns, teacher_rows, teacher_columns)
        )
    learn = rows_learn or columns_learn
    fused = _fused(total, len(student_columns) // groups)
    for start in range(0, len(student_rows), block_rows):
        block = slice(start, start + block_rows)
        student = product(student_rows[block], student_columns.mT, half=half)
        teacher = product(teacher_rows[block], teacher_columns.mT, half=half)
        counts = None if counted is None else counted[block]
        step = fused or _divergence_and_slopes
        divergence, slopes = step(
            student, teacher, groups=groups, counted=counts, absent=absent, temperature=temperature, half=half,
            learn=learn,
        )  # fmt: skip
        total += divergence
        if rows_learn:
            row_slopes[block] = product(slopes, student_columns, half=half)
        if columns_learn:
            add_product(column_slopes, slopes.mT, student_rows[block], half=half)
    return total, row_slopes, column_slopes


@_relation_kl.register_fake
def _(student_rows: Tensor, student_columns: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    rows_learn, columns_learn = rest[-2:]
    nothing = student_rows.new_empty(0)
    row_slopes = torch.empty_like(student_rows) if rows_learn else nothing
    column_slopes = torch.empty_like(student_columns) if columns_learn else student_rows.new_empty(0)
    return student_rows.new_empty(()), row_slopes, column_slopes


def _keep(ctx: object, inputs: tuple[object, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output[1:])  # type: ignore[attr-defined]


def _scale(ctx: object, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    slopes = [gradient * each if each.numel() else None for each in ctx.saved_tensors]  # type: ignore[attr-defined]
    return (*slopes, *[None] * 10)


_relation_kl.register_autograd(_scale, setup_context=_keep)


def _divergence_and_slopes(
    student: Tensor, teacher: Tensor, *, groups: int, counted: Tensor | None, absent: Tensor | None,
    temperature: float, half: bool, learn: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum of the divergences, and its slopes for the student's products (of no meaning unless somebody learns).

    Shape:
        student, teacher: [n, M] products, overwritten here; returns a scalar and [n, M].
    """
    student, teacher = (_log_relation(products, absent, groups, temperature) for products in (student, teacher))
    share = teacher.exp()  # [n, M]; a row that does not count has none
    if counted is not None:
        share *= counted[:, None]
    divergence = torch.linalg.vecdot(share, teacher.sub_(student)).sum()
    if not learn:
        return divergence, share
    slopes = student.exp_()
    if counted is not None:
        slopes *= counted[:, None]
    slopes.sub_(share).div_(temperature)
    return divergence, slopes.bfloat16() if half else slopes


def _log_relation(products: Tensor, absent: Tensor | None, groups: int, temperature: float) -> Tensor:
    """Log-probabilities of each row's relation to the columns of each group: [n, M]."""
    products.div_(temperature)
    if absent is not None:
        products.masked_fill_(absent, LEFT_OUT)
    return products.unflatten(1, (groups, -1)).log_softmax(2).flatten(1)


def _fused(like: Tensor, width: int) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """:func:`_divergence_and_slopes` as one kernel, where that works."""
    if not like.is_cuda or like.dtype != torch.float32 or not (kernel := kernels()) or width > kernel.WIDEST:
        return None
    return functools.partial(_by_kernel, kernel.divergence_and_slopes)


@functools.cache
def kernels() -> ModuleType | None:
    """Our own Triton kernel's module, or None without Triton or without what it compiles with."""
    try:
        from segdistill.methods.cirkd import kernel

        products, sums = torch.zeros(1, 16, device="cuda"), torch.empty(1, 1, device="cuda")
        kernel.divergence_and_slopes(
            products, products, sums, None, groups=1, counted=None, absent=None, temperature=1.0
        )
    except Exception as error:  # no Triton, no C compiler, a device too old: each fails in its own way
        logger.info("cirkd computes relations without a kernel of its own, more slowly: %s", error)
        return None
    return kernel


def _by_kernel(
    kernel: Callable[..., None], student: Tensor, teacher: Tensor, *, groups: int, half: bool, learn: bool, **how: Any
) -> tuple[Tensor, Tensor]:
    sums = student.new_empty(len(student), groups)
    slopes = torch.empty_like(student, dtype=torch.bfloat16) if half else student
    kernel(student, teacher, sums, slopes if learn else None, groups=groups, **how)
    return sums.sum(), slopes
