"""A teacher that is wrong about names alone: for the controls, here and in tests/contracts."""

from torch import Tensor, nn

from segdistill.models.outputs import Outputs
from segdistill.models.segmenter import Segmenter


class Permuted(nn.Module):
    """A segmenter whose classes are each called by the name of the next."""

    def __init__(self, network: Segmenter) -> None:
        super().__init__()
        self.network, self.info = network, network.info

    def forward(self, images: Tensor) -> Outputs:
        outputs = self.network(images)
        return outputs._replace(logits=outputs.logits.roll(1, dims=1))

    def logits(self, images: Tensor) -> Tensor:
        return self.network.logits(images).roll(1, dims=1)
