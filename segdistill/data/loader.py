"""Training batches in an order that only the seed decides."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from segdistill.data.settings import AugmentationConfig
from segdistill.data.shards import ShardDataset
from segdistill.data.transforms import Augmentation


@dataclass(frozen=True)
class Share:
    """What part of each global batch this process sees, and in how many pieces."""

    batch_size: int  # images an optimiser step, over all processes and pieces
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1

    @property
    def micro_batch(self) -> int:
        """Images in one forward pass of one process."""
        return self.batch_size // (self.accumulate * self.world_size)


class SampleNumbers(Sampler[list[int]]):
    """Batches of sample numbers, without end: number s is the s-th sample ever drawn, in this run or a resumed one."""

    def __init__(self, share: Share, first_iteration: int) -> None:
        self.share, self.first_iteration = share, first_iteration

    def __iter__(self) -> Iterator[list[int]]:
        share, iteration = self.share, self.first_iteration
        while True:
            for piece in range(share.accumulate):
                start = iteration * share.batch_size
                start += (piece * share.world_size + share.rank) * share.micro_batch
                yield list(range(start, start + share.micro_batch))
            iteration += 1


class NumberedSamples(Dataset[tuple[Tensor, Tensor]]):
    """The s-th augmented sample: shuffled anew each epoch, all randomness from (seed, s)."""

    def __init__(self, source: ShardDataset, augmentation: AugmentationConfig, seed: int) -> None:
        self.source, self.augmentation, self.seed = source, Augmentation(augmentation), seed
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(number, len(self.source))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.source))
            self._epoch = epoch
        image, label = self.source[int(self._order[position])]
        draw = int(np.random.SeedSequence((self.seed, number, 1)).generate_state(1, np.uint64)[0] >> 1)
        return self.augmentation(image, label, draw)


def training_batches(
    source: ShardDataset,
    augmentation: AugmentationConfig,
    *,
    seed: int,
    share: Share,
    first_iteration: int,
    workers: int,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless micro-batches of this process, ``share.accumulate`` of them an iteration.

    Shape:
        images [b, 3, h, w] uint8 and labels [b, h, w] uint8.
    """
    loader = DataLoader(
        NumberedSamples(source, augmentation, seed),
        batch_sampler=SampleNumbers(share, first_iteration),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_leave_the_group,
        generator=torch.Generator(),  # its own, so that building a loader moves no other random stream
    )
    return iter(loader)


def _leave_the_group(_worker: int) -> None:
    """A signal to the whole group is for the training, which stops where it can save; workers end with it."""
    os.setpgid(0, 0)
