"""Sums over huge maps, a block of rows at a time: what would need the whole map keeps one block in memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def sum_over_blocks(
    term: Callable[..., Tensor], rows: Sequence[Tensor], *whole: Tensor, block: int, dim: int = 0
) -> Tensor:
    """The sum of ``term(*block of rows, *whole)`` over consecutive blocks of rows.

    Each block is computed again in the backward pass, so that the memory of one block bounds the memory of all. Value
    and gradient are those of ``term(*rows, *whole)`` if that is a sum over rows. Where one block holds all rows,
    nothing is computed twice.

    Args:
        rows: tensors with equally many rows along ``dim``, cut together.
        whole: tensors that every block sees.
        block: rows a block.

    Shape:
        returns a scalar.
    """
    count = rows[0].shape[dim]
    if count <= block:
        return term(*rows, *whole)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*rows, *whole))
    total = rows[0].new_zeros(())
    for parts in zip(*(tensor.split(block, dim) for tensor in rows), strict=True):
        if needs_grad:
            total = total + checkpoint(term, *parts, *whole, use_reentrant=False, preserve_rng_state=False)
        else:
            total = total + term(*parts, *whole)
    return total
