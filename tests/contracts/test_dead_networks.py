"""A dead network is not taken for a live one, and a checkpoint of another run neither resumed nor lost."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from segdistill.engine import checkpoint
from segdistill.engine.distributed import Processes
from segdistill.engine.evaluate import evaluate
from segdistill.engine.inference import Views
from segdistill.engine.trainer import MOST_SKIPPED
from segdistill.errors import UserError
from segdistill.identity import Identity, effective

ALONE = Processes(0, 1, torch.device("cpu"))


def poisoned(trainer: Any, first: int, last: int = 10**9) -> Any:
    """The trainer, with a loss that is NaN from one iteration to another."""
    total = trainer.learner.total

    def nan(terms: Any, progress: float = 1.0) -> Any:
        dead = first <= trainer.progress.iteration <= last
        return total(terms, progress) * (float("nan") if dead else 1.0)

    trainer.learner.total = nan
    return trainer


def test_fp16_with_a_loss_that_stays_nan_is_no_success(tmp_path: Path) -> None:
    """Its steps are all skipped, so that the weights stay finite and score something."""
    trainer = poisoned(tiny.make_trainer(tmp_path, ALONE, precision="fp16", iterations=6), first=0)
    with pytest.raises(UserError, match=r"fp16 left out the last 6 steps, .* by iteration 6: the training diverged"):
        trainer.run()


def test_fp16_may_skip_some_steps_and_not_a_long_run_of_them(tmp_path: Path) -> None:
    few = tiny.make_trainer(tmp_path / "a", ALONE, precision="fp16", iterations=40, select="best")
    assert poisoned(few, first=5, last=5 + MOST_SKIPPED - 3).run().iterations == 40
    assert few.progress.skipped == 0
    many = tiny.make_trainer(tmp_path / "b", ALONE, precision="fp16", iterations=400)
    with pytest.raises(UserError, match=f"last {MOST_SKIPPED + 3} steps, .* by iteration 28"):
        poisoned(many, first=5).run()


def test_fp32_with_weights_that_became_nan_keeps_the_older_checkpoint(tmp_path: Path) -> None:
    trainer = tiny.make_trainer(tmp_path, ALONE, log_every=100, validate_every=100, checkpoint_every=2)
    with pytest.raises(UserError, match=r"cnn.* is not finite by iteration 6: the training diverged"):
        poisoned(trainer, first=4).run()
    state = checkpoint.load(tmp_path / "resume.safetensors")
    assert state is not None and state["progress"]["iteration"] == 4


@pytest.mark.parametrize("select", ["last", "best"])
def test_a_buffer_that_is_not_finite_is_not_scored(tmp_path: Path, select: str) -> None:
    """Running statistics do not show in the losses of training, nor do a method's averages of its own."""
    trainer = tiny.make_trainer(tmp_path, ALONE, select=select)
    trainer.learner.students["cnn"].register_buffer("running_var", torch.tensor([1.0, float("inf")]))
    with pytest.raises(UserError, match=r"cnn\.running_var is not finite"):
        trainer.run()
    assert not list(tmp_path.iterdir())


def test_scores_that_are_not_finite_are_no_scores() -> None:
    network = tiny.TinySegmenter()
    torch.nn.init.constant_(network.decoder[0].bias, 10.0)
    torch.nn.init.constant_(network.classifier.weight, 3e38)  # finite, its products are not
    with pytest.raises(UserError, match="the network's scores are not finite"):
        evaluate(network, tiny.Blobs(4), Views(tiny.INFERENCE), num_classes=3, processes=ALONE)  # type: ignore[arg-type]


def test_a_split_without_any_label_has_no_score() -> None:
    blobs = tiny.Blobs(4)
    blobs.labels[:] = 255
    with pytest.raises(UserError, match="the split of 4 images has no pixel with a label"):
        evaluate(tiny.TinySegmenter(), blobs, Views(tiny.INFERENCE), num_classes=3, processes=ALONE)  # type: ignore[arg-type]


def stopped(work: Path, fingerprint: str) -> None:
    trainer = tiny.make_trainer(work, ALONE, fingerprint=fingerprint)
    trainer.progress.iteration = 2
    trainer.save()


@pytest.mark.parametrize("harm", ["another run", "a flipped byte", "an empty file"])
def test_an_unusable_checkpoint_is_put_aside_with_a_warning_and_never_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    monkeypatch.setattr(logging.getLogger("segdistill"), "propagate", True)
    path = tmp_path / "resume.safetensors"
    for number in (1, 2):  # the second does not take the place of the first
        stopped(tmp_path, "another" if harm == "another run" else "tiny")
        if harm != "another run":
            content = bytearray(path.read_bytes())
            content[-1] ^= 16
            path.write_bytes(bytes(content) if harm == "a flipped byte" else b"")
        before = path.read_bytes()
        caplog.clear()
        trainer = tiny.make_trainer(tmp_path, ALONE, checkpoint_every=100)
        trainer.run()
        kept = tmp_path / f"unusable-{number}-resume.safetensors"
        assert kept.read_bytes() == before
        (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert str(path) in told and str(kept) in told and "starts anew" in told


@pytest.mark.parametrize("change", ["a weight more", "an optimiser less", "a counter more"])
def test_a_checkpoint_of_another_layout_is_put_aside_and_leaves_no_trace(tmp_path: Path, change: str) -> None:
    anew = tiny.make_trainer(tmp_path / "anew", ALONE)
    anew.run()
    trainer = tiny.make_trainer(tmp_path, ALONE, iterations=2)
    trainer.run()
    state = checkpoint.load(tmp_path / "resume.safetensors")
    assert state is not None
    if change == "a weight more":
        state["learner"]["_methods.gone.weight"] = torch.zeros(1)
    elif change == "an optimiser less":
        state["optimizers"] = {}
    else:
        state["progress"]["gone"] = 1
    checkpoint.save(tmp_path / "resume.safetensors", state)
    trainer = tiny.make_trainer(tmp_path, ALONE)
    trainer.run()
    assert (tmp_path / "unusable-1-resume.safetensors").exists()
    for name, value in tiny.weights(anew).items():
        assert torch.equal(tiny.weights(trainer)[name], value), name


def identity(**changes: Any) -> str:
    train = changes.pop("train", tiny.train_config())
    facts = {"data": "d", "teacher": "t", "seed": 0, "settings": {"train": effective(train)}, "code": "c"}
    return Identity(**(facts | changes)).key


def test_identity_knows_data_teacher_seed_and_settings_and_nothing_that_changes_no_update() -> None:
    mine, train = identity(), tiny.train_config()
    others = [identity(data="e"), identity(teacher="u"), identity(teacher=None), identity(seed=1), identity(code="d")]
    others += [identity(train=replace(train, **change)) for change in ({"iterations": 9}, {"precision": "bf16"})]
    assert len({mine, *others}) == len(others) + 1
    same = {"workers": 7, "cache_gib": 3.0, "log_every": 1, "checkpoint_every": 1, "validate_every": 1}
    same |= {"gradient_share_every": 5}
    assert identity(train=replace(train, **same)) == mine
    best = tiny.train_config(select="best")
    assert identity(train=best) != identity(train=replace(best, validate_every=1)), "it decides which weights are kept"


def test_identity_knows_the_weights_that_a_training_begins_with_and_not_where_they_lie(tmp_path: Path) -> None:
    def key(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return Identity("d", None, 0, {"model": {"encoder_weights": str(tmp_path / name)}}, "c").key

    first = key("a.safetensors", b"weights")
    assert key("a.safetensors", b"others") != first
    assert key("b.safetensors", b"weights") == first
