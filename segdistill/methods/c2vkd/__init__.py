"""C2VKD: a CNN teaches a vision transformer by dense features, one vector an image, and decoupled pixels."""

from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor, nn

from segdistill.config import config
from segdistill.errors import UserError
from segdistill.geometry import resize, size_of
from segdistill.losses.align import Projection, projection
from segdistill.losses.blocks import align_logits
from segdistill.losses.divergence import divergence
from segdistill.losses.fused import fused
from segdistill.losses.precision import add_product, in_float32, is_half, product
from segdistill.losses.vectors import unit
from segdistill.methods.c2vkd.attention_pool import AttentionPool, load_attention_pool
from segdistill.methods.c2vkd.decoupling import blended_two_way
from segdistill.methods.dkd import non_target_kl, target_kl
from segdistill.methods.method import Channels, MethodConfig, NonNegative, OfflineMethod, Temperature
from segdistill.models.outputs import ModelInfo, Outputs, Tap

Direction = Literal["teacher_to_student", "student_to_teacher"]


@config
class C2VKDConfig(MethodConfig):
    """C2VKD; the defaults are the released code's where it could be read."""

    name: Literal["c2vkd"] = "c2vkd"
    weight: NonNegative = 1.0
    """Factor of the four terms; 0 switches the method off."""
    pdd_weight: NonNegative = 1.0
    """Weight of the pixel-wise decoupled term; 0 is off."""
    visual_weight: NonNegative = 0.1
    """Weight of the divergence between the channel distributions at each location, as published; 0 is off."""
    patch_weight: NonNegative = 0.1
    """Weight of the distance of the patch relations, as published; 0 is off."""
    linguistic_weight: NonNegative = 0.5
    """Weight of the divergence between the images' vectors, as published; 0 is off, and nothing is pooled."""
    pdd: Literal["mix", "literal", "dkd"] = "mix"
    """How the decoupled term is read: pulled to the mean of teacher and label (mix), to their sum (literal), or DKD."""
    target_factor: NonNegative = 0.5
    """Factor of the labelled class's part of the decoupled term."""
    other_factor: NonNegative = 0.5
    """Factor of the part of all other classes."""
    temperature: Temperature = 1.0
    """Of the reading dkd alone; divides both logits, squared it multiplies the term."""
    upsample: bool = True
    """Compare logits at label size and not at the teacher's logit size."""
    kl_direction: Direction = "teacher_to_student"
    """Whose distribution is first in the visual and linguistic terms: the teacher's (code) or the student's (paper)."""
    reduction: Literal["element_mean", "per_location"] = "element_mean"
    """What visual_weight and linguistic_weight multiply: the mean over channels too (as published), or their sum."""
    student_tap: Tap = "stage4"
    """Where the student's feature is taken."""
    teacher_tap: Tap = "stage4"
    """Where the teacher's feature is taken; last_feature is the nearest to the released VOC script's (ASPP output)."""
    student_vector: Literal["projection", "pool"] = "projection"
    """What makes the student's feature a vector: a projection of its mean (segformer.py), or the pool (train.py)."""
    pool: Literal["gap", "clip"] = "gap"
    """What makes the teacher's feature a vector: its mean (the fallback, not the paper's), or CLIP's attention pool."""
    pool_weights: Path | None = None
    """For clip: a .safetensors file with CLIP-RN101's tensors visual.attnpool.*, or a whole CLIP."""
    pool_heads: Channels = 32
    """For clip: attention heads of the pool; the file does not tell."""
    half_products: bool = True
    """Of networks in half precision, multiply patches as bfloat16, summed in float32; false: all in float32."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "C2VKDConfig":
        """Refuses settings that would have no effect, or lack what they need."""
        if self.temperature != 1.0 and self.pdd != "dkd":
            raise ValueError(f"temperature {self.temperature} belongs to pdd: dkd; pdd: {self.pdd} has none")
        if self.pool == "clip" and self.pool_weights is None:
            raise ValueError(
                "pool: clip needs pool_weights, a local .safetensors file with CLIP's tensors visual.attnpool.*; "
                "without one there are pool: gap (which is not the paper's) and linguistic_weight: 0"
            )
        if self.pool == "gap" and self.pool_weights is not None:
            raise ValueError(f"pool_weights {self.pool_weights} belongs to pool: clip; pool: gap reads no file")
        return self


@fused
@in_float32
def channel_kl(student: Tensor, teacher: Tensor, *, direction: Direction) -> Tensor:
    """Mean over all locations of the KL between softmaxes over channels, temperature 1; the teacher's side detached.

    Shape:
        student, teacher: [B, C, ...], equal.
    """
    student, teacher = student.log_softmax(1), teacher.detach().log_softmax(1)
    sink, source = (student, teacher) if direction == "teacher_to_student" else (teacher, student)
    return divergence(sink, source, 1).mean()


def patch_distance(student: Tensor, teacher: Tensor, *, half: bool = False) -> Tensor:
    """Mean over all N^2 pairs of locations of the batch, N = B * h * w, of the squared difference of their relations.

    A location's vector is divided by its length and then centred over channels, in this order: a constant added to
    all channels does not cancel. The relation of two is their inner product over C - 1. A zero vector relates to none.

    With more locations than channels no pair is formed: for S and T [N, C] the sum over pairs is that of C x C maps,
    and with U = S - T and V = S + T it is (<U'U, V'V> + <U'V, V'U>) / 2. Near S = T this is as exact as the pairs are,
    where a sum of S'S, S'T and T'T would not be. Otherwise there are few pairs, and they are formed.

    Args:
        half: round U and V for the products through the channels; see ``losses.precision.product``.

    Shape:
        student, teacher: [B, C, h, w], equal.
    """
    count, channels = student[:, 0].numel(), student.shape[1]
    student, teacher = _patches(student), _patches(teacher.detach())
    total = _by_pairs(student, teacher) if count <= channels else _through_channels(student, teacher, half)
    return total / (count * max(channels - 1, 1)) ** 2


@fused
@in_float32
def _patches(feature: Tensor) -> Tensor:
    """Unit vectors of all locations, centred: [B * h * w, C]."""
    vectors = unit(feature.movedim(1, -1).flatten(0, 2), dim=1)
    return vectors - vectors.mean(1, keepdim=True)


@in_float32
def _by_pairs(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.addmm(teacher @ teacher.mT, student, student.mT, beta=-1).square().sum()


@in_float32
def _through_channels(student: Tensor, teacher: Tensor, half: bool) -> Tensor:
    return _ThroughChannels.apply(student, teacher, half)  # type: ignore[no-any-return]


@fused
def _difference_and_sum(student: Tensor, teacher: Tensor, half: bool) -> tuple[Tensor, Tensor]:
    """U and V: [N, C], rounded if half, once for all products."""
    difference, both = student - teacher, student + teacher
    return (difference.bfloat16(), both.bfloat16()) if half else (difference, both)


class _ThroughChannels(torch.autograd.Function):
    """What :func:`_by_pairs` gives, by three products, and two for the gradient of S.

    The gradient is 4 (S S' - T T') S = U (V'U + V'V) + V (U'U + U'V): autograd would take six products to it.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, half: bool) -> Tensor:
        difference, both = _difference_and_sum(student, teacher, half)
        of_difference = product(difference.mT, difference, half=half)  # [C, C]
        of_both = product(both.mT, both, half=half)
        mixed = product(difference.mT, both, half=half)
        ctx.save_for_backward(difference, both, mixed.mT + of_both, of_difference + mixed)
        ctx.half = half
        return ((of_difference * of_both).sum() + (mixed * mixed.mT).sum()) / 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        difference, both, left, right = ctx.saved_tensors
        slopes = product(difference, left, half=ctx.half)
        add_product(slopes, both, right, half=ctx.half)
        return slopes.mul_(gradient), None, None


class CNNToViT(OfflineMethod[C2VKDConfig]):
    """Knowledge distillation from CNNs to vision transformers (C2VKD): visual, linguistic and decoupled pixel terms.

    Example:
        c2vkd: # as published: a ViT learns, and without cross-entropy
          students: {vit: *vit}
          methods: [{name: c2vkd}]
          supervised: 0.0

    Formula:
        With S = resize(project(F_student)) and T = F_teacher, D channels at each of the teacher's locations:

        visual      mean over locations of KL(softmax T || softmax S) over channels (L_G)
        patch       mean over pairs of locations, within and across images, of (<x_S, y_S> - <x_T, y_T>)^2 / (D - 1)^2,
                    with vectors of unit length, then centred over channels (L_P)
        linguistic  mean over images of KL(softmax t || softmax s) over the vectors s = project(mean of F_student), or
                    s = pool(S) with ``student_vector: pool``, and t = pool(F_teacher) (L_L)
        pdd         mean over valid pixels of a s_y log(s_y / q_y) + b s_n log(s_n / q_n), where s and t are softmaxes
                    of logits, summed to the labelled class y and all others n, and q = (t + (1, 0)) / 2

        pdd is 0 at s_y = (1 + t_y) / 2, not where student and teacher agree: the label corrects the teacher. Two
        properties to know. It pulls like smoothed labels, never to s_y = 1 unless the teacher is there. And its
        gradient at the labelled logit, a s_y s_n (log(s_y / q_y) - log(s_n / q_n)) at a = b, vanishes as s_y goes to
        0: pixels that are badly wrong are almost ignored, so that a start with many classes is slow.

        ``pdd: literal`` does not halve q (Eq. 9 as reported): at a = b the same gradient, and a value that is lower by
        a log 2; at other ratios both differ, and both forms can be negative. ``pdd: dkd`` is a T^2 KL(t || s) on the
        two-way distributions plus b T^2 KL(teacher || student) among the other classes. No label corrects it.

    Weights:
        The published total is pdd + 0.1 visual + 0.1 patch + 0.5 linguistic, **without cross-entropy**: set
        ``supervised: 0`` in the experiment, which then reports the cross-entropy and does not train on it. Training
        with it too is a deviation, to be named "C2VKD + CE"; so is a warm-up by cross-entropy.

        Published, visual and linguistic are means over channels too; here they are means over locations and images, so
        that their factors are 0.1 / D and 0.5 / d for vectors of d channels (5e-5 at D = 2048, 1e-3 at d = 512).
        ``reduction: per_location`` leaves out both divisions. As published the feature terms are very small beside pdd
        (a public re-implementation logged 1e-4, 3e-9 and 6e-4 beside 0.45); say which reduction a table uses.

    Masks:
        pdd is a mean over labelled pixels at label size. The other terms use no label and see every location, also of
        images without labels.

    Inferred:
        A re-implementation: the paper's text was not available, and the released code lacks the decoupled loss, the
        pool and its weights. Read in the code: visual, patch and linguistic, their weights and projections, that there
        is no cross-entropy, and a = b = 0.5, T = 1. Inferred: the blend of pdd (confidence 0.75, from second-hand
        equations; dkd 0.25, from the released call's arguments); the teacher's stage 4 as tap (0.85); CLIP-RN101's
        attention pool (structure 0.9, weights 0.6). kl_direction differs between paper and code; the code's is the
        default. The pool's positions are resized to the teacher's grid, whereas the released pool is declared for
        16 x 16.

        The released files disagree about the student's vector. models/seg/segformer.py gives one, a projection of the
        encoder's mean, and no script uses it: ``student_vector: projection``. train.py sends the visual features of
        *both* sides through the same frozen pool: ``student_vector: pool``, through which the student's gradient then
        goes. Its pool is 2048 wide and its features 256, so that as released it cannot run; here S has the teacher's
        width.

        pdd counts a teacher's certainty in full: log q is exact and not cut off. Our specification's pseudo-code cuts
        probabilities off at 1e-8, which matters only where the teacher gives all other classes less: with logits
        (0, 0) of the student and (40, 0) of the teacher, label 0, the term is 9.83 here and 4.26 there.

        The pool's weights are not published, so the default ``pool: gap`` is a fallback and **not the paper's LFD**:
        the mean of the teacher's feature, with the student projected to its width. Tables must name the rows "C2VKD
        (re-implementation, GAP for LFD)", with ``pool: clip`` "C2VKD (re-implementation, CLIP-RN101 pool)", and with
        ``linguistic_weight: 0`` "C2VKD (re-implementation, no LFD)"; beside cross-entropy "C2VKD + CE" with the same in
        brackets. Only with ``pool: clip`` and without cross-entropy is a row "as published".

        The features' projection is left out where the widths are equal already (the published pairs never are), and
        the one to CLIP's space never is. Zero vectors have no relation and get no gradient (the code would divide by
        almost 0). patch depends on the batch of the process: gradient accumulation does not reproduce a large one.

    Reference:
        Zheng, Luo, Zhou, Wang: Distilling Efficient Vision Transformers from CNNs for Semantic Segmentation, 2023,
        arXiv:2310.07265; Pattern Recognition, 2025. The decoupled reading dkd: Zhao et al., CVPR 2022,
        arXiv:2203.08679.
    """

    paper = "Zheng et al., PR 2025"
    needs = "logits, labels; stage 4, two 1x1 projections; optionally CLIP's attention pool from a file"
    evidence = "partly second-hand"

    def __init__(self, config: C2VKDConfig, student: ModelInfo, teacher: ModelInfo) -> None:
        super().__init__(config, student, teacher)
        if config.pdd_weight and student.num_classes < 2:
            needed = "c2vkd: pdd parts the labelled class from the others and needs two"
            raise UserError(f"{needed}, not {student.num_classes}")
        width, self.visual_width = student.channels(config.student_tap), teacher.channels(config.teacher_tap)
        self.linguistic_width = self.visual_width
        self.pool: AttentionPool | None = None
        self.visual_projection: nn.Module | None = None
        self.linguistic_projection: nn.Module | None = None
        linguistic = "linguistic" in self.weights
        pooled = linguistic and config.student_vector == "pool"
        if pooled or not {"visual", "patch"}.isdisjoint(self.weights):
            self.visual_projection = projection(width, self.visual_width)
        if linguistic and config.pool == "clip":
            self.pool = _fitting_pool(config, self.visual_width)
            self.linguistic_width = self.pool.out_channels
        if linguistic and not pooled:
            make = projection if config.pool == "gap" else Projection
            self.linguistic_projection = make(width, self.linguistic_width)

    def term_weights(self) -> dict[str, float]:
        weights = super().term_weights()
        if self.config.reduction == "element_mean":
            weights["visual"] /= self.visual_width
            weights["linguistic"] /= self.linguistic_width
        return weights

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        config, terms = self.config, {}
        feature, goal = student.tap(config.student_tap), teacher.tap(config.teacher_tap).detach()
        if "pdd" in self.weights:
            terms["pdd"] = self._pdd(student.logits, teacher.logits, target)
        if self.visual_projection is not None:
            visual = resize(self.visual_projection(feature), size_of(goal))
            if "visual" in self.weights:
                terms["visual"] = channel_kl(visual, goal, direction=config.kl_direction)
            if "patch" in self.weights:
                half = config.half_products and is_half(visual, goal)
                terms["patch"] = patch_distance(visual, goal, half=half)
        if "linguistic" in self.weights:
            pool = _mean if self.pool is None else self.pool
            if self.linguistic_projection is None:
                vector = pool(visual)  # [B, d]
            else:
                vector = self.linguistic_projection(_mean(feature)[:, :, None, None]).flatten(1)
            terms["linguistic"] = channel_kl(vector, pool(goal), direction=config.kl_direction)
        return terms

    def _pdd(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        config = self.config
        aligned = align_logits(student, teacher.detach(), target, upsample=config.upsample)
        a, b, temperature = config.target_factor, config.other_factor, config.temperature
        if config.pdd == "dkd":
            parts = target_kl(*aligned, temperature=temperature), non_target_kl(*aligned, temperature=temperature)
            return a * parts[0] + b * parts[1]
        return blended_two_way(*aligned, target_factor=a, other_factor=b, normalized=config.pdd == "mix")


@in_float32
def _mean(feature: Tensor) -> Tensor:
    return feature.mean((2, 3))  # [B, C]


def _fitting_pool(config: C2VKDConfig, channels: int) -> AttentionPool:
    assert config.pool_weights is not None
    pool = load_attention_pool(config.pool_weights, config.pool_heads)
    if pool.in_channels != channels:
        raise UserError(
            f"c2vkd: the attention pool in {config.pool_weights} takes {pool.in_channels} channels and the teacher's "
            f"{config.teacher_tap} has {channels}: a pool fits only the width it was trained on; take a tap or a "
            "teacher of that width, pool: gap, or linguistic_weight: 0"
        )
    return pool
