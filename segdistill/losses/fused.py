"""Chains of element-wise operations over large maps as one kernel each, on GPUs where Triton works."""

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
LARGE = 2**24
"""Elements of a map from which on compiling pays: 8 maps of 360x480 of 11 classes are fewer, of 512x1024 of 19 more."""

logger = logging.getLogger(__name__)


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Compiles a function for large maps on a GPU, on first use, so that it reads and writes each map once.

    Everywhere else, and within a program that is compiled as a whole, it is the function as it stands. Compiling takes
    seconds, which small maps would never bring back; torch's own TORCH_COMPILE_DISABLE=1 forbids it.
    """

    @functools.cache  # on first use, because the compiler alone takes seconds to import
    def compiled() -> Callable[P, R]:
        return torch.compile(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or not _large(*args, *kwargs.values()) or kernels() is None:
            return function(*args, **kwargs)
        return compiled()(*args, **kwargs)

    return call


@functools.cache
def kernels() -> ModuleType | None:
    """Our own Triton kernels, or None without Triton or without what it compiles with."""
    try:
        module = importlib.import_module("segdistill.losses.relation_kernel")
        products, sums = torch.zeros(1, 16, device="cuda"), torch.empty(1, 1, device="cuda")
        module.divergence_and_slopes(
            products, products, sums, None, groups=1, counted=None, absent=None, temperature=1.0
        )
    except Exception as error:  # no Triton, no C compiler, a device too old: each fails in its own way
        logger.info("losses are computed without kernels of their own, more slowly: %s", error)
        return None
    return module


def _large(*values: object) -> bool:
    return any(isinstance(value, Tensor) and value.is_cuda and value.numel() >= LARGE for value in values)
