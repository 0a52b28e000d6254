"""From a batch, and what the teacher gives for it, to named losses: students and the methods between them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from segdistill.losses import cross_entropy
from segdistill.methods.method import Method, OfflineMethod
from segdistill.models.outputs import Outputs
from segdistill.models.segmenter import Segmenter


class Learner(nn.Module):
    """One forward gives every raw term, named ``<student>/<term>``; :meth:`weights` says what each counts for.

    Students and methods are submodules, so that one DDP wraps them together. The teacher is none of it: a cohort of
    learners shares one.

    Args:
        students: name -> segmenter; one with offline methods, several with online ones.
        methods: the experiment's methods by the names that their terms carry.
        supervised: weight of the cross-entropy to the labels.
        auxiliary: weight of the auxiliary head's cross-entropy, times ``supervised``.
    """

    def __init__(
        self,
        students: Mapping[str, Segmenter],
        methods: Mapping[str, Method] | None = None,
        *,
        supervised: float = 1.0,
        auxiliary: float = 0.4,
    ) -> None:
        super().__init__()
        # Plain dicts for reading, ModuleDicts for registration: nn.ModuleDict forgets what its values are.
        self.students, self.methods = dict(students), dict(methods or {})
        self._students, self._methods = nn.ModuleDict(students), nn.ModuleDict(self.methods)
        self.needs_teacher = any(isinstance(method, OfflineMethod) for method in self.methods.values())
        self.factors: dict[str, float] = {}
        self.ramps: dict[str, float] = {}  # the part of the budget over which a factor rises, where it does
        for name in self.students:
            self.factors[f"{name}/ce"] = supervised
            self.factors[f"{name}/aux_ce"] = supervised * auxiliary
            for label, method in self.methods.items():
                self.factors |= {f"{name}/{label}.{term}": weight for term, weight in method.weights.items()}
                if method.config.ramp:
                    rising = (term for term in method.weights if term not in method.helper_terms)
                    self.ramps |= {f"{name}/{label}.{term}": method.config.ramp for term in rising}
        for method in self.methods.values():
            method.attach(self.students)
        self.keep_features = False
        self.last_features: dict[str, Tensor] = {}

    def forward(
        self, images: Tensor, target: Tensor, pixels: Tensor | None = None, teacher_outputs: Outputs | None = None
    ) -> dict[str, Tensor]:
        """The raw terms of one batch, float32 scalars.

        Args:
            pixels: what the sums of cross-entropies are divided by if this is a piece of a batch; see
                :func:`segdistill.losses.cross_entropy`.
            teacher_outputs: what the teacher gives for the images, where :attr:`needs_teacher`.

        Shape:
            images: [B, 3, H, W] float RGB in 0..1; target: [B, H, W] int64; pixels: scalar.
        """
        outputs = {name: student(images) for name, student in self.students.items()}
        if self.keep_features:
            self.last_features = {name: output.last_feature for name, output in outputs.items()}
        terms: dict[str, Tensor] = {}
        for name, output in outputs.items():
            # With a weight of 0 the cross-entropy is still reported, but nothing flows through it.
            terms[f"{name}/ce"] = cross_entropy(output.logits, target, pixels)
            if output.aux_logits is not None:
                terms[f"{name}/aux_ce"] = cross_entropy(output.aux_logits, target, pixels)
        for label, method in self.methods.items():
            if isinstance(method, OfflineMethod):
                (output,) = outputs.values()
                losses = method(output, teacher_outputs, target)
            else:
                losses = method(outputs, target)
            terms.update({self._key(label, term): loss for term, loss in losses.items()})
        return terms

    def _key(self, label: str, term: str) -> str:
        """``kl`` of kd as ``cnn/kd.kl``, ``vit/kl`` of dml as ``vit/dml.kl``."""
        student, _, term = term.rpartition("/")
        return f"{student or next(iter(self.students))}/{label}.{term}"

    def weights(self, progress: float = 1.0) -> dict[str, float]:
        """The factor of every term, at a progress in 0..1 through the budget."""
        risen = {key: self.factors[key] * min(1.0, progress / ramp) for key, ramp in self.ramps.items()}
        return self.factors | risen

    def total(self, terms: Mapping[str, Tensor], progress: float = 1.0) -> Tensor:
        """The weighted sum that is minimised."""
        weights = self.weights(progress)
        # A term that has not begun to rise stays in the sum: its helpers then get a gradient, of zero, as DDP expects.
        weighted = [weights[key] * loss for key, loss in terms.items() if self.factors[key] != 0.0]
        return sum(weighted[1:], start=weighted[0])

    def gradient_shares(self, terms: Mapping[str, Tensor], progress: float = 1.0) -> dict[str, Tensor]:
        """Norm of each weighted term's gradient at its student's last feature, over the sum of these norms.

        A term that does not go through that feature has none. Needs ``keep_features`` during the forward pass, and is
        to be called before the backward pass.

        Shape:
            terms: scalars; returns scalars.
        """
        weights, norms = self.weights(progress), {}
        for key, loss in terms.items():
            feature = self.last_features[key.partition("/")[0]]
            if weights[key] != 0.0:
                (gradient,) = torch.autograd.grad(loss, feature, retain_graph=True, allow_unused=True)
                if gradient is not None:
                    norms[key] = weights[key] * gradient.float().norm()
        totals: dict[str, Tensor] = {}
        for key, norm in norms.items():
            student = key.partition("/")[0]
            totals[student] = totals.get(student, norm.new_zeros(())) + norm
        return {key: norm / totals[key.partition("/")[0]].clamp_min(1e-12) for key, norm in norms.items()}
