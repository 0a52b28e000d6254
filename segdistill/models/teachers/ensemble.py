"""Several teachers as one: the mean of their logits, which is the geometric mean of what they think probable."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from segdistill.config import config, parse, to_dict
from segdistill.geometry import finest, resize, size_of
from segdistill.models.outputs import ModelInfo, Outputs, SegmentationNetwork
from segdistill.models.teachers import build_network


@config
class EnsembleConfig:
    """What the mean is taken of."""

    family: Literal["ensemble"] = "ensemble"

    members: Annotated[list[dict[str, Any]], Field(min_length=2)]
    """The ``config`` of each."""


class Ensemble(SegmentationNetwork):
    """The mean of the members' logits, at the finest of their sizes; they have no feature in common."""

    def __init__(self, members: Sequence[SegmentationNetwork]) -> None:
        super().__init__()
        self.members, self.aux_head = nn.ModuleList(members), None
        self.images = members[0].images
        self.config = EnsembleConfig(members=[to_dict(member.config) for member in members])
        self.info = mean_info([member.info for member in members])

    def forward(self, images: Tensor) -> Outputs:
        logits = self.logits(images)
        return Outputs(logits, (), logits[:, :0])

    def logits(self, images: Tensor) -> Tensor:
        every = [member.logits(images).float() for member in self.members]  # type: ignore[operator]
        size = finest(map(size_of, every))
        total = resize(every[0], size)
        for logits in every[1:]:
            total = total + resize(logits, size)
        return total / len(every)


def mean_info(members: Sequence[ModelInfo]) -> ModelInfo:
    """What is known of the mean."""
    stride = min(member.logits_stride for member in members)
    kind = "cnn" if all(member.kind == "cnn" for member in members) else "vit"
    return ModelInfo(members[0].num_classes, (), (), 0, stride, stride, kind)


def mean_of(members: Sequence[SegmentationNetwork]) -> SegmentationNetwork:
    """The mean of trained networks."""
    return Ensemble(members).eval()


def build(description: dict[str, Any], num_classes: int, where: str) -> SegmentationNetwork:
    """The same without weights."""
    members = parse(EnsembleConfig, description, where).members
    return Ensemble([build_network(member, num_classes, f"{where}.members") for member in members])
