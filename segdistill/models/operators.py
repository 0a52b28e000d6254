"""Attention and MLP as maps to maps of the same shape: those of a transformer's first stage, and loose ones.

What is borrowed from a network (:func:`first_stage_operators`, :class:`Borrowed`) shares its weights and registers
nothing: the network keeps its parameters, their names and its exported program.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segdistill.errors import UserError

Call = Callable[[nn.Module, Tensor, int, int], Tensor]
"""Gives tokens [B, h * w, C] and their height and width to an attention or MLP as its library wants them."""


class Operators(NamedTuple):
    """The two branches of a transformer block."""

    attention: nn.Module
    mlp: nn.Module


class Branch(nn.Module):
    """A residual branch of a block, norm and operator and scale, without the residual and without drop path.

    Args:
        norm, operator, scale: layers of the block.
        call: how the operator takes its tokens.
        multiple: what height and width must be a multiple of. Other maps are padded at the bottom and right by
            repeating the edge, as the segmenter pads its images, and the result is cropped.
    """

    def __init__(self, norm: nn.Module, operator: nn.Module, scale: nn.Module, call: Call, multiple: int = 1) -> None:
        super().__init__()
        self.norm, self.operator, self.scale = norm, operator, scale
        self.call, self.multiple = call, multiple

    def forward(self, maps: Tensor) -> Tensor:
        """Shape: [B, C, h, w], returned as such."""
        height, width = maps.shape[-2:]
        bottom, right = -height % self.multiple, -width % self.multiple
        if bottom or right:
            maps = F.pad(maps, (0, right, 0, bottom), mode="replicate")
        tokens = self.scale(self.call(self.operator, self.norm(_tokens(maps)), *maps.shape[-2:]))
        return _map(tokens, *maps.shape[-2:])[..., :height, :width]


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
        query = self._split(self.query(self.norm(_tokens(maps))))  # [B, heads, h * w, C / heads]
        key, value = map(self._split, self.key_value(self.norm(_tokens(pooled))).chunk(2, -1))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return _map(self.project(attended), height, width)

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
        wide = self.widen(self.norm(_tokens(maps.to(self.widen.weight.dtype))))
        mixed = self.depthwise(_map(wide, *maps.shape[-2:]))
        return _map(self.narrow(_tokens(F.gelu(mixed))), *maps.shape[-2:])


def first_stage_operators(encoder: nn.Module, name: str) -> Operators:
    """Attention and MLP of the last block of a transformer encoder's first stage, with the encoder's own weights.

    They map the feature that the stage gives, at any size.

    Args:
        name: the encoder's, for the message.

    Raises:
        UserError: an encoder without such a block, or one whose block is not known here.
    """
    # Here, because the methods import this module, and reading a method's parameters needs no network.
    from segmentation_models_pytorch.encoders.mix_transformer import MixVisionTransformer
    from segmentation_models_pytorch.encoders.timm_vit import TimmViTEncoder
    from timm.models import pvt_v2, vision_transformer

    # The libraries' blocks, by attribute; their types are unknown to the type checker.
    block: Any
    stages = (module for module in encoder.modules() if isinstance(module, pvt_v2.PyramidVisionTransformerStage))
    pyramid: Any = next(stages, None)
    if isinstance(encoder, MixVisionTransformer):
        block = encoder.block1[-1]
        return _branches(block, _with_two_numbers, block.attn.sr_ratio)
    if pyramid is not None:
        block = pyramid.blocks[-1]
        strided = block.attn.pool is None and block.attn.sr is not None
        return _branches(block, _with_a_pair, block.attn.sr.stride[0] if strided else 1)
    if isinstance(encoder, TimmViTEncoder) and hasattr(encoder.model, "blocks"):
        block = encoder.model.blocks[encoder._output_indices[0]]
        if type(block) is vision_transformer.Block:
            return _branches(block, _alone, 1)
    raise UserError(
        f"encoder '{name}' has no attention and MLP that can be borrowed;"
        " mit_b0 to mit_b5, pvt_v2_* and, with architecture DPT, plain vision transformers (vit_*, deit_*) have"
    )


def _branches(block: Any, call: Call, multiple: int) -> Operators:
    # Plain vision transformers may scale their branches; the pyramids do not.
    scales = [getattr(block, scale, nn.Identity()) for scale in ("ls1", "ls2")]
    return Operators(
        Branch(block.norm1, block.attn, scales[0], call, multiple), Branch(block.norm2, block.mlp, scales[1], call)
    )


def _with_two_numbers(operator: nn.Module, tokens: Tensor, height: int, width: int) -> Tensor:
    return operator(tokens, height, width)


def _with_a_pair(operator: nn.Module, tokens: Tensor, height: int, width: int) -> Tensor:
    return operator(tokens, (height, width))


def _alone(operator: nn.Module, tokens: Tensor, height: int, width: int) -> Tensor:
    return operator(tokens)


def _fitting(module: nn.Module, maps: Tensor) -> Tensor:
    """Maps in the precision of the module's weights; autocast may narrow both again."""
    weight = next(module.parameters(), None)
    return maps if weight is None else maps.to(weight.dtype)


def _tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)  # [B, h * w, C]


def _map(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (height, width))
