"""Training batches in an order that only the seed decides."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from segdistill.data.parallel import ahead
from segdistill.data.settings import AugmentationConfig
from segdistill.data.shards import ShardDataset
from segdistill.data.transforms import Augmentation, Crop, cut

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Share:
    """What part of each global batch this process sees, and in how many pieces."""

    batch_size: int  # images an optimiser step, over all processes and pieces
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    unlabelled: int = 0  # images beside those, of another data set

    @property
    def micro_batch(self) -> int:
        """Images in one forward pass of one process, but for those beside."""
        return self.batch_size // (self.accumulate * self.world_size)

    @property
    def beside(self) -> "Share":
        """The same of the images beside."""
        return replace(self, batch_size=self.unlabelled, unlabelled=0)


def training_batches(
    source: ShardDataset,
    augmentation: AugmentationConfig,
    *,
    seed: int,
    share: Share,
    first_iteration: int,
    workers: int,
    device: torch.device = CPU,
    beside: ShardDataset | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless micro-batches of this process, ``share.accumulate`` of them an iteration.

    Args:
        source: what ``share.batch_size`` images of each batch are from, in the same order with whatever is beside them.
        beside: what the last ``share.unlabelled`` are from, with an order and random numbers of their own.
        workers: threads that read ahead, twice as many samples as there are threads. Reading, hashing, decoding and
            copying leave Python to the others, so threads are enough, and they share what is kept in memory.
        device: where the crops are augmented and wanted. A GPU does that in a stream of its own, beside the step.

    Shape:
        images [b, C, h, w] float32 in 0..1 and labels [b, h, w] uint8.
    """
    augment, cuda = Augmentation(augmentation), device.type == "cuda"
    sources = (source,) if beside is None else (source, beside)
    read = functools.partial(_read, sources, augment, seed, pinned=cuda)
    threads = max(workers, *(getattr(each, "readers", 0) for each in sources))  # samples in memory need none
    samples = ahead(read, _places(share, first_iteration), threads)
    images = share.micro_batch + share.beside.micro_batch
    stream = torch.cuda.Stream(device) if cuda else None
    while True:
        crops = list(itertools.islice(samples, images))
        if stream is None:
            yield augment(crops, device)
            continue
        with torch.cuda.stream(stream):
            batch = augment(crops, device)
        training = torch.cuda.current_stream(device)
        training.wait_stream(stream)
        for part in batch:
            part.record_stream(training)
        yield batch


def sample_numbers(share: Share, first_iteration: int) -> Iterator[int]:
    """What this process sees, without end: number s is the s-th sample ever drawn, in this run or a resumed one."""
    for iteration in itertools.count(first_iteration):
        for piece in range(share.accumulate):
            start = iteration * share.batch_size + (piece * share.world_size + share.rank) * share.micro_batch
            yield from range(start, start + share.micro_batch)


def _places(share: Share, first_iteration: int) -> Iterator[tuple[int, int]]:
    """Of each sample of each micro-batch, which data set it is from, and its number there."""
    shares = (share, share.beside)
    numbers = [sample_numbers(each, first_iteration) for each in shares]
    while True:
        for which, each in enumerate(shares):
            yield from ((which, number) for number in itertools.islice(numbers[which], each.micro_batch))


def _read(
    sources: Sequence[ShardDataset], augmentation: Augmentation, seed: int, place: tuple[int, int], *, pinned: bool
) -> tuple[Tensor, Crop]:
    """What the s-th sample of a data set shows, and what becomes of it: all randomness is from (seed, s, data set)."""
    which, number = place
    source = sources[which]
    epoch, position = divmod(number, len(source))
    index = int(_order(seed, epoch, len(source), which)[position])
    draw = int(np.random.SeedSequence((seed, number, 1 + which)).generate_state(1, np.uint64)[0] >> 1)
    crop = augmentation.draw(source.size(index), draw)
    rows, columns = crop.window
    image, label = source.rows(index, rows)
    return cut(image, label, (slice(None), columns), pinned=pinned), crop


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, samples: int, which: int) -> np.ndarray:
    """Shuffled anew each epoch, and for each data set."""
    return np.random.default_rng((seed, epoch, which)[: 2 + which]).permutation(samples)
