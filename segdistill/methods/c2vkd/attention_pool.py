"""CLIP's attention pool, frozen, from a local file: one vector an image, in the space that CLIP shares with text."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from segdistill.errors import UserError
from segdistill.losses.precision import in_float32

PREFIX = "visual.attnpool."
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "c_proj")
_KEYS = ("positional_embedding", *(f"{name}.{part}" for name in _PROJECTIONS for part in ("weight", "bias")))


class AttentionPool(nn.Module):
    """Multi-head attention over an image's tokens, in which their mean asks and an output projection answers.

    The mean of the tokens is put before them, and learned positions, resized bilinearly to the feature's grid, are
    added. Only the mean token's answer is wanted, so keys and values are never formed: the query goes through the key
    projection to the tokens, and the attended mean of the tokens through the value projection. Equal to the whole
    attention, at a small part of its cost.

    The tensors are buffers outside ``state_dict``: they follow ``to``, no optimiser finds them and no checkpoint holds
    them.
    """

    positions: Tensor  # [1 + G * G, C], the mean token's first
    query_weight: Tensor  # [C, C]
    query_bias: Tensor  # [C]
    key_weight: Tensor  # [C, C]; the keys' bias adds the same to all scores of a query, which softmax does not see
    value_weight: Tensor  # [C, C]
    value_bias: Tensor  # [C]
    output_weight: Tensor  # [D, C]
    output_bias: Tensor  # [D]

    def __init__(self, tensors: dict[str, Tensor], heads: int) -> None:
        """Takes tensors named and shaped as :func:`load_attention_pool` checks them."""
        super().__init__()
        self.heads = heads
        for name, key in {
            "positions": "positional_embedding",
            "query_weight": "q_proj.weight",
            "query_bias": "q_proj.bias",
            "key_weight": "k_proj.weight",
            "value_weight": "v_proj.weight",
            "value_bias": "v_proj.bias",
            "output_weight": "c_proj.weight",
            "output_bias": "c_proj.bias",
        }.items():
            self.register_buffer(name, tensors[key].float(), persistent=False)

    @property
    def in_channels(self) -> int:
        """Width of the features it takes."""
        return int(self.positions.shape[1])

    @property
    def out_channels(self) -> int:
        """Width of the vectors it gives."""
        return int(self.output_weight.shape[0])

    @in_float32
    def forward(self, feature: Tensor) -> Tensor:
        """The global vector of each image.

        Shape:
            feature: [B, C, h, w]; returns [B, D].
        """
        height, width = feature.shape[-2:]
        cells = feature.to(self.positions.dtype).flatten(2).mT  # [B, h * w, C]
        tokens = torch.cat([cells.mean(1, keepdim=True), cells], dim=1) + self._positions_at((height, width))
        query = F.linear(tokens[:, 0], self.query_weight, self.query_bias).unflatten(1, (self.heads, -1))
        query = query * query.shape[-1] ** -0.5  # [B, heads, C / heads]
        asked = torch.einsum("bhd,hdc->bhc", query, self.key_weight.unflatten(0, (self.heads, -1)))
        attention = torch.einsum("bhc,bnc->bhn", asked, tokens).softmax(-1)
        attended = torch.einsum("bhn,bnc->bhc", attention, tokens)
        values = torch.einsum("bhc,hdc->bhd", attended, self.value_weight.unflatten(0, (self.heads, -1))).flatten(1)
        return F.linear(values + self.value_bias, self.output_weight, self.output_bias)

    def _positions_at(self, size: tuple[int, int]) -> Tensor:
        """The positions for a grid of another size: [1 + h * w, C]."""
        mean, cells = self.positions[:1], self.positions[1:]
        side = _side(len(cells))
        grid = F.interpolate(cells.mT.unflatten(1, (side, side))[None], size, mode="bilinear")  # [1, C, h, w]
        return torch.cat([mean, grid[0].flatten(1).mT])


def load_attention_pool(path: Path, heads: int) -> AttentionPool:
    """The pool in a safetensors file that holds CLIP's attention pool alone, or a whole CLIP with its names.

    Raises:
        UserError: no readable safetensors file, or a tensor missing, unexpected or of another shape: the message names
            file and key.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: not a .safetensors file; other formats can run code when they are read")
    if not path.is_file():
        raise UserError(f"{path}: no such file; it should hold the tensors {PREFIX}* of a CLIP with a ResNet")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            # A whole CLIP has a positional_embedding of its text side too: with the prefix, only the prefix counts.
            prefix = PREFIX if any(name.startswith(PREFIX) for name in names) else ""
            own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            _require_names(path, own, prefix)
            tensors = {key: file.get_tensor(prefix + key) for key in _KEYS}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    _require_shapes(path, tensors, prefix)
    width = tensors["positional_embedding"].shape[1]
    if width % heads:
        raise UserError(f"{path}: the attention pool is {width} wide, which {heads} heads do not divide")
    return AttentionPool(tensors, heads)


def _require_names(path: Path, names: list[str], prefix: str) -> None:
    for key in _KEYS:
        if key not in names:
            raise UserError(f"{path}: key '{prefix}{key}' of the attention pool is missing: wrong weights")
    for name in names:
        if name not in _KEYS:
            raise UserError(f"{path}: key '{prefix}{name}' is not in an attention pool: wrong weights")


def _require_shapes(path: Path, tensors: dict[str, Tensor], prefix: str) -> None:
    positions = tensors["positional_embedding"]
    if positions.ndim != 2 or len(positions) < 2 or _side(len(positions) - 1) ** 2 != len(positions) - 1:
        raise UserError(
            f"{path}: key '{prefix}positional_embedding' has shape {tuple(positions.shape)}, the attention pool needs"
            " (1 + a square number, width): wrong weights"
        )
    width, output = positions.shape[1], tensors["c_proj.bias"].shape[0] if tensors["c_proj.bias"].ndim else 1
    for name in _PROJECTIONS:
        rows = output if name == "c_proj" else width
        for key, shape in ((f"{name}.weight", (rows, width)), (f"{name}.bias", (rows,))):
            if tuple(tensors[key].shape) != shape:
                raise UserError(
                    f"{path}: key '{prefix}{key}' has shape {tuple(tensors[key].shape)}, the attention pool needs"
                    f" {shape}: wrong weights"
                )
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: key '{prefix}{key}' holds values that are no finite numbers: wrong weights")


def _side(cells: int) -> int:
    return round(cells**0.5)
