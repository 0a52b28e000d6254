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


def ratio(fine: tuple[int, ...], coarse: tuple[int, ...]) -> int | None:
    """The least power of two r with coarse = ceil(fine / r) along both axes: cells of one image at two strides."""
    fits = [2**n for n in range(12) if tuple(math.ceil(cells / 2**n) for cells in fine) == tuple(coarse)]
    return fits[0] if fits else None


def nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """The label at the centre of each cell, or the last one of the image."""
    cells = ratio(tuple(labels.shape[1:]), size)
    small = labels.new_empty(len(labels), *size)
    for b, i, j in pixels(small):
        row, column = (
            min(math.floor((index + 0.5) * (cells or old / new)), old - 1)
            for index, old, new in zip((i, j), labels.shape[1:], size, strict=True)
        )
        small[b, i, j] = labels[b, row, column]
    return small


def windows(old: tuple[int, ...], new: tuple[int, int]) -> list[list[range]]:
    """Along both axes, the cells that lie in each cell of a coarser grid."""
    cells = ratio(old, new)
    if cells:
        return [[range(i * cells, min((i + 1) * cells, a)) for i in range(b)] for a, b in zip(old, new, strict=True)]
    return [[range(i * a // b, -(-(i + 1) * a // b)) for i in range(b)] for a, b in zip(old, new, strict=True)]


def resized(maps: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Averaged to a coarser grid, interpolated to a finer one."""
    old = tuple(maps.shape[-2:])
    if old != size and old[0] >= size[0] and old[1] >= size[1]:
        down, across = windows(old, size)
        means = [[maps[..., [*rows], :][..., [*columns]].mean((-2, -1)) for columns in across] for rows in down]
        return torch.stack([torch.stack(row, -1) for row in means], -2)
    return bilinear(maps, size, align_corners)


def bilinear(maps: Tensor, size: tuple[int, int], align_corners: bool, *, stretched: bool = False) -> Tensor:
    """To a finer grid, whose cells lie in those of the maps; or from edge to edge."""
    cells = None if stretched else ratio(size, tuple(maps.shape[-2:]))
    rows, columns = (
        _taps(old, new, old * cells if cells else new, align_corners)
        for old, new in zip(maps.shape[-2:], size, strict=True)
    )
    lines = []
    for top, bottom, down in rows:
        cells_of_row = []
        for left, right, along in columns:
            upper = (1 - along) * maps[..., top, left] + along * maps[..., top, right]
            lower = (1 - along) * maps[..., bottom, left] + along * maps[..., bottom, right]
            cells_of_row.append((1 - down) * upper + down * lower)
        lines.append(torch.stack(cells_of_row, -1))
    return torch.stack(lines, -2)


def _taps(old: int, new: int, covered: int, align_corners: bool) -> list[tuple[int, int, float]]:
    """For the first ``new`` of the ``covered`` cells over which the old ones are spread."""
    taps = []
    for index in range(new):
        if align_corners:
            position = index * (old - 1) / (covered - 1) if covered > 1 else 0.0
        else:
            position = max((index + 0.5) * old / covered - 0.5, 0.0)
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


def _labelled(logits: Tensor, labels: Tensor) -> list[tuple[Tensor, int]]:
    """Of each labelled pixel its log probabilities [K] and its class."""
    return [
        (log_softmax(logits[b, :, i, j]), int(labels[b, i, j])) for b, i, j in pixels(logits) if labels[b, i, j] < 254
    ]


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: list[float]) -> Tensor:
    """sum of w(y) * -log p(y) over the sum of w(y)."""
    cases = _labelled(logits, labels)
    mass = sum(weights[label] for _, label in cases)
    return sum((weights[label] * -log_p[label] for log_p, label in cases), 0.0 * logits.sum()) / (mass or 1)


def hard_cross_entropy(
    logits: Tensor, labels: Tensor, threshold: float, min_kept: int, weights: list[float] | None = None
) -> Tensor:
    """The weighted mean over pixels with p(y) < threshold, or, if they are fewer, over the min_kept * B hardest."""
    cases = sorted(_labelled(logits, labels), key=lambda case: case[0][case[1]].item())
    hard = [case for case in cases if math.exp(case[0][case[1]].item()) < threshold]
    kept = hard if len(hard) > min_kept * len(labels) else cases[: min_kept * len(labels)]
    own = [1.0 if weights is None else weights[label] for _, label in kept]
    losses = [weight * -log_p[label] for weight, (log_p, label) in zip(own, kept, strict=True)]
    return sum(losses, 0.0 * logits.sum()) / (sum(own) or 1)


def dice(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the classes of the labels of 1 - 2 sum p y / (sum p + sum y)."""
    cases, losses = _labelled(logits, labels), []
    for c in sorted({label for _, label in cases}):
        probabilities = [torch.exp(log_p[c]) for log_p, _ in cases]
        shared = sum(p for p, (_, label) in zip(probabilities, cases, strict=True) if label == c)
        losses.append(1 - 2 * shared / (sum(probabilities) + sum(label == c for _, label in cases)))
    return mean(losses)


def lovasz_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the classes of the labels of the Lovasz extension of |wrong| / |class or wrong|, sets as sets."""
    cases, losses = _labelled(logits, labels), []
    for c in sorted({label for _, label in cases}):
        own = {number for number, (_, label) in enumerate(cases) if label == c}
        errors = [1 - torch.exp(log_p[c]) if label == c else torch.exp(log_p[c]) for log_p, label in cases]
        wrong, before, loss = set[int](), 0.0, torch.zeros((), dtype=torch.float64)
        for number in sorted(range(len(cases)), key=lambda number: -errors[number].item()):
            wrong.add(number)
            jaccard = len(wrong) / len(own | wrong)
            loss, before = loss + errors[number] * (jaccard - before), jaccard
        losses.append(loss)
    return mean(losses)
