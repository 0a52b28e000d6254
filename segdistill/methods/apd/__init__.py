"""Adaptive perspective distillation: the teacher's view of the data set, and its view of this batch."""

from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from segdistill.config import Beta, LearningRate, config
from segdistill.errors import UserError
from segdistill.geometry import resize, resize_labels, size_of
from segdistill.losses.align import Projection
from segdistill.losses.blocks import align_logits
from segdistill.losses.divergence import pixel_kl
from segdistill.losses.masks import class_members, valid_mask
from segdistill.losses.supervised import cross_entropy
from segdistill.methods.apd.perspective import Scope, local_kl, local_perspective, present_classes, prototype_distance
from segdistill.methods.method import Channels, MethodConfig, NonNegative, OfflineMethod, Positive, Temperature
from segdistill.models.outputs import ModelInfo, Outputs

Head = Literal["mlp", "identity"]


@config
class APDConfig(MethodConfig):
    """Adaptive perspective distillation; the defaults are the released code's."""

    name: Literal["apd"] = "apd"
    weight: NonNegative = 1.0
    """Factor of the three terms that train the student; 0 switches the method off."""
    global_weight: NonNegative = 10.0
    """Weight of the divergence between the logits, as published; 0 is off."""
    local_weight: NonNegative = 10.0
    """Weight of the divergence between the prototype classifiers, as published; 0 is off."""
    prototype_weight: NonNegative = 10.0
    """Weight of the alignment of the prototypes, as published; 0 is off."""
    teacher_head_weight: NonNegative = 1.0
    """Factor of the teacher head's own loss; 0 leaves the head as it was drawn."""
    reduction: Literal["element_mean", "per_pixel"] = "element_mean"
    """What global_weight and local_weight multiply: the mean over pixels and classes (as published), or over pixels."""
    temperature: Temperature = 1.0
    """Of the global divergence; divides both logits, squared it multiplies the loss."""
    cosine_scale: Positive = 10.0
    """Multiplies the cosines of the local classifier (the released code calls it a temperature)."""
    scope: Scope = "batch"
    """Whose pixels make a prototype: the process's batch (released code) or each image's own (abstract)."""
    student_head: Head = "mlp"
    """What maps the student's last feature into the space of its prototypes."""
    teacher_head: Head = "mlp"
    """The same for the teacher."""
    hidden_channels: Channels = 512
    """Width between the two layers of an mlp head."""
    out_channels: Channels = 512
    """Width of the prototypes behind an mlp head."""
    normalize: bool = True
    """Give every pixel's vector and every prototype unit length; false (kmeans_norm: False there) leaves both be."""
    mask_ignore_global: bool = False
    """Leave ignored pixels out of the global divergence; the released code does not."""
    mask_ignore_local: bool = False
    """Leave ignored pixels out of the local divergence; the released code does not."""
    upsample: bool = True
    """Take the global divergence at label size; false: at the teacher's logit size, far cheaper."""
    align_corners: bool = True
    """Interpolate coarser maps from corner cell to corner cell and not in place; finer ones are averaged anyway."""
    teacher_head_lr: LearningRate = 1e-5
    """Constant learning rate of the teacher head's Adam."""
    teacher_head_betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Betas of the teacher head's Adam."""


class AdaptivePerspective(OfflineMethod[APDConfig]):
    """Adaptive perspective distillation (APD), complete.

    Example:
        apd_masked:
          students: {cnn: *cnn}
          methods:
            - {name: apd, hidden_channels: 128, out_channels: 128, mask_ignore_global: true, mask_ignore_local: true}

    Formula:
        With F the last features (the student's resized to the teacher's), U = unit(head(F)), p_c = unit(mean of U over
        the pixels labelled c), Q = softmax over the n classes present of cosine_scale * <U, p_c>, P = softmax(logits):

        global        T^2 * mean over pixels of KL(P_teacher || P_student), logits at label size
        local         mean over pixels of KL(Q_teacher || Q_student), divided by n
        prototype     0.5 * mean over present classes of 1 - <p_student, p_teacher>
        teacher_head  cross-entropy of the teacher's own cosine logits at label size, absent classes with logit 0

        The first three train the student and its head. The fourth trains the teacher's head alone, with an Adam of its
        own: the head's features come in detached and its outputs leave detached, so that one backward pass of the sum
        gives each side exactly the gradient of the released code's two passes.

    Weights:
        The released code weighs global and local with 10 and takes the mean over pixels *and classes*. The global term
        here is a mean over pixels, so its factor is 10 / K (0.53 at K = 19, 0.067 at K = 150). n changes with the
        batch and cannot go into a factor, so the local term itself is divided by n and keeps the factor 10.
        ``reduction: per_pixel`` leaves out both divisions: the same weight is then K and n times as strong. ``weight``
        and ``ramp`` scale the student's terms, not the teacher head's.

    Masks:
        As in the released code, ignored pixels shape no prototype but are distilled (``mask_ignore_*`` leaves them
        out), and a batch without any label gives zeros. Images without labels shape no prototype; global and, with
        ``scope: batch``, local distil them too.

    Inferred:
        The paper's text was not available: this is the released code. Its exceptions turned to zeros are not copied.
        Without ``normalize`` prototype is no distance, there as here: it has no least value.

    Reference:
        Tian et al.: Adaptive Perspective Distillation for Semantic Segmentation, IEEE TPAMI 45(2), 2023,
        doi:10.1109/TPAMI.2022.3159581.
    """

    paper = "Tian et al., TPAMI 2023"
    needs = "logits; last feature, two heads, an optimiser for the teacher's head"
    evidence = "official code"
    helper_terms: ClassVar = {"teacher_head": ("local", "prototype")}

    def __init__(self, config: APDConfig, student: ModelInfo, teacher: ModelInfo) -> None:
        super().__init__(config, student, teacher)
        self.student_head: nn.Module | None = None
        self.teacher_head: nn.Module | None = None
        if not self._local:
            return
        if "prototype" in self.weights:
            _require_one_width(config, student, teacher)
        self.student_head = _head(config.student_head, student.channels("last_feature"), config)
        self.teacher_head = _head(config.teacher_head, teacher.channels("last_feature"), config)
        self.teacher_head.requires_grad_("teacher_head" in self.weights)

    def term_weights(self) -> dict[str, float]:
        weights = super().term_weights()
        if self.config.reduction == "element_mean":
            weights["global"] /= self.student_info.num_classes
        if self.config.teacher_head == "identity":
            weights["teacher_head"] = 0.0
        return weights

    @property
    def _local(self) -> bool:
        return not {"local", "prototype"}.isdisjoint(self.weights)

    def own_optimizers(self) -> dict[str, tuple[list[nn.Parameter], Any]]:
        if self.teacher_head is None or "teacher_head" not in self.weights:
            return {}
        betas = list(self.config.teacher_head_betas)
        settings = {"name": "adam", "lr": self.config.teacher_head_lr, "betas": betas, "weight_decay": 0.0}
        return {"teacher_head": (list(self.teacher_head.parameters()), settings)}

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if "global" in self.weights:
            terms["global"] = self._global(student, teacher, target)
        if self._local:
            terms.update(self._local_terms(student.last_feature, teacher.last_feature.detach(), target))
        return terms

    def _global(self, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
        config = self.config
        student_logits, teacher_logits, labels = align_logits(
            student.logits, teacher.logits, target, upsample=config.upsample, align_corners=config.align_corners
        )
        valid = valid_mask(labels)
        mask = valid if config.mask_ignore_global else valid.any().expand_as(valid)
        settings: dict[str, Any] = {"temperature": config.temperature, "align_corners": config.align_corners}
        return pixel_kl(student_logits, teacher_logits, mask, **settings)

    def _local_terms(self, student: Tensor, teacher: Tensor, target: Tensor) -> dict[str, Tensor]:
        config, size = self.config, size_of(teacher)
        assert self.student_head is not None and self.teacher_head is not None
        labels = resize_labels(target, size)
        members = class_members(labels, self.student_info.num_classes)
        present = present_classes(members, config.scope)
        student = resize(student, size, align_corners=config.align_corners)
        settings: dict[str, Any] = {name: getattr(config, name) for name in ("scope", "cosine_scale", "normalize")}
        student_view = local_perspective(self.student_head(student), members, **settings)
        teacher_view = local_perspective(self.teacher_head(teacher), members, **settings)
        terms = {}
        if "local" in self.weights:
            valid = valid_mask(labels) if config.mask_ignore_local else None
            element_mean = config.reduction == "element_mean"
            terms["local"] = local_kl(
                student_view.logits, teacher_view.logits, present, valid, element_mean=element_mean
            )
        if "prototype" in self.weights:
            terms["prototype"] = prototype_distance(student_view.prototypes, teacher_view.prototypes, present)
        if "teacher_head" in self.weights:
            terms["teacher_head"] = cross_entropy(teacher_view.logits, target, align_corners=config.align_corners)
        return terms


def _head(kind: Head, in_channels: int, config: APDConfig) -> nn.Module:
    if kind == "identity":
        return nn.Identity()
    return nn.Sequential(
        Projection(in_channels, config.hidden_channels, bias=True),
        nn.ReLU(inplace=True),
        Projection(config.hidden_channels, config.out_channels, bias=True),
    )


def _require_one_width(config: APDConfig, student: ModelInfo, teacher: ModelInfo) -> None:
    widths = {
        f"student_head ({config.student_head})": _width(config.student_head, student, config),
        f"teacher_head ({config.teacher_head})": _width(config.teacher_head, teacher, config),
    }
    if len(set(widths.values())) > 1:
        heads = " and ".join(f"{width} behind the {head}" for head, width in widths.items())
        raise UserError(
            f"apd: prototypes can be compared only at one width, not {heads}; "
            "use mlp heads, set out_channels to an identity head's width, or prototype_weight: 0"
        )


def _width(head: Head, model: ModelInfo, config: APDConfig) -> int:
    return model.channels("last_feature") if head == "identity" else config.out_channels
