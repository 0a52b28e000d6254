"""Names of nested terms on one line, where a test compares all of them."""

from collections.abc import Mapping

from torch import Tensor


def flat(terms: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """``{"cnn": {"kl": loss}}`` as ``{"cnn/kl": loss}``."""
    return {f"{student}/{term}": loss for student, losses in terms.items() for term, loss in losses.items()}
