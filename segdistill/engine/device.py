"""Whether the GPUs that were asked for are there; if not, why, before days are spent on the CPU instead."""

import warnings

import torch

from segdistill.errors import UserError

# The first branch of NVIDIA's driver that runs a major version of CUDA.
DRIVERS = {"11": "R450", "12": "R525", "13": "R580"}


def usable_gpus() -> int:
    """How many GPUs torch can use: none under a driver that is too old, whatever is in the machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is in our sentence
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def require_gpus(count: int, asked: str) -> None:
    """Raises a UserError where torch can use fewer GPUs; ``asked`` begins its sentence: who asked for how many."""
    usable = usable_gpus()
    if usable >= count:
        return
    reason = f" ({_reason()})" if not usable else ""
    raise UserError(f"{asked}, and torch sees {usable} that it can use{reason}; {_build()}")


def _reason() -> str:
    """The first sentence of what torch says."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return "no GPU is visible to it"


def _build() -> str:
    version = torch.version.cuda
    if version is None:
        return f"torch {torch.__version__} is built without CUDA"
    driver = DRIVERS.get(version.split(".")[0])
    needs = f", which needs NVIDIA's driver {driver} or newer" if driver else ""
    return f"torch {torch.__version__} is built for CUDA {version}{needs}"
