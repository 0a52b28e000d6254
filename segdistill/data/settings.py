"""Settings of the data a network is fed with."""

from typing import Annotated

from pydantic import Field

from segdistill.config import config

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]


@config
class AugmentationConfig:
    """Joint random augmentation of image and mask; the same pixels go to teacher and student."""

    # Height and width of a training crop; a smaller image is padded with void.
    crop_size: tuple[Positive, Positive]
    # Bounds of the random scale, relative to the stored size.
    scale: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]]
    # Probability of a horizontal flip.
    flip: Probability
    # Strength of brightness, contrast and saturation jitter; 0 is off.
    color_jitter: Probability
