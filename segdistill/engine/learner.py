"""From a batch to named losses: students, the frozen teacher, and the methods between them."""

from collections.abc import Mapping

from torch import Tensor, nn

from segdistill.losses import cross_entropy
from segdistill.methods.method import Method, OfflineMethod
from segdistill.models.segmenter import Segmenter
from segdistill.models.teacher import Teacher


class Learner(nn.Module):
    """One forward gives every raw term, named ``<student>/<term>``; the weights stand in :attr:`factors`.

    Students and methods are submodules, so that one DDP wraps them together. The teacher keeps its network to itself:
    it is frozen, has no gradient to share and belongs in no checkpoint.

    Args:
        students: name -> segmenter; one with offline methods, several with online ones.
        methods: the experiment's methods by the names that their terms carry.
        teacher: needed by offline methods.
        supervised: weight of the cross-entropy to the labels.
        auxiliary: weight of the auxiliary head's cross-entropy, times ``supervised``.
    """

    def __init__(
        self,
        students: Mapping[str, Segmenter],
        methods: Mapping[str, Method] | None = None,
        teacher: Teacher | None = None,
        *,
        supervised: float = 1.0,
        auxiliary: float = 0.4,
    ) -> None:
        super().__init__()
        # Plain dicts for reading, ModuleDicts for registration: nn.ModuleDict forgets what its values are.
        self.students, self.methods = dict(students), dict(methods or {})
        self._students, self._methods = nn.ModuleDict(students), nn.ModuleDict(self.methods)
        self.teacher = teacher  # hides its network: no parameter of it is ours
        self.factors: dict[str, float] = {}
        for name in self.students:
            self.factors[f"{name}/ce"] = supervised
            self.factors[f"{name}/aux_ce"] = supervised * auxiliary
            for label, method in self.methods.items():
                self.factors |= {f"{name}/{label}.{term}": weight for term, weight in method.weights.items()}

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The raw terms of one batch, float32 scalars.

        Shape:
            images: [B, 3, H, W] float RGB in 0..1; target: [B, H, W] int64.
        """
        outputs = {name: student(images) for name, student in self.students.items()}
        teacher_outputs = self.teacher(images) if self.teacher is not None else None
        terms: dict[str, Tensor] = {}
        for name, output in outputs.items():
            # With a weight of 0 the cross-entropy is still reported, but nothing flows through it.
            terms[f"{name}/ce"] = cross_entropy(output.logits, target)
            if output.aux_logits is not None:
                terms[f"{name}/aux_ce"] = cross_entropy(output.aux_logits, target)
        for label, method in self.methods.items():
            if isinstance(method, OfflineMethod):
                (output,) = outputs.values()
                found = method(output, teacher_outputs, target)
            else:
                found = method(outputs, target)
            terms.update({self._key(label, term): loss for term, loss in found.items()})
        return terms

    def _key(self, label: str, term: str) -> str:
        """``kl`` of kd as ``cnn/kd.kl``, ``vit/kl`` of dml as ``vit/dml.kl``."""
        student, _, term = term.rpartition("/")
        return f"{student or next(iter(self.students))}/{label}.{term}"

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum that is minimised."""
        weighted = [self.factors[key] * loss for key, loss in terms.items() if self.factors[key] != 0.0]
        return sum(weighted[1:], start=weighted[0])
