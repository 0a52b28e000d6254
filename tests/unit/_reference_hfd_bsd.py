"""HFD and BSD as slow float64 loops over regions, pixels and channels, written from the specification's formulas."""

from collections.abc import Callable

import torch
from _reference import kl, log_softmax, mean, nearest, pixels, resized, windows
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]


def cosine(sink: Tensor, source: Tensor) -> Tensor:
    """1 - cos of two vectors; a zero vector has the cosine 0 with everything."""
    lengths = (sink @ sink).sqrt() * (source @ source).sqrt()
    return 1 - (sink @ source) / lengths if lengths > 0 else torch.ones((), dtype=torch.float64)


def mse(sink: Tensor, source: Tensor) -> Tensor:
    difference = sink / (sink @ sink).sqrt() - source / (source @ source).sqrt()
    return difference @ difference


def l2(sink: Tensor, source: Tensor) -> Tensor:
    return (sink - source) @ (sink - source)


def channel_kl(sink: Tensor, source: Tensor) -> Tensor:
    return kl(source, sink)


DISTANCES: dict[str, Distance] = {"cosine": cosine, "mse": mse, "l2": l2, "kl": channel_kl}


def error(logits: Tensor, label: int) -> float:
    return float(-log_softmax(logits.detach())[label])


def hfd(sink: Tensor, source: Tensor, distance: str) -> Tensor:
    """Mean over locations of the distance of two maps [B, C, h, w]; the source is a constant."""
    source = source.detach()
    return mean([DISTANCES[distance](sink[b, :, i, j], source[b, :, i, j]) for b, i, j in pixels(sink)])


def region_cells(size: tuple[int, int], grid: tuple[int, int], row: int, column: int) -> list[tuple[int, int]]:
    down, across = windows(size, grid)
    return [(i, j) for i in down[row] for j in across[column]]


def region_error(logits: Tensor, labels: Tensor, b: int, grid: tuple[int, int], row: int, column: int) -> float | None:
    """The mean cross-entropy of the labelled pixels of a region, None if there are none."""
    found = [
        error(logits[b, :, i, j], int(labels[b, i, j]))
        for i, j in region_cells((labels.shape[1], labels.shape[2]), grid, row, column)
        if labels[b, i, j] != 255
    ]
    return sum(found) / len(found) if found else None


def region_mean(
    features: Tensor, b: int, grid: tuple[int, int], row: int, column: int, labels: Tensor | None
) -> Tensor:
    """The mean vector of a region's cells; with labels, each cell counts by the labelled share of its pixels."""
    size = (features.shape[-2], features.shape[-1])
    total, weights = torch.zeros(features.shape[1], dtype=torch.float64), 0.0
    for i, j in region_cells(size, grid, row, column):
        weight = 1.0
        if labels is not None:
            covered = region_cells((labels.shape[1], labels.shape[2]), size, i, j)
            weight = sum(int(labels[b, y, x] != 255) for y, x in covered) / len(covered)
        total, weights = total + weight * features[b, :, i, j], weights + weight
    return total / weights


def bsd(
    logits: dict[str, Tensor],
    features: dict[str, Tensor],
    target: Tensor,
    *,
    size: tuple[int, int],
    grid: tuple[int, int],
    projections: dict[str, Tensor] | None = None,
    distance: str = "cosine",
    selection: bool = True,
    per_direction: bool = True,
    temperature: float = 1.0,
    mask_features: bool = False,
    mask_ignore: bool = True,
) -> dict[str, Tensor]:
    """The region and pixel terms of two peers.

    Args:
        size: where predictions are judged and compared.
        projections: a peer's W [C_other, C_own], where it has one.
    """
    labels = nearest(target, size)
    fitted = {name: resized(value, size, False) for name, value in logits.items()}
    terms = {}
    for sink, source in (tuple(logits), tuple(logits)[::-1]):
        w = (projections or {}).get(sink)
        values, counted = [], 0
        for b in range(len(labels)):
            for row in range(grid[0]):
                for column in range(grid[1]):
                    errors = [region_error(fitted[name], labels, b, grid, row, column) for name in (sink, source)]
                    if errors[0] is None and (selection or mask_ignore):
                        continue
                    counted += 1
                    if selection and not errors[1] < errors[0]:
                        continue
                    ours, theirs = (
                        region_mean(features[name], b, grid, row, column, labels if mask_features else None)
                        for name in (sink, source)
                    )
                    values.append(DISTANCES[distance](ours if w is None else w @ ours, theirs.detach()))
        terms[f"{sink}/region"] = _average(values, None if per_direction else counted)
        values, counted = [], 0
        for b, i, j in pixels(fitted[sink]):
            label = int(labels[b, i, j])
            if label == 255 and (selection or mask_ignore):
                continue
            counted += 1
            ours, theirs = fitted[sink][b, :, i, j], fitted[source][b, :, i, j]
            if selection and not error(theirs, label) < error(ours, label):
                continue
            values.append(temperature**2 * kl(theirs / temperature, ours / temperature))
        terms[f"{sink}/pixel"] = _average(values, None if per_direction else counted)
    return terms


def attention(maps: Tensor, weights: Tensor) -> Tensor:
    """Single-head attention of each location to all, query, key and value by the three matrices [3, C, C]."""
    rows = []
    for b in range(len(maps)):
        tokens = [maps[b, :, i, j] for _, i, j in pixels(maps[b : b + 1])]
        keys, values = ([weights[index] @ token for token in tokens] for index in (1, 2))
        attended = []
        for token in tokens:
            scores = torch.stack([(weights[0] @ token) @ key for key in keys]) / len(token) ** 0.5
            shares = torch.exp(log_softmax(scores))
            attended.append(sum(share * value for share, value in zip(shares, values, strict=True)))
        rows.append(torch.stack(attended, -1).unflatten(-1, maps.shape[-2:]))
    return torch.stack(rows)


def _average(values: list[Tensor], count: int | None) -> Tensor:
    if not values:
        return torch.zeros((), dtype=torch.float64)
    return sum(values) / (len(values) if count is None else count)
