"""What the pixels of a data set's images are: how many channels of how many bits, and how networks normalise them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from segdistill.config import config

MOST_CHANNELS = 256  # as segdistill.data.decoding, which imports nothing of this package


@config
class ImageFormat:
    """The same for every image of a data set. Without values it is that of photographs."""

    channels: Annotated[int, Field(ge=1, le=MOST_CHANNELS)] = 3
    """Red, green and blue, or whatever the data set has, in the order of its files."""

    bits: Literal[8, 16] = 8
    """Of one channel of one pixel; networks are shown its value as a share of the largest one."""

    mean: tuple[float, ...] = ()
    """Of each channel, over the pixels of the training images, in 0..1; none of photographs, whose normalisation is
    that with which the encoder was trained."""

    std: tuple[float, ...] = ()
    """The standard deviation likewise."""

    @property
    def is_rgb(self) -> bool:
        """Whether they are photographs: red, green and blue of 8 bits."""
        return (self.channels, self.bits) == (3, 8)

    def __str__(self) -> str:
        return f"{self.channels} channel{'s' if self.channels > 1 else ''} of {self.bits} bits"


RGB = ImageFormat()


def of_contract(contract: Mapping[str, Any]) -> ImageFormat:
    """What a network is shown, as the contract in its file says it (models/portable.py).

    Raises:
        ValueError: it says nothing that can be.
    """
    described = contract.get("input") or {}
    return ImageFormat(channels=described.get("shape", (None, 3))[1], bits=described.get("bits", 8))
