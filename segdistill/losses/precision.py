"""Losses are computed in float32, whatever precision the networks ran in."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
_HALF = (torch.float16, torch.bfloat16)


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Runs a function with autocast off and its half-precision tensors widened to float32.

    float64 stays float64, so that a loss can be checked against its formula in full precision.
    """

    @functools.wraps(function)
    def wide(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(value.device.type for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with _without_autocast(device):
            return function(
                *[_widen(value) for value in args],  # type: ignore[arg-type]
                **{name: _widen(value) for name, value in kwargs.items()},  # type: ignore[arg-type]
            )

    # A code object of its own: torch.compile counts recompilations by it, and all wrapped functions would share one.
    wide.__code__ = wide.__code__.replace(co_name=function.__name__)  # type: ignore[attr-defined]
    return wide


def product(first: Tensor, second: Tensor, *, half: bool) -> Tensor:
    """The matrix product of two matrices, without gradient, summed in float32.

    Args:
        half: round the factors to bfloat16, for which GPUs have units many times as fast. For features that came in
            half precision this costs no more than they lack already.

    Shape:
        first: [N, M]; second: [M, L]; returns [N, L].
    """
    if not half:
        return first @ second
    first, second = first.bfloat16(), second.bfloat16()
    if first.is_cuda:
        return torch.mm(first, second, out_dtype=torch.float32)
    return first.float() @ second.float()  # the same numbers where there are no such units


def add_product(total: Tensor, first: Tensor, second: Tensor, *, half: bool) -> None:
    """Adds :func:`product` to a matrix, in place.

    Shape:
        total: [N, L], float32 if half; first: [N, M]; second: [M, L].
    """
    if half and total.is_cuda:
        torch.addmm(total, first.bfloat16(), second.bfloat16(), out_dtype=torch.float32, out=total)
    else:
        total += product(first, second, half=half)


def is_half(*tensors: Tensor) -> bool:
    """Whether all of them came in half precision."""
    return all(tensor.dtype in _HALF for tensor in tensors)


def _widen(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and is_half(value) else value


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    # Not torch.amp.is_autocast_available: older compilers cannot trace it, and cut every loss into three graphs.
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
