"""A folder that transformers' ``save_pretrained`` wrote: ``config.json``, ``*.safetensors``, and the normalisation.

Nothing is asked of the hub, no code of a folder is run, and nothing pickled is read.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segdistill.config import parse
from segdistill.errors import UserError
from segdistill.files import read_json, require_regular
from segdistill.models.outputs import ModelInfo, SegmentationNetwork
from segdistill.models.teachers.foreign import ForeignConfig, ForeignNetwork, sources_of
from segdistill.models.weights import not_finite

SETTINGS, INDEX = "config.json", "model.safetensors.index.json"
PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")  # the latter from transformers 5 on
# Whose encoder is named so may be looked up on the hub, or bring its own weights; ours come from the folder.
WITHOUT_WEIGHTS = {"use_pretrained_backbone": False}
LEAST_PROBABILITY = 1e-6  # of a class in a pixel, before its logarithm is taken


class Segformer(ForeignNetwork):
    """SegformerForSemanticSegmentation: all taps."""

    def __init__(self, config: ForeignConfig) -> None:
        super().__init__(config)
        self.network = _network(config)
        # Apart from its head, the classifier shows what enters it.
        self.classifier, self.network.decode_head.classifier = self.network.decode_head.classifier, nn.Identity()
        self.info = self.measure()

    def run(self, images: Tensor) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
        stages = self.network.segformer(images, output_hidden_states=True).hidden_states
        last = self.network.decode_head(stages)
        return self.classifier(last), stages, last


class UPerNet(ForeignNetwork):
    """UperNetForSemanticSegmentation over any encoder: logits before they are enlarged to the image, all taps."""

    def __init__(self, config: ForeignConfig) -> None:
        super().__init__(config)
        self.network = _network(config)
        self.network.auxiliary_head = None  # learns beside the head, and says nothing once that is done
        self.classifier, self.network.decode_head.classifier = self.network.decode_head.classifier, nn.Identity()
        self.info = self.measure()

    def run(self, images: Tensor) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
        stages = self.network.backbone.forward_with_filtered_kwargs(images).feature_maps
        last = self.network.decode_head(stages)
        return self.classifier(last), stages if len(stages) == 4 else (), last


class Mask2Former(ForeignNetwork):
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


ARCHITECTURES: dict[str, type[ForeignNetwork]] = {
    "SegformerForSemanticSegmentation": Segformer,
    "UperNetForSemanticSegmentation": UPerNet,
    "Mask2FormerForUniversalSegmentation": Mask2Former,
}


def names(folder: Path) -> list[str]:
    """Its classes, in order, as ``id2label`` has them."""
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
    config = _config(folder, sources_of(folder, names(folder), classes, labels))
    _require_weights(folder)
    library = _transformers()
    with torch.random.fork_rng(devices=[]), _building(str(folder)):
        network: Any = ARCHITECTURES[config.architecture](config)
        loaded, report = getattr(library, config.architecture).from_pretrained(
            folder, config=network.network.config, local_files_only=True, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{folder}: key '{missing[0]}' is missing; a partly loaded model is no model")
    weights = loaded.state_dict()
    if broken := not_finite(weights):
        raise UserError(f"{folder}: key '{broken[0]}' is not finite: what a diverged training left is no network")
    head = "decode_head.classifier."
    own = {key: tensor for key, tensor in weights.items() if not key.startswith((head, "auxiliary_head."))}
    if hasattr(network, "classifier"):
        parts = {key.removeprefix(head): tensor for key, tensor in weights.items() if key.startswith(head)}
        network.classifier.load_state_dict(parts)
    network.network.load_state_dict(own)
    network.eval()
    return network  # type: ignore[no-any-return]


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


def _config(folder: Path, sources: list[list[int]]) -> ForeignConfig:
    settings = _settings(folder)
    architecture = next(iter(settings.get("architectures") or ()), None)
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
