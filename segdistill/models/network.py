"""Takes a segmentation-models-pytorch network apart into encoder, decoder, neck and 1x1 classifier.

All of its parts are the library's, with one change: a classifier that is not a 1x1 convolution (PSPNet's) is built
anew as one, because ``Outputs.last_feature`` is promised to be what a 1x1 classifier turns into logits.
"""

import contextlib
import inspect
import warnings
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.base.initialization import initialize_head
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers.conv2d_same import Conv2dSame
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn import functional as F

from segdistill.errors import UserError, nearest
from segdistill.models.config import ModelConfig, images_of

# What each decoder can be built at: DeepLab's are written for a dilated encoder, FPN adds stages that halve each time,
# and DPT's stages all have the patch size for their stride.
STRIDES: dict[str, tuple[int, ...]] = {
    "DeepLabV3": (8, 16),
    "DeepLabV3Plus": (8, 16),
    "PSPNet": (8, 16, 32),
    "FPN": (32,),
    "Segformer": (8, 16, 32),
    "UPerNet": (8, 16, 32),
    "DPT": (8, 16, 32),
}

# Keywords of the library's classes that ModelConfig or the Segmenter decides.
_DECIDED = {"in_channels", "classes", "activation", "upsampling", "aux_params", "kwargs", "self"}

# What a library raises when it is asked for something it cannot build.
_LIBRARY_ERRORS = (TypeError, ValueError, KeyError, NotImplementedError, RuntimeError, AssertionError, AttributeError)


class Parts(NamedTuple):
    """The pieces of one network, in the order in which an image goes through them."""

    encoder: nn.Module
    decoder: nn.Module
    neck: nn.Module  # between decoder and classifier: the identity, but for DPT
    classifier: nn.Conv2d


class EvenConv2dSame(nn.Conv2d):
    """timm's Conv2dSame of stride 2 for inputs of even size, where TensorFlow's padding is a constant.

    The Segmenter pads images to a multiple of the total stride, so every input is even; and the exporter, which needs
    minutes for padding that depends on a symbolic size, needs seconds for this.
    """

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = (kernel - 2 for kernel in self.kernel_size)  # to add: (n / 2 - 1) * 2 + kernel - n
        padding = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        padded = F.pad(input, padding)
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def resolve_encoder(name: str, architecture: str) -> str:
    """The name segmentation-models-pytorch knows the encoder by: its own, or a timm model's behind ``tu-``."""
    bare = name.removeprefix("tu-")
    if name in smp_encoders and architecture != "DPT":
        return name
    if timm.is_model(bare):
        return f"tu-{bare}"
    raise UserError(f"model.encoder: unknown encoder '{name}'{_nearest_encoder(bare)}")


def build_parts(config: ModelConfig, num_classes: int, *, pretrained: bool) -> Parts:
    """Builds the network of a config; ``pretrained`` fetches the encoder's ImageNet weights.

    Raises:
        UserError: an unknown encoder or decoder keyword, or a combination the libraries cannot build.
    """
    encoder_name = resolve_encoder(config.encoder, config.architecture)
    network_class = getattr(smp, config.architecture)
    _check_decoder_keywords(config, network_class)
    dilated_mit = encoder_name.startswith("mit_b") and config.output_stride != 32
    if config.output_stride not in STRIDES[config.architecture] or dilated_mit:
        raise _stride_error(config, encoder_name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # smp's about encoder_weights="imagenet" of timm encoders
            network = network_class(
                encoder_name=encoder_name,
                encoder_weights="imagenet" if pretrained else None,
                classes=num_classes,
                **_stride_keywords(config),
                **config.decoder,
            )
    except _LIBRARY_ERRORS as error:
        if pretrained:
            raise  # the same config has been built without weights before, so it is the download: see weights.py
        raise _misfit(config, encoder_name, error) from None
    parts = _take_apart(network, config)
    _adapt_input(parts.encoder, len(config.channels or range(images_of(config).channels)))
    return parts


def _adapt_input(encoder: nn.Module, channels: int) -> None:
    """Gives an encoder of RGB images others, as timm does: weights are repeated and rescaled, or summed for one.

    Here, and not by either library: so encoders of both, downloaded weights and those of a file go the same way.
    """
    if channels == 3:
        return
    for module in encoder.modules():  # several where a stem has branches; an encoder that needs more does not run
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:
            module.weight = nn.Parameter(adapt_input_conv(channels, module.weight.detach()))
            module.in_channels = channels


def normalisation(config: ModelConfig, *, pretrained: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel that the network sees.

    Of photographs those that the encoder was trained with; of other images those of the train split.
    """
    images = images_of(config)
    if images.is_rgb:
        mean, std = _of_encoder(config, pretrained=pretrained)
    else:
        mean, std = images.mean or (0.0,) * images.channels, images.std or (1.0,) * images.channels
    seen = config.channels or range(images.channels)
    return tuple(mean[channel] for channel in seen), tuple(std[channel] or 1.0 for channel in seen)


def _of_encoder(config: ModelConfig, *, pretrained: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation [3] that the encoder was trained with, ImageNet's where nothing is recorded.

    timm's record comes with its code. That of the other library's own encoders (resnet18, mit_b0) lies beside their
    weights on the network and is read only if those were; otherwise timm's for the same name holds.
    """
    bare = config.encoder.removeprefix("tu-")
    if pretrained and not resolve_encoder(config.encoder, config.architecture).startswith("tu-"):
        record = smp.encoders.get_preprocessing_params(bare, pretrained="imagenet")
        return tuple(record["mean"]), tuple(record["std"])
    settings = timm.get_pretrained_cfg(bare, allow_unregistered=True) if timm.is_model(bare) else None
    if settings is None:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return tuple(settings.mean), tuple(settings.std)


def is_transformer(encoder: nn.Module) -> bool:
    """Whether the encoder attends: then its kind is "vit", else "cnn"."""
    names = {type(module).__name__ for module in encoder.modules()}
    return any("Attention" in name for name in names)


def _stride_keywords(config: ModelConfig) -> dict[str, Any]:
    if config.architecture == "DPT":
        return {"dynamic_img_size": True}
    depth = {"encoder_depth": 5}
    if config.architecture.startswith("DeepLab"):
        return {**depth, "encoder_output_stride": config.output_stride}
    return {**depth, "output_stride": config.output_stride} if config.output_stride != 32 else depth


def _take_apart(network: Any, config: ModelConfig) -> Parts:
    encoder, head = network.encoder, network.segmentation_head
    _change_classes(network)
    if config.architecture == "DPT":
        # Blocks after the last tap, the final norm and the head never run: drop them, or DDP waits for their gradients.
        encoder.model.prune_intermediate_layers(encoder._output_indices, prune_norm=True, prune_head=True)
        return Parts(encoder, network.decoder, head.head[:-1], head.head[-1])
    classifier = head[0]
    if classifier.kernel_size != (1, 1):
        classifier = nn.Conv2d(classifier.in_channels, classifier.out_channels, kernel_size=1)
        initialize_head(classifier)
    return Parts(encoder, network.decoder, nn.Identity(), classifier)


def _change_classes(network: Any) -> None:
    """Gives some of timm's layers another forward; parameters and their names stay."""
    for module in network.encoder.modules():
        if type(module) is Conv2dSame and module.stride == (2, 2) and module.dilation == (1, 1):
            module.__class__ = EvenConv2dSame


def _check_decoder_keywords(config: ModelConfig, network_class: Any) -> None:
    names = inspect.signature(network_class.__init__).parameters
    allowed = [name for name in names if name not in _DECIDED and not name.startswith("encoder_")]
    if unknown := next((key for key in config.decoder if key not in allowed), None):
        of = f"architecture '{config.architecture}'{nearest(unknown, allowed)}"
        raise UserError(f"model.decoder.{unknown}: unknown key of {of}")


def _misfit(config: ModelConfig, encoder_name: str, error: Exception) -> UserError:
    """Says which of stride, encoder and decoder keywords the library refused."""
    if config.architecture != "DPT" and config.output_stride not in _encoder_strides(encoder_name, default=(8, 16, 32)):
        return _stride_error(config, encoder_name)
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if config.architecture == "DPT":
        reason += "; DPT takes plain vision transformers such as vit_tiny_patch16_224"
    elif "downsampling pattern" in reason:
        reason = "its stages do not halve the image; architecture 'DPT' takes plain vision transformers"
    return UserError(
        f"model: architecture '{config.architecture}' cannot be built over encoder '{config.encoder}'"
        f" with decoder {config.decoder}: {reason}"
    )


def _encoder_strides(encoder_name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """The output strides an encoder can be built at; ``default`` where it cannot be built at all."""
    if encoder_name.startswith("mit_b"):
        return (32,)  # the library would dilate it, and break its attention, whose reductions are strided convolutions
    possible = []
    for stride in (8, 16, 32):
        with contextlib.suppress(*_LIBRARY_ERRORS), torch.device("meta"):
            smp.encoders.get_encoder(encoder_name, weights=None, output_stride=stride)
            possible.append(stride)
    return tuple(possible) or default


def _stride_error(config: ModelConfig, encoder_name: str) -> UserError:
    decoder_allows = STRIDES[config.architecture]
    encoder_allows = _encoder_strides(encoder_name, default=decoder_allows)
    both = tuple(stride for stride in decoder_allows if stride in encoder_allows)
    encoder, decoder, common = (", ".join(map(str, strides)) for strides in (encoder_allows, decoder_allows, both))
    advice = f"the encoder allows {encoder} and the architecture {decoder}: choose another of either"
    return UserError(
        f"model.output_stride: {config.output_stride} is not possible with encoder '{config.encoder}' and architecture"
        f" '{config.architecture}'; {f'allowed: {common}' if both else advice}"
    )


def _nearest_encoder(name: str) -> str:
    close = nearest(name, [*smp_encoders, *timm.list_models()])
    every = "; allowed: encoders of segmentation-models-pytorch and timm"
    return close if close.startswith("; did you mean") else every
