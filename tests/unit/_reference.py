"""The formulas as slow float64 loops over pixels, written from the specification and sharing no code with the library.

All of them take float64 tensors and can be differentiated. 255 marks a pixel without label.
"""

import math

import torch
from torch import Tensor


def log_softmax(logits: Tensor) -> Tensor:
    shifted = logits - logits.max().detach()
    return shifted - torch.log(torch.exp(shifted).sum())


def kl(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """sum_c t log(t / s) of one pixel's logits [K]."""
    t, s = log_softmax(teacher_logits.detach()), log_softmax(student_logits)
    return torch.exp(t) @ (t - s)


def mean(values: list[Tensor]) -> Tensor:
    return sum(values) / len(values) if values else torch.zeros((), dtype=torch.float64)


def pixels(maps: Tensor) -> list[tuple[int, int, int]]:
    batch, height, width = maps.shape[0], maps.shape[-2], maps.shape[-1]
    return [(b, i, j) for b in range(batch) for i in range(height) for j in range(width)]


def pixel_kl(student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float) -> Tensor:
    """T^2 / M * sum over valid pixels of KL(teacher || student); labels None takes every pixel."""
    values = [
        kl(teacher[b, :, i, j] / temperature, student[b, :, i, j] / temperature)
        for b, i, j in pixels(student)
        if labels is None or labels[b, i, j] != 255
    ]
    return temperature**2 * mean(values)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over valid pixels of -log softmax at the label; the logits already at label size."""
    values = [-log_softmax(logits[b, :, i, j])[labels[b, i, j]] for b, i, j in pixels(logits) if labels[b, i, j] != 255]
    return mean(values)


def nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    small = labels.new_empty(len(labels), *size)
    for b, i, j in pixels(small):
        small[b, i, j] = labels[b, i * labels.shape[1] // size[0], j * labels.shape[2] // size[1]]
    return small


def bilinear(maps: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    rows, columns = (_taps(old, new, align_corners) for old, new in zip(maps.shape[-2:], size, strict=True))
    lines = []
    for top, bottom, down in rows:
        cells = []
        for left, right, along in columns:
            upper = (1 - along) * maps[..., top, left] + along * maps[..., top, right]
            lower = (1 - along) * maps[..., bottom, left] + along * maps[..., bottom, right]
            cells.append((1 - down) * upper + down * lower)
        lines.append(torch.stack(cells, -1))
    return torch.stack(lines, -2)


def _taps(old: int, new: int, align_corners: bool) -> list[tuple[int, int, float]]:
    taps = []
    for index in range(new):
        if align_corners:
            position = index * (old - 1) / (new - 1) if new > 1 else 0.0
        else:
            position = max((index + 0.5) * old / new - 0.5, 0.0)
        low = min(math.floor(position), old - 1)
        taps.append((low, min(low + 1, old - 1), position - low))
    return taps


def l2norm(vector: Tensor) -> Tensor:
    return vector / torch.sqrt((vector * vector).sum())


def prototypes(vectors: Tensor, labels: Tensor, images: range, normalize: bool = True) -> dict[int, Tensor]:
    """Mean of the vectors [B, C, h, w] of each class that some pixel of these images has, at length one or as it is."""
    members: dict[int, list[Tensor]] = {}
    for b, i, j in pixels(vectors):
        if b in images and labels[b, i, j] != 255:
            members.setdefault(int(labels[b, i, j]), []).append(vectors[b, :, i, j])
    means = {c: mean(members[c]) for c in sorted(members)}
    return {c: l2norm(vector) for c, vector in means.items()} if normalize else means


def apd_local(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    scale: float = 10.0,
    scope: str = "batch",
    masked: bool = False,
    element_mean: bool = True,
    normalize: bool = True,
    align_corners: bool = True,
) -> dict[str, Tensor]:
    """The local, prototype and teacher_head terms from the heads' outputs [B, C, h, w] of equal size."""
    labels = nearest(target, (teacher.shape[-2], teacher.shape[-1]))
    if normalize:
        student, teacher = (
            torch.stack([l2norm(v[b, :, i, j]) for b, i, j in pixels(v)], -1)
            .unflatten(-1, (v.shape[0], *v.shape[-2:]))
            .movedim(1, 0)
            for v in (student, teacher)
        )
    groups = [range(len(target))] if scope == "batch" else [range(b, b + 1) for b in range(len(target))]
    divergences, distances = [], []
    slots = torch.zeros(len(target), num_classes, *labels.shape[1:], dtype=torch.float64)
    for images in groups:
        ours, theirs = (prototypes(vectors, labels, images, normalize) for vectors in (student, teacher))
        if not ours:
            continue
        distances.append(mean([1 - (ours[c] * theirs[c].detach()).sum() for c in ours]))
        for b, i, j in pixels(student):
            if b not in images:
                continue
            cosines = {c: scale * (theirs[c] * teacher[b, :, i, j]).sum() for c in theirs}
            for c, value in cosines.items():
                slots[b, c, i, j] = value
            if masked and labels[b, i, j] == 255:
                continue
            student_logits = torch.stack([scale * (ours[c] * student[b, :, i, j]).sum() for c in ours])
            value = kl(torch.stack(list(cosines.values())), student_logits)
            divergences.append(value / len(ours) if element_mean else value)
    return {
        "local": mean(divergences),
        "prototype": 0.5 * mean(distances),
        "teacher_head": cross_entropy(bilinear(slots, (target.shape[1], target.shape[2]), align_corners), target),
    }
