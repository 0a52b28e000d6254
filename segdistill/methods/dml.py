"""Deep mutual learning: co-trained students imitate each other's predictions."""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from segdistill.config import config
from segdistill.geometry import finest, resize_labels, size_of
from segdistill.losses.blocks import resized_in_one_block
from segdistill.losses.divergence import pixel_kl
from segdistill.losses.masks import counted_mask
from segdistill.methods.method import MethodConfig, NonNegative, OnlineMethod, Temperature
from segdistill.models.outputs import Outputs


@config
class DMLConfig(MethodConfig):
    """Mutual distillation of the logits of two or more students."""

    name: Literal["dml"] = "dml"
    weight: NonNegative = 1.0
    """Factor of every student's mean divergence from its peers."""
    temperature: Temperature = 1.0
    """Divides all logits; the squared temperature multiplies the loss. OKDDip's comparison uses 3."""
    mask_ignore: bool = True
    """Leave out ignored pixels."""
    upsample: bool = False
    """Compare at label size and not at the size of the finest peer's logits."""


class MutualLearning(OnlineMethod[DMLConfig]):
    """Deep mutual learning (DML) of K >= 2 students.

    Example:
        dml_soft:
          students: {cnn: *cnn, vit: *vit}
          methods: [{name: dml, temperature: 3.0}]

    Formula:
        L_k = T^2 / (K - 1) * sum over peers l != k of mean over valid pixels of KL(p_l || p_k), p = softmax(z / T).
        p_l is detached, so L_k trains student k alone. All logits are first resized to the finest student's size.

    Masks:
        Ignored pixels are left out unless ``mask_ignore`` is false; no label enters, so that peers teach each other on
        images without labels too.

    Inferred:
        The original algorithm updates the students one after the other, each time with fresh predictions; here, as
        is common, all of them are updated at once from one forward pass.

    Reference:
        Zhang, Xiang, Hospedales, Lu: Deep Mutual Learning, CVPR 2018, arXiv:1706.00384. The mean over valid
        pixels is our reduction of its per-image loss, so weight 1 and T = 1 carry over.
    """

    paper = "Zhang et al., CVPR 2018"
    needs = "logits of two or more students"
    evidence = "public code"
    term = "kl"

    def forward(self, peers: Mapping[str, Outputs], target: Tensor) -> dict[str, dict[str, Tensor]]:
        config, logits = self.config, [peers[peer].logits for peer in self.peers]
        size = size_of(target) if config.upsample else finest(map(size_of, logits))
        valid = counted_mask(resize_labels(target, size), mask_ignore=config.mask_ignore)
        named = dict(zip(self.peers, resized_in_one_block(logits, size), strict=True))
        return {peer: {"kl": self._divergence(peer, named, valid)} for peer in self.peers}

    def _divergence(self, sink: str, logits: Mapping[str, Tensor], valid: Tensor) -> Tensor:
        sources = [peer for peer in self.peers if peer != sink]
        temperature = self.config.temperature
        total = sum(pixel_kl(logits[sink], logits[source], valid, temperature=temperature) for source in sources)
        return total / len(sources)  # type: ignore[return-value]
