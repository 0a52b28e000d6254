"""Attention and MLP of a transformer's first stage, as maps to maps of the same shape.

They share the network's weights and register nothing: it keeps its parameters, their names and its exported program.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from segdistill.errors import UserError

Call = Callable[[nn.Module, Tensor, int, int], Tensor]
"""Gives tokens [B, h * w, C] and their height and width to an attention or MLP as its library wants them."""


def as_tokens(maps: Tensor) -> Tensor:
    """[B, h * w, C] from [B, C, h, w]."""
    return maps.flatten(2).transpose(1, 2)


def as_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, C, h, w] from [B, h * w, C]."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


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
        maps = maps.to(self.norm.weight.dtype)  # type: ignore[arg-type]  # autocast may narrow both again
        bottom, right = -height % self.multiple, -width % self.multiple
        if bottom or right:
            maps = F.pad(maps, (0, right, 0, bottom), mode="replicate")
        tokens = self.scale(self.call(self.operator, self.norm(as_tokens(maps)), *maps.shape[-2:]))
        return as_map(tokens, *maps.shape[-2:])[..., :height, :width]


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


def loose_operators(channels: int) -> Operators:
    """The two of a PVTv2 block with linear attention, freshly drawn, for maps of so many channels.

    Every cell attends to the means of 7 x 7 windows, which bounds the attention matrix: at stride 4 the whole one would
    have a row and a column per 16 image pixels. The MLP is four times as wide, with a 3x3 depth-wise convolution.
    """
    from timm.models import pvt_v2

    attention = pvt_v2.Attention(channels, num_heads=1, linear_attn=True)
    mlp = pvt_v2.MlpWithDepthwiseConv(channels, 4 * channels)
    return Operators(
        *(Branch(nn.LayerNorm(channels), operator, nn.Identity(), _with_a_pair) for operator in (attention, mlp))
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
