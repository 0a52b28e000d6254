"""What low-level features go through: a layer borrowed from a student."""

import copy

import torch
from torch import Tensor, nn


class Borrowed:
    """A layer of somebody else's network, which training may or must not change. No module: it registers nothing.

    Args:
        module: the layer; its weights are read at every call.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._shell = copy.deepcopy(module).to("meta").eval()  # the structure alone, filled at every call

    def __call__(self, maps: Tensor) -> Tensor:
        """The layer as it is: gradients reach its weights."""
        return self.module(_fitting(self.module, maps))

    def frozen(self, maps: Tensor) -> Tensor:
        """The same with its weights as constants, and without dropout, so that two calls are the same function."""
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        weights = {name: tensor.detach() for name, tensor in named}
        return torch.func.functional_call(self._shell, weights, (_fitting(self.module, maps),))


def _fitting(module: nn.Module, maps: Tensor) -> Tensor:
    """Maps in the precision of the module's weights; autocast may narrow both again."""
    weight = next(module.parameters(), None)
    return maps if weight is None else maps.to(weight.dtype)
