"""The loss against the labels."""

from torch import Tensor
from torch.nn import functional as F

from segdistill.geometry import size_of
from segdistill.losses.align import resize_logits
from segdistill.losses.masks import IGNORE_INDEX, labelled_mask, labelled_only
from segdistill.losses.precision import in_float32


@in_float32
def cross_entropy(
    logits: Tensor, target: Tensor, pixels: Tensor | None = None, *, align_corners: bool = False
) -> Tensor:
    """Cross-entropy at label size: the mean over the labelled pixels of the batch, 0 with a graph if there are none.

    Args:
        pixels: what the sum is divided by where this is a part of a larger batch, the labelled pixels of an average
            part: the mean over the parts is then that over all labelled pixels. None is for a batch of its own.

    Shape:
        logits: [B, K, h, w], resized to the labels here.
        target: [B, H, W] int64.
        pixels: scalar.
    """
    logits = resize_logits(logits, size_of(target), align_corners=align_corners)  # [B, K, H, W]
    total = F.cross_entropy(logits, labelled_only(target), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (labelled_mask(target).sum().clamp_min(1) if pixels is None else pixels)
