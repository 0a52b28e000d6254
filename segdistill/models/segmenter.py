"""The one model class: images in, ``Outputs`` out, whichever encoder and decoder are inside.

Image sizes: any. The images are padded at the bottom and right, by repeating the edge, to a multiple of 32, and every
tap is cropped to ceil(H / stride) x ceil(W / stride). So cell (i, j) of a tap of stride s always covers the pixels from
(s*i, s*j) on, and only the last cells may reach beyond the image: the rule of :mod:`segdistill.geometry`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segdistill.errors import UserError
from segdistill.geometry import crop, enlarge, resize
from segdistill.models.batch_norm import allow_single_values
from segdistill.models.config import ModelConfig, images_of
from segdistill.models.network import build_parts, is_transformer, normalisation, resolve_encoder
from segdistill.models.operators import first_stage_operators
from segdistill.models.outputs import ModelInfo, Outputs, SegmentationNetwork
from segdistill.models.weights import imagenet_download, load_encoder_file, local_weights_path

MULTIPLE = 32  # the stride of an undilated encoder; every decoder here takes multiples of it
AUX_CHANNELS = 256  # at most; a stage with fewer channels keeps its own number
PROBE = 64  # pixels: the smallest image that leaves a dilated stage more than one cell


class Segmenter(SegmentationNetwork):
    """A decoder over an encoder, with the taps that distillation needs.

    ``mean`` and ``std`` are buffers of the state dict, so a saved model normalises as it did in training.
    """

    mean: Tensor
    std: Tensor
    seen: Tensor | None

    def __init__(self, config: ModelConfig, num_classes: int, *, pretrained: bool = False) -> None:
        super().__init__()
        self.config = config
        parts = build_parts(config, num_classes, pretrained=pretrained)
        self.encoder, self.decoder, self.neck, self.classifier = parts
        mean, std = normalisation(config, pretrained=pretrained)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.images = images_of(config)
        # On the device of the network, so that no index is sent there at each step.
        self.register_buffer("seen", torch.tensor(config.channels) if config.channels else None, persistent=False)
        self.info = self._measure(num_classes)
        self.aux_head = _fcn_head(self.info.feature_channels[2], num_classes) if config.aux else None
        allow_single_values(self)

    def forward(self, images: Tensor) -> Outputs:
        """One pass.

        Shape:
            images: [B, C, H, W], float in 0..1: all channels of the data set's images, such as RGB.
        """
        height, width = images.shape[-2:]
        stages, decoded = self._run(self._prepare(images))
        features = crop_stages(stages, height, width, self.info)
        last_feature = crop_to_stride(decoded, height, width, self.info.last_stride)
        aux_logits = None if self.aux_head is None else self.aux_head(features[2])
        return Outputs(self.classifier(last_feature), features, last_feature, aux_logits)

    def logits(self, images: Tensor) -> Tensor:
        """The logits of :meth:`forward` alone, which is what serving computes."""
        _, decoded = self._run(self._prepare(images))
        height, width = images.shape[-2:]
        return crop_to_stride(self.classifier(decoded), height, width, self.info.logits_stride)

    @property
    def attention(self) -> nn.Module:
        """Norm and attention that end a transformer's first stage, as a map to a map: a view of the encoder's own."""
        return first_stage_operators(self.encoder, self.config.encoder).attention

    @property
    def mlp(self) -> nn.Module:
        """Norm and MLP (Mix-FFN) that end a transformer's first stage; see :attr:`attention`."""
        return first_stage_operators(self.encoder, self.config.encoder).mlp

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        """What may have come with ImageNet weights."""
        return self.encoder.parameters()

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        """All the others: decoder, classifier and auxiliary head."""
        encoder = {id(parameter) for parameter in self.encoder_parameters()}
        return (parameter for parameter in self.parameters() if id(parameter) not in encoder)

    def _prepare(self, images: Tensor) -> Tensor:
        if images.shape[1] != self.images.channels:
            raise UserError(f"images of {images.shape[1]} channels, but the network is made for {self.images}")
        if self.seen is not None:
            images = images.index_select(1, self.seen)
        return pad((images - self.mean) / self.std)

    def _run(self, images: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        if self.config.architecture == "DPT":  # its encoder gives class tokens beside the stages
            stages, prefix_tokens = self.encoder(images)
            return stages, self.neck(self.decoder(stages, prefix_tokens))
        stages = self.encoder(images)
        return stages[-4:], self.neck(self.decoder(list(stages)))

    def _measure(self, num_classes: int) -> ModelInfo:
        """Channels and strides as they are, from one small image; libraries' own statements do not cover dilation."""
        self.eval()
        try:
            with torch.no_grad():
                stages, last = self._run(torch.zeros(1, self.mean.shape[1], PROBE, PROBE))
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            raise UserError(
                f"model: architecture '{self.config.architecture}' over encoder '{self.config.encoder}'"
                f" does not run on a {PROBE}x{PROBE} image: {str(error).strip().splitlines()[0]}"
            ) from None
        self.train()
        info = measured(num_classes, last, stages, last, self.encoder, aux=self.config.aux)
        self._check_strides(info.feature_strides)
        return info

    def _check_strides(self, measured: tuple[int, ...]) -> None:
        stride = self.config.output_stride
        plain = self.config.architecture == "DPT"
        promised = (stride,) * 4 if plain else tuple(min(full, stride) for full in (4, 8, 16, 32))
        if measured == promised:
            return
        allowed = f"allowed: {measured[-1]}" if plain else "choose another encoder or stride"
        raise UserError(
            f"model.output_stride: {stride} asks for encoder stages of strides {promised}, but those of"
            f" '{self.config.encoder}' have {measured}; {allowed}"
        )


def build_segmenter(config: ModelConfig, num_classes: int) -> Segmenter:
    """Builds a segmenter in training mode, with the encoder weights its config asks for.

    Raises:
        UserError: a name, keyword, stride or weights file that does not fit.
    """
    path = None if config.encoder_weights in ("none", "imagenet") else local_weights_path(config.encoder_weights)
    segmenter = Segmenter(config, num_classes)
    if config.encoder_weights == "imagenet":
        with imagenet_download(config.encoder):
            segmenter = Segmenter(config, num_classes, pretrained=True)
    if path is not None:
        load_encoder_file(segmenter.encoder, resolve_encoder(config.encoder, config.architecture), path)
    return segmenter


def logits_at(logits: Tensor, size: Sequence[int], stride: int | None = None) -> Tensor:
    """Logits at the size of a label or an image, float32, bilinear.

    Args:
        logits: what a segmenter gave for an image of ``size``, or for one of another scale.
        size: H and W.
        stride: image pixels per cell of the logits; found from the sizes if left out.

    Shape:
        logits: [B, K, h, w]. Returns [B, K, H, W].
    """
    height, width = size
    if stride is None:
        return resize(logits.float(), (height, width))
    return enlarge(logits.float(), (height, width), stride)


def pad(images: Tensor) -> Tensor:
    """Images [B, C, H, W] whose edge is repeated at the bottom and right, to multiples of :data:`MULTIPLE`."""
    height, width = images.shape[-2:]
    # Not "-height % 32": written so, the exporter can prove that the sum is a multiple of 32 for every height.
    bottom = (height + MULTIPLE - 1) // MULTIPLE * MULTIPLE - height
    right = (width + MULTIPLE - 1) // MULTIPLE * MULTIPLE - width
    if torch.compiler.is_exporting() or bottom or right:  # an exported program must not depend on the example's size
        return F.pad(images, (0, right, 0, bottom), mode="replicate")
    return images


def crop_to_stride(tap: Tensor, height: int, width: int, stride: int) -> Tensor:
    """The cells of a tap [B, C, h, w] that stand for an image of height and width before it was padded."""
    return crop(tap, (height + stride - 1) // stride, (width + stride - 1) // stride)


def crop_stages(stages: Sequence[Tensor], height: int, width: int, info: ModelInfo) -> tuple[Tensor, ...]:
    """The encoder's stages likewise."""
    strides = info.feature_strides
    return tuple(crop_to_stride(stage, height, width, stride) for stage, stride in zip(stages, strides, strict=True))


def measured(
    num_classes: int, logits: Tensor, stages: Sequence[Tensor], last: Tensor | None, encoder: nn.Module, *, aux: bool
) -> ModelInfo:
    """What is known of a network that gives these maps of an image of :data:`PROBE` pixels."""
    return ModelInfo(
        num_classes=num_classes,
        feature_channels=tuple(stage.shape[1] for stage in stages),
        feature_strides=tuple(PROBE // stage.shape[-1] for stage in stages),
        last_channels=0 if last is None else last.shape[1],
        last_stride=PROBE // (logits if last is None else last).shape[-1],
        logits_stride=PROBE // logits.shape[-1],
        kind="vit" if is_transformer(encoder) else "cnn",
        aux=aux,
    )


def _fcn_head(in_channels: int, num_classes: int) -> nn.Sequential:
    channels = min(AUX_CHANNELS, in_channels)
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Dropout(0.1),
        nn.Conv2d(channels, num_classes, kernel_size=1),
    )
