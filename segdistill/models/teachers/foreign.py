"""What networks of other libraries have in common: their own normalisation, their own classes, our geometry."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from segdistill.config import config
from segdistill.errors import UserError
from segdistill.models.outputs import ModelInfo, Outputs, SegmentationNetwork
from segdistill.models.segmenter import PROBE, crop_stages, crop_to_stride, measured, pad
from segdistill.models.teachers import matched

ABSENT = -1  # in the table of sources, where a class has fewer than another one

Sources = list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]]


@config
class ForeignConfig:
    """What a network of another library is built from, its weights apart."""

    family: str
    """Whose module reads it; see :data:`segdistill.models.teachers.FAMILIES`."""

    architecture: str
    """The class of its library."""

    origin: str
    """The name of the folder that it was read from."""

    settings: dict[str, Any]
    """Its library's own settings."""

    names: list[str]
    """Its classes, in order."""

    sources: Sources
    """The indices of its classes that make each of ours."""

    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    """Of red, green and blue, in 0..1, in its training."""

    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
    """Likewise."""


class ForeignNetwork(SegmentationNetwork):
    """A network of another library behind the interface of ours.

    A class that several of its classes make has the logsumexp of their logits, so that its probability is the sum of
    theirs. Its classes that are none of ours are left out: what remains is the probability of ours given that it is
    one of them.

    Normalisation and table of classes are buffers of the state dict, so that the hash of saved weights covers them.
    """

    mean: Tensor
    std: Tensor
    sources: Tensor

    def __init__(self, config: ForeignConfig) -> None:
        super().__init__()
        self.config, self.aux_head = config, None
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1))
        most = max(map(len, config.sources))
        table = [[*own, *[ABSENT] * (most - len(own))] for own in config.sources]
        self.register_buffer("sources", torch.tensor(table))  # [K, most]

    def run(self, images: Tensor) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
        """Logits of its own classes, four encoder stages or none, and what entered its 1x1 classifier, if one is there.

        Shape:
            images: [B, 3, H, W], normalised, of sizes that are multiples of 32.
        """
        raise NotImplementedError

    def forward(self, images: Tensor) -> Outputs:
        height, width = images.shape[-2:]
        logits, stages, last = self.run(pad((images - self.mean) / self.std))
        logits = self._relabelled(crop_to_stride(logits, height, width, self.info.logits_stride))
        features = crop_stages(stages, height, width, self.info)
        if last is None:
            return Outputs(logits, features, logits[:, :0])
        return Outputs(logits, features, crop_to_stride(last, height, width, self.info.last_stride))

    def measure(self) -> ModelInfo:
        """Channels and strides as they are, from one small image.

        Raises:
            UserError: cells that are no power of two pixels wide, which is our rule of geometry.
        """
        self.eval()
        with torch.no_grad():
            logits, stages, last = self.run(torch.zeros(1, 3, PROBE, PROBE, device=self.mean.device))
        strides = [PROBE / tap.shape[-1] for tap in (logits, *stages, *(() if last is None else (last,)))]
        if odd := next((stride for stride in strides if stride not in (1, 2, 4, 8, 16, 32)), None):
            raise UserError(
                f"{self.config.origin}: a {self.config.architecture} with cells of {odd:.3g} pixels; allowed: 1, 2, 4,"
                " 8, 16, 32"
            )
        return measured(len(self.config.sources), logits, stages, last, self, aux=False)

    def _relabelled(self, logits: Tensor) -> Tensor:
        """Logits [B, T, h, w] of its classes as [B, K, h, w] of ours."""
        if self.sources.shape[1] == 1:
            return logits[:, self.sources[:, 0]]
        grouped = logits.float()[:, self.sources.clamp_min(0)]  # [B, K, most, h, w]
        return grouped.masked_fill((self.sources == ABSENT)[:, :, None, None], -torch.inf).logsumexp(2)


def sources_of(where: Path, names: Sequence[str], classes: Sequence[str], labels: Mapping[str, str]) -> Sources:
    """The indices of a teacher's classes that make each class of the data set.

    Args:
        names: its classes, in order.
        classes: the data set's, in order.
        labels: one of ``names`` -> one of ``classes``; what is not in it is matched by name, see :func:`matched`.

    Raises:
        UserError: a class of the data set has no source.
    """
    for name, label in labels.items():
        if label not in classes:
            raise UserError(
                f"train_teacher.labels.{name}: '{label}' is no class of the data set; allowed: {', '.join(classes)}"
            )
    table = {**matched(names, classes), **labels}
    sources = [[index for index, name in enumerate(names) if table.get(name) == label] for label in classes]
    missing = [label for label, own in zip(classes, sources, strict=True) if not own]
    if missing:
        raise UserError(
            f"{where}: none of its classes is {', '.join(missing)}; it has {', '.join(names)}; the data set has"
            f" {', '.join(classes)}; say which is which in train_teacher.labels, {{its name: the data set's}}"
        )
    return sources
