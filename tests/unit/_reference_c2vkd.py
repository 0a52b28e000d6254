"""C2VKD as slow float64 loops over pixels, pairs and heads, written from the specification; see ``_reference.py``."""

import math

import torch
from _reference import bilinear, kl, log_softmax, mean, pixels
from torch import Tensor


def channel_kl(student: Tensor, teacher: Tensor, direction: str) -> Tensor:
    """Mean over the rows [N, C] of the KL of the one that comes first."""
    values = []
    for s, t in zip(student, teacher.detach(), strict=True):
        first, second = (log_softmax(v) for v in ((t, s) if direction == "teacher_to_student" else (s, t)))
        values.append(sum(torch.exp(f) * (f - g) for f, g in zip(first, second, strict=True)))
    return mean(values)


def patch(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all pairs of the squared difference of their relations."""
    ours, theirs = relations(student), relations(teacher.detach())
    return mean([(ours[i][j] - theirs[i][j]) ** 2 for i in range(len(ours)) for j in range(len(ours))])


def relations(feature: Tensor) -> list[list[Tensor]]:
    channels = feature.shape[1]
    vectors = []
    for b, i, j in pixels(feature):
        vector = feature[b, :, i, j] / torch.sqrt(sum(value**2 for value in feature[b, :, i, j]))
        vectors.append(vector - sum(vector) / channels)
    return [[(x * y).sum() / (channels - 1) for y in vectors] for x in vectors]


def pdd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    reading: str = "mix",
    a: float = 0.5,
    b: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """The decoupled term in its readings; logits [B, K, h, w] at the size of the labels."""
    values = []
    for n, i, j in pixels(student):
        y = int(labels[n, i, j])
        if y == 255:
            continue
        zs, zt = student[n, :, i, j] / temperature, teacher[n, :, i, j].detach() / temperature
        ps, pt = torch.exp(log_softmax(zs)), torch.exp(log_softmax(zt))
        others = [c for c in range(len(ps)) if c != y]
        s_y, t_y = ps[y], pt[y]
        s_n, t_n = sum(ps[c] for c in others), sum(pt[c] for c in others)
        if reading == "dkd":
            target = t_y * torch.log(t_y / s_y) + t_n * torch.log(t_n / s_n)
            values.append(temperature**2 * (a * target + b * kl(zt[others], zs[others])))
        else:
            half = 2 if reading == "mix" else 1
            values.append(a * s_y * torch.log(half * s_y / (t_y + 1)) + b * s_n * torch.log(half * s_n / t_n))
    return mean(values)


def attention_pool(feature: Tensor, weights: dict[str, Tensor], heads: int) -> Tensor:
    """The mean token's answer after attention over all tokens: [B, D]."""
    side = math.isqrt(len(weights["positional_embedding"]) - 1)
    grid = weights["positional_embedding"][1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    positions = (
        bilinear(grid, (feature.shape[2], feature.shape[3]), align_corners=False, stretched=True)[0].flatten(1).T
    )

    def linear(name: str, value: Tensor) -> Tensor:
        return weights[f"{name}.weight"] @ value + weights[f"{name}.bias"]

    answers = []
    for image in feature:
        cells = list(image.flatten(1).T)
        tokens = [sum(cells) / len(cells) + weights["positional_embedding"][0]]
        tokens += [cell + position for cell, position in zip(cells, positions, strict=True)]
        query = linear("q_proj", tokens[0]).chunk(heads)
        keys = [linear("k_proj", token).chunk(heads) for token in tokens]
        values = [linear("v_proj", token).chunk(heads) for token in tokens]
        parts = []
        for head in range(heads):
            scores = torch.stack([(query[head] * key[head]).sum() / math.sqrt(len(query[head])) for key in keys])
            shares = torch.exp(log_softmax(scores))
            parts.append(sum(share * value[head] for share, value in zip(shares, values, strict=True)))
        answers.append(linear("c_proj", torch.cat(parts)))
    return torch.stack(answers)
