"""Class prototypes: the mean feature of each class under the labels, and the cosine classifier that they make."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from segdistill.losses.divergence import divergence
from segdistill.losses.fused import fused
from segdistill.losses.masks import LEFT_OUT, masked_mean
from segdistill.losses.precision import in_float32
from segdistill.losses.vectors import unit

Scope = Literal["batch", "image"]


class Perspective(NamedTuple):
    """A cosine classifier made from the features at hand."""

    logits: Tensor  # [B, K, h, w], 0 for a class without pixels
    prototypes: Tensor  # [G, K, C], 0 for a class without pixels; G = 1 (batch) or B (image)


def present_classes(members: Tensor, scope: Scope) -> Tensor:
    """Which classes have a prototype: [G, K] bool from members [B, K, P]."""
    present = members.any(-1)
    return present.any(0, keepdim=True) if scope == "batch" else present


@fused
@in_float32
def local_perspective(
    features: Tensor, members: Tensor, *, scope: Scope, cosine_scale: float, normalize: bool
) -> Perspective:
    """Averages each class's features to a prototype and scores every pixel against every prototype.

    With ``normalize`` features and prototypes are brought to length one; else both keep the length they have.

    The sums are one product with the 0/1 membership matrix: no loop over classes, deterministic, and the host need not
    know which classes are there.

    Shape:
        features: [B, C, h, w]; members: [B, K, h * w].
    """
    vectors = unit(features.flatten(2), dim=1) if normalize else features.flatten(2)  # [B, C, P]
    belongs = members.to(vectors.dtype)
    sums, counts = torch.einsum("bkp,bcp->bkc", belongs, vectors), belongs.sum(-1, keepdim=True)
    if scope == "batch":
        sums, counts = sums.sum(0, keepdim=True), counts.sum(0, keepdim=True)
    prototypes = sums / counts.clamp_min(1)  # [G, K, C]
    if normalize:
        prototypes = unit(prototypes, dim=-1)
    shared = prototypes.expand(len(vectors), -1, -1)
    logits = cosine_scale * torch.einsum("bkc,bcp->bkp", shared, vectors)
    return Perspective(logits.unflatten(-1, features.shape[-2:]), prototypes)


@fused
@in_float32
def local_kl(
    student_logits: Tensor, teacher_logits: Tensor, present: Tensor, valid: Tensor | None, *, element_mean: bool
) -> Tensor:
    """Mean over pixels of KL(teacher || student) among the n present classes, divided by n for ``element_mean``.

    With prototypes per image, each image has its own n, and images without any label are left out.

    Shape:
        student_logits, teacher_logits: [B, K, h, w]; present: [G, K] bool; valid: [B, h, w] bool.
    """
    absent = ~present[:, :, None, None]
    student = student_logits.masked_fill(absent, LEFT_OUT).log_softmax(1)
    teacher = teacher_logits.detach().masked_fill(absent, LEFT_OUT).log_softmax(1)
    values = divergence(student, teacher, 1)  # [B, h, w]
    count = present.sum(1)[:, None, None]  # [G, 1, 1]
    if element_mean:
        values = values / count.clamp_min(1)
    return masked_mean(values, (count > 0).expand_as(values) if valid is None else valid)


@in_float32
def prototype_distance(student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
    """0.5 * mean over present classes of 1 - <p_student, p_teacher>; per image, then averaged, if they are per image.

    Shape:
        student, teacher: [G, K, C], unit vectors if the distance is to be one; present: [G, K] bool.
    """
    distance = torch.where(present, 1 - (student * teacher.detach()).sum(-1), 0.0)  # [G, K]
    count = present.sum(1)
    return 0.5 * masked_mean(distance.sum(1) / count.clamp_min(1), count > 0)
