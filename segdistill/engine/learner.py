"""From a batch, and what the teacher gives for it, to named losses: students and the methods between them."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from segdistill.engine.supervision import Supervision
from segdistill.losses.pseudo_labels import with_pseudo_labels
from segdistill.methods.method import Method, OfflineMethod
from segdistill.models.outputs import Outputs
from segdistill.models.segmenter import Segmenter


class Learner(nn.Module):
    """One forward gives every student's raw terms, :meth:`weights` what each term counts for, whichever student's.

    A term is the labels' (``ce``, or ``aux_ce`` of the auxiliary head; see :class:`Supervision`) or a method's:
    ``kd.kl``, the method's name and the method's own name of it.

    Students and methods are submodules, so that one DDP wraps them together. The teacher is none of it: a cohort of
    learners shares one.

    Args:
        students: name -> segmenter; one with offline methods, several with online ones.
        methods: the experiment's methods by the names that their terms carry.
        supervised: weight of what the labels teach.
        auxiliary: weight of what they teach the auxiliary head, times ``supervised``.
        pseudo_labels: to the methods, an unlabelled pixel has the class of which the teacher, or the mean of students
            that teach each other, is at least so sure; None leaves it unlabelled.
        supervision: what the labels teach; None is the cross-entropy.
    """

    def __init__(
        self,
        students: Mapping[str, Segmenter],
        methods: Mapping[str, Method] | None = None,
        *,
        supervised: float = 1.0,
        auxiliary: float = 0.4,
        pseudo_labels: float | None = None,
        supervision: Supervision | None = None,
    ) -> None:
        super().__init__()
        self.pseudo_labels, self.supervision = pseudo_labels, supervision or Supervision()
        # Plain dicts for reading, ModuleDicts for registration: nn.ModuleDict forgets what its values are.
        self.students, self.methods = dict(students), dict(methods or {})
        self._students, self._methods = nn.ModuleDict(students), nn.ModuleDict(self.methods)
        self.needs_teacher = any(isinstance(method, OfflineMethod) for method in self.methods.values())
        labels = self.supervision.factors.items()
        self.factors = {term: supervised * factor for term, factor in labels}
        self.factors |= {f"aux_{term}": supervised * auxiliary * factor for term, factor in labels}
        self.ramps: dict[str, float] = {}  # the part of the budget over which a factor rises, where it does
        for label, method in self.methods.items():
            self.factors |= {f"{label}.{term}": weight for term, weight in method.weights.items()}
            if method.config.ramp:
                rising = (term for term in method.weights if term not in method.helper_terms)
                self.ramps |= {f"{label}.{term}": method.config.ramp for term in rising}
            method.attach(self.students)
        self._features: dict[str, Tensor] | None = None

    def forward(
        self, images: Tensor, target: Tensor, mass: Tensor | None = None, teacher_outputs: Outputs | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """The raw terms of one batch, float32 scalars, by student and term.

        Args:
            mass: what the sums of cross-entropies are divided by if this is a piece of a batch; see
                :func:`segdistill.losses.supervised.cross_entropy`.
            teacher_outputs: what the teacher gives for the images, where :attr:`needs_teacher`.

        Shape:
            images: [B, 3, H, W] float RGB in 0..1; target: [B, H, W] int64; mass: scalar.
        """
        outputs = {name: student(images) for name, student in self.students.items()}
        if self._features is not None:
            self._features.update({name: output.last_feature for name, output in outputs.items()})
        terms: dict[str, dict[str, Tensor]] = {}
        for name, output in outputs.items():
            # With a weight of 0 the cross-entropy is still reported, but nothing flows through it.
            terms[name] = self.supervision(output.logits, target, mass)
            if output.aux_logits is not None:
                auxiliary = self.supervision(output.aux_logits, target, mass)
                terms[name] |= {f"aux_{term}": loss for term, loss in auxiliary.items()}
        if self.pseudo_labels is not None:
            judges = [output.logits for output in outputs.values()]
            if self.needs_teacher and teacher_outputs is not None:
                judges = [teacher_outputs.logits]
            target = with_pseudo_labels(target, judges, threshold=self.pseudo_labels)
        for label, method in self.methods.items():
            if isinstance(method, OfflineMethod):
                ((name, output),) = outputs.items()
                losses = {name: method(output, teacher_outputs, target)}
            else:
                losses = method(outputs, target)
            for name, own in losses.items():
                terms[name].update({f"{label}.{term}": loss for term, loss in own.items()})
        return terms

    def banks(self) -> list[str]:
        """Names of buffers that are alike in every process: what methods remember, and the weights of classes."""
        return [name for name, _ in self.named_buffers() if name.startswith(("_methods.", "supervision."))]

    @staticmethod
    def short_name(key: str) -> str:
        """A weight's name for people: without the room of the state that it is in."""
        return key.removeprefix("_students.").removeprefix("_methods.")

    @contextlib.contextmanager
    def last_features(self) -> Iterator[dict[str, Tensor]]:
        """Each student's last feature, as a forward pass inside gives it.

        It is no output of the forward pass, since DDP expects a gradient for all that an output came from.
        """
        features: dict[str, Tensor] = {}
        self._features = features
        try:
            yield features
        finally:
            self._features = None

    def weights(self, progress: float = 1.0) -> dict[str, float]:
        """The factor of every term, at a progress in 0..1 through the budget."""
        risen = {term: self.factors[term] * min(1.0, progress / ramp) for term, ramp in self.ramps.items()}
        return self.factors | risen

    def total(self, terms: Mapping[str, Mapping[str, Tensor]], progress: float = 1.0) -> Tensor:
        """The weighted sum that is minimised."""
        weights = self.weights(progress)
        # A term that has not begun to rise stays in the sum: its helpers then get a gradient, of zero, as DDP expects.
        losses = [(term, loss) for own in terms.values() for term, loss in own.items()]
        weighted = [weights[term] * loss for term, loss in losses if self.factors[term] != 0.0]
        return sum(weighted[1:], start=weighted[0])

    def gradient_shares(
        self, terms: Mapping[str, Mapping[str, Tensor]], features: Mapping[str, Tensor], progress: float = 1.0
    ) -> dict[str, dict[str, Tensor]]:
        """Norm of each weighted term's gradient at its student's last feature, over the sum of the student's norms.

        A term that does not go through that feature has none. To be called before the backward pass.

        Args:
            features: what :meth:`last_features` gave for these terms.

        Shape:
            terms: scalars; returns scalars.
        """
        weights = self.weights(progress)
        shares: dict[str, dict[str, Tensor]] = {}
        for student, losses in terms.items():
            norms = {}
            for term, loss in losses.items():
                if weights[term] == 0.0:
                    continue
                (gradient,) = torch.autograd.grad(loss, features[student], retain_graph=True, allow_unused=True)
                if gradient is not None:
                    norms[term] = weights[term] * gradient.float().norm()
            if norms:
                total = torch.stack(list(norms.values())).sum().clamp_min(1e-12)
                shares[student] = {term: norm / total for term, norm in norms.items()}
        return shares
