"""Vectors as directions."""

import torch
from torch import Tensor


def unit(vectors: Tensor, dim: int) -> Tensor:
    """Vectors of length one; a zero vector stays zero and gets no gradient (division by eps would blow it up)."""
    length = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / torch.where(length > 1e-12, length, torch.inf)
