"""Channel-wise distillation: where in the image a channel fires, not which channel fires at a pixel."""

from typing import Literal

from torch import Tensor, nn

from segdistill.config import config
from segdistill.geometry import resize, resize_labels, size_of
from segdistill.losses.align import projection, resize_logits
from segdistill.losses.divergence import divergence
from segdistill.losses.masks import LEFT_OUT, masked_mean, valid_mask
from segdistill.losses.precision import in_float32
from segdistill.methods.method import MethodConfig, NonNegative, OfflineMethod, Temperature
from segdistill.models.outputs import ModelInfo, Outputs, Tap


@config
class CWDConfig(MethodConfig):
    """Channel-wise distillation; the defaults are the released command's, on the logits."""

    name: Literal["cwd"] = "cwd"
    weight: NonNegative = 1.0
    """Factor of both terms; 0 switches the method off."""
    logits_weight: NonNegative = 3.0
    """Weight of the divergence between the logits' channels, one a class; 0 is off."""
    feature_weight: NonNegative = 0.0
    """Weight of the divergence between a feature's channels; 0 is off. The released code's results have 35 to 50."""
    tap: Tap = "last_feature"
    """The feature of the feature term."""
    temperature: Temperature = 4.0
    """Divides both maps before the softmax over space; the squared temperature multiplies the loss."""
    mask_ignore: bool = False
    """Take the softmax without ignored pixels; the released code takes it over all."""


@in_float32
def channel_kl(student: Tensor, teacher: Tensor, valid: Tensor | None = None, *, temperature: float) -> Tensor:
    """T^2 * mean over images and channels of KL(teacher || student), with phi = softmax(x / T) over space.

    The teacher's side is detached. The gradient is T / (B * C) * (phi_student - phi_teacher): for every image and
    channel it sums to zero over space.

    Args:
        valid: the positions among which the softmax is taken, an image without any being left out; None for all.

    Shape:
        student, teacher: [B, C, h, w]; valid: [B, h, w] bool.
    """
    student, teacher = (maps.flatten(2) / temperature for maps in (student, teacher.detach()))  # [B, C, h * w]
    if valid is not None:
        ignored = ~valid.flatten(1)[:, None]
        student, teacher = student.masked_fill(ignored, LEFT_OUT), teacher.masked_fill(ignored, LEFT_OUT)
    values = divergence(student.log_softmax(-1), teacher.log_softmax(-1), -1).mean(1)  # [B]
    return masked_mean(values, None if valid is None else valid.flatten(1).any(1)) * temperature**2


class ChannelWise(OfflineMethod[CWDConfig]):
    """Channel-wise knowledge distillation (CWD).

    Example:
        cwd_feature:
          students: {cnn: *cnn}
          methods: [{name: kd}, {name: cwd, logits_weight: 0.0, feature_weight: 50.0, temperature: 1.0}]

    Formula:
        L = T^2 / (B C) * sum over images and channels of KL(phi_teacher || phi_student), phi = softmax(x / T) over the
        h x w positions of a channel x. Sum over space, mean over images and channels.

        logits   x are the logits, one channel a class
        feature  x is a feature, the student's brought to the teacher's width by a 1x1 convolution without bias where
                 widths differ

    Weights:
        The published codes reduce as above, so their weights carry over, with one exception:

            TorchDistiller, command in its README           logits    T = 4   3 (the default)
            TorchDistiller, names of its result folders     feature   T = 1   35 to 50, PSP feature
            mmrazor, mmsegmentation-distiller, Cityscapes   logits    T = 1   5
            mmsegmentation-distiller, ADE20K                logits    T = 1   10
            CIRKD, CNNs                                     both      T = 4   feature 50 -> 100, logits 3
            CIRKD, SegFormer                                both      T = 4   feature 5, logits 0.3

        CIRKD divides the feature term by the student's channels before the projection: w there is
        w * C_teacher / C_student here, 100 for its 50 at 128 -> 256. Its SegFormer weights gave less than training
        without a teacher: tune them anew. Two temperatures at once are two entries of the method.

    Masks:
        Off by default, as published: no label enters. With ``mask_ignore`` the softmax runs over an image's valid
        positions, an image without any is left out of the mean, and a batch without any gives zero. Images without
        labels are distilled like the others either way.

    Inferred:
        The masked softmax is not in the paper or its code, and neither is resizing the student to the teacher's size:
        there, sizes have to be equal.

    Reference:
        Shu, Liu, Gao, Yan, Shen: Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, arXiv:2011.13256.
    """

    paper = "Shu et al., ICCV 2021"
    needs = "logits; for the feature term a feature, 1x1 projection"
    evidence = "official code"

    def __init__(self, config: CWDConfig, student: ModelInfo, teacher: ModelInfo) -> None:
        super().__init__(config, student, teacher)
        self.projection: nn.Module | None = None
        if "feature" in self.weights:
            self.projection = projection(student.channels(config.tap), teacher.channels(config.tap))

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        if "logits" in self.weights:
            logits = resize_logits(student.logits, size_of(teacher.logits))
            terms["logits"] = self._divergence(logits, teacher.logits, target)
        if self.projection is not None:
            goal = teacher.tap(self.config.tap)
            feature = resize(self.projection(student.tap(self.config.tap)), size_of(goal))
            terms["feature"] = self._divergence(feature, goal, target)
        return terms

    def _divergence(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        valid = valid_mask(resize_labels(target, size_of(teacher))) if self.config.mask_ignore else None
        return channel_kl(student, teacher, valid, temperature=self.config.temperature)
