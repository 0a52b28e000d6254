"""The contract of a distillation method.

A method is one file, or a folder where it has parts that no other method uses: a config with ``name`` and ``weight``,
one or more pure functions, and a class that joins the two. It returns its terms raw; the learner applies the weights
and logs both. Trainable helpers (projections, heads, memory banks) are submodules of the method: optimised with the
student, wrapped with it by DDP, kept in the resume checkpoint, never exported. Adding a method touches its file and the
table in ``methods/__init__.py``; its contract tests ask for its formula, written a second time, in
tests/contracts/formulas.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, get_args

from pydantic import Field
from torch import Tensor, nn

from segdistill.config import Fraction
from segdistill.config import config as config_class
from segdistill.errors import UserError
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

    name: str
    weight: NonNegative = 1.0
    """Factor of all of the method's terms; 0 switches the method off."""
    ramp: Fraction = 0.0
    """Part of the budget over which the factors of what teaches a student rise from 0; 0: full from the start."""


ConfigT = TypeVar("ConfigT", bound=MethodConfig)


class Method(nn.Module, Generic[ConfigT]):
    """What frozen-teacher and co-trained methods share.

    The class attributes and the sections of the docstring (Example, Formula, Weights, Masks, Inferred, Reference) are
    what ``segdistill methods`` prints; the example is an entry of ``experiments`` in params.yaml.
    """

    Config: ClassVar[type[MethodConfig]]
    """What the brackets say: that of ``OfflineMethod[KDConfig]`` is KDConfig."""
    kind: ClassVar[Literal["offline", "online"]]
    """Whether a frozen teacher teaches, or co-trained students each other."""
    paper: ClassVar[str]
    """Short citation."""
    needs: ClassVar[str]
    """What it compares, and what it builds for that."""
    evidence: ClassVar[Evidence]
    """Where the formula comes from: the authors' code, another public implementation, texts about the paper, ..."""
    term: ClassVar[str] = ""
    """The only term, of a method whose config has no ``<term>_weight``."""
    helper_terms: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Terms that train helpers alone, and no student: neither ``weight`` nor ``ramp`` scales them, and they are off
    where all of the terms that they are named with here are off."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for argument in (argument for base in getattr(cls, "__orig_bases__", ()) for argument in get_args(base)):
            if isinstance(argument, type):  # and no type variable, as in the two classes below
                cls.Config = argument

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config
        own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        self._term_weights = {
            name.removesuffix("_weight"): weight for name, weight in own.items() if name.endswith("_weight")
        } or {self.term: 1.0}

    def term_weights(self) -> dict[str, float]:
        """What each term is multiplied with beside ``weight``: its ``<term>_weight`` in the config.

        For the method that translates one, or has a term that other settings switch off.
        """
        return dict(self._term_weights)

    @property
    def weights(self) -> dict[str, float]:
        """The factor of each term, whichever peer's, the method's own ``weight`` included.

        A term with factor 0 is switched off and is not computed.
        """
        own = self.term_weights()
        factors = {term: self.config.weight * own[term] for term in own if term not in self.helper_terms}
        for term, served in self.helper_terms.items():
            factors[term] = own[term] if any(factors[each] for each in served) else 0.0
        return {term: factor for term, factor in factors.items() if factor}

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


class OfflineMethod(Method[ConfigT]):
    """A frozen teacher teaches one student."""

    kind = "offline"

    def __init__(self, config: ConfigT, student: ModelInfo, teacher: ModelInfo) -> None:
        super().__init__(config)
        self.student_info, self.teacher_info = student, teacher

    def helper_parameters(self, student: str) -> list[nn.Parameter]:
        own = {id(parameter) for parameters, _ in self.own_optimizers().values() for parameter in parameters}
        return [parameter for parameter in self.parameters() if parameter.requires_grad and id(parameter) not in own]

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor) -> dict[str, Tensor]:
        """The raw terms, each a float32 scalar.

        Shape:
            target: [B, H, W] int64, ``losses.IGNORE_INDEX`` where a pixel does not count, ``losses.UNLABELLED`` where
                it counts and has no class.
        """
        raise NotImplementedError


class OnlineMethod(Method[ConfigT]):
    """Peers, trained together from the start, teach each other."""

    kind = "online"

    def __init__(self, config: ConfigT, peers: Mapping[str, ModelInfo]) -> None:
        super().__init__(config)
        if len(peers) < 2:
            raise UserError(f"{config.name} needs at least two students that teach each other, not {list(peers)}")
        self.peers = tuple(peers)
        self.helpers = nn.ModuleDict()  # one entry per peer that needs one: what its sink side learns through

    def helper_parameters(self, student: str) -> list[nn.Parameter]:
        return list(self.helpers[student].parameters()) if student in self.helpers else []

    def forward(self, peers: Mapping[str, Outputs], target: Tensor) -> dict[str, dict[str, Tensor]]:
        """The raw terms, each a float32 scalar, by the peer that learns from them; nothing where all are off.

        Shape:
            target: as in :meth:`OfflineMethod.forward`.
        """
        raise NotImplementedError
