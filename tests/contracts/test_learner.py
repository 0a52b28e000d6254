"""What the learner adds up, and what the trainer says about it."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from segdistill.config import parse
from segdistill.engine.distributed import Processes
from segdistill.engine.learner import Learner
from segdistill.engine.settings import LossConfig
from segdistill.engine.supervision import Supervision
from segdistill.engine.tracker import Tracker
from segdistill.errors import UserError
from segdistill.identity import effective
from segdistill.losses.align import resize_logits
from segdistill.losses.masks import IGNORE_INDEX, UNLABELLED
from segdistill.methods import METHODS
from segdistill.models.outputs import Outputs

ALONE = Processes(0, 1, torch.device("cpu"))
IMAGES, TARGET = torch.rand(2, 3, *tiny.SIZE), torch.randint(tiny.CLASSES, (2, *tiny.SIZE))
BATCH = IMAGES, TARGET, None, tiny.make_teacher()(IMAGES)


class Recorder(Tracker):
    def __init__(self) -> None:
        self.said: dict[str, dict[int, float]] = {}

    def metrics(self, values: Any, step: int | None = None) -> None:
        for name, value in values.items():
            self.said.setdefault(name, {})[-1 if step is None else step] = value


def test_a_ramp_raises_the_methods_weights_linearly_and_leaves_the_cross_entropy(tmp_path: Path) -> None:
    learner = tiny.make_trainer(tmp_path, ALONE, method="kd", settings={"weight": 2.0, "ramp": 0.5}).learner
    for progress, weight in ((0.0, 0.0), (0.125, 0.5), (0.25, 1.0), (0.5, 2.0), (1.0, 2.0)):
        found = learner.weights(progress)
        assert found["kd.kl"] == pytest.approx(weight) and found["ce"] == 1.0
    terms = learner(*BATCH)
    expected = terms["cnn"]["ce"] + 0.5 * terms["cnn"]["kd.kl"]
    torch.testing.assert_close(learner.total(terms, 0.125), expected)


@pytest.mark.parametrize(("method", "term"), [("apd", "teacher_head"), ("skd", "critic")])
def test_a_ramp_leaves_what_trains_a_methods_helpers_alone(tmp_path: Path, method: str, term: str) -> None:
    learner = tiny.make_trainer(tmp_path, ALONE, method=method, settings={"ramp": 0.5}).learner
    for progress, risen in ((0.0, 0.0), (0.25, 0.5), (1.0, 1.0)):
        for own, factor in learner.methods[method].weights.items():
            expected = factor if own == term else risen * factor
            assert learner.weights(progress)[f"{method}.{own}"] == pytest.approx(expected)


def test_helpers_have_a_gradient_of_zero_before_a_ramp_begins_to_rise(tmp_path: Path) -> None:
    settings = {"ramp": 0.5, "teacher_head_weight": 0.0}
    learner = tiny.make_trainer(tmp_path, ALONE, method="apd", settings=settings).learner
    learner.total(learner(*BATCH), 0.0).backward()
    for parameter in learner.methods["apd"].student_head.parameters():
        assert parameter.grad is not None and bool((parameter.grad == 0).all())


@pytest.mark.parametrize("method", ["kd", "apd", "dml"])
def test_terms_are_logged_raw_and_weighted_and_the_weighted_ones_sum_to_the_total(tmp_path: Path, method: str) -> None:
    recorder = Recorder()
    tiny.make_trainer(tmp_path, ALONE, method=method, trackers=recorder, settings={"weight": 0.5}).run()
    said = recorder.said
    raw = {name.removeprefix("train/loss/") for name in said if name.startswith("train/loss/")} - {"total"}
    weighted = {name.removeprefix("train/weighted/") for name in said if name.startswith("train/weighted/")}
    assert raw == weighted and len(raw) > 1
    if method != "dml":  # two peers write to one recorder here
        assert said["train/loss/total"][8] == pytest.approx(sum(said[f"train/weighted/{term}"][8] for term in raw))
    if method == "kd":
        assert said["train/weighted/kd.kl"][8] == pytest.approx(0.5 * said["train/loss/kd.kl"][8])


@pytest.mark.parametrize("method", ["kd", "dml"])
def test_gradient_shares_are_those_of_separate_backward_passes_and_sum_to_one(tmp_path: Path, method: str) -> None:
    learner = tiny.make_trainer(tmp_path, ALONE, method=method, settings={"weight": 3.0}).learner
    with learner.last_features() as features:
        terms = learner(*BATCH)
    shares = learner.gradient_shares(terms, features)
    assert features.keys() == shares.keys() == learner.students.keys()
    for student, feature in features.items():
        norms = {
            term: torch.autograd.grad(learner.factors[term] * loss, feature, retain_graph=True)[0].norm()
            for term, loss in terms[student].items()
        }
        total = sum(norms.values())
        for term, norm in norms.items():
            torch.testing.assert_close(shares[student][term], norm / total)


def test_features_are_given_to_who_asks_and_kept_for_nobody_else(tmp_path: Path) -> None:
    learner = tiny.make_trainer(tmp_path, ALONE, method="kd").learner
    with learner.last_features() as features:
        learner(*BATCH)
    before = features["cnn"]
    learner(*BATCH)
    assert features["cnn"] is before


def test_a_methods_memory_is_named_among_its_banks_and_no_weight_is(tmp_path: Path) -> None:
    learner = tiny.make_trainer(tmp_path, ALONE, method="cirkd").learner
    banks = set(learner.banks())
    assert any(name.endswith("rows") for name in banks) and banks <= set(learner.state_dict())
    assert not banks & {name for name, _ in learner.named_parameters()}


def test_gradient_shares_are_logged_every_so_often_and_change_no_weight(tmp_path: Path) -> None:
    recorder = Recorder()
    measured = tiny.make_trainer(tmp_path / "a", ALONE, method="apd", trackers=recorder, gradient_share_every=3)
    measured.run()
    plain = tiny.make_trainer(tmp_path / "b", ALONE, method="apd")
    plain.run()
    assert sorted(recorder.said["train/gradient_share/apd.local"]) == [3, 6]
    assert "train/gradient_share/apd.teacher_head" not in recorder.said, "it does not pass the student's feature"
    for name, value in tiny.weights(plain).items():
        assert torch.equal(value, tiny.weights(measured)[name]), name


def test_gradient_shares_of_a_compiled_step_are_refused() -> None:
    with pytest.raises(UserError, match=r"train.*gradient_share_every cannot look inside a compiled step"):
        tiny.train_config(compile=True, gradient_share_every=5)


@pytest.mark.parametrize("method", ["none", *METHODS])
def test_a_compiled_step_is_one_graph_compiled_once_and_has_the_values_of_the_plain_one(
    tmp_path: Path, method: str
) -> None:
    """With the graphs run as they are: what is compiled here is what torch.compile would make kernels of.

    The teacher is a graph of its own, which a cohort shares.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (tiny.make_trainer(tmp_path, ALONE, method=method).learner for _ in range(2))
    teacher, graphs = tiny.make_teacher(), []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled.compile(backend=keep)
    teacher.compile(backend=keep)
    for _ in range(2):
        outcomes = []
        for learner in (plain, compiled):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16):
                teacher_outputs = teacher(IMAGES) if learner.needs_teacher else None
                terms = learner(IMAGES, TARGET, None, teacher_outputs)
            learner.total(terms).backward()
            outcomes.append(terms)
        torch.testing.assert_close(outcomes[1], outcomes[0], rtol=1e-5, atol=1e-6)
    assert len(graphs) == 1 + plain.needs_teacher and not counters["graph_break"] and not counters["recompile_limit"]


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_student_is_a_plain_one_with_no_trace_of_its_method(tmp_path: Path, method: str) -> None:
    trainer = tiny.make_trainer(tmp_path, ALONE, method=method, iterations=2, validate_every=5)
    before = tiny.weights(trainer)
    trainer.run()
    after = tiny.weights(trainer)
    for name, student in trainer.learner.students.items():
        plain = tiny.TinySegmenter(width=student.info.last_channels)
        plain.load_state_dict(student.state_dict())
        torch.testing.assert_close(plain(BATCH[0]).logits, student(BATCH[0]).logits, rtol=0, atol=0)
        mine = [key for key in after if key.startswith(f"_students.{name}.")]
        assert mine and not any(torch.equal(after[key], before[key]) for key in mine), "everything was trained"


def test_a_training_that_diverges_stops_and_names_the_terms(tmp_path: Path) -> None:
    late = {"validate_every": 100, "checkpoint_every": 100}  # which look at the weights, and find them broken sooner
    trainer = tiny.make_trainer(tmp_path, ALONE, method="fitnet", settings={"weight": 1e9}, iterations=40, **late)
    with pytest.raises(UserError, match=r"^cnn: ce, fitnet\.regression is not finite by iteration 4: the training div"):
        trainer.run()


def test_every_loss_has_a_term_of_its_own_for_both_heads_of_a_network_under_any_method(tmp_path: Path) -> None:
    class TwoHeads(tiny.TinySegmenter):
        def forward(self, images: torch.Tensor) -> Outputs:
            return super().forward(images)._replace(aux_logits=self.classifier(self.encoder(images)))

    config: LossConfig = parse(LossConfig, {"cross_entropy": 0.5, "dice": 2.0, "lovasz": 3.0}, "loss")
    kd = tiny.make_training("tiny", tmp_path, method="kd").learner.methods
    learner = Learner({"cnn": TwoHeads()}, kd, supervised=10.0, auxiliary=0.1, supervision=Supervision(config))
    terms, weights = learner(*BATCH), learner.weights()
    expected = {
        "ce": 5.0,
        "dice": 20.0,
        "lovasz": 30.0,
        "aux_ce": 0.5,
        "aux_dice": 2.0,
        "aux_lovasz": 3.0,
        "kd.kl": 1.0,
    }
    assert weights == pytest.approx(expected) and terms["cnn"].keys() == expected.keys()
    total = sum(expected[term] * loss for term, loss in terms["cnn"].items())
    torch.testing.assert_close(learner.total(terms), total)


def test_another_loss_against_the_labels_is_another_training() -> None:
    plain, other = (effective(tiny.train_config(loss=loss)) for loss in ({}, {"dice": 1.0}))
    assert plain == effective(tiny.train_config()) != other


@pytest.mark.parametrize("method", ["dkd", "kdcl"])
def test_pseudo_labels_let_a_term_that_needs_labels_teach_where_who_judges_is_sure(tmp_path: Path, method: str) -> None:
    images, target = IMAGES.clone(), TARGET.clone()
    target[1] = UNLABELLED
    target[1, :4] = IGNORE_INDEX

    def of(threshold: float | None, labels: torch.Tensor = target) -> dict[str, Any]:
        learner = tiny.make_training("tiny", tmp_path, method=method, pseudo_labels=threshold).learner.eval()
        return learner(images, labels, None, tiny.make_teacher()(images) if method == "dkd" else None)

    learner = tiny.make_training("tiny", tmp_path, method=method).learner.eval()
    networks = [tiny.make_teacher()] if method == "dkd" else learner.students.values()
    mean = torch.stack([resize_logits(each(images).logits.detach(), tiny.SIZE).softmax(1) for each in networks]).mean(0)
    confidence, classes = mean.max(1)
    threshold = float(confidence[1].median())
    by_hand = torch.where((target == UNLABELLED) & (confidence >= threshold), classes, target)
    assert (
        (by_hand == UNLABELLED).any() and (by_hand[1] < tiny.CLASSES).any() and (by_hand[1, :4] == IGNORE_INDEX).all()
    )
    expected, found, without = of(None, by_hand), of(threshold), of(None)
    for student, terms in found.items():
        torch.testing.assert_close(terms["ce"], without[student]["ce"], msg="nobody drew these labels")
        for term in (term for term in terms if term.startswith(method)):
            torch.testing.assert_close(terms[term], expected[student][term])
            assert not torch.equal(terms[term], without[student][term])
    torch.testing.assert_close(of(1.0), without, msg="nobody is as sure as that")
