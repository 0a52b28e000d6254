"""What low-level features go through: a layer borrowed from a student, or loose attention and MLP."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segdistill.models.operators import as_map, as_tokens


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


class PooledAttention(nn.Module):
    """Norm and multi-head attention from every cell to the means of at most ``grid`` x ``grid`` windows of the map.

    The pooling bounds the attention matrix, which at stride 4 would have a row and a column per 16 image pixels.
    """

    def __init__(self, channels: int, *, heads: int, grid: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be divided among {heads} heads")
        self.heads, self.grid = heads, grid
        self.norm = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels)
        self.key_value = nn.Linear(channels, 2 * channels)
        self.project = nn.Linear(channels, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Shape: [B, C, h, w], returned as such."""
        height, width = maps.shape[-2:]
        maps = maps.to(self.query.weight.dtype)
        pooled = F.adaptive_avg_pool2d(maps, (min(height, self.grid), min(width, self.grid)))
        query = self._split(self.query(self.norm(as_tokens(maps))))  # [B, heads, h * w, C / heads]
        key, value = map(self._split, self.key_value(self.norm(as_tokens(pooled))).chunk(2, -1))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return as_map(self.project(attended), height, width)

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class ConvMLP(nn.Module):
    """Norm and an MLP over channels with a 3x3 depth-wise convolution inside, as in a Mix-FFN."""

    def __init__(self, channels: int, *, expansion: int) -> None:
        super().__init__()
        hidden = expansion * channels
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, kernel_size=3, padding=1, groups=hidden)
        self.narrow = nn.Linear(hidden, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Shape: [B, C, h, w], returned as such."""
        wide = self.widen(self.norm(as_tokens(maps.to(self.widen.weight.dtype))))
        mixed = self.depthwise(as_map(wide, *maps.shape[-2:]))
        return as_map(self.narrow(as_tokens(F.gelu(mixed))), *maps.shape[-2:])


def _fitting(module: nn.Module, maps: Tensor) -> Tensor:
    """Maps in the precision of the module's weights; autocast may narrow both again."""
    weight = next(module.parameters(), None)
    return maps if weight is None else maps.to(weight.dtype)
