"""Evaluation: integer confusion counts over a whole split, at the resolution of the labels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from segdistill.data.shards import ShardDataset
from segdistill.engine.distributed import Processes
from segdistill.engine.settings import InferenceConfig
from segdistill.errors import UserError
from segdistill.metrics.calibration_error import BINS, calibration_gaps, expected_calibration_error
from segdistill.metrics.confusion import confusion_matrix_per_image, iou_counts, mean_iou, pixel_accuracy
from segdistill.models.segmenter import logits_at

Key = TypeVar("Key")


class Network(Protocol):
    """What is evaluated: a segmenter, or a network from a file (models/portable.py)."""

    training: bool

    @property
    def info(self) -> Any:
        """Has ``logits_stride``: image pixels per cell of the logits."""

    def logits(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in 0..1 to logits [B, K, h, w]."""

    def train(self, mode: bool = True) -> Any:
        """Sets the mode, as a module does."""

    def eval(self) -> Any:
        """Sets the mode of use."""


@dataclass(frozen=True)
class Evaluation:
    """Confusion counts of one network on one split; rows are the truth, columns the prediction."""

    confusion: np.ndarray  # [K, K] int64
    counts: np.ndarray  # [N, 3, K] int64, ``iou_counts`` of each image: what is kept must not grow with N x K x K
    ids: list[str]
    finite: bool = True  # whether all scores were; if not, the counts say nothing
    calibration: np.ndarray | None = None  # [15] int64, see metrics/calibration_error.py; None where nobody asked

    @property
    def miou(self) -> float:
        """Mean IoU over the classes that occur."""
        return mean_iou(self.confusion)

    @property
    def accuracy(self) -> float:
        """Correct pixels among the labelled ones."""
        return pixel_accuracy(self.confusion)

    @property
    def ece(self) -> float | None:
        """Expected calibration error (0..1); None where nobody asked for it."""
        if self.calibration is None:
            return None
        return expected_calibration_error(self.calibration, int(self.confusion.sum()))


def predict(
    network: Network,
    images: Tensor,
    size: tuple[int, int],
    settings: InferenceConfig,
    *,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
) -> Tensor:
    """Class scores at label size: logits for one view, mean softmax over several (flips, scales).

    Shape:
        images: [B, 3, H, W] float RGB in 0..1; returns [B, K, *size] float32.
    """
    views = [
        (settings.input_scale * scale, mirrored)
        for scale in scales
        for mirrored in ((False, True) if flip else (False,))
    ]
    if len(views) == 1:
        return _view(network, images, size, settings, *views[0])
    return torch.stack([_view(network, images, size, settings, *view).softmax(1) for view in views]).mean(0)


def _view(
    network: Network, images: Tensor, size: tuple[int, int], settings: InferenceConfig, scale: float, mirrored: bool
) -> Tensor:
    if scale != 1.0:
        # By size, as the logits come back: by factor, the image's edge would be cut off where sizes are rounded.
        scaled = [max(1, round(length * scale)) for length in images.shape[-2:]]
        images = functional.interpolate(images, size=scaled, mode="bilinear", antialias=scale < 1.0)
    if mirrored:
        images = images.flip(-1)
    logits = _slide(network, images, settings) if settings.window else _full_size(network, images)
    if mirrored:
        logits = logits.flip(-1)
    if tuple(logits.shape[-2:]) != size:
        logits = functional.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return logits


def _full_size(network: Network, images: Tensor) -> Tensor:
    """Logits at the size of the images."""
    return logits_at(network.logits(images), images.shape[-2:], network.info.logits_stride)


def _slide(network: Network, images: Tensor, settings: InferenceConfig) -> Tensor:
    """Logits of overlapping windows, averaged by how often a pixel was seen."""
    assert settings.window is not None
    height, width = images.shape[-2:]
    window = (min(settings.window[0], height), min(settings.window[1], width))
    total: Tensor | None = None
    hits = images.new_zeros((1, 1, height, width))
    for top in _starts(height, window[0], settings.window_stride):
        for left in _starts(width, window[1], settings.window_stride):
            area = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = _full_size(network, images[area])
            total = logits.new_zeros((*logits.shape[:2], height, width)) if total is None else total
            total[area] += logits
            hits[area] += 1
    assert total is not None
    return total / hits


def _starts(length: int, window: int, stride: float) -> list[int]:
    """Where windows begin so that they cover the length; the last one ends with it."""
    step = max(1, int(window * stride))
    return sorted({*range(0, length - window, step), length - window})


@torch.inference_mode()
def masks(
    network: Network, dataset: ShardDataset, indices: Sequence[int], settings: InferenceConfig, device: Any = "cpu"
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Some images of a split, with their labels and the classes that the network gives them.

    Shape:
        image: [H, W, 3] uint8; label, mask: [h, w] uint8, of the label's size.
    """
    for index in indices:
        image, label = dataset[index]
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(device).float() / 255
        scores = predict(network, pixels, (label.shape[0], label.shape[1]), settings)
        yield image, label, scores.argmax(1)[0].to(torch.uint8).cpu().numpy()


def evaluate(
    network: Network,
    dataset: ShardDataset,
    settings: InferenceConfig,
    *,
    num_classes: int,
    processes: Processes,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    calibration: bool = False,
    progress: Any = None,
) -> Evaluation:
    """Confusion counts of a segmenter on a split.

    Args:
        network: its mode is restored afterwards.
        calibration: whether to look at its probabilities, too.
        progress: called with the number of images done.

    Raises:
        UserError: scores that are not finite, or no pixel with a label: nothing to make a score of.
    """
    (evaluation,) = evaluate_together(
        {"": network}, dataset, settings, num_classes=num_classes, processes=processes, flip=flip, scales=scales,
        calibration=calibration, progress=progress,
    ).values()  # fmt: skip
    if not evaluation.finite:
        raise UserError("the network's scores are not finite: it diverged, and a mIoU would say nothing of it")
    return evaluation


@torch.inference_mode()
def evaluate_together(
    networks: Mapping[Key, Network],
    dataset: ShardDataset,
    settings: InferenceConfig,
    *,
    num_classes: int,
    processes: Processes,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    calibration: bool = False,
    progress: Any = None,
) -> dict[Key, Evaluation]:
    """Confusion counts of several segmenters on a split that is read once, as :func:`evaluate` would give each.

    Each process takes its share of the images, without doubles, and counts are summed.

    Raises:
        UserError: no pixel has a label.
    """
    device = processes.device
    modes = {key: network.training for key, network in networks.items()}

    def zeros(*shape: int) -> dict[Key, Tensor]:
        return {key: torch.zeros(shape, dtype=torch.int64, device=device) for key in networks}

    confusion, counts = zeros(num_classes, num_classes), zeros(len(dataset), 3, num_classes)
    broken, gaps = zeros(), zeros(BINS)
    several_views = flip or len(scales) > 1
    share = list(range(processes.rank, len(dataset), processes.world_size))
    for numbers, images, labels in _batches(dataset, share, settings.batch_size):
        images, labels = images.to(device).float() / 255, labels.to(device).long()
        places, (height, width) = torch.tensor(numbers, device=device), labels.shape[-2:]
        for key, network in networks.items():
            network.eval()
            scores = predict(network, images, (height, width), settings, flip=flip, scales=scales)
            highest, prediction = scores.max(1)
            broken[key] |= ~highest.isfinite().all()  # a NaN among the scores comes out as the highest
            matrices = confusion_matrix_per_image(prediction, labels, num_classes)
            confusion[key] += matrices.sum(0)
            counts[key][places] = torch.stack(iou_counts(matrices), -2)
            if calibration:  # the scores of one view are logits, those of several are probabilities
                probability = highest if several_views else (highest - scores.logsumexp(1)).exp()
                gaps[key] += calibration_gaps(probability, prediction == labels, labels < num_classes)
        if progress is not None:
            progress(len(numbers))
    evaluations, ids = {}, [dataset.sample_id(index) for index in range(len(dataset))]
    for key, network in networks.items():
        network.train(modes[key])
        total, of_images = (processes.sum(part[key]).cpu().numpy() for part in (confusion, counts))
        if len(dataset) and not total.any():
            raise UserError(f"the split of {len(dataset)} images has no pixel with a label; it cannot be scored")
        finite = not processes.sum(broken[key]).item()
        calibrated = processes.sum(gaps[key]).cpu().numpy() if calibration else None
        evaluations[key] = Evaluation(total, of_images, ids, finite, calibrated)
    return evaluations


def _batches(dataset: ShardDataset, numbers: list[int], size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Neighbouring images of equal size, stacked: [b, 3, H, W] and [b, H, W], uint8."""
    group: list[tuple[int, Tensor, Tensor]] = []
    for number in numbers:
        image, label = dataset[number]
        item = (number, torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label))
        if group and (len(group) == size or item[1].shape != group[0][1].shape):
            yield _stack(group)
            group = []
        group.append(item)
    if group:
        yield _stack(group)


def _stack(group: list[tuple[int, Tensor, Tensor]]) -> tuple[list[int], Tensor, Tensor]:
    numbers, images, labels = zip(*group, strict=True)
    return list(numbers), torch.stack(images), torch.stack(labels)
