"""The formulas at sight: loops over classes and images, whole quadratic maps, boolean indexing.

``losses.py`` compares the methods with these, in value and gradient, and then in time and memory. They take what the
method built (heads, projections) and its config, so that both sides compute the same number from the same tensors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from segdistill.losses.masks import IGNORE_INDEX
from segdistill.models.outputs import Outputs

Loss = Callable[[Any, Outputs, Outputs, Tensor], Tensor]


@dataclass(frozen=True)
class Dense:
    """Terms of an offline method, and the straightforward way to their sum."""

    terms: tuple[str, ...]
    function: Loss
    changes: Mapping[str, Any] = field(default_factory=dict)  # config of the comparison, where not the default
    quadratic: bool = False  # in the number of pixels

    @property
    def label(self) -> str:
        return ", ".join([" + ".join(self.terms), *(str(value) for value in self.changes.values())])


def bilinear(maps: Tensor, size: torch.Size, *, align_corners: bool = False) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=align_corners)


def nearest(target: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(target[:, None].float(), size=size, mode="nearest-exact")[:, 0].long()


def kl(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """KL(teacher || student) of logits along an axis."""
    return F.kl_div(student.log_softmax(dim), teacher.log_softmax(dim), reduction="none", log_target=True).sum(dim)


def apd_local(method: Any, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
    """A loop over the classes present: pick their pixels, average, compare."""
    size = teacher.last_feature.shape[-2:]
    labels = nearest(target, size)
    feature = bilinear(student.last_feature, size, align_corners=method.config.align_corners)
    ours = F.normalize(method.student_head(feature), dim=1)
    with torch.no_grad():
        theirs = F.normalize(method.teacher_head(teacher.last_feature), dim=1)
    classes = [int(label) for label in labels.unique() if label != IGNORE_INDEX]

    def logits(vectors: Tensor) -> Tensor:
        rows = vectors.movedim(1, -1)
        maps = []
        for label in classes:
            prototype = F.normalize(rows[labels == label].mean(0), dim=0)
            maps.append(method.config.cosine_scale * torch.einsum("bchw,c->bhw", vectors, prototype))
        return torch.stack(maps, 1)

    return kl(logits(ours), logits(theirs), dim=1).mean() / len(classes)


def ifvd(method: Any, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
    """A loop over the images and their classes, which writes each class's centre over its pixels."""
    size = teacher.last_feature.shape[-2:]
    labels = nearest(target, size)

    def cosines(features: Tensor) -> Tensor:
        centres = []
        for feature, label in zip(features, labels, strict=True):
            centre = feature
            for found in label.unique():
                if found != IGNORE_INDEX:
                    here = (label == found).float()
                    mean = (feature * here).sum((1, 2), keepdim=True) / here.sum()
                    centre = centre * (1 - here) + mean * here
            centres.append(centre)
        return F.cosine_similarity(features, torch.stack(centres), dim=1)

    difference = cosines(bilinear(student.last_feature, size)) - cosines(teacher.last_feature)
    return difference[labels != IGNORE_INDEX].square().mean()


def skd_pairwise(method: Any, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
    """The whole map of similarities between all nodes of an image, of both networks."""

    def similarities(feature: Tensor) -> Tensor:
        nodes = F.max_pool2d(feature, 2, ceil_mode=True).flatten(2)
        nodes = nodes / nodes.detach().norm(dim=1, keepdim=True)
        return torch.einsum("bcm,bcn->bmn", nodes, nodes)

    ours = bilinear(student.last_feature, teacher.last_feature.shape[-2:])
    return F.mse_loss(similarities(ours), similarities(teacher.last_feature))


def cirkd_minibatch(method: Any, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
    """A loop over the pairs of images, each with its whole map of pixels by pixels."""
    ours = F.normalize(bilinear(student.last_feature, teacher.last_feature.shape[-2:]), dim=1).flatten(2)
    theirs = F.normalize(teacher.last_feature, dim=1).flatten(2)
    total = ours.new_zeros(())
    for one in range(len(ours)):
        for other in range(len(ours)):
            relations = (maps[one].T @ maps[other] / method.config.temperature for maps in (ours, theirs))
            total = total + kl(*relations, dim=1).mean()
    return total / len(ours) ** 2


def c2vkd_patch(method: Any, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
    """The whole map of relations between all locations of the batch, of both networks."""

    def relations(feature: Tensor) -> Tensor:
        rows = F.normalize(feature.movedim(1, -1).flatten(0, 2), dim=1)
        rows = rows - rows.mean(1, keepdim=True)
        return rows @ rows.T / (feature.shape[1] - 1)

    theirs = teacher.features[3]
    ours = bilinear(method.visual_projection(student.features[3]), theirs.shape[-2:])
    return F.mse_loss(relations(ours), relations(theirs))


def c2vkd_pdd(method: Any, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
    """The valid pixels picked out, and two probabilities of each."""
    valid = target != IGNORE_INDEX
    labels = target[valid][:, None]

    def two_way(outputs: Outputs) -> Tensor:
        rows = bilinear(outputs.logits, target.shape[-2:]).movedim(1, -1)[valid]
        labelled = rows.softmax(1).gather(1, labels)
        return torch.cat([labelled, 1 - labelled], 1)

    ours = two_way(student)
    goal = (two_way(teacher) + ours.new_tensor([1.0, 0.0])) / 2
    return 0.5 * (ours * (ours.log() - goal.log())).sum(1).mean()


def dkd(method: Any, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
    """The valid pixels picked out, and of each the labelled class and the others."""
    size = teacher.logits.shape[-2:]
    labels = nearest(target, size)
    valid = labels != IGNORE_INDEX
    hit = F.one_hot(labels[valid], teacher.logits.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        rows = logits.movedim(1, -1)[valid]
        labelled = rows.softmax(1)[hit]
        others = rows[~hit].view(len(rows), -1)
        return torch.stack([labelled, 1 - labelled], 1).log(), others

    ours, theirs = parts(bilinear(student.logits, size)), parts(teacher.logits)
    return sum(kl(one, other, dim=1).mean() for one, other in zip(ours, theirs, strict=True))


def dist(method: Any, student: Outputs, teacher: Outputs, target: Tensor) -> Tensor:
    """The valid pixels picked out as rows, and the correlations of rows and of columns."""
    size = teacher.logits.shape[-2:]
    valid = nearest(target, size) != IGNORE_INDEX
    ours, theirs = (
        logits.softmax(1).movedim(1, -1)[valid] for logits in (bilinear(student.logits, size), teacher.logits)
    )

    def correlations(first: Tensor, second: Tensor) -> Tensor:
        first, second = (rows - rows.mean(1, keepdim=True) for rows in (first, second))
        return F.cosine_similarity(first, second, dim=1)

    return 2 - correlations(ours, theirs).mean() - correlations(ours.T, theirs.T).mean()


DENSE: dict[str, tuple[Dense, ...]] = {
    "apd": (Dense(("local",), apd_local),),
    "c2vkd": (Dense(("patch",), c2vkd_patch, quadratic=True), Dense(("pdd",), c2vkd_pdd)),
    "cirkd": (Dense(("minibatch",), cirkd_minibatch, quadratic=True),),
    "dist": (Dense(("inter", "intra"), dist),),
    "dkd": (Dense(("target", "non_target"), dkd),),
    "ifvd": (Dense(("variation",), ifvd),),
    "skd": (Dense(("pairwise",), skd_pairwise, {"grid": "stride2"}, quadratic=True),),
}
