"""A folder that transformers' ``save_pretrained`` wrote: ``config.json``, ``*.safetensors``, and the normalisation.

Beside a backbone, which tells no classes apart, lies a linear head: ``head.safetensors`` with a ``weight`` [T, D] and a
``bias`` [T], and ``head.json``, which is ``{"classes": ["background", ...]}``.

Nothing is asked of the hub, no code of a folder is run, and nothing pickled is read.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from segdistill.config import config, parse
from segdistill.errors import UserError
from segdistill.files import read_json, require_regular
from segdistill.geometry import crop
from segdistill.models.outputs import ModelInfo, SegmentationNetwork
from segdistill.models.teachers.foreign import ForeignConfig, ForeignNetwork, sources_of
from segdistill.models.weights import not_finite, read_safetensors

SETTINGS, INDEX = "config.json", "model.safetensors.index.json"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the latter from transformers 5 on
# Whose encoder is named so may be looked up on the hub, or bring its own weights; ours come from the folder.
WITHOUT_WEIGHTS = {"use_pretrained_backbone": False}
LEAST_PROBABILITY = 1e-6  # of a class in a pixel, before its logarithm is taken
HEAD, HEAD_DOCUMENT = "head.safetensors", "head.json"
FINE_STRIDE = 8  # of the cells of patches whose width is no power of two


@config
class Head:
    """What ``head.json`` says."""

    classes: Annotated[list[str], Field(min_length=1)]
    """The names of what the head tells apart, in order."""


class HuggingFaceNetwork(ForeignNetwork):
    """A network of transformers, whose weights it reads from a folder."""

    network: Any

    def fill(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Takes the weights under their keys in transformers."""
        self.network.load_state_dict(weights)


class DecodedNetwork(HuggingFaceNetwork):
    """A network of transformers whose decoder ends with a 1x1 classifier."""

    def __init__(self, config: ForeignConfig) -> None:
        super().__init__(config)
        self.network = _network(config)
        # Apart from its head, the classifier shows what enters it.
        self.classifier, self.network.decode_head.classifier = self.network.decode_head.classifier, nn.Identity()
        self.network.auxiliary_head = None  # learns beside the head, and says nothing once that is done
        self.info = self.measure()

    def fill(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Likewise, without those of an auxiliary head."""
        head, unused = "decode_head.classifier.", "auxiliary_head."
        parts = {key.removeprefix(head): tensor for key, tensor in weights.items() if key.startswith(head)}
        self.classifier.load_state_dict(parts)
        super().fill({key: weight for key, weight in weights.items() if not key.startswith((head, unused))}, folder)


class Segformer(DecodedNetwork):
    """SegformerForSemanticSegmentation: all taps."""

    def run(self, images: Tensor) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
        stages = self.network.segformer(images, output_hidden_states=True).hidden_states
        last = self.network.decode_head(stages)
        return self.classifier(last), stages, last


class UPerNet(DecodedNetwork):
    """UperNetForSemanticSegmentation over any encoder: logits before they are enlarged to the image, all taps."""

    def run(self, images: Tensor) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
        stages = self.network.backbone.forward_with_filtered_kwargs(images).feature_maps
        last = self.network.decode_head(stages)
        return self.classifier(last), stages if len(stages) == 4 else (), last


class Mask2Former(HuggingFaceNetwork):
    """Mask2FormerForUniversalSegmentation: the encoder's stages, and the semantic map as transformers makes it.

    A pixel's score of a class is the sum over the queries of the class's probability times the mask's; its logarithm
    stands for a logit, so that softmax gives the scores over their sum.
    """

    def __init__(self, config: ForeignConfig) -> None:
        super().__init__(config)
        self.network = _network(config)
        self.info = self.measure()

    def run(self, images: Tensor) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
        outputs = self.network(images, output_hidden_states=True)
        classes = outputs.class_queries_logits.float().softmax(-1)[..., :-1]  # [B, Q, T], without "no object"
        masks = outputs.masks_queries_logits.float().sigmoid()  # [B, Q, h, w]
        with torch.autocast(images.device.type, enabled=False):
            scores = torch.einsum("bqc,bqhw->bchw", classes, masks)
        stages = outputs.encoder_hidden_states
        return scores.clamp_min(LEAST_PROBABILITY).log(), stages if len(stages) == 4 else (), None


class Dino(HuggingFaceNetwork):
    """A backbone of the DINO family under a linear head, which reads the last layer's normalised patch tokens.

    Tokens of class and registers are dropped. Cells of patches whose width is no power of two are resampled to
    :data:`FINE_STRIDE`, which is the same before a linear head as after it.
    """

    def __init__(self, config: ForeignConfig) -> None:
        super().__init__(config)
        self.network = _network(config)
        self.classifier = nn.Conv2d(self.network.config.hidden_size, len(config.names), 1)
        self.info = self.measure()

    def run(self, images: Tensor) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
        height, width = images.shape[-2:]
        side = self.network.config.patch_size
        rows, columns = (height + side - 1) // side, (width + side - 1) // side
        padded = functional.pad(images, (0, columns * side - width, 0, rows * side - height), mode="replicate")
        tokens = self.network(padded).last_hidden_state[:, 1 + getattr(self.network.config, "num_register_tokens", 0) :]
        last = tokens.transpose(1, 2).reshape(len(images), -1, rows, columns)  # [B, D, rows, columns]
        if side & (side - 1):  # cell by cell from the upper left corner, whatever was padded
            last = functional.interpolate(last, scale_factor=side / FINE_STRIDE, mode="bilinear")
            last = crop(last, height // FINE_STRIDE, width // FINE_STRIDE)
        return self.classifier(last), (), last

    def fill(self, weights: dict[str, Tensor], folder: Path) -> None:
        """Likewise, and the head's from a file of its own."""
        super().fill(weights, folder)
        path = folder / HEAD
        given = read_safetensors(path)
        for key, tensor in self.classifier.state_dict().items():
            shape = list(tensor.shape[:2])  # that of a matrix, or of a 1x1 convolution
            if key not in given or list(given[key].shape) not in (shape, list(tensor.shape)):
                what = f"has shape {list(given[key].shape)}" if key in given else "is missing"
                raise UserError(
                    f"{path}: key '{key}' {what}; over this backbone and of {len(self.config.names)} classes it is of"
                    f" shape {shape}"
                )
            given[key] = given[key].reshape(tensor.shape).float()
        self.classifier.load_state_dict({key: given[key] for key in self.classifier.state_dict()})


ARCHITECTURES: dict[str, type[HuggingFaceNetwork]] = {
    "SegformerForSemanticSegmentation": Segformer,
    "UperNetForSemanticSegmentation": UPerNet,
    "Mask2FormerForUniversalSegmentation": Mask2Former,
    "Dinov2Model": Dino,
    "Dinov2WithRegistersModel": Dino,
    "DINOv3ViTModel": Dino,
}


def names(folder: Path) -> list[str]:
    """Its classes, in order, as ``id2label`` has them, or a backbone's head."""
    if ARCHITECTURES.get(_architecture(folder)) is Dino:
        return parse(Head, read_json(folder / HEAD_DOCUMENT), str(folder / HEAD_DOCUMENT)).classes
    path = folder / SETTINGS
    labels = _settings(folder).get("id2label")
    if not isinstance(labels, dict) or set(labels) != {str(index) for index in range(len(labels))}:
        raise UserError(f"{path}: no 'id2label' from \"0\" on in it, which names the classes")
    return [str(labels[str(index)]) for index in range(len(labels))]


def outline(folder: Path) -> ModelInfo:
    """What is known of it without its weights."""
    config = _config(folder, [[index] for index in range(len(names(folder)))])
    with torch.random.fork_rng(devices=[]), _building(str(folder)):
        return ARCHITECTURES[config.architecture](config).info


def read(folder: Path, classes: Sequence[str], labels: Mapping[str, str]) -> SegmentationNetwork:
    """The network with its weights.

    Raises:
        UserError: a file that is absent or damaged, weights that are pickled, missing or not finite, a network of
            another kind, or a class without a source.
    """
    settings = _config(folder, sources_of(folder, names(folder), classes, labels))
    _require_weights(folder)
    library = _transformers()
    with torch.random.fork_rng(devices=[]), _building(str(folder)):
        network = ARCHITECTURES[settings.architecture](settings)
        loaded, report = getattr(library, settings.architecture).from_pretrained(
            folder, config=network.network.config, local_files_only=True, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder}: key '{missing[0]}' is missing; a partly loaded model is no model")
    weights = loaded.state_dict()
    if broken := not_finite(weights):
        raise UserError(f"{folder}: key '{broken[0]}' is not finite: what a diverged training left is no network")
    network.fill(weights, folder)
    return network.eval()


def build(description: dict[str, Any], num_classes: int, where: str) -> SegmentationNetwork:
    """The network without weights."""
    config = parse(ForeignConfig, description, where)
    with torch.random.fork_rng(devices=[]), _building(where):
        return ARCHITECTURES[config.architecture](config)


def _network(config: ForeignConfig) -> Any:
    library = _transformers()
    model = getattr(library, config.architecture)
    settings = model.config_class.from_dict({**config.settings, **WITHOUT_WEIGHTS})
    return model(settings)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "transformers is not installed, which a teacher from a Hugging Face folder needs: pip install"
            " 'segdistill[huggingface]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


@contextlib.contextmanager
def _building(where: str) -> Iterator[None]:
    """Keeps the library off the network, and turns what it has against a folder into a sentence."""
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = True
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a network is built from, and its own checks of it, may raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{where}: transformers cannot build this network: {reason}") from None
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path}: no JSON object; it is not a network's configuration")
    return settings


def _architecture(folder: Path) -> str:
    return str(next(iter(_settings(folder).get("architectures") or ()), None))


def _config(folder: Path, sources: list[list[int]]) -> ForeignConfig:
    settings, architecture = _settings(folder), _architecture(folder)
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{folder / SETTINGS}: architecture '{architecture}' cannot teach; allowed: {', '.join(ARCHITECTURES)}"
        )
    mean, std = _normalisation(folder)
    return ForeignConfig(
        family="huggingface", architecture=architecture, origin=folder.resolve().name, settings=settings,
        names=names(folder), sources=sources, mean=mean, std=std,
    )  # fmt: skip


def _normalisation(folder: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation [3] of images in 0..1."""
    path = next((folder / name for name in PREPROCESSORS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder / PREPROCESSORS[0]}: no such file; it says how the network's images are normalised")
    document = read_json(path)
    if isinstance(document, dict):
        document = document.get("image_processor", document)
    if not isinstance(document, dict):
        raise UserError(f"{path}: no JSON object; it says how the network's images are normalised")
    # The library rescales bytes, and normalises what that gives; our images are bytes over 255.
    scale = 255 * document.get("rescale_factor", 1 / 255) if document.get("do_rescale", True) else 255.0
    mean, std = [0.0] * 3, [1.0] * 3
    if document.get("do_normalize", True):
        values = [document.get("image_mean"), document.get("image_std")]
        for key, value in zip(("image_mean", "image_std"), values, strict=True):
            if (
                not isinstance(value, list)
                or len(value) != 3
                or not all(isinstance(part, int | float) for part in value)
            ):
                raise UserError(f"{path}: no '{key}' of three numbers in it, for red, green and blue")
        mean, std = values  # type: ignore[assignment]
    return [value / scale for value in mean], [value / scale for value in std]


def _require_weights(folder: Path) -> None:
    """Raises a UserError where there are no weights that may be read."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix))
        has = f"only {pickled[0]}, which is pickled and never read" if pickled else "none"
        raise UserError(
            f"{folder}: expected weights in *.safetensors, and there is {has}; load it where you trust it, and write it"
            " by transformers' save_pretrained"
        )
    for path in files:
        require_regular(path)
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map", {}).values()
        if foreign := next((name for name in shards if name not in {path.name for path in files}), None):
            raise UserError(f"{folder / INDEX}: names '{foreign}', which is no *.safetensors file of this folder")
