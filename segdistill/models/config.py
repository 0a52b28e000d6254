"""What a segmenter is made of. Importable without torch, so that a stage's config costs nothing to read."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from segdistill.config import config
from segdistill.errors import UserError
from segdistill.images import MOST_CHANNELS, RGB, ImageFormat

MOST = 8192  # of any number that a decoder takes: channels, rates of dilation, shares


def _is_decoder_value(value: Any) -> Any:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            _is_decoder_value(inner)
    elif isinstance(value, int | float) and not 0 <= value <= MOST:
        raise ValueError(f"{value} is not in 0..{MOST}, as every number of a decoder is")
    return value


Architecture = Literal["DeepLabV3", "DeepLabV3Plus", "PSPNet", "FPN", "Segformer", "UPerNet", "DPT"]


@config
class ModelConfig:
    """A decoder over an encoder, both by their names in segmentation-models-pytorch and timm."""

    architecture: Architecture
    """The decoder, a class of segmentation-models-pytorch; DPT is the one for plain vision transformers."""

    encoder: str
    """One of segmentation-models-pytorch's own (resnet18, mit_b0), or a timm model with or without "tu-" in front."""

    output_stride: Literal[8, 16, 32]
    """Image pixels per cell of the deepest encoder stage; below 32 the encoder is dilated. For DPT, the patch size."""

    encoder_weights: str = "none"
    """"none" (random), "imagenet" (the encoder's own, downloaded), or the path of a local .safetensors file."""

    decoder: dict[str, Annotated[Any, AfterValidator(_is_decoder_value)]] = dataclasses.field(default_factory=dict)
    """Extra keywords of the decoder's class, such as decoder_channels."""

    channels: Annotated[tuple[Annotated[int, Field(ge=0, lt=MOST_CHANNELS)], ...], Field(min_length=1)] | None = None
    """Which of the images' channels the network sees, by index from 0, such as [0, 1, 2]; null: all of them."""

    aux: bool = False
    """Add an auxiliary FCN head on the third encoder stage, which gives ``aux_logits``."""


@config
class NetworkConfig(ModelConfig):
    """A network that was built for images that are no photographs, as its file says it."""

    images: ImageFormat = RGB
    """What it is shown, of which it sees ``channels``."""


def for_images(config: ModelConfig, images: ImageFormat) -> ModelConfig:
    """The config with what the network is shown; of photographs it stays as it is.

    Raises:
        UserError: the images have no such channel.
    """
    if config.channels and max(config.channels) >= images.channels:
        raise UserError(
            f"model.channels: {max(config.channels)}, but the images have {images}; allowed: 0 to {images.channels - 1}"
        )
    if images == RGB:
        return config
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig)}
    return NetworkConfig(**values, images=images)


def images_of(config: ModelConfig) -> ImageFormat:
    """What a network of this config is shown."""
    return config.images if isinstance(config, NetworkConfig) else RGB
