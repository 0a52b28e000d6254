"""Class prototypes: the mean feature of each class under the labels, and the cosine classifier they make."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from segdistill.losses.fused import fused
from segdistill.losses.precision import in_float32

Scope = Literal["batch", "image"]


class Perspective(NamedTuple):
    """A cosine classifier made from the features at hand."""

    logits: Tensor  # [B, K, h, w], 0 for a class without pixels
    prototypes: Tensor  # [G, K, C], 0 for a class without pixels; G = 1 (batch) or B (image)


def unit(vectors: Tensor, dim: int) -> Tensor:
    """Vectors of length one; a zero vector stays zero and gets no gradient (division by eps would blow it up)."""
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / torch.where(length > 1e-12, length, torch.inf)


def class_members(labels: Tensor, num_classes: int) -> Tensor:
    """Which pixel belongs to which class, and an ignored pixel to none.

    Shape:
        labels: [B, h, w]; returns [B, K, h * w] bool.
    """
    classes = torch.arange(num_classes, device=labels.device)
    return labels.flatten(1)[:, None] == classes[:, None]


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
