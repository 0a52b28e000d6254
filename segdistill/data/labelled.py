"""Which samples keep their labels, where a part of the training split is to become images without labels."""

import functools
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from segdistill.data.checks import load_sample
from segdistill.data.decoding import BadFile
from segdistill.data.layouts import WITHOUT_MASKS, Layout, Legend, Sample
from segdistill.data.parallel import ordered_map
from segdistill.errors import UserError

SEED = 0  # of the order in which samples come to their labels: one data set has one labelled eighth, whoever asks


def samples_by_split(layout: Layout, labelled: float, *, workers: int) -> dict[str, tuple[Sample, ...]]:
    """The samples of every split, of which a part of the training images has been stripped of its masks.

    Args:
        layout: the data set.
        labelled: the part of the training images that keeps its masks; the others join the split without masks.
        workers: processes; 0 = all cores.

    Raises:
        UserError: a training mask cannot be used.
    """
    splits = {split: tuple(layout.samples(split)) for split in layout.splits}
    if labelled == 1.0:
        return splits
    train, count = splits["train"], len(layout.classes)
    task = functools.partial(_classes_present, legend=layout.legend)
    try:
        present = np.array(list(ordered_map(task, list(train), workers=workers))).reshape(len(train), 256)[:, :count]
    except BadFile as problem:
        raise UserError(str(problem)) from None
    kept = set(labelling_order(present)[: max(1, round(labelled * len(train)))])
    stripped = tuple(
        replace(sample, split=WITHOUT_MASKS, mask=None) for number, sample in enumerate(train) if number not in kept
    )
    splits["train"] = tuple(sample for number, sample in enumerate(train) if number in kept)
    return splits | {WITHOUT_MASKS: splits.get(WITHOUT_MASKS, ()) + stripped}


def labelling_order(present: np.ndarray) -> list[int]:
    """The order in which samples come to labels, such that any beginning of it is a fair part of all.

    The next sample is a random one that shows the class of whose images the smallest part has been taken, the rarest
    of several. So every class is there as soon as there are as many samples as classes, each keeps about its share,
    and a smaller part is always a part of a larger one. Samples without any class come last.

    Shape:
        present: [N, K] bool, which classes a sample shows.
    """
    shuffled = np.random.default_rng(SEED).permutation(len(present))
    waiting = [deque(number for number in shuffled if present[number, k]) for k in range(present.shape[1])]
    totals = present.sum(0)
    taken, order, there = np.zeros(len(totals)), list[int](), np.zeros(len(present), dtype=bool)
    while True:
        for queue in waiting:
            while queue and there[queue[0]]:
                queue.popleft()
        open_classes = [k for k, queue in enumerate(waiting) if queue]
        if not open_classes:
            return order + [int(number) for number in shuffled if not there[number]]
        neediest = min(open_classes, key=lambda k: (taken[k] / totals[k], totals[k]))
        number = int(waiting[neediest].popleft())
        order.append(number)
        there[number] = True
        taken += present[number]


def _classes_present(sample: Sample, *, legend: Legend) -> Sequence[bool]:
    _, _, labels = load_sample(sample, legend)
    return np.bincount(labels.ravel(), minlength=256) > 0  # type: ignore[return-value]
