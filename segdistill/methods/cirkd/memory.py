"""Queues of vectors by class, and what fills them from a batch, without ever asking the device how much that is."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from segdistill.losses.masks import class_members
from segdistill.losses.precision import in_float32
from segdistill.losses.vectors import unit


class ClassQueues(nn.Module):
    """One ring of unit vectors per class: the newest replace the oldest, and only what was written is ever read.

    Rings, pointers and fill counts are buffers, so a checkpoint restores them exactly. A zero vector stands for no
    vector: tensors of one size then hold any number of them, and the host need not know how many.

    Shape:
        rows: [C * size + 1, D]; ring c is rows c * size ... (c + 1) * size - 1. The last row takes what goes nowhere,
            and is zero outside :meth:`enqueue`.
        pointers: [C], the place of each ring that is written next; filled: [C].
    """

    rows: Tensor
    pointers: Tensor
    filled: Tensor

    def __init__(self, num_classes: int, size: int, channels: int) -> None:
        super().__init__()
        self.num_classes, self.size = num_classes, size
        self.register_buffer("rows", torch.zeros(num_classes * size + 1, channels))
        self.register_buffer("pointers", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("filled", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, vectors: Tensor) -> None:
        """Writes the vectors that are not zero, in order; of more than a ring holds, the last ones.

        Shape:
            vectors: [C, E, D].
        """
        given = (vectors != 0).any(-1)  # [C, E]
        count = given.sum(1)  # [C]
        rank = given.cumsum(1) - 1
        kept = given & (rank >= count[:, None] - self.size)
        place = (self.pointers[:, None] + rank) % self.size + self._starts()
        place = torch.where(kept, place, self.num_classes * self.size)
        self.rows.index_copy_(0, place.flatten(), vectors.flatten(0, 1).to(self.rows.dtype))
        self.rows[-1].zero_()
        self.pointers.copy_((self.pointers + count) % self.size)
        self.filled.copy_((self.filled + count).clamp_max(self.size))

    @torch.no_grad()
    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Vectors of every class, drawn without replacement, and which of them there are.

        Of a class with fewer than ``count`` all are drawn, and the rest of its share is absent.

        Shape:
            returns [C * n, D] and [C * n] bool, n the smaller of ``count`` and the size of a ring.
        """
        device = self.rows.device
        written = torch.arange(self.size, device=device) < self.filled[:, None]  # a ring fills from its start
        chance = torch.rand(self.num_classes, self.size, device=device).masked_fill_(~written, -1)
        drawn, places = chance.topk(min(count, self.size), dim=1, sorted=False)
        return self.rows[(places + self._starts()).flatten()], (drawn >= 0).flatten()

    def _starts(self) -> Tensor:
        return torch.arange(self.num_classes, device=self.rows.device)[:, None] * self.size


@torch.no_grad()
@in_float32
def random_members(vectors: Tensor, labels: Tensor, num_classes: int, count: int) -> Tensor:
    """Of every image and class up to ``count`` vectors, drawn without replacement among the pixels with that label.

    Pixels are sorted by image and class, in random order within; the first ``count`` of each group are taken.

    Shape:
        vectors: [B, P, D]; labels: [B, P]; returns [B, C, count, D], zero where a class has fewer pixels.
    """
    batch, pixels = labels.shape
    device, groups = labels.device, batch * num_classes
    image = torch.arange(batch, device=device)[:, None]
    labelled = (labels >= 0) & (labels < num_classes)
    group = torch.where(labelled, image * num_classes + labels, groups).flatten()  # the last one is no class
    chance = torch.rand(batch * pixels, dtype=torch.float64, device=device) / 2
    order = (group + chance).argsort()
    group = group[order]
    rank = torch.arange(batch * pixels, device=device) - torch.searchsorted(group, group)
    place = torch.where((rank < count) & (group < groups), group * count + rank, groups * count)
    taken = torch.full((groups * count + 1,), batch * pixels, device=device).scatter_(0, place, order)[:-1]
    there = (taken < batch * pixels)[:, None]
    chosen = vectors.flatten(0, 1)[taken.clamp_max(batch * pixels - 1)]
    return torch.where(there, chosen, 0.0).view(batch, num_classes, count, -1)


@torch.no_grad()
@in_float32
def class_means(vectors: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """The mean of each class's vectors in each image, at length one.

    Shape:
        vectors: [B, P, D]; labels: [B, P]; returns [B, C, D], zero where an image has no pixel of a class.
    """
    belongs = class_members(labels, num_classes).to(vectors.dtype)  # [B, C, P]
    return unit(belongs @ vectors, dim=-1)


@torch.no_grad()
def gather_batches(values: Tensor) -> Tensor:
    """The values of all processes, in their order, along the first dimension; one process's own without a group."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values.contiguous())
    return torch.cat(parts)
