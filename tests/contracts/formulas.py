"""One numeric case for every method: its formula once more, in float64, straight from its docstring.

All maps have the size of the labels and all widths agree, so nothing is resized or projected; a class is absent and
some pixels have no label. Nothing of the library is used: what is here is slow and plain, and is the second opinion.
A new method needs its line in ``CASES``.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = 255
Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A formula, and the settings under which it is asked.

    ``formula(method, first, second, target)`` gives the raw terms; ``first`` is the student, or both are peers. Of the
    method it may only read helpers: a head's weights, a drawn generator.
    """

    formula: Callable[[Any, Any, Any, Tensor], Terms]
    settings: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] = lambda method: None


def rows(maps: Tensor) -> Tensor:
    """[B, C, h, w] as one row a pixel, [B * h * w, C]."""
    return maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])


def log_p(logits: Tensor, temperature: float = 1.0) -> Tensor:
    scaled = logits / temperature
    return scaled - scaled.exp().sum(-1, keepdim=True).log()


def kl(source: Tensor, sink: Tensor) -> Tensor:
    """KL(source || sink) of each row of log-probabilities; the source teaches and gets no gradient."""
    source = source.detach()
    return (source.exp() * (source - sink)).sum(-1)


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.square().sum(-1, keepdim=True).sqrt()


def labelled(target: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows have a label, and those labels."""
    flat = target.flatten()
    return flat != IGNORED, flat[flat != IGNORED]


def own(values: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([row[label] for row, label in zip(values, labels.tolist(), strict=True)])


def others(values: Tensor, labels: Tensor) -> Tensor:
    kept = [[c for c in range(values.shape[1]) if c != label] for label in labels.tolist()]
    return torch.stack([row[classes] for row, classes in zip(values, kept, strict=True)])


def kd(method: Any, student: Any, teacher: Any, target: Tensor) -> Terms:
    valid, _ = labelled(target)
    return {"kl": 4 * kl(log_p(rows(teacher.logits), 2), log_p(rows(student.logits), 2))[valid].mean()}


def pseudo(method: Any, student: Any, teacher: Any, target: Tensor) -> Terms:
    valid, _ = labelled(target)
    sure, classes = log_p(rows(teacher.logits)).exp().max(1)
    counted = valid & (sure >= 0.5)
    assert valid.sum() > counted.sum() > 0, "the threshold leaves out some pixels and not all"
    return {"ce": -own(log_p(rows(student.logits))[counted], classes[counted]).mean()}


def dml(method: Any, first: Any, second: Any, target: Tensor) -> Terms:
    valid, _ = labelled(target)
    one, other = (log_p(rows(peer.logits), 2)[valid] for peer in (first, second))
    return {"first/kl": 4 * kl(other, one).mean(), "second/kl": 4 * kl(one, other).mean()}


def kdcl(method: Any, first: Any, second: Any, target: Tensor) -> Terms:
    valid, labels = labelled(target)
    logits = [rows(peer.logits)[valid] for peer in (first, second)]
    margins = [each - own(each, labels)[:, None] for each in logits]
    ensemble = log_p(torch.minimum(*margins), 2)
    return {
        f"{peer}/kl": 4 * kl(ensemble, log_p(each, 2)).mean()
        for peer, each in zip(("first", "second"), logits, strict=True)
    }


def dkd(method: Any, student: Any, teacher: Any, target: Tensor) -> Terms:
    valid, labels = labelled(target)
    ours, theirs = (rows(outputs.logits)[valid] / 3 for outputs in (student, teacher))
    two_way = []
    for logits in (ours, theirs):
        b = own(log_p(logits).exp(), labels)
        two_way.append(torch.stack([b, 1 - b], 1).log())
    target_part = kl(two_way[1], two_way[0]).mean()
    other_part = kl(log_p(others(theirs, labels)), log_p(others(ours, labels))).mean()
    return {"target": 9 * target_part, "non_target": 9 * other_part}


def dist(method: Any, student: Any, teacher: Any, target: Tensor) -> Terms:
    valid, _ = labelled(target)

    def correlation(x: Tensor, y: Tensor) -> Tensor:
        x, y = x - x.mean(), y - y.mean()
        return (x * y).sum() / (x.square().sum().sqrt() * y.square().sum().sqrt() + 1e-8)

    def distance(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
        p, q = (log_p(rows(logits), 2).exp()[valid] for logits in (ours, theirs.detach()))
        return tuple(
            1 - torch.stack([correlation(x, y) for x, y in zip(one, two, strict=True)]).mean()
            for one, two in ((p, q), (p.T, q.T))
        )  # type: ignore[return-value]

    inter, intra = distance(student.logits, teacher.logits)
    return {"inter": inter, "intra": intra, "aux": sum(distance(student.aux_logits, teacher.aux_logits))}


def cwd(method: Any, student: Any, teacher: Any, target: Tensor) -> Terms:
    def divergence(ours: Tensor, theirs: Tensor) -> Tensor:
        return 16 * kl(log_p(theirs.flatten(2), 4), log_p(ours.flatten(2), 4)).mean()

    return {
        "logits": divergence(student.logits, teacher.logits),
        "feature": divergence(student.last_feature, teacher.last_feature),
    }


def at(method: Any, student: Any, teacher: Any, target: Tensor) -> Terms:
    ours, theirs = (
        unit(feature.square().mean(1).flatten(1)) for feature in (student.last_feature, teacher.last_feature.detach())
    )
    return {"attention": (ours - theirs).square().sum(1).mean()}


def fitnet(method: Any, student: Any, teacher: Any, target: Tensor) -> Terms:
    return {"regression": (student.last_feature - teacher.last_feature.detach()).square().mean()}


def mgd(method: Any, student: Any, teacher: Any, target: Tensor) -> Terms:
    first, _, second = method.generator
    hidden = F.conv2d(student.features[3], first.weight, first.bias, padding=1).clamp_min(0)
    generated = F.conv2d(hidden, second.weight, second.bias, padding=1)
    return {"generation": (generated - teacher.features[3].detach()).square().sum((1, 2, 3)).mean()}


def ifvd(method: Any, student: Any, teacher: Any, target: Tensor) -> Terms:
    def cosines(feature: Tensor) -> Tensor:
        values = []
        for vectors, labels in zip(feature.flatten(2).mT, target.flatten(1), strict=True):
            for vector, label in zip(vectors, labels, strict=True):
                if label != IGNORED:
                    values.append(unit(vector) @ unit(vectors[labels == label].mean(0)))
        return torch.stack(values)

    return {"variation": (cosines(student.last_feature) - cosines(teacher.last_feature).detach()).square().mean()}


def skd(method: Any, student: Any, teacher: Any, target: Tensor) -> Terms:
    def relations(feature: Tensor) -> Tensor:
        nodes = torch.stack(
            [feature[:, :, i, j : j + 2].amax(-1) for i in range(2) for j in (0, 2)], 1
        )  # a 2 x 4 map has windows of 1 x 2
        nodes = nodes / nodes.detach().square().sum(-1, keepdim=True).sqrt()
        return nodes @ nodes.mT

    pairwise = (relations(student.last_feature) - relations(teacher.last_feature).detach()).square().mean()
    constant = copy.deepcopy(method.critic).requires_grad_(False)
    fake, real = (outputs.logits.softmax(1) for outputs in (student, teacher))
    holistic = (constant(real.detach()) - constant(fake)).mean()
    critic = (1 - method.critic(real.detach())).clamp_min(0) + (1 + method.critic(fake.detach())).clamp_min(0)
    return {"pairwise": pairwise, "holistic": holistic, "critic": critic.mean()}


def apd(method: Any, student: Any, teacher: Any, target: Tensor) -> Terms:
    valid, labels = labelled(target)
    present = sorted(set(labels.tolist()))

    def cosines(head: Any, feature: Tensor) -> tuple[Tensor, Tensor]:
        first, _, second = head
        hidden = (rows(feature) @ first.weight[:, :, 0, 0].T + first.bias).clamp_min(0)
        vectors = unit(hidden @ second.weight[:, :, 0, 0].T + second.bias)
        prototypes = unit(torch.stack([vectors[valid][labels == c].mean(0) for c in present]))
        return 10 * vectors @ prototypes.T, prototypes

    our_logits, ours = cosines(method.student_head, student.last_feature)
    their_logits, theirs = cosines(method.teacher_head, teacher.last_feature.detach())
    slots = torch.zeros(len(their_logits), student.logits.shape[1], dtype=torch.float64)
    slots[:, present] = their_logits
    return {
        "global": 4 * kl(log_p(rows(teacher.logits), 2), log_p(rows(student.logits), 2)).mean(),
        "local": kl(log_p(their_logits), log_p(our_logits)).mean() / len(present),
        "prototype": 0.5 * (1 - (ours * theirs.detach()).sum(1)).mean(),
        "teacher_head": -own(log_p(slots)[valid], labels).mean(),
    }


def c2vkd(method: Any, student: Any, teacher: Any, target: Tensor) -> Terms:
    valid, labels = labelled(target)
    ours, theirs = student.features[3], teacher.features[3].detach()

    def relations(feature: Tensor) -> Tensor:
        vectors = unit(rows(feature))
        vectors = vectors - vectors.mean(1, keepdim=True)
        return vectors @ vectors.T / (feature.shape[1] - 1)

    s, t = (own(log_p(rows(outputs.logits)).exp()[valid], labels) for outputs in (student, teacher))
    q = (t.detach() + 1) / 2
    return {
        "pdd": (0.5 * s * (s / q).log() + 0.5 * (1 - s) * ((1 - s) / (1 - q)).log()).mean(),
        "visual": kl(log_p(rows(theirs)), log_p(rows(ours))).mean(),
        "patch": (relations(ours) - relations(theirs)).square().mean(),
        "linguistic": kl(log_p(theirs.mean((2, 3))), log_p(ours.mean((2, 3)))).mean(),
    }


def cirkd(method: Any, student: Any, teacher: Any, target: Tensor) -> Terms:
    ours, theirs = (
        [unit(image.flatten(1).T) for image in feature] for feature in (student.last_feature, teacher.last_feature)
    )
    pairs = [
        kl(log_p(theirs[i] @ theirs[j].T, 0.1), log_p(ours[i] @ ours[j].T, 0.1)).mean()
        for i in range(len(ours))
        for j in range(len(ours))
    ]
    valid, _ = labelled(target)
    by_image = [
        vectors[labels == c]
        for vectors, labels in zip(theirs, target.flatten(1), strict=True)
        for c in labels.unique()
        if c != IGNORED
    ]
    memories = {"pixel": torch.cat(by_image), "region": torch.stack([unit(vectors.mean(0)) for vectors in by_image])}
    anchors, goals = torch.cat(ours)[valid], torch.cat(theirs)[valid]
    return {"minibatch": torch.stack(pairs).mean()} | {
        term: kl(log_p(goals @ memory.detach().T, 0.1), log_p(anchors @ memory.detach().T, 0.1)).mean()
        for term, memory in memories.items()
    }


def hfd_bsd(method: Any, first: Any, second: Any, target: Tensor) -> Terms:
    valid, labels = labelled(target)
    found: Terms = {}
    for name, sink, source in (("first", first, second), ("second", second, first)):
        low = (unit(rows(sink.features[0])) * unit(rows(source.features[0].detach()))).sum(1)
        found[f"{name}/hfd"] = (1 - low).mean()
        log_sink, log_source = (log_p(rows(peer.logits), 2)[valid] for peer in (sink, source))
        errors = [-own(log_p(rows(peer.logits))[valid].detach(), labels) for peer in (sink, source)]
        found[f"{name}/pixel"] = 4 * kl(log_source, log_sink)[errors[1] < errors[0]].mean()
        maps = []
        for error in errors:
            whole = torch.zeros(target.numel(), dtype=torch.float64)
            whole[valid] = error
            maps.append(whole.view(target.shape))
        distances = []
        for b in range(len(target)):
            for i in range(2):
                for j in (0, 2):  # a 2 x 4 map has regions of 1 x 2
                    place = (b, i, slice(j, j + 2))
                    count = (target[place] != IGNORED).sum()
                    if count and maps[1][place].sum() / count < maps[0][place].sum() / count:
                        g, goal = (unit(peer.last_feature[b, :, i, j : j + 2].mean(-1)) for peer in (sink, source))
                        distances.append(1 - g @ goal.detach())
        found[f"{name}/region"] = torch.stack(distances).mean()
    return found


CASES = {
    "kd": Case(kd, {"temperature": 2.0}),
    "apd": Case(apd, {"temperature": 2.0, "hidden_channels": 5, "out_channels": 3}),
    "at": Case(at),
    "c2vkd": Case(c2vkd),
    "cirkd": Case(
        cirkd, {"projector": "identity", "pixel_queue": 50, "region_queue": 20, "pixel_contrast": 500,
                "region_contrast": 500},
    ),
    "cwd": Case(cwd, {"feature_weight": 50.0}),
    "dist": Case(dist, {"temperature": 2.0}),
    "dkd": Case(dkd, {"temperature": 3.0}),
    "fitnet": Case(fitnet, {"always_project": False, "standardize": False}),
    "ifvd": Case(ifvd),
    "mgd": Case(mgd, {"mask_ratio": 0.0}),
    "pseudo": Case(pseudo, {"threshold": 0.5}),
    "skd": Case(skd, {"holistic_weight": 0.1, "critic_channels": 4}, lambda method: method.critic.eval()),
    "dml": Case(dml, {"temperature": 2.0}),
    "hfd_bsd": Case(hfd_bsd, {"hfd": "direct", "temperature": 2.0, "region_grid": 2}),
    "kdcl": Case(kdcl),
}  # fmt: skip
