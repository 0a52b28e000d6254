"""One member of a cohort: a learner with its optimisers, random stream, best weights, curves, trackers and checkpoint.

It knows no loss and no method: the learner gives named terms, a tracker takes numbers. Batches, the teacher and the
order of things are the cohort's.
"""

import contextlib
import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segdistill.config import parse
from segdistill.engine import checkpoint
from segdistill.engine.distributed import Processes
from segdistill.engine.evaluate import Evaluation
from segdistill.engine.learner import Learner
from segdistill.engine.optim import build_optimizer, set_learning_rates, student_optimizer
from segdistill.engine.settings import OptimizerConfig, Schedule, TrainConfig
from segdistill.engine.stopwatch import Stopwatch
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.models.batch_norm import synchronised
from segdistill.models.outputs import Outputs
from segdistill.models.segmenter import Segmenter
from segdistill.models.weights import not_finite

logger = logging.getLogger(__name__)

CHECKPOINT = "resume.safetensors"
# Iterations between two agreements of all processes on the clock and on a wish to stop.
AGREE_EVERY = 10
# Steps in a row that fp16's loss scaling may skip. The scale begins at 65,536 and halves with each skip, so that 16 of
# them bring it to 1: what still overflows then overflows without any scaling.
MOST_SKIPPED = 20


@dataclass(frozen=True)
class Training:
    """What is to be trained."""

    name: str  # its own among those of a cohort
    learner: Learner
    optimizers: Mapping[str, OptimizerConfig]  # by student
    fingerprint: str  # names everything that defines this training; a checkpoint of another one is not resumed
    work: Path  # folder of the resume checkpoint
    trackers: Mapping[str, Tracker]  # by student
    budget: float = 1.0  # a multiple of the loop's
    judge: Callable[[int, Mapping[str, Evaluation]], None] | None = None
    """Is told the iteration and the scores of each validation but the last, alike in all processes; raises
    :class:`Ended` where it is not worth going on."""


@dataclass
class Result:
    """What a training leaves besides the weights, which are in the learner's students."""

    iterations: int
    seconds: float  # of its own steps, and of the data and the teacher that it shares: what it would take alone
    images_per_second: float
    evaluations: dict[str, Evaluation]
    curves: dict[str, list[dict[str, float]]]
    startup_seconds: float = 0.0  # of first steps, which wait for compilers, caches and the first data
    cpu_seconds: float | None = None  # of ``seconds``, what the processors worked; None on a GPU, whose clock they are


class Ended(UserError):
    """A training that ended before its budget, alone; the other members of its cohort went on."""

    became = "ended"  # the tag that says so

    def __init__(self, iteration: int, reason: str) -> None:
        super().__init__(f"{self.became} by iteration {iteration}: {reason}")
        self.iteration, self.reason = iteration, reason


class Diverged(Ended):
    """A training that ended in numbers that are not finite: nothing good can come of it, and its weights are lost."""

    became = "diverged"

    def __str__(self) -> str:
        return (
            f"{self.reason} by iteration {self.iteration}: the training diverged; lower its learning rate or the"
            " weights of its methods (segdistill calibrate shows them)"
        )


class Pruned(Ended):
    """A training that is not worth its budget, as its judge finds."""

    became = "pruned"


@dataclass
class Progress:
    """The counters of a training; all of them are in the checkpoint."""

    iteration: int = 0
    seconds: float = 0.0  # of training, without validation, saving and start-up
    startup_seconds: float = 0.0
    cpu_seconds: float = 0.0  # of all threads, as ``seconds``
    starts: int = 0  # steps that were the first of a process
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)  # validation mIoU of the kept weights, by student
    sums: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by student and term, since the last log entry
    since_log: int = 0
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))  # steps in a row, up to now, that fp16 left out


class Trainer:
    """Trains a learner's students on the batches that it is given; ``seed`` is of what they draw: dropout and masks."""

    def __init__(self, training: Training, config: TrainConfig, *, seed: int, processes: Processes) -> None:
        self.training, self.config, self.processes = training, config, processes
        # What has no method learns from labels alone, its batch normalisation too.
        self.takes_unlabelled = bool(config.unlabelled) and any(
            method.weights for method in training.learner.methods.values()
        )
        self.images_per_step = config.batch_size + (config.unlabelled if self.takes_unlabelled else 0)
        self.iterations = max(1, round(config.iterations * training.budget)) if config.iterations else None
        device = processes.device
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.learner = training.learner.to(device, memory_format=layout)  # type: ignore[call-overload]
        if processes.world_size > 1 and device.type == "cuda":
            self.learner = synchronised(self.learner)
        self.optimizers, self.schedules = self._optimizers(training.optimizers)
        self.wrapped = self._wrap(self.learner)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.progress = Progress(
            curves={name: [] for name in self.learner.students}, skipped=torch.zeros((), device=device)
        )
        self.kept: dict[str, dict[str, Tensor]] = {}
        self.stopwatch, self.started = Stopwatch(), False
        torch.manual_seed(seed + processes.rank)
        self.random_state = self._global_random_state()

    # -- set-up -------------------------------------------------------------------------------------------------------

    def _optimizers(
        self, configs: Mapping[str, OptimizerConfig]
    ) -> tuple[dict[str, torch.optim.Optimizer], dict[str, Schedule]]:
        optimizers, schedules = {}, {}
        methods = self.learner.methods
        for name, student in self.learner.students.items():
            optimizers[name] = student_optimizer(configs[name], student, methods.values(), name)  # type: ignore[arg-type]
            schedules[name] = configs[name].schedule
        for label, method in methods.items():
            for helper, (parameters, settings) in method.own_optimizers().items():
                own: OptimizerConfig = parse(OptimizerConfig, settings, f"{label}.{helper}")  # type: ignore[arg-type]
                optimizers[f"{label}.{helper}"] = build_optimizer(own, [(parameters, 1.0)])
                schedules[f"{label}.{helper}"] = own.schedule
        return optimizers, schedules

    def _wrap(self, learner: Learner) -> nn.Module:
        if self.config.compile:
            learner.compile()
        if self.processes.world_size == 1:
            return learner
        # Memory banks fill alike in all processes; sending them round at every step would cost more than training.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(learner, learner.banks())  # type: ignore[no-untyped-call]
        ids = [self.processes.device.index] if self.processes.device.type == "cuda" else None
        # Without cross-entropy, a classifier or auxiliary head may get no gradient at all.
        idle = 0.0 in learner.factors.values()
        return DistributedDataParallel(learner, device_ids=ids, find_unused_parameters=idle)

    # -- a step -------------------------------------------------------------------------------------------------------

    def look_at_the_clock(self) -> None:
        """Takes over what the stopwatch knows: between two looks the clock stands still, until the first step's end."""
        if self.started:
            self.progress.seconds += self.stopwatch.take()
            self.progress.cpu_seconds += self.stopwatch.take_cpu()
            return
        self.started = True
        if self.processes.device.type == "cuda":
            torch.cuda.synchronize(self.processes.device)  # this once: the step's time is known when it is done
        self.progress.startup_seconds += self.stopwatch.take()
        self.stopwatch.take_cpu()
        self.progress.starts += 1

    @property
    def fraction(self) -> float:
        """How much of the budget is used, 0..1."""
        if self.iterations is not None:
            return self.progress.iteration / self.iterations
        assert self.config.seconds is not None
        return min(1.0, self.progress.seconds / (self.config.seconds * self.training.budget))

    @property
    def finished(self) -> bool:
        """Whether its budget is used."""
        # All processes must leave in the same iteration, so the clock counts only where they agree on it.
        alone = self.iterations is not None or self.processes.world_size == 1
        return self.fraction >= 1.0 and (alone or self.progress.iteration % AGREE_EVERY == 0)

    def learn(
        self, images: Tensor, target: Tensor, mass: Tensor | None, teacher_outputs: Outputs | None, *, last: bool
    ) -> None:
        """Forward and backward pass of one micro-batch, as :meth:`Learner.forward` takes it.

        Gradients travel between processes with the last one before the step only.
        """
        share: Any = contextlib.nullcontext()
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            share = self.wrapped.no_sync()
        every = self.config.gradient_share_every
        measured = last and bool(every) and (self.progress.iteration + 1) % every == 0
        look: Any = self.learner.last_features() if measured else contextlib.nullcontext()
        with self._own_random_state(), share, look as features:
            with autocast(self.config, images.device):
                terms = self.wrapped(images, target, mass, teacher_outputs)
            if measured:
                self._log_gradient_shares(terms, features)
            loss = self.learner.total(terms, self.fraction) / self.config.accumulate
            self.scaler.scale(loss).backward()
        for student, losses in terms.items():
            sums = self.progress.sums.setdefault(student, {})
            for term, value in losses.items():
                sums[term] = sums.get(term, 0.0) + value.detach()

    def step(self) -> None:
        """Moves the weights by the gradients of all pieces, and forgets these."""
        limit, before = self.config.max_grad_norm, self._scale()
        for name, optimizer in self.optimizers.items():
            set_learning_rates(optimizer, self.schedules[name], self.fraction)
            if limit is not None:
                self.scaler.unscale_(optimizer)
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                torch.nn.utils.clip_grad_norm_(parameters, limit)
            self.scaler.step(optimizer)
        self.scaler.update()
        if before is not None:
            scale = self._scale()
            fell = (scale < before) | (scale == 0)  # type: ignore[operator]
            self.progress.skipped = torch.where(fell, self.progress.skipped + 1, 0)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)  # so that one member's gradients alone are held at a time
        self.progress.iteration += 1
        self.progress.since_log += 1

    def _scale(self) -> Tensor | None:
        """The loss scale of fp16, on the device: reading it there waits for nothing."""
        if not self.scaler.is_enabled():
            return None
        return self.scaler.scale(torch.ones((), device=self.processes.device))

    @contextlib.contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """What is drawn inside does not depend on what others drew. States are kept on the host: nothing waits."""
        self._set_global_random_state(self.random_state)
        yield
        self.random_state = self._global_random_state()

    def _global_random_state(self) -> list[Tensor]:
        """Of the CPU and, where it trains on one, of the GPU."""
        device = self.processes.device
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    def _set_global_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, self.processes.device)

    # -- what is said -------------------------------------------------------------------------------------------------

    @property
    def speed(self) -> float:
        """Images a second, start-up not counted."""
        steps = self.progress.iteration - self.progress.starts
        return steps * self.images_per_step / max(self.progress.seconds, 1e-9)

    def log(self) -> None:
        """Mean terms since the last entry; the only part of a step that waits for the device.

        Raises:
            Diverged: a term is not finite, or fp16 skips every step.
        """
        sums, pieces = self.progress.sums, self.progress.since_log * self.config.accumulate
        self.progress.sums, self.progress.since_log = {}, 0
        keys = [(name, term) for name in sums for term in sorted(sums[name])]
        values = torch.stack([sums[name][term].float() for name, term in keys]) / pieces
        means = dict(zip(keys, (self.processes.sum(values) / self.processes.world_size).tolist(), strict=True))
        self._require_steps()
        weights = self.learner.weights(self.fraction)
        for name, tracker in self.training.trackers.items():
            terms = {term: value for (student, term), value in means.items() if student == name}
            weighted = {term: weights[term] * value for term, value in terms.items()}
            loss = sum(weighted.values())
            entry = {f"train/loss/{term}": value for term, value in terms.items()} | {"train/loss/total": loss}
            entry |= {f"train/weighted/{term}": value for term, value in weighted.items()}
            rate = self.optimizers[name].param_groups[0]["lr"]
            entry |= {"train/lr": rate, "perf/training_images_per_second": self.speed}
            # The cross-entropy is what all experiments have: totals of different methods do not compare.
            losses = {"train/loss/total": loss, "train/loss/ce": terms["ce"]}
            self.progress.curves[name].append({"step": self.progress.iteration, **losses})
            if self.processes.is_main:
                tracker.metrics(entry, self.progress.iteration)
            self._require_finite(name, terms)

    def _require_finite(self, student: str, terms: Mapping[str, float]) -> None:
        """Under fp16 the scaler skips steps whose numbers overflowed, so there it is no proof; a run of skips is."""
        broken = [term for term, value in terms.items() if not math.isfinite(value)]
        if broken and self.config.precision != "fp16":
            raise self._diverged(f"{student}: {', '.join(broken)} is not finite")

    def _require_steps(self) -> None:
        """Ends a training in fp16 whose steps are all skipped: the weights that stay finite do not learn."""
        skipped = int(self.progress.skipped.item()) if self.scaler.is_enabled() else 0
        if skipped >= MOST_SKIPPED or (self.finished and skipped >= self.progress.iteration):
            raise self._diverged(f"fp16 left out the last {skipped} steps, whose gradients are not finite")

    def require_finite_weights(self) -> None:
        """Looks at weights and buffers, running statistics and methods' helpers among them.

        Raises:
            Diverged: what is not finite is neither scored nor kept.
        """
        broken = not_finite(self.learner.state_dict())
        if self.processes.any(bool(broken)):
            name = self.learner.short_name(broken[0]) if broken else "a weight of another process"
            raise self._diverged(f"{name} is not finite")

    def _diverged(self, reason: str) -> Diverged:
        return Diverged(self.progress.iteration, reason)

    def _log_gradient_shares(self, terms: Mapping[str, Mapping[str, Tensor]], features: Mapping[str, Tensor]) -> None:
        """How much of what each student's last feature is told comes from each term, in this process's batch."""
        scaled = {
            name: {term: self.scaler.scale(loss) for term, loss in losses.items()} for name, losses in terms.items()
        }
        for name, shares in self.learner.gradient_shares(scaled, features, self.fraction).items():
            if self.processes.is_main:
                values = zip(shares, torch.stack(list(shares.values())).tolist(), strict=True)
                entry = {f"train/gradient_share/{term}": value for term, value in values}
                self.training.trackers[name].metrics(entry, self.progress.iteration + 1)

    # -- what is kept -------------------------------------------------------------------------------------------------

    def validated(self, evaluations: Mapping[str, Evaluation]) -> None:
        """Takes the scores of its students; keeps the best weights where the config asks for them.

        Raises:
            Diverged: a network's scores are not finite.
            Ended: the judge ends it.
        """
        step = self.progress.iteration
        for name, evaluation in evaluations.items():
            if not evaluation.finite:
                raise self._diverged(f"{name}: the network's scores are not finite")
            self.progress.curves[name].append({"step": step, "val/miou": evaluation.miou})
            if self.processes.is_main:
                scores = {"val/miou": evaluation.miou, "val/pixel_accuracy": evaluation.accuracy}
                self.training.trackers[name].metrics(scores, step)
            logger.info(
                "iteration %d, %s %s: validation mIoU %.2f %%", step, self.training.name, name, 100 * evaluation.miou
            )
            if self.config.select == "best" and evaluation.miou > self.progress.best.get(name, -1.0):
                self.progress.best[name] = evaluation.miou
                student = self.learner.students[name]
                self.kept[name] = {key: value.detach().clone() for key, value in student.state_dict().items()}

        if self.training.judge is not None and self.fraction < 1.0:
            self.training.judge(step, evaluations)

    def restore_best(self, evaluations: Mapping[str, Evaluation]) -> dict[str, Segmenter]:
        """Takes back the weights of students that were better before, if any were kept; gives these students."""
        kept = self.progress.best
        better = [name for name, evaluation in evaluations.items() if name in kept and kept[name] > evaluation.miou]
        for name in better:
            self.learner.students[name].load_state_dict(self.kept[name])
        return {name: self.learner.students[name] for name in better}

    def result(self, evaluations: dict[str, Evaluation]) -> Result:
        """What it comes to, with the scores of the weights that it ends with."""
        progress = self.progress
        progress.seconds += self.stopwatch.take()  # all is done by now, on a GPU too
        return Result(
            progress.iteration, progress.seconds, self.speed, evaluations, progress.curves, progress.startup_seconds,
            progress.cpu_seconds if self.processes.device.type == "cpu" else None,
        )  # fmt: skip

    def save(self) -> None:
        """Writes the checkpoint.

        Raises:
            Diverged: a weight is not finite; the checkpoint before stays.
        """
        self.require_finite_weights()
        state = self.state()
        if self.processes.is_main:
            checkpoint.save(self.training.work / CHECKPOINT, state)
        self.processes.barrier()

    def state(self) -> dict[str, Any]:
        """All that a resume needs, every process's random stream included."""
        return {
            "fingerprint": self.training.fingerprint,
            "learner": self.learner.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "progress": vars(self.progress),
            "kept": self.kept,
            "random": [self.processes.gather(state) for state in self.random_state],
        }

    def resume(self) -> None:
        """Goes on from the checkpoint if there is one; one of no use here is put aside, and training starts anew."""
        path, fault = self.training.work / CHECKPOINT, ""
        try:
            state = checkpoint.load(path)
            if state is not None and state["fingerprint"] != self.training.fingerprint:
                fault = f"{path}: a checkpoint of other settings, data or teacher"
        except UserError as error:
            state, fault = None, str(error)
        if not self.processes.any(bool(fault)) and state is not None:
            fresh = copy.deepcopy(self.state())
            try:
                self._take_up(state)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                fault = f"{path}: written by another version of this program ({type(error).__name__})"
            if not self.processes.any(bool(fault)):
                logger.info("%s: resumed at iteration %d", self.training.name, self.progress.iteration)
                return
            self._take_up(fresh)
        if fault and self.processes.is_main:
            logger.warning("%s; it is kept as %s, and the training starts anew", fault, checkpoint.put_aside(path))

    def _take_up(self, state: Mapping[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        device = self.processes.device
        self.progress = Progress(**state["progress"])
        self.progress.sums = {
            name: {term: value.to(device) for term, value in sums.items()} for name, sums in self.progress.sums.items()
        }
        self.progress.skipped = self.progress.skipped.to(device)
        self.kept = state["kept"]
        streams = [states[self.processes.rank : self.processes.rank + 1] for states in state["random"]]
        if all(streams):  # a process that was not there keeps the stream that its seed began
            self.random_state = [stream[0] for stream in streams]


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """The precision of all networks' forward passes."""
    dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=config.precision != "fp32")
