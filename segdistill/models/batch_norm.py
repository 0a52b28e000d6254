"""Batch normalisation where there is no batch to speak of, and across processes."""

import functools

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def allow_single_values(network: nn.Module) -> None:
    """Lets every batch normalisation take its running statistics where a batch has but one value per channel.

    Global pooling (ASPP, PSP, split attention) of a batch of one, or a crop of one cell, leaves nothing to compute a
    variance from, and PyTorch then raises. Any other input is treated as before; parameters and their names stay.
    """
    for module in network.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, _SingleValue):
            module.__class__ = _allowing(type(module))  # type: ignore[assignment, arg-type]


def synchronised(network: nn.Module) -> nn.Module:
    """The network with statistics over the batches of all processes, which is never a single value.

    timm's, because PyTorch's own replaces a layer that is norm and activation in one (most of timm's encoders) by a
    norm alone: the network would lose its activations without a word.
    """
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(network)  # type: ignore[no-any-return]


class _SingleValue(_BatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        if not self.training or input.numel() > input.shape[1]:
            return super().forward(input)
        self.training = False
        try:
            return super().forward(input)
        finally:
            self.training = True


@functools.cache
def _allowing(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"SingleValue{kind.__name__}", (_SingleValue, kind), {})
