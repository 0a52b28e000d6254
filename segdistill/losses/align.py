"""The one place where maps of different size and width are brought together.

The rule: resize logits or features, never probabilities, since softmax(resize(z)) is not resize(softmax(z)).
    * frozen teacher: the student's map goes to the teacher's size;
    * co-trained peers: every map goes to the size of the finest (most pixels, the first if several);
    * a method that compares at label size (``upsample``): every map goes there.
Labels follow by nearest neighbour, so a pixel of the small map is valid if the label it falls on is.

Widths are brought together by a 1x1 convolution of the side that learns, before its map is resized; none where they are
equal.
"""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional as F

from segdistill.losses.precision import in_float32

Size = tuple[int, int]


def size_of(maps: Tensor) -> Size:
    """Height and width, the last two sizes."""
    return int(maps.shape[-2]), int(maps.shape[-1])


def finest(sizes: Iterable[Size]) -> Size:
    """The size with the most pixels, the first of them if several have as many."""
    return max(sizes, key=lambda size: size[0] * size[1])


@in_float32
def resize_logits(logits: Tensor, size: Size, *, align_corners: bool = False) -> Tensor:
    """Logits at another size, bilinear, in float32.

    Shape:
        logits: [B, K, h, w]; returns [B, K, *size].
    """
    return _bilinear(logits, size, align_corners)


def resize_features(features: Tensor, size: Size, *, align_corners: bool = False) -> Tensor:
    """Features at another size, bilinear, in the precision they have.

    Shape:
        features: [B, C, h, w]; returns [B, C, *size].
    """
    return _bilinear(features, size, align_corners)


def resize_labels(target: Tensor, size: Size) -> Tensor:
    """Labels at another size, by nearest neighbour.

    Shape:
        target: [B, H, W]; returns [B, *size], same dtype.
    """
    if size_of(target) == tuple(size):
        return target
    return F.interpolate(target[:, None].float(), size=size, mode="nearest")[:, 0].to(target.dtype)


class Projection(nn.Conv2d):
    """A 1x1 convolution from one width to another; autocast may narrow it, and without autocast it takes any input."""

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


def projection(in_channels: int, out_channels: int, *, bias: bool = False) -> nn.Module:
    """What brings a feature to another width; the identity where the widths are equal."""
    return nn.Identity() if in_channels == out_channels else Projection(in_channels, out_channels, bias=bias)


def _bilinear(maps: Tensor, size: Size, align_corners: bool) -> Tensor:
    if size_of(maps) == tuple(size):
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)
