"""Evaluation: integer confusion counts over a whole split, at the resolution of the labels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Required, TypedDict, TypeVar, Unpack

import numpy as np
import torch
from torch import Tensor

from segdistill.data.parallel import READERS, ahead
from segdistill.data.transforms import unit_range
from segdistill.engine.distributed import Processes
from segdistill.engine.inference import Views, predict
from segdistill.errors import UserError
from segdistill.metrics.boundary import boundary_counts
from segdistill.metrics.calibration_error import BINS, calibration_gaps, expected_calibration_error
from segdistill.metrics.confusion import (
    confusion_matrix_per_image,
    iou_counts,
    iou_from_counts,
    mean_iou,
    mean_over_present,
    pixel_accuracy,
)
from segdistill.models.outputs import Network

Key = TypeVar("Key")
MANY = 64  # images of a process, for which it is worth to start threads that read them ahead


class Samples(Protocol):
    """What networks are evaluated on: a prepared split, or another test set (data/mapped.py)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """An image [H, W, 3] uint8 and its label [h, w] uint8."""

    def sample_id(self, index: int) -> str:
        """Its name."""


@dataclass(frozen=True)
class Evaluation:
    """Confusion counts of one network on one split; rows are the truth, columns the prediction."""

    confusion: np.ndarray  # [K, K] int64
    counts: np.ndarray  # [N, 3, K] int64, ``iou_counts`` of each image: what is kept must not grow with N x K x K
    ids: list[str]
    finite: bool = True  # whether all scores were; if not, the counts say nothing
    calibration: np.ndarray | None = None  # [15] int64, see metrics/calibration_error.py; None where nobody asked
    boundary: np.ndarray | None = None  # [3, K] int64, see metrics/boundary.py; None where nobody asked

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

    @property
    def boundary_miou(self) -> float | None:
        """Mean Boundary IoU over the classes that occur; None where nobody asked for it."""
        return None if self.boundary is None else float(mean_over_present(iou_from_counts(*self.boundary)))


@torch.inference_mode()
def masks(
    network: Network, dataset: Samples, indices: Sequence[int], views: Views, device: Any = "cpu"
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Some images of a split, with their labels and the classes that the network gives them.

    Shape:
        image: [H, W, C] uint8 or uint16; label, mask: [h, w] uint8, of the label's size.
    """
    for index in indices:
        image, label = dataset[index]
        pixels = unit_range(torch.from_numpy(image).permute(2, 0, 1)[None].to(device))
        prediction = predict(network, pixels, (label.shape[0], label.shape[1]), views)
        yield image, label, prediction.classes[0].to(torch.uint8).cpu().numpy()


class Asked(TypedDict, total=False):
    """What an evaluation is to find, and with whom."""

    num_classes: Required[int]
    processes: Required[Processes]
    calibration: bool  # whether to look at probabilities, too
    boundary: bool  # whether to count the pixels near edges, too


def evaluate(network: Network, dataset: Samples, views: Views, **asked: Unpack[Asked]) -> Evaluation:
    """Confusion counts of a segmenter on a split; its mode is restored afterwards.

    Raises:
        UserError: scores that are not finite, or no pixel with a label: nothing to make a score of.
    """
    (evaluation,) = evaluate_together({"": network}, dataset, views, **asked).values()
    if not evaluation.finite:
        raise UserError("the network's scores are not finite: it diverged, and a mIoU would say nothing of it")
    return evaluation


@torch.inference_mode()
def evaluate_together(
    networks: Mapping[Key, Network], dataset: Samples, views: Views, **asked: Unpack[Asked]
) -> dict[Key, Evaluation]:
    """Confusion counts of several segmenters on a split that is read once, as :func:`evaluate` would give each.

    Each process takes its share of the images, without doubles, and counts are summed.

    Raises:
        UserError: no pixel has a label.
    """
    num_classes, processes = asked["num_classes"], asked["processes"]
    calibration, boundary = asked.get("calibration", False), asked.get("boundary", False)
    device = processes.device
    modes = {key: network.training for key, network in networks.items()}

    def zeros(*shape: int) -> dict[Key, Tensor]:
        return {key: torch.zeros(shape, dtype=torch.int64, device=device) for key in networks}

    confusion, counts = zeros(num_classes, num_classes), zeros(len(dataset), 3, num_classes)
    broken, gaps, edges = zeros(), zeros(BINS), zeros(3, num_classes)
    share = list(range(processes.rank, len(dataset), processes.world_size))
    for numbers, images, labels in _batches(dataset, share, views.settings.batch_size):
        images, labels = unit_range(images.to(device)), labels.to(device).long()
        places, (height, width) = torch.tensor(numbers, device=device), labels.shape[-2:]
        for key, network in networks.items():
            network.eval()
            prediction = predict(network, images, (height, width), views, probability=calibration)
            broken[key] |= ~prediction.finite
            matrices = confusion_matrix_per_image(prediction.classes, labels, num_classes)
            confusion[key] += matrices.sum(0)
            counts[key][places] = torch.stack(iou_counts(matrices), -2)
            if prediction.probability is not None:
                right, labelled = prediction.classes == labels, labels < num_classes
                gaps[key] += calibration_gaps(prediction.probability, right, labelled)
            if boundary:
                edges[key] += boundary_counts(prediction.classes, labels, num_classes)
    evaluations, ids = {}, [dataset.sample_id(index) for index in range(len(dataset))]
    for key, network in networks.items():
        network.train(modes[key])
        total, of_images = (processes.sum(part[key]).cpu().numpy() for part in (confusion, counts))
        if len(dataset) and not total.any():
            raise UserError(f"the split of {len(dataset)} images has no pixel with a label; it cannot be scored")
        finite = not processes.sum(broken[key]).item()
        calibrated = processes.sum(gaps[key]).cpu().numpy() if calibration else None
        near = processes.sum(edges[key]).cpu().numpy() if boundary else None
        evaluations[key] = Evaluation(total, of_images, ids, finite, calibrated, near)
    return evaluations


def _batches(dataset: Samples, numbers: list[int], size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Neighbouring images of equal size, stacked: [b, C, H, W] and [b, H, W], as they are stored."""
    group: list[tuple[int, Tensor, Tensor]] = []
    samples = ahead(dataset.__getitem__, numbers, READERS if len(numbers) >= MANY else 0)
    for number, (image, label) in zip(numbers, samples, strict=True):
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
