"""Every method between real networks of every kind, on an image whose size no stride divides."""

from itertools import product

import pytest
import torch
from torch import Tensor

from segdistill.config import parse
from segdistill.engine.learner import Learner
from segdistill.errors import UserError
from segdistill.methods import METHODS, build_offline, build_online, load, parse_method
from segdistill.models.config import ModelConfig
from segdistill.models.segmenter import Segmenter, build_segmenter
from segdistill.models.teacher import Teacher

CLASSES, SIZE = 5, (70, 90)
MODELS = {
    "cnn": {"architecture": "DeepLabV3Plus", "encoder": "mobilenetv3_small_050", "output_stride": 16},
    "vit": {"architecture": "Segformer", "encoder": "mit_b0", "output_stride": 32},
}
OFFLINE = [name for name in METHODS if load(name).kind == "offline"]
ONLINE = [name for name in METHODS if load(name).kind == "online"]
# What is large by default, for memories of whole data sets and for features that are wide.
SMALL = {
    "apd": {"hidden_channels": 16, "out_channels": 16},
    "cirkd": {"pixel_queue": 50, "region_queue": 10, "pixel_contrast": 40, "region_contrast": 20},
}


@pytest.fixture(scope="module")
def networks() -> dict[str, list[Segmenter]]:
    """Three of each kind."""
    torch.manual_seed(0)
    configs = {
        kind: parse(ModelConfig, {"encoder_weights": "none", **model}, "model") for kind, model in MODELS.items()
    }
    return {kind: [build_segmenter(config, CLASSES) for _ in range(3)] for kind, config in configs.items()}


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(CLASSES, (2, *SIZE), generator=generator)
    target[:, :20] = 255
    return torch.rand(2, 3, *SIZE, generator=generator), target


def learn(learner: Learner, batch: tuple[Tensor, Tensor], teacher: Teacher | None = None) -> None:
    """One backward pass of the methods' terms alone; every student must have learned something."""
    for student in learner.students.values():
        student.zero_grad()
    terms = learner(*batch, None, teacher(batch[0]) if teacher else None)
    methods = {name: {term: loss for term, loss in own.items() if "." in term} for name, own in terms.items()}
    assert all(own and all(bool(loss.isfinite()) for loss in own.values()) for own in methods.values())
    learner.total(methods).backward()
    for student in learner.students.values():
        gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients)
        assert any(bool((gradient != 0).any()) for gradient in gradients)


@pytest.mark.parametrize(("student", "teacher"), product(MODELS, MODELS))
@pytest.mark.parametrize("name", OFFLINE)
def test_a_teacher_of_any_kind_teaches_a_student_of_any_kind(
    name: str, student: str, teacher: str, networks: dict[str, list[Segmenter]], batch: tuple[Tensor, Tensor]
) -> None:
    own, frozen = networks[student][0], Teacher(networks[teacher][2])
    config = parse_method({"name": name, **SMALL.get(name, {})}, "methods.0")[1]
    learn(Learner({"student": own}, build_offline([config], own.info, frozen.info)), batch, frozen)


@pytest.mark.parametrize("kinds", [("cnn", "vit"), ("vit", "cnn"), ("cnn", "cnn"), ("vit", "vit")])
@pytest.mark.parametrize("name", ONLINE)
def test_students_of_any_kind_teach_each_other(
    name: str, kinds: tuple[str, str], networks: dict[str, list[Segmenter]], batch: tuple[Tensor, Tensor]
) -> None:
    peers = {"first": networks[kinds[0]][0], "second": networks[kinds[1]][1]}
    alike = {"hfd": "direct"} if name == "hfd_bsd" and kinds[0] == kinds[1] else {}
    config = parse_method({"name": name, **alike}, "methods.0")[1]
    learn(Learner(peers, build_online([config], {key: peer.info for key, peer in peers.items()})), batch)


@pytest.mark.parametrize("name", ["dml", "kdcl"])
def test_three_students_teach_each_other(
    name: str, networks: dict[str, list[Segmenter]], batch: tuple[Tensor, Tensor]
) -> None:
    peers = {"first": networks["cnn"][0], "second": networks["cnn"][1], "third": networks["vit"][0]}
    config = parse_method({"name": name}, "methods.0")[1]
    learn(Learner(peers, build_online([config], {key: peer.info for key, peer in peers.items()})), batch)


@pytest.mark.parametrize("kind", MODELS)
def test_two_students_of_a_kind_have_no_heterogeneous_features(kind: str, networks: dict[str, list[Segmenter]]) -> None:
    infos = {"first": networks[kind][0].info, "second": networks[kind][1].info}
    with pytest.raises(UserError, match=r"the students are first .* and second .*; choose hfd: direct"):
        build_online([parse_method({"name": "hfd_bsd"}, "methods.0")[1]], infos)


def test_methods_combine_and_their_terms_add_up(
    networks: dict[str, list[Segmenter]], batch: tuple[Tensor, Tensor]
) -> None:
    own, frozen = networks["cnn"][0], Teacher(networks["vit"][2])
    listed = [{"name": "kd"}, {"name": "cwd", "weight": 0.5}, {"name": "fitnet"}, {"name": "kd", "temperature": 4.0}]
    configs = [parse_method(method, "methods")[1] for method in listed]
    learner = Learner({"student": own}, build_offline(configs, own.info, frozen.info))
    terms = learner(*batch, None, frozen(batch[0]))["student"]
    by_hand = {"ce": 1.0, "kd.kl": 1.0, "cwd.logits": 1.5, "fitnet.regression": 10.0, "kd-2.kl": 1.0}
    assert terms.keys() == by_hand.keys()
    expected = sum(weight * terms[term] for term, weight in by_hand.items())
    torch.testing.assert_close(learner.total({"student": terms}), expected)
