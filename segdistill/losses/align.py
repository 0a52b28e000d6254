"""Where maps of different size and width are brought together before they are compared.

The rule: resize logits or features, never probabilities, since softmax(resize(z)) is not resize(softmax(z)).
    * frozen teacher: the student's map goes to the teacher's grid;
    * co-trained peers: every map goes to the grid of the finest (most cells, the first if several);
    * a method that compares at label size (``upsample``): every map goes there.
What compares logits pixel by pixel resizes them itself, a block of images at a time: :mod:`segdistill.losses.blocks`.
Labels follow: a cell is valid if the label at its centre is. Which image points a cell stands for, and so how a map is
resized, is :mod:`segdistill.geometry`'s.

Widths are brought together by a 1x1 convolution of the side that learns, before its map is resized; none where they are
equal.
"""

from torch import Tensor, nn

from segdistill.geometry import Size, resize
from segdistill.losses.precision import in_float32


@in_float32
def resize_logits(logits: Tensor, size: Size, *, align_corners: bool = False) -> Tensor:
    """Logits on another grid, in float32.

    Shape:
        logits: [B, K, h, w]; returns [B, K, *size].
    """
    return resize(logits, size, align_corners=align_corners)


class Projection(nn.Conv2d):
    """A 1x1 convolution from one width to another; autocast may narrow it, and without autocast it takes any input.

    A larger kernel sees as many cells around, and zeros beyond the edge.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, *, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.dtype))


def projection(in_channels: int, out_channels: int, *, bias: bool = False) -> nn.Module:
    """What brings a feature to another width; the identity where the widths are equal."""
    return nn.Identity() if in_channels == out_channels else Projection(in_channels, out_channels, bias=bias)
