"""Chains of element-wise operations over large maps as one kernel each, on GPUs where Triton works."""

import functools
import logging
from collections.abc import Callable
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
        if torch.compiler.is_compiling() or not _large(*args, *kwargs.values()) or not compiles():
            return function(*args, **kwargs)
        return compiled()(*args, **kwargs)

    return call


@functools.cache
def compiles() -> bool:
    """Whether functions can be compiled for the GPU; it needs Triton and a C compiler."""
    try:
        torch.compile(lambda maps: maps.exp() + 1)(torch.zeros(1, device="cuda"))
    except Exception as error:  # no Triton, no C compiler, a device too old: each fails in its own way
        logger.info("losses of large maps are not compiled, and slower: %s", error)
        return False
    return True


def _large(*values: object) -> bool:
    return any(isinstance(value, Tensor) and value.is_cuda and value.numel() >= LARGE for value in values)
