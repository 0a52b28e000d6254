"""The contract of a distillation method.

A method is one file, or a folder where it has parts that no other method uses: a config with ``name`` and ``weight``,
one or more pure functions, and a class that joins the two. It returns its terms raw; the learner applies the weights
and logs both. Trainable helpers (projections, heads, memory banks) are submodules of the method: optimised with the
student, wrapped with it by DDP, kept in the resume checkpoint, never exported. Adding a method touches its file and the
table in ``methods/__init__.py``; its contract tests ask for its formula, written a second time, in
tests/contracts/formulas.py.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from segdistill.config import Fraction
from segdistill.config import config as config_class
from segdistill.models.outputs import ModelInfo, Outputs

# Ranges that hold what was ever published with much to spare; beyond them a run ends in infinities, or not at all.
NonNegative = Annotated[float, Field(ge=0, le=1e9)]
Positive = Annotated[float, Field(ge=1e-3, le=1e6)]
Temperature = Annotated[float, Field(ge=0.01, le=1000)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Channels = Annotated[int, Field(ge=1, le=16384)]

Evidence = Literal["official code", "public code", "partly second-hand", "reconstruction"]


@config_class
class MethodConfig:
    """What every method can be told; a method's own config adds its ``name`` and its parameters."""

    weight: NonNegative = 1.0
    """Factor of all of the method's terms; 0 switches the method off."""
    ramp: Fraction = 0.0
    """Part of the budget over which the factors of what teaches a student rise from 0; 0: full from the start."""


class Method(nn.Module):
    """What frozen-teacher and co-trained methods share.

    The class attributes and the sections of the docstring (Formula, Weights, Masks, Inferred, Reference) are what
    ``segdistill methods`` prints. They are read from the source without importing it, so the attributes are literals.
    """

    Config: ClassVar[type]
    paper: ClassVar[str]
    """Short citation."""
    needs: ClassVar[str]
    """What it compares, and what it builds for that."""
    evidence: ClassVar[Evidence]
    """Where the formula comes from: the authors' code, another public implementation, texts about the paper, ..."""
    helper_terms: ClassVar[tuple[str, ...]] = ()
    """Terms that train helpers alone, and no student: neither ``weight`` nor ``ramp`` scales them."""

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def weights(self) -> dict[str, float]:
        """The factor of each term (without a peer's name), the method's own ``weight`` included.

        A term with factor 0 is switched off and is not computed.
        """
        raise NotImplementedError

    def attach(self, students: Mapping[str, nn.Module]) -> None:
        """Shows the method the networks it works between, once, before training.

        For the method that borrows a layer of a student. What it keeps must not be registered as a submodule: it
        belongs to the student.
        """

    def own_optimizers(self) -> dict[str, tuple[list[nn.Parameter], dict[str, Any]]]:
        """Helpers that another optimiser than the student's trains: name -> (parameters, optimiser settings)."""
        return {}

    def helper_parameters(self, student: str) -> list[nn.Parameter]:
        """The helpers that the named student's optimiser trains."""
        raise NotImplementedError


class OfflineMethod(Method):
    """A frozen teacher teaches one student."""

    kind: ClassVar[str] = "offline"

    def __init__(self, config: Any, student: ModelInfo, teacher: ModelInfo) -> None:
        super().__init__(config)

    def helper_parameters(self, student: str) -> list[nn.Parameter]:
        own = {id(parameter) for parameters, _ in self.own_optimizers().values() for parameter in parameters}
        return [parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in own]

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """The raw terms, each a float32 scalar.

        Shape:
            target: [B, H, W] int64, ``losses.IGNORE_INDEX`` where there is no label.
        """
        raise NotImplementedError


class OnlineMethod(Method):
    """Peers, trained together from the start, teach each other."""

    kind: ClassVar[str] = "online"

    def __init__(self, config: Any, peers: Mapping[str, ModelInfo]) -> None:
        super().__init__(config)
        self.helpers = nn.ModuleDict()  # one entry per peer that needs one: what its sink side learns through

    def helper_parameters(self, student: str) -> list[nn.Parameter]:
        return list(self.helpers[student].parameters()) if student in self.helpers else []

    def forward(self, peers: Mapping[str, Outputs], target: Tensor) -> dict[str, Tensor]:
        """The raw terms, each a float32 scalar, named ``<peer>/<term>`` after the peer that learns from it.

        Shape:
            target: [B, H, W] int64, ``losses.IGNORE_INDEX`` where there is no label.
        """
        raise NotImplementedError
