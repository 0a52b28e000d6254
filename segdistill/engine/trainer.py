"""The one training loop. It knows no loss and no method: a learner gives named terms, a tracker takes numbers.

Laws (tests/contracts/test_loop_laws.py): one batch of 8 = four of 2 accumulated = two processes of 4; interrupted and
resumed = never interrupted, bit for bit on one CPU process. The first holds for the cross-entropy wherever labels are
missing. Of a method's terms it holds for means over images or over all pixels; a mean over labelled pixels is one of
the piece that a process has before it, and so is what relates the images of a batch.
"""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from segdistill.config import parse
from segdistill.data.loader import Share, training_batches
from segdistill.data.shards import ShardDataset
from segdistill.engine import checkpoint
from segdistill.engine.distributed import Processes
from segdistill.engine.evaluate import Evaluation, evaluate
from segdistill.engine.learner import Learner
from segdistill.engine.optim import build_optimizer, set_learning_rates, student_optimizer
from segdistill.engine.progress import TrainingBar
from segdistill.engine.settings import InferenceConfig, OptimizerConfig, Schedule, TrainConfig
from segdistill.engine.tracker import Tracker
from segdistill.errors import Interrupted, UserError, stop_on_sigterm
from segdistill.losses import valid_mask
from segdistill.models.batch_norm import synchronised
from segdistill.models.weights import not_finite

logger = logging.getLogger(__name__)

# Iterations between two agreements of all processes on the clock and on a wish to stop.
AGREE_EVERY = 10
CHECKPOINT = "resume.safetensors"
# Steps in a row that fp16's loss scaling may skip. The scale begins at 65,536 and halves with each skip, so that 16 of
# them bring it to 1: what still overflows then overflows without any scaling.
MOST_SKIPPED = 20


@dataclass
class Result:
    """What a training run leaves besides the weights, which are in the learner's students."""

    iterations: int
    seconds: float
    images_per_second: float
    evaluations: dict[str, Evaluation]
    curves: dict[str, list[dict[str, float]]]
    evaluation_seconds: float = 0.0
    data_seconds: float = 0.0


@dataclass
class Progress:
    """The counters of a run; all of them are in the checkpoint."""

    iteration: int = 0
    seconds: float = 0.0  # of training, without validation and saving
    data_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    curves: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)  # validation mIoU of the kept weights, by student
    sums: dict[str, Tensor] = field(default_factory=dict)  # of each term since the last log entry
    since_log: int = 0
    skipped: Tensor = field(default_factory=lambda: torch.zeros(()))  # steps in a row, up to now, that fp16 left out


class Trainer:
    """Trains a learner's students on one data set with one budget.

    Args:
        learner: the students, methods and teacher.
        train_set: what is learned from.
        val_set: what is validated on; None never validates.
        config: the loop.
        optimizers: one config a student, by its name.
        inference: how students are validated.
        seed: of data order, augmentation and dropout.
        work: folder of the resume checkpoint.
        fingerprint: names everything that defines this run; a checkpoint of another one is not resumed.
        trackers: one a student, by its name.
        processes: this process and its peers.
    """

    def __init__(
        self,
        learner: Learner,
        train_set: ShardDataset,
        val_set: ShardDataset | None,
        config: TrainConfig,
        optimizers: Mapping[str, OptimizerConfig],
        *,
        inference: InferenceConfig,
        seed: int,
        work: Path,
        fingerprint: str,
        trackers: Mapping[str, Tracker],
        processes: Processes,
    ) -> None:
        self.config, self.inference, self.seed = config, inference, seed
        self.train_set, self.val_set = train_set, val_set
        self.work, self.fingerprint, self.trackers, self.processes = work, fingerprint, trackers, processes
        self.share = Share(config.batch_size, config.accumulate, processes.rank, processes.world_size)
        if config.batch_size % (config.accumulate * processes.world_size):
            raise UserError(
                f"batch_size: {config.batch_size} is not divisible by accumulate {config.accumulate} "
                f"times {processes.world_size} processes"
            )
        device = processes.device
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.learner = learner.to(device, memory_format=layout)  # type: ignore[call-overload]
        if processes.world_size > 1 and device.type == "cuda":
            self.learner = synchronised(learner)
        self.optimizers, self.schedules = self._optimizers(optimizers)
        self.wrapped = self._wrap(self.learner)
        enabled = config.precision != "fp32"
        self.autocast_dtype = torch.float16 if config.precision == "fp16" else torch.bfloat16
        self.autocast = enabled
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.progress = Progress(curves={name: [] for name in learner.students}, skipped=torch.zeros((), device=device))
        self.kept: dict[str, dict[str, Tensor]] = {}

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
        banks = [name for name, _ in learner.named_buffers() if name.startswith("_methods.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(learner, banks)  # type: ignore[no-untyped-call]
        ids = [self.processes.device.index] if self.processes.device.type == "cuda" else None
        # Without cross-entropy, a classifier or auxiliary head may get no gradient at all.
        idle = 0.0 in learner.factors.values()
        return DistributedDataParallel(learner, device_ids=ids, find_unused_parameters=idle)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        """Trains to the end of the budget, from the checkpoint if there is one.

        Raises:
            Interrupted: SIGTERM came; the state is saved.
        """
        config, progress = self.config, self.progress
        torch.manual_seed(self.seed + self.processes.rank)
        self._resume()
        device, started = self.processes.device, time.monotonic()
        before = progress.seconds
        batches = training_batches(
            self.train_set,
            config.augmentation,
            seed=self.seed,
            share=self.share,
            first_iteration=progress.iteration,
            workers=config.workers,
        )
        self.wrapped.train()
        with stop_on_sigterm() as stop, TrainingBar(config, self.processes.is_main) as bar:
            while not self._finished():
                for optimizer_name, optimizer in self.optimizers.items():
                    set_learning_rates(optimizer, self.schedules[optimizer_name], self.fraction)
                    optimizer.zero_grad(set_to_none=True)
                measured = (
                    bool(config.gradient_share_every) and (progress.iteration + 1) % config.gradient_share_every == 0
                )
                asked = time.monotonic()
                pieces = [next(batches) for _ in range(config.accumulate)]
                progress.data_seconds += time.monotonic() - asked
                targets = [target.to(device, non_blocking=True) for _, target in pieces]
                pixels = self._pixels(targets)
                for piece, (images, _) in enumerate(pieces):
                    last = piece == config.accumulate - 1
                    self.learner.keep_features = measured and last
                    terms = self._backward(images.to(device, non_blocking=True), targets[piece], pixels, last)
                    for key, term in terms.items():
                        progress.sums[key] = progress.sums.get(key, 0.0) + term.detach()
                self._step()
                progress.iteration += 1
                progress.since_log += 1
                progress.seconds = before + time.monotonic() - started
                bar.update(self.fraction, progress.iteration)
                stopping = self._agree(stop)  # once: a signal that comes later is heard the next time, by all
                finished = self._finished()
                if progress.iteration % config.log_every == 0 or finished:
                    bar.describe(self._log(finished), self._speed())
                paused = time.monotonic()
                if progress.iteration % config.validate_every == 0 and not finished:
                    self._validate()
                # At the end, too: who is told to stop during the last validation trains nothing anew.
                if progress.iteration % config.checkpoint_every == 0 or stopping or finished:
                    self._save(stopping)
                started += time.monotonic() - paused
        evaluations = self._validate()
        if config.select == "best":
            evaluations = self._restore_best(evaluations)
        return Result(
            progress.iteration,
            progress.seconds,
            self._speed(),
            evaluations,
            progress.curves,
            progress.evaluation_seconds,
            progress.data_seconds,
        )

    @property
    def fraction(self) -> float:
        """How much of the budget is used, 0..1."""
        if self.config.iterations is not None:
            return self.progress.iteration / self.config.iterations
        assert self.config.seconds is not None
        return min(1.0, self.progress.seconds / self.config.seconds)

    def _finished(self) -> bool:
        if self.config.iterations is not None:
            return self.progress.iteration >= self.config.iterations
        # All processes must leave in the same iteration, so the clock counts only where they agree on it.
        agreed = self.processes.world_size == 1 or self.progress.iteration % AGREE_EVERY == 0
        return agreed and self.fraction >= 1.0

    def _pixels(self, targets: list[Tensor]) -> Tensor | None:
        """The labelled pixels of an average piece of the batch, over all processes; None if there is one piece."""
        count = len(targets) * self.processes.world_size
        if count == 1:
            return None
        labelled = torch.stack([valid_mask(target).sum() for target in targets]).sum()
        return self.processes.sum(labelled).clamp_min(1) / count

    def _backward(self, images: Tensor, target: Tensor, pixels: Tensor | None, last: bool) -> dict[str, Tensor]:
        """Forward and backward of one micro-batch; gradients travel between processes with the last one only."""
        share: Any = contextlib.nullcontext()
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            share = self.wrapped.no_sync()
        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        with share:
            with torch.autocast(images.device.type, self.autocast_dtype, enabled=self.autocast):
                terms = self.wrapped(images.float().div_(255).contiguous(memory_format=layout), target.long(), pixels)
            if self.learner.keep_features:
                self._log_gradient_shares(terms)
            loss = self.learner.total(terms, self.fraction) / self.config.accumulate
            self.scaler.scale(loss).backward()
        return terms

    def _step(self) -> None:
        limit, before = self.config.max_grad_norm, self._scale()
        for optimizer in self.optimizers.values():
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

    def _scale(self) -> Tensor | None:
        """The loss scale of fp16, on the device: reading it there waits for nothing."""
        if not self.scaler.is_enabled():
            return None
        return self.scaler.scale(torch.ones((), device=self.processes.device))

    def _agree(self, stop: threading.Event) -> bool:
        """Whether all processes stop now, because any of them was told to; makes all see the slowest clock."""
        if self.processes.world_size == 1:
            return stop.is_set()
        if self.progress.iteration % AGREE_EVERY:
            return False
        seen = torch.tensor([self.progress.seconds, float(stop.is_set())], device=self.processes.device)
        self.progress.seconds, wish = self.processes.maximum(seen).tolist()
        return bool(wish)

    # -- what is said and kept ----------------------------------------------------------------------------------------

    def _speed(self) -> float:
        return self.progress.iteration * self.config.batch_size / max(self.progress.seconds, 1e-9)

    def _log(self, finished: bool) -> float:
        """Mean terms since the last entry; the only place of the loop that waits for the device."""
        sums, pieces = self.progress.sums, self.progress.since_log * self.config.accumulate
        self.progress.sums, self.progress.since_log = {}, 0
        keys = sorted(sums)
        values = torch.stack([sums[key].float() for key in keys]) / pieces
        means = dict(zip(keys, (self.processes.sum(values) / self.processes.world_size).tolist(), strict=True))
        self._require_steps(finished)
        weights, total = self.learner.weights(self.fraction), 0.0
        for name, tracker in self.trackers.items():
            mine = {key.split("/", 1)[1]: value for key, value in means.items() if key.startswith(f"{name}/")}
            weighted = {term: weights[f"{name}/{term}"] * value for term, value in mine.items()}
            loss = sum(weighted.values())
            total += loss
            entry = {f"train/loss/{term}": value for term, value in mine.items()} | {"train/loss/total": loss}
            entry |= {f"train/weighted/{term}": value for term, value in weighted.items()}
            rate = self.optimizers[name].param_groups[0]["lr"]
            entry |= {"train/lr": rate, "perf/images_per_second": self._speed()}
            self.progress.curves[name].append({"step": self.progress.iteration, "train/loss/total": loss})
            if self.processes.is_main:
                tracker.metrics(entry, self.progress.iteration)
            self._require_finite(name, mine)
        return total

    def _require_finite(self, student: str, terms: Mapping[str, float]) -> None:
        """Stops a training that diverged: nothing good can come of it, and its weights are lost.

        Under fp16 the scaler skips steps whose numbers overflowed, so there it is no proof; a run of skips is.
        """
        broken = [term for term, value in terms.items() if not math.isfinite(value)]
        if broken and self.config.precision != "fp16":
            raise self._diverged(f"{student}: {', '.join(broken)} is not finite")

    def _require_steps(self, finished: bool) -> None:
        """Stops a training in fp16 whose steps are all skipped: the weights that stay finite do not learn."""
        skipped = int(self.progress.skipped.item()) if self.scaler.is_enabled() else 0
        if skipped >= MOST_SKIPPED or (finished and skipped >= self.progress.iteration):
            raise self._diverged(f"fp16 left out the last {skipped} steps, whose gradients are not finite")

    def _require_finite_weights(self) -> None:
        """Weights and buffers, running statistics and methods' helpers among them: what is not finite is not kept."""
        broken = not_finite(self.learner.state_dict())
        if self.processes.maximum(torch.tensor(float(bool(broken)), device=self.processes.device)).item():
            names = [name.removeprefix("_students.").removeprefix("_methods.") for name in broken]
            raise self._diverged(f"{names[0] if names else 'a weight of another process'} is not finite")

    def _diverged(self, what: str) -> UserError:
        return UserError(
            f"{what} by iteration {self.progress.iteration}: the training diverged; lower its learning rate or the"
            " weights of its methods (segdistill calibrate shows them)"
        )

    def _log_gradient_shares(self, terms: Mapping[str, Tensor]) -> None:
        """How much of what each student's last feature is told comes from each term, in this process's batch."""
        scaled = {key: self.scaler.scale(term) for key, term in terms.items()}
        shares = self.learner.gradient_shares(scaled, self.fraction)
        self.learner.last_features = {}
        if not shares or not self.processes.is_main:
            return
        values = dict(zip(shares, torch.stack(list(shares.values())).tolist(), strict=True))
        for name, tracker in self.trackers.items():
            mine = {key.split("/", 1)[1]: value for key, value in values.items() if key.startswith(f"{name}/")}
            tracker.metrics(
                {f"train/gradient_share/{term}": value for term, value in mine.items()}, self.progress.iteration + 1
            )

    def _validate(self) -> dict[str, Evaluation]:
        """Every student on the validation split; keeps the best weights where the config asks for them."""
        self._require_finite_weights()
        if self.val_set is None:
            return {}
        started, step = time.monotonic(), self.progress.iteration
        evaluations = {}
        for name, student in self.learner.students.items():
            found = evaluations[name] = evaluate(
                student, self.val_set, self.inference, num_classes=student.info.num_classes, processes=self.processes
            )
            self.progress.curves[name].append({"step": step, "val/miou": found.miou})
            if self.processes.is_main:
                self.trackers[name].metrics({"val/miou": found.miou, "val/pixel_accuracy": found.accuracy}, step)
            logger.info("iteration %d, %s: validation mIoU %.2f %%", step, name, 100 * found.miou)
            if self.config.select == "best" and found.miou > self.progress.best.get(name, -1.0):
                self.progress.best[name] = found.miou
                self.kept[name] = {key: value.detach().clone() for key, value in student.state_dict().items()}
        self.progress.evaluation_seconds += time.monotonic() - started
        return evaluations

    def _restore_best(self, evaluations: dict[str, Evaluation]) -> dict[str, Evaluation]:
        assert self.val_set is not None
        for name, student in self.learner.students.items():
            if self.progress.best[name] > evaluations[name].miou:
                student.load_state_dict(self.kept[name])
                evaluations[name] = evaluate(
                    student,
                    self.val_set,
                    self.inference,
                    num_classes=student.info.num_classes,
                    processes=self.processes,
                )
        return evaluations

    def _save(self, stopping: bool) -> None:
        """Writes the checkpoint; ends the run if all processes agreed to."""
        self._require_finite_weights()
        state = self.state()
        if self.processes.is_main:
            checkpoint.save(self.work / CHECKPOINT, state)
        self.processes.barrier()
        if stopping:
            raise Interrupted(f"stopped at iteration {self.progress.iteration}; the same command continues from there")

    def state(self) -> dict[str, Any]:
        """All that a resume needs, every process's random stream included; the teacher is not in it."""
        device = self.processes.device
        return {
            "fingerprint": self.fingerprint,
            "learner": self.learner.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "scaler": self.scaler.state_dict(),
            "progress": vars(self.progress),
            "kept": self.kept,
            "rng": self.processes.gather(torch.get_rng_state()),
            "cuda_rng": self.processes.gather(torch.cuda.get_rng_state(device)) if device.type == "cuda" else [],
        }

    def _resume(self) -> None:
        state = self._read_checkpoint()
        if state is None:
            return
        try:
            self._take_up(state)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise UserError(
                f"{self.work / CHECKPOINT}: written by another version of this program ({reason})"
                "; finish with that version, or move the file away to start anew"
            ) from None
        logger.info("resumed at iteration %d", self.progress.iteration)

    def _take_up(self, state: Mapping[str, Any]) -> None:
        self.learner.load_state_dict(state["learner"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.scaler.load_state_dict(state["scaler"])
        rank, device = self.processes.rank, self.processes.device
        for name, value in state["progress"].items():
            setattr(self.progress, name, value)
        self.progress.sums = {key: value.to(device) for key, value in self.progress.sums.items()}
        self.progress.skipped = self.progress.skipped.to(device)
        self.kept = state["kept"]
        if rank < len(state["rng"]):  # a process that was not there keeps the stream that its seed began
            torch.set_rng_state(state["rng"][rank])
        if rank < len(state["cuda_rng"]) and device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"][rank], device)

    def _read_checkpoint(self) -> dict[str, Any] | None:
        """What to go on from; a checkpoint that is of no use here is put aside, and the training starts anew."""
        path, state, fault = self.work / CHECKPOINT, None, ""
        try:
            state = checkpoint.load(path)
            if state is not None and state["fingerprint"] != self.fingerprint:
                fault = f"{path}: a checkpoint of other settings, data or teacher"
        except UserError as error:
            fault = str(error)
        # Of one mind, and when all have read it.
        if not self.processes.maximum(torch.tensor(float(bool(fault)), device=self.processes.device)).item():
            return state
        if self.processes.is_main:
            logger.warning("%s; it is kept as %s, and the training starts anew", fault, checkpoint.put_aside(path))
        return None
