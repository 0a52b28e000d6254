"""Encoder weights: from timm's and segmentation-models-pytorch's own downloads, or from a local safetensors file."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv
from torch import Tensor, nn

from segdistill.errors import UserError
from segdistill.files import require_regular

HUB_TIMEOUT_SECONDS = 5.0

# Heads in the files of segmentation-models-pytorch's own encoders, which mirror torchvision's and others' names.
_NATIVE_HEADS = ("fc.", "classifier.", "head.", "last_linear.")


@contextlib.contextmanager
def imagenet_download(encoder: str) -> Iterator[None]:
    """Makes a download inside fail in seconds, as a UserError, if the hub does not answer; cached files still load."""
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    reachable = not was_offline and hub_answers(constants.ENDPOINT)
    try:
        # The client reads this at each request; it would otherwise retry a dead network for most of a minute.
        constants.HF_HUB_OFFLINE = not reachable
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cause = reason if reachable else "the network does not answer and no earlier download is cached"
        raise UserError(
            f"model.encoder_weights: the ImageNet weights of encoder '{encoder}' could not be had ({cause});"
            " give the path of a local .safetensors file, or 'none'"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def hub_answers(endpoint: str) -> bool:
    """Whether there is somebody to download weights from; says no within seconds."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=HUB_TIMEOUT_SECONDS)
    except Exception:  # whatever the client of the day raises: refused, timed out, not resolved, bad proxy
        return False
    return True


def local_weights_path(value: str) -> Path:
    """The file that ``encoder_weights`` names; a UserError where it is no .safetensors file, or absent."""
    path = Path(value)
    allowed = "allowed: none, imagenet, or the path of a .safetensors file"
    if path.suffix != ".safetensors":
        raise UserError(f"model.encoder_weights: '{value}' is not a .safetensors file; {allowed}")
    if not path.is_file():
        raise UserError(
            f"model.encoder_weights: {value}: no such file; {_where_to_get(path.stem)}, or choose imagenet, which"
            " downloads it, or none"
        )
    return path


def _where_to_get(encoder: str) -> str:
    """Which file of the hub is an encoder's, as far as its name tells."""
    known = timm.get_pretrained_cfg(encoder, allow_unregistered=True) if timm.is_model(encoder) else None
    source = f"model.safetensors of {known.hf_hub_id} on the Hugging Face hub" if known and known.hf_hub_id else None
    return f"save {source or 'the weights of the encoder, with its own keys,'} there"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, on the CPU.

    Raises:
        UserError: the file is no safetensors file, is cut short, or holds a number that is not finite.
    """
    require_regular(path)
    try:
        tensors = load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})") from None
    broken = not_finite(tensors)
    if broken:
        raise UserError(f"{path}: key '{broken[0]}' is not finite: what a diverged training left is no network")
    return tensors


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold an infinity or a NaN; waits for the device once."""
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    if not names:
        return []
    finite = torch.stack([tensors[name].detach().isfinite().all() for name in names]).tolist()
    return [name for name, good in zip(names, finite, strict=True) if not good]


def load_encoder_file(encoder: nn.Module, name: str, path: Path) -> None:
    """Fills an encoder from a file with the encoder library's own keys.

    Nothing may be missing. What the encoder has no place for must be the classifier's side of the same model. ``name``
    is the resolved one.
    """
    is_timm, title = name.startswith("tu-"), name.removeprefix("tu-")
    module = encoder.get_submodule("model") if is_timm else encoder
    # timm's feature extractors name a submodule "stages_0" where the whole model says "stages.0".
    flat = {key: key.replace(".", "_") for key in module.state_dict()}
    given = {key.replace(".", "_"): (key, tensor) for key, tensor in read_safetensors(path).items()}
    places = {*flat.values(), *(_whole_model(title) if is_timm else ())}
    for place, (key, _) in given.items():
        known = place in places or (not is_timm and key.startswith(_NATIVE_HEADS))
        if not known and not key.endswith("num_batches_tracked"):
            raise UserError(f"{path}: key '{key}' is not in encoder '{title}': wrong weights")
    loaded: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        if key.endswith("num_batches_tracked") and flat[key] not in given:
            loaded[key] = tensor  # a counter that older files leave out
            continue
        if flat[key] not in given:
            raise UserError(f"{path}: key '{key}' of encoder '{title}' is missing: wrong weights")
        loaded[key] = _adapted(given[flat[key]][1], tensor)
        read, needed = tuple(loaded[key].shape), tuple(tensor.shape)
        if read != needed:
            raise UserError(f"{path}: key '{key}' has shape {read}, encoder '{title}' needs {needed}: wrong weights")
    nn.Module.load_state_dict(module, loaded, strict=True)


def _adapted(weight: Tensor, place: Tensor) -> Tensor:
    """The weights of a convolution of RGB images for as many channels as there are, as timm changes them."""
    is_rgb = weight.ndim == place.ndim == 4 and weight.shape[1] == 3 != place.shape[1]
    return adapt_input_conv(place.shape[1], weight) if is_rgb else weight


def _whole_model(name: str) -> set[str]:
    with torch.device("meta"):
        return {key.replace(".", "_") for key in timm.create_model(name).state_dict()}
