"""A second test set, read where it lies, in the classes of the first."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segdistill.data.checks import load_sample, read_file
from segdistill.data.decoding import BadFile
from segdistill.data.layouts import IGNORE_INDEX, open_layout
from segdistill.data.shards import content_hash
from segdistill.errors import UserError, nearest


class MappedDataset:
    """The test split of a data set in its official layout, whose classes stand for ours or are ignored.

    Args:
        folder: the data set.
        layout: its layout.
        mapping: a class of it -> the class of ours that it is part of; empty: those of the same name.
        classes: ours, in the order of their ids.
        key: where the settings stand, for sentences.

    Attributes:
        mapped: the ids of our classes that the set has, in order; no other can be scored on it.

    Raises:
        UserError: no such layout, folder or class; no class in common; fewer than two images with masks.
    """

    def __init__(self, folder: Path, layout: str, mapping: Mapping[str, str], classes: Sequence[str], key: str) -> None:
        opened = open_layout(layout, folder)
        names = [entry.name for entry in opened.classes]
        mapping = mapping or {name: name for name in names if name in classes}
        if not mapping:
            raise UserError(
                f"{key}.classes: {folder} has no class of the same name as one of ours ({', '.join(classes)}); say "
                f"which of its classes is part of which: {', '.join(names)}"
            )
        for source, target in mapping.items():
            if source not in names:
                raise UserError(f"{key}.classes: {folder} has no class '{source}'{nearest(source, names)}")
            if target not in classes:
                raise UserError(f"{key}.classes.{source}: no class of ours is '{target}'{nearest(target, classes)}")
        self._table = np.full(256, IGNORE_INDEX, dtype=np.uint8)
        for source, target in mapping.items():
            self._table[names.index(source)] = classes.index(target)
        self.mapped = sorted({classes.index(target) for target in mapping.values()})
        self._mapping, self._legend = dict(sorted(mapping.items())), opened.legend
        self._samples = [sample for sample in opened.samples(opened.tested_on) if sample.mask]
        if len(self._samples) < 2:
            raise UserError(
                f"{key}.data: {folder} has {len(self._samples)} images with masks in its split '{opened.tested_on}'; "
                "an interval needs two"
            )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """As :class:`segdistill.data.shards.ShardDataset` gives them: [H, W, 3] and [H, W].

        Raises:
            UserError: a file cannot be used.
        """
        try:
            _, image, label = load_sample(self._samples[index], self._legend)
        except BadFile as problem:
            raise UserError(str(problem)) from None
        return np.array(image), self._table[label]

    def sample_id(self, index: int) -> str:
        """The name of a sample, as in the source."""
        return self._samples[index].id

    def sequence(self, index: int) -> str | None:
        """The drive or film of which a sample is a frame, where the source says so."""
        return self._samples[index].sequence

    @property
    def content_hash(self) -> str:
        """What is scored: every image and mask, and what their classes stand for; reads all files."""
        facts = []
        for sample in self._samples:
            assert sample.mask is not None
            try:
                digests = [hashlib.sha256(read_file(path)).hexdigest() for path in (sample.image, sample.mask)]
            except BadFile as problem:
                raise UserError(f"{sample.image}: {problem}") from None
            facts.append((sample.split, sample.id, " ".join(digests)))
        return content_hash([f"{source}: {target}" for source, target in self._mapping.items()], facts)
