"""The one training loop: a cohort of trainings on the same batches, with one pass of the teacher.

A single training is a cohort of one. Laws (tests/contracts/test_loop_laws.py, test_cohort_laws.py): a cohort of K gives
what K cohorts of one give, bit for bit on one CPU process, in any order; so does one that is interrupted and resumed,
and one of which a member diverges. One batch of 8 = four of 2 accumulated = two processes of 4: this holds for the
cross-entropy wherever labels are missing, with class weights too. Which pixels are hard, Dice and Lovasz go by the
piece that a process has before it, and so do a method's means over labelled pixels, and what relates the images of a
batch; for a method's means over images or over all pixels the law holds.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from segdistill.data.loader import Share, training_batches
from segdistill.data.shards import ShardDataset
from segdistill.engine.distributed import Processes
from segdistill.engine.evaluate import Evaluation, evaluate_together
from segdistill.engine.inference import Views
from segdistill.engine.progress import Advance
from segdistill.engine.settings import InferenceConfig, TrainConfig
from segdistill.engine.stopwatch import timed
from segdistill.engine.supervision import Supervision
from segdistill.engine.trainer import AGREE_EVERY, Diverged, Ended, Result, Trainer, Training, autocast
from segdistill.errors import GOES_ON, Interrupted, UserError, stop_on_signal
from segdistill.losses.supervised import above_zero
from segdistill.models.segmenter import Segmenter
from segdistill.models.teacher import Teacher

logger = logging.getLogger(__name__)


class Cohort:
    """Trains several learners on one data set, each with the whole of one budget, or its own multiple of it.

    Members step one after another, so that their activations do not add up. One that is ahead of the others, after a
    resume, waits for them; one whose budget is used leaves.

    Args:
        trainings: the members; what labels teach is the same in all of them.
        val_set: None never validates.
        inference: how students are validated.
        seed: of data order, augmentation and what learners draw.
        teacher: what members with offline methods learn from.
        unlabelled_set: where the images beside each batch come from, if the loop asks for some; a member without
            methods takes none of them.
        advanced: is told after each step how far these are.

    Raises:
        ValueError: two members of one name, a method without its teacher, or a budget in seconds for several members.
        UserError: the batch does not divide among pieces and processes.
    """

    def __init__(
        self,
        trainings: Sequence[Training],
        train_set: ShardDataset,
        val_set: ShardDataset | None,
        config: TrainConfig,
        *,
        inference: InferenceConfig,
        seed: int,
        teacher: Teacher | None,
        processes: Processes,
        unlabelled_set: ShardDataset | None = None,
        advanced: Callable[[Advance], None] | None = None,
    ) -> None:
        names = [training.name for training in trainings]
        if len(set(names)) < len(names):
            raise ValueError(f"the members of a cohort have names of their own, not {names}")
        if config.seconds is not None and len(names) > 1:
            raise ValueError("a clock that several trainings share is not the clock of one: train them one by one")
        for key in ("batch_size", "unlabelled"):
            if getattr(config, key) % (config.accumulate * processes.world_size):
                raise UserError(
                    f"{key}: {getattr(config, key)} is not divisible by accumulate {config.accumulate} "
                    f"times {processes.world_size} processes"
                )
        if config.unlabelled and not unlabelled_set:
            raise ValueError(f"unlabelled: {config.unlabelled}, and there are no images without labels")
        self.train_set, self.val_set, self.config = train_set, val_set, config
        self.unlabelled_set, self.advanced = unlabelled_set, advanced
        self.inference, self.seed, self.processes = inference, seed, processes
        self.members = {
            training.name: Trainer(training, config, seed=seed, processes=processes) for training in trainings
        }
        if config.compile:  # Dynamo counts by function, and all learners share theirs
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(trainings))
        # Images that nobody takes are not read.
        beside = config.unlabelled if any(member.takes_unlabelled for member in self.members.values()) else 0
        self.share = Share(config.batch_size, config.accumulate, processes.rank, processes.world_size, beside)
        self.teacher = None
        taught = [name for name, member in self.members.items() if member.learner.needs_teacher]
        if taught:
            if teacher is None:
                raise ValueError(f"{taught} learn from a teacher, and there is none")
            layout = torch.channels_last if config.channels_last else torch.contiguous_format
            self.teacher = teacher.to(processes.device, memory_format=layout)  # type: ignore[call-overload]
            if config.compile:
                self.teacher.compile()
        self.outcomes: dict[str, Result | Ended] = {}
        # What the cohort as a whole took of this process's time after its first step, by activity.
        self.seconds = {"data": 0.0, "training": 0.0, "evaluation": 0.0}

    def run(self) -> dict[str, Result | Ended]:
        """Trains to the end of the budget, from the checkpoints that are there; what became of each member, by name.

        Raises:
            Interrupted: SIGTERM or Ctrl-C came; the state is saved.
        """
        names = list(self.members)
        for member in self.members.values():
            member.resume()
            member.wrapped.train()
        self._train()
        evaluations = self._validate(self.members)
        better = {
            (name, student): network
            for name, member in self.members.items()
            for student, network in member.restore_best(evaluations[name]).items()
        }
        for (name, student), evaluation in self._evaluate(better).items():
            evaluations[name][student] = evaluation
        self.outcomes |= {name: member.result(evaluations[name]) for name, member in self.members.items()}
        return {name: self.outcomes[name] for name in names}

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _train(self) -> None:
        config, number, images = self.config, -1, 0
        with stop_on_signal() as stop:
            while active := {name: member for name, member in self.members.items() if not member.finished}:
                iteration = min(member.progress.iteration for member in active.values())
                takers = {name: member for name, member in active.items() if member.progress.iteration == iteration}
                started = time.monotonic()
                if iteration != number:  # at first, and where one that was behind the others has diverged
                    batches = self._batches(iteration)
                self._step(batches, list(takers.values()))
                self.seconds["training"] += time.monotonic() - started
                if number < 0:  # the first step is start-up
                    self.seconds |= {"data": 0.0, "training": 0.0}
                number = iteration + 1
                if self.advanced:
                    seconds = self.seconds["data"] + self.seconds["training"]
                    images += sum(member.images_per_step for member in takers.values()) if seconds else 0
                    self.advanced(self._advance(number, active, images / max(seconds, 1e-9)))
                stopping = self._agree(stop, number, takers)  # once: a later signal is heard the next time, by all
                for name, member in takers.items():
                    if number % config.log_every == 0 or member.finished:
                        with self._ending_alone(name):
                            member.log()
                if number % config.validate_every == 0:  # who is at the end is scored there
                    self._validate({name: member for name, member in takers.items() if not member.finished})
                for name in [name for name in takers if name in self.members]:
                    # At the end, too: who is told to stop during the last validation trains nothing anew.
                    if number % config.checkpoint_every == 0 or stopping or takers[name].finished:
                        with self._ending_alone(name):
                            takers[name].save()
                if stopping and self.members:
                    raise Interrupted(f"stopped and saved at iteration {number}; {GOES_ON} from there")

    def _advance(self, number: int, active: Mapping[str, Trainer], images_per_second: float) -> Advance:
        longest = max((member.iterations or 0 for member in active.values()), default=0) or None
        fraction = min(member.fraction for member in active.values())
        return Advance(number, longest, fraction, images_per_second)

    def _batches(self, iteration: int) -> Iterator[tuple[Tensor, Tensor]]:
        return training_batches(
            self.train_set, self.config.augmentation, seed=self.seed, share=self.share, first_iteration=iteration,
            workers=self.config.workers, device=self.processes.device,
            beside=self.unlabelled_set if self.share.unlabelled else None,
        )  # fmt: skip

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]], takers: list[Trainer]) -> None:
        """One step of each taker, one after another: what a backward pass needs is held for one at a time."""
        config, device = self.config, self.processes.device
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        taught = [member for member in takers if member.learner.needs_teacher]
        with timed(device, *(member.stopwatch for member in takers)):
            asked = time.monotonic()
            pieces = [next(batches) for _ in range(config.accumulate)]
            waited = time.monotonic() - asked
            self.seconds["data"] += waited
            self.seconds["training"] -= waited
            mass = self._mass([labels for _, labels in pieces], takers[0].learner.supervision)
        for number, (images, labels) in enumerate(pieces):
            last = number == len(pieces) - 1
            with timed(device, *(member.stopwatch for member in takers)):
                images, target = images.contiguous(memory_format=layout), labels.long()
                labelled = slice(self.share.micro_batch)
            teacher_outputs = None
            if taught:
                with timed(device, *(member.stopwatch for member in taught)), autocast(config, device):
                    teacher_outputs = self.teacher(images)  # type: ignore[misc]
            for member in takers:
                with timed(device, member.stopwatch):
                    outputs = teacher_outputs if member.learner.needs_teacher else None
                    part = slice(None) if member.takes_unlabelled else labelled
                    member.learn(images[part], target[part], mass, outputs, last=last)
                    if last:
                        member.step()
        for member in takers:
            member.look_at_the_clock()

    def _mass(self, targets: list[Tensor], supervision: Supervision) -> Tensor | None:
        """The labels' mass in an average piece of the batch, over all processes; None if there is one piece."""
        count = len(targets) * self.processes.world_size
        if count == 1:
            return None
        mass = torch.stack([supervision.mass(target) for target in targets]).sum()
        return above_zero(self.processes.sum(mass)) / count

    def _agree(self, stop: threading.Event, iteration: int, takers: Mapping[str, Trainer]) -> bool:
        """Whether all processes stop now, because any of them was told to; makes all see the slowest clock."""
        if self.processes.world_size == 1:
            return stop.is_set()
        if iteration % AGREE_EVERY:
            return False
        clocks = [member.progress.seconds for member in takers.values()]
        seen = torch.tensor([*clocks, float(stop.is_set())], device=self.processes.device)
        *clocks, wish = self.processes.maximum(seen).tolist()
        for member, seconds in zip(takers.values(), clocks, strict=True):
            member.progress.seconds = seconds
        return bool(wish)

    @contextlib.contextmanager
    def _ending_alone(self, name: str) -> Iterator[None]:
        """A member that diverges inside, or is ended by its judge, ends; the others go on."""
        try:
            yield
        except Ended as ended:
            logger.log(logging.WARNING if isinstance(ended, Diverged) else logging.INFO, "%s: %s", name, ended)
            self.outcomes[name] = ended
            member = self.members.pop(name)
            if self.processes.is_main:
                for tracker in member.training.trackers.values():
                    tracker.tags({ended.became: f"at iteration {ended.iteration}: {ended.reason}"})

    # -- validation ---------------------------------------------------------------------------------------------------

    def _validate(self, members: Mapping[str, Trainer]) -> dict[str, dict[str, Evaluation]]:
        """The scores of the students of those members that are sound, by the members' names and their own."""
        for name in [name for name in members if name in self.members]:
            with self._ending_alone(name):
                members[name].require_finite_weights()
        sound = [name for name in members if name in self.members]
        networks = {
            (name, student): network for name in sound for student, network in members[name].learner.students.items()
        }
        evaluations: dict[str, dict[str, Evaluation]] = {name: {} for name in sound}
        for (name, student), evaluation in self._evaluate(networks).items():
            evaluations[name][student] = evaluation
        for name in sound:
            with self._ending_alone(name):
                members[name].validated(evaluations[name])
        return evaluations

    def _evaluate(self, networks: Mapping[tuple[str, str], Segmenter]) -> dict[tuple[str, str], Evaluation]:
        if self.val_set is None or not networks:
            return {}
        started = time.monotonic()
        num_classes = next(iter(networks.values())).info.num_classes
        evaluations = evaluate_together(
            networks, self.val_set, Views(self.inference), num_classes=num_classes, processes=self.processes
        )
        self.seconds["evaluation"] += time.monotonic() - started
        return evaluations
