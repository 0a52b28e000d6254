"""Losses are computed in float32, whatever precision the networks ran in."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


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

    return wide


def _widen(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
