"""Settings of the data a network is fed with."""

from typing import Annotated

from pydantic import Field, model_validator

from segdistill.config import Fraction, config

Side = Annotated[int, Field(ge=1, le=16384)]  # pixels
Workers = Annotated[int, Field(ge=0, le=1024)]  # processes or threads
Scale = Annotated[float, Field(ge=0.05, le=8)]


@config
class AugmentationConfig:
    """Joint random augmentation of image and mask; the same pixels go to teacher and student."""

    crop_size: tuple[Side, Side]
    """Height and width of a training crop; a smaller image is padded with void."""

    scale: tuple[Scale, Scale]
    """Bounds of the random scale, relative to the stored size."""

    flip: Fraction
    """Probability of a horizontal flip."""

    color_jitter: Fraction
    """Strength of brightness, contrast and saturation jitter; 0 is off."""

    @model_validator(mode="after")
    def _scale_in_order(self) -> "AugmentationConfig":
        if self.scale[0] > self.scale[1]:
            raise ValueError(f"scale {list(self.scale)}: the first bound is above the second")
        return self
