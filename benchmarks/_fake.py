"""What two networks give for a batch, made of random numbers, and the methods between them. No network is run."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from segdistill.losses.masks import IGNORE_INDEX
from segdistill.methods import build_offline, build_online, parse_method
from segdistill.methods.method import Method
from segdistill.models.operators import loose_operators
from segdistill.models.outputs import ModelInfo, Outputs


@dataclass(frozen=True)
class Setting:
    """A crop of the literature, and the stride of logits and last features on it."""

    size: tuple[int, int]
    num_classes: int
    stride: int
    name: str = ""

    def __str__(self) -> str:
        sides, maps = ("x".join(map(str, pair)) for pair in (self.size, self.at(self.stride)))
        return f"{self.name}: crop {sides}, {self.num_classes} classes, logits and last feature {maps}"

    def at(self, stride: int) -> tuple[int, int]:
        height, width = self.size
        return -(-height // stride), -(-width // stride)


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting((512, 1024), 19, 8, "cityscapes/8"),
        Setting((512, 1024), 19, 4, "cityscapes/4"),
        Setting((512, 512), 150, 8, "ade20k/8"),
        Setting((512, 512), 150, 4, "ade20k/4"),
    )
}


@dataclass(frozen=True)
class Network:
    """Widths of what a network gives."""

    kind: str
    widths: tuple[int, int, int, int]  # of the encoder's stages
    last: int
    dilated: bool = False  # at stride 8: the last stage has stride 16

    def info(self, setting: Setting) -> ModelInfo:
        strides = (4, 8, 16, 16 if self.dilated and setting.stride == 8 else 32)
        stride = setting.stride
        return ModelInfo(setting.num_classes, self.widths, strides, self.last, stride, stride, self.kind)


STUDENT = Network("vit", (32, 64, 160, 256), 128)  # SegFormer-B0, its decoder narrowed to 128
TEACHER = Network("cnn", (256, 512, 1024, 2048), 512, dilated=True)  # ResNet-101 with a PSPNet head
PEER = Network("cnn", (64, 128, 256, 512), 128)  # ResNet-18: co-trained with the student


@dataclass(frozen=True)
class Inputs:
    """One batch: what the networks gave for it, and its labels."""

    setting: Setting
    student: Outputs
    teacher: Outputs
    peer: Outputs
    target: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for one in (self.student, self.peer) for leaf in (one.logits, *one.features, one.last_feature)]


class Lender(nn.Module):
    """What a method may borrow from a student: the attention and the MLP of its first stage."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.mlp = loose_operators(width)


def draw(setting: Setting, batch: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Random outputs. The labels are blocks of about twelve classes an image, a tenth of them ignored."""
    torch.manual_seed(0)

    def outputs(network: Network, *, grad: bool) -> Outputs:
        def values(channels: int, stride: int) -> Tensor:
            drawn = torch.randn(batch, channels, *setting.at(stride), device=device)
            return drawn.to(dtype).requires_grad_(grad)

        info = network.info(setting)
        stages = tuple(itertools.starmap(values, zip(info.feature_channels, info.feature_strides, strict=True)))
        logits = values(info.num_classes, info.logits_stride)
        return Outputs(logits, stages, values(info.last_channels, info.last_stride))

    shown = torch.randint(setting.num_classes, (batch, 12))
    blocks = shown.gather(1, torch.randint(12, (batch, 8 * 8))).unflatten(1, (8, 8))
    blocks[torch.rand(blocks.shape) < 0.1] = IGNORE_INDEX
    target = nn.functional.interpolate(blocks[:, None].float(), size=setting.size)[:, 0].long().to(device)
    return Inputs(setting, outputs(STUDENT, grad=True), outputs(TEACHER, grad=False), outputs(PEER, grad=True), target)


def build(name: str, setting: Setting, device: torch.device, **changes: Any) -> Method:
    """The method between the student and the teacher, or between the student and its peer."""
    torch.manual_seed(0)
    cls, config = parse_method({"name": name, **changes}, name)
    student = STUDENT.info(setting)
    if cls.kind == "offline":
        method = build_offline([config], student, TEACHER.info(setting))[name]
        lenders = {"vit": Lender(STUDENT.widths[0])}
    else:
        method = build_online([config], {"cnn": PEER.info(setting), "vit": student})[name]
        lenders = {"cnn": Lender(PEER.widths[0]), "vit": Lender(STUDENT.widths[0])}
    method.attach({name: lender.to(device) for name, lender in lenders.items()})
    return method.to(device)


def terms(method: Method, inputs: Inputs) -> dict[str, Tensor]:
    """The method's raw terms; of peers as ``cnn/kl``."""
    if method.kind == "offline":
        return method(inputs.student, inputs.teacher, inputs.target)
    nested = method({"cnn": inputs.peer, "vit": inputs.student}, inputs.target)
    return {f"{peer}/{term}": loss for peer, losses in nested.items() for term, loss in losses.items()}
