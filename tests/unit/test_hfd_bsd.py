"""HFD and BSD: the method against the slow loops, and the invariants of its specification."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import _reference as plain
import _reference_hfd_bsd as reference
import pytest
import torch
from _flat import flat
from torch import Tensor, nn

from segdistill.config import parse, to_dict
from segdistill.errors import UserError
from segdistill.losses.supervised import cross_entropy
from segdistill.methods import build_online, parse_method
from segdistill.methods.hfd_bsd.selection import feature_distances, learners, pixel_errors, region_errors, region_means
from segdistill.models.config import ModelConfig
from segdistill.models.export import load_model, save_model
from segdistill.models.outputs import ModelInfo, Outputs
from segdistill.models.segmenter import Segmenter, build_segmenter

CLASSES = 4
CNN = ModelInfo(CLASSES, (3, 4, 4, 4), (4, 8, 16, 32), 5, 4, 4, "cnn")
VIT = ModelInfo(CLASSES, (4, 4, 4, 4), (4, 8, 16, 32), 7, 4, 4, "vit")
TWIN = replace(VIT, kind="cnn")  # a CNN with the widths of the transformer
SIZES = {"cnn": (6, 8), "vit": (3, 4)}
SIZE = (12, 16)
BSD = {"hfd_weight": 0.0, "region_grid": 3}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Attention(nn.Module):
    """Single-head attention over all locations, with dropout in training."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(0.7 * torch.randn(3, channels, channels))
        self.dropout = nn.Dropout(dropout)

    def forward(self, maps: Tensor) -> Tensor:
        tokens = maps.flatten(2).transpose(1, 2)
        query, key, value = (tokens @ weight.T for weight in self.weights)
        shares = self.dropout((query @ key.transpose(1, 2) / maps.shape[1] ** 0.5).softmax(-1))
        return (shares @ value).transpose(1, 2).unflatten(2, maps.shape[-2:])


class Student(nn.Module):
    """What the method borrows from a transformer."""

    def __init__(self, channels: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = Attention(channels, dropout)
        self.mlp = nn.Conv2d(channels, channels, kernel_size=1, bias=False)


def build(cnn: ModelInfo = CNN, vit: ModelInfo = VIT, student: nn.Module | None = None, **changes: Any) -> Any:
    config = parse_method({"name": "hfd_bsd", **changes}, "methods.0")[1]
    method: Any = build_online([config], {"cnn": cnn, "vit": vit})["hfd_bsd"].double()
    method.attach({"cnn": nn.Identity(), "vit": (Student() if student is None else student).double()})
    return method


def draw(
    info: ModelInfo, size: tuple[int, int], *, seed: int, batch: int = 2, first: tuple[int, int] | None = None
) -> Outputs:
    generator = torch.Generator().manual_seed(seed)

    def leaf(channels: int, size: tuple[int, int]) -> Tensor:
        return torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64).requires_grad_()

    return Outputs(
        leaf(CLASSES, size), (leaf(info.feature_channels[0], first or size),), leaf(info.last_channels, size)
    )


def scene(**sizes: tuple[int, int]) -> tuple[dict[str, Outputs], Tensor]:
    """A CNN finer than the transformer, whose own first stage is finer than its logits, and labels finer than both."""
    given = SIZES | sizes
    peers = {"cnn": draw(CNN, given["cnn"], seed=1), "vit": draw(VIT, given["vit"], seed=2, first=(4, 5))}
    return peers, labels()


def twins() -> tuple[dict[str, Outputs], Tensor]:
    """Two students of one geometry, at label size."""
    return {name: draw(VIT, SIZE, seed=seed) for seed, name in enumerate(("cnn", "vit"))}, labels()


def labels() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(CLASSES, (2, *SIZE), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.3] = 255
    target[0, :4, :6] = 255  # one region of the 3 x 3 grid, all of it
    return target


def mapped(outputs: Outputs, change: Callable[[Tensor], Tensor]) -> Outputs:
    return Outputs(change(outputs.logits), tuple(map(change, outputs.features)), change(outputs.last_feature))


def leaves(outputs: Outputs) -> list[Tensor]:
    return [outputs.logits, *outputs.features, outputs.last_feature]


def gradients(loss: Tensor, *wanted: Tensor) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)


def assert_same(found: Tensor, slow: Tensor, *wanted: Tensor) -> None:
    """Equal values, and equal gradients where the slow one has any."""
    torch.testing.assert_close(found, slow, rtol=1e-9, atol=1e-12)
    for mine, theirs in zip(gradients(found, *wanted), gradients(slow, *wanted), strict=True):
        assert mine is not None and theirs is not None and bool((theirs != 0).any())
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-12)


# -- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {}),
        ({"temperature": 2.5}, {"temperature": 2.5}),
        ({"normalize": "all"}, {"per_direction": False}),
        ({"selection": False}, {"selection": False}),
        ({"selection": False, "mask_ignore": False}, {"selection": False, "mask_ignore": False}),
        ({"mask_region_features": True}, {"mask_features": True}),
        ({"region_distance": "kl"}, {"distance": "kl"}),
        ({"region_distance": "l2"}, {"distance": "l2"}),
    ],
    ids=lambda value: ",".join(f"{key}={value[key]}" for key in value) or "defaults",
)
@pytest.mark.parametrize("upsample", [True, False])
def test_region_and_pixel_terms_equal_the_slow_loops(
    changes: dict[str, Any], settings: dict[str, Any], upsample: bool
) -> None:
    peers, target = scene()
    method = build(**BSD, **changes, upsample=upsample)
    found = flat(method(peers, target))
    weights = {name: method.helpers[name]["region"].weight for name in peers}
    slow = reference.bsd(
        {name: outputs.logits for name, outputs in peers.items()},
        {name: outputs.last_feature for name, outputs in peers.items()},
        target,
        size=SIZE if upsample else (6, 8),
        grid=(3, 3),
        projections={name: weight[:, :, 0, 0] for name, weight in weights.items()},
        **settings,
    )
    assert set(found) == set(slow) == {"cnn/region", "vit/region", "cnn/pixel", "vit/pixel"}
    for name, outputs in peers.items():
        assert_same(found[f"{name}/region"], slow[f"{name}/region"], outputs.last_feature, weights[name])
        assert_same(found[f"{name}/pixel"], slow[f"{name}/pixel"], outputs.logits)


@pytest.mark.parametrize("distance", ["cosine", "kl"])
@pytest.mark.parametrize("hfd", ["cross_op", "direct"])
def test_the_low_level_term_equals_the_slow_loop(hfd: str, distance: str) -> None:
    peers, target = scene()
    student = Student()
    method = build(student=student, hfd=hfd, distance=distance, region_weight=0, pixel_weight=0)
    found = flat(method(peers, target))
    cnn, vit = (peers[name].features[0] for name in ("cnn", "vit"))
    phi, psi = (method.helpers[name]["hfd"].weight for name in ("cnn", "vit"))
    fitted_phi = torch.einsum("oi,bihw->bohw", phi[:, :, 0, 0], cnn)
    if hfd == "direct":
        finer = (6, 8)
        to_cnn = reference.hfd(fitted_phi, plain.resized(vit, finer, False), distance)
        mirrored = torch.einsum("oi,bihw->bohw", psi[:, :, 0, 0], vit)
        to_vit = reference.hfd(plain.resized(mirrored, finer, False), cnn, distance)
    else:
        weights = student.attention.weights.detach()
        attended = [reference.attention(maps, weights) for maps in (plain.resized(fitted_phi, (4, 5), False), vit)]
        to_cnn = reference.hfd(*attended, distance)
        mixed = torch.einsum("oi,ik,bkhw->bohw", psi[:, :, 0, 0], student.mlp.weight[:, :, 0, 0], vit)
        to_vit = reference.hfd(mixed, plain.resized(cnn, (4, 5), False), distance)
        assert_same(found["vit/hfd"], to_vit, student.mlp.weight)
    assert set(found) == {"cnn/hfd", "vit/hfd"}
    assert_same(found["cnn/hfd"], to_cnn, cnn, phi)
    assert_same(found["vit/hfd"], to_vit, vit, psi)


def test_a_case_small_enough_for_a_pencil() -> None:
    """Two pixels of two classes, all labelled 0, in one region.

    The first student gives class 0 the probabilities 1/2 and 3/4, the second 1/4 and 3/4. At pixel 1 the first has the
    smaller error, so the second learns KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3; at pixel 2
    the errors are equal and nobody learns. Over the region the first's mean error is the smaller, so the second learns:
    the mean (1, 1) of its features (1, 0) and (1, 2) is at 45 degrees to (0, 2), that of the first's (0, 3) and (0, 1).
    """
    first, second = torch.tensor([[0.5, 0.75], [0.5, 0.25]]).log(), torch.tensor([[0.25, 0.75], [0.75, 0.25]]).log()
    ours, theirs = torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    peers = {
        name: Outputs(logits.view(1, 2, 1, 2), (), feature.view(1, 2, 1, 2))
        for name, logits, feature in (("a", first, ours), ("b", second, theirs))
    }
    pair = ModelInfo(2, (2,) * 4, (4, 8, 16, 32), 2, 4, 4, "cnn")
    method, config = parse_method({"name": "hfd_bsd", "hfd_weight": 0}, "methods.0")
    found = flat(method(config, {"a": pair, "b": pair})(peers, torch.zeros(1, 1, 2, dtype=torch.int64)))
    expected = {"a/region": 0.0, "b/region": 1 - 0.5**0.5, "a/pixel": 0.0, "b/pixel": 0.5 * math.log(4 / 3)}
    assert {key: loss.item() for key, loss in found.items()} == pytest.approx(expected, abs=1e-6)


# -- the invariants of the specification ------------------------------------------------------------------------------


def test_students_that_agree_have_nothing_to_learn() -> None:  # 1
    outputs = draw(VIT, SIZE, seed=0)
    student = Student()
    nn.init.dirac_(student.mlp.weight)
    found = flat(build(TWIN, VIT, student, region_grid=3)({"cnn": outputs, "vit": outputs}, labels()))
    assert set(found) == {f"{name}/{term}" for name in ("cnn", "vit") for term in ("hfd", "region", "pixel")}
    assert all(abs(loss.item()) < 1e-12 for loss in found.values())


def test_equal_features_give_no_region_loss_though_one_student_is_selected() -> None:  # 1
    peers, target = twins()
    peers["vit"] = peers["vit"]._replace(last_feature=peers["cnn"].last_feature)
    found = flat(build(TWIN, VIT, **BSD)(peers, target))
    assert found["cnn/pixel"] > 0 and found["vit/pixel"] > 0
    assert abs(found["cnn/region"].item()) < 1e-12 and abs(found["vit/region"].item()) < 1e-12


def test_from_an_oracle_only_the_other_learns_and_a_step_brings_it_nearer_to_the_labels() -> None:  # 2
    peers, target = twins()
    oracle = 20.0 * torch.nn.functional.one_hot(target.clamp_max(CLASSES - 1), CLASSES).movedim(-1, 1).double()
    peers["cnn"] = peers["cnn"]._replace(logits=oracle)
    found = flat(build(TWIN, VIT, **BSD)(peers, target))
    logits = peers["vit"].logits
    assert found["cnn/pixel"].item() == 0.0 and found["cnn/region"].item() == 0.0 and found["vit/pixel"] > 0.1
    (gradient,) = gradients(found["vit/pixel"], logits)
    valid = target != 255
    assert gradient is not None and bool((gradient.abs().sum(1)[valid] > 0).all())
    before, after = cross_entropy(logits, target), cross_entropy(logits - 10.0 * gradient, target)
    assert after < before - 0.01


@pytest.mark.parametrize("hfd", ["cross_op", "direct", "aux_op"])
def test_a_students_terms_have_no_gradient_to_the_other(hfd: str) -> None:  # 3
    peers, target = scene()
    method = build(hfd=hfd, region_grid=3)
    for key, loss in flat(method(peers, target)).items():
        sink = key.split("/")[0]
        for name, outputs in peers.items():
            assert all(gradient is None for gradient in gradients(loss, *leaves(outputs))) == (name != sink), key
            helpers = gradients(loss, *method.helpers[name].parameters())
            assert name == sink or all(gradient is None for gradient in helpers), key


def test_the_cnn_leaves_the_attention_weights_alone_and_the_vit_trains_its_mlp() -> None:  # 3
    peers, target = scene()
    student = Student()
    found = flat(build(student=student)(peers, target))
    for key, loss in found.items():
        attention, mlp = gradients(loss, student.attention.weights, student.mlp.weight)
        assert attention is None, key
        assert (mlp is None) == (key != "vit/hfd"), key


def test_the_weights_are_read_at_every_call_and_stay_the_students() -> None:
    peers, target = scene()
    student = Student()
    method = build(student=student)
    before = flat(method(peers, target))["cnn/hfd"]
    with torch.no_grad():
        student.attention.weights.mul_(-3.0)
    assert abs(flat(method(peers, target))["cnn/hfd"] - before) > 1e-3
    assert not any("attention" in name or "mlp" in name for name in method.state_dict())
    mine = {id(parameter) for parameter in method.parameters()}
    assert mine.isdisjoint(id(parameter) for parameter in student.parameters())


def test_dropout_in_the_attention_does_not_separate_equal_features() -> None:
    outputs = draw(VIT, SIZE, seed=0)
    student = Student(dropout=0.5)
    method = build(TWIN, VIT, student, region_weight=0, pixel_weight=0)
    assert abs(flat(method({"cnn": outputs, "vit": outputs}, labels()))["cnn/hfd"].item()) < 1e-12
    assert student.attention.training and student.attention.dropout.training


def test_errors_and_masks_carry_no_gradient() -> None:  # 3
    peers, target = twins()
    errors = [pixel_errors(outputs.logits, target) for outputs in peers.values()]
    regional = [region_errors(error, target, (3, 3)) for error in errors]
    assert not any(each.requires_grad for each in [*errors, *regional, *learners(*errors, target != 255)])


@pytest.mark.parametrize("sink", ["cnn", "vit"])
def test_the_pixel_gradient_is_zero_wherever_the_student_is_the_better(sink: str) -> None:  # 4
    peers, target = twins()
    source = "vit" if sink == "cnn" else "cnn"
    errors = {name: pixel_errors(outputs.logits, target) for name, outputs in peers.items()}
    learns = (target != 255) & (errors[source] < errors[sink])
    (gradient,) = gradients(flat(build(TWIN, VIT, **BSD)(peers, target))[f"{sink}/pixel"], peers[sink].logits)
    assert gradient is not None and 0.2 < learns.double().mean() < 0.8
    assert torch.equal((gradient != 0).any(1), learns)


@pytest.mark.parametrize("changes", [{}, {"normalize": "all"}, {"selection": False}, {"upsample": False}])
def test_exchanging_the_students_exchanges_their_terms(changes: dict[str, Any]) -> None:  # 5
    peers, target = scene()
    method, config = parse_method({"name": "hfd_bsd", **BSD, **changes}, "methods.0")
    infos = {"cnn": CNN, "vit": VIT}
    forward, backward = (method(config, dict(order)).double() for order in (infos.items(), [*infos.items()][::-1]))
    backward.load_state_dict(forward.state_dict())
    here, there = flat(forward(peers, target)), flat(backward(dict([*peers.items()][::-1]), target))
    assert set(here) == set(there)
    for key, loss in here.items():
        torch.testing.assert_close(there[key], loss)
    unnamed = method(config, {"cnn": VIT, "vit": CNN}).double()
    for name, other in (("cnn", "vit"), ("vit", "cnn")):
        unnamed.helpers[name].load_state_dict(forward.helpers[other].state_dict())
    swapped = flat(unnamed({"cnn": peers["vit"], "vit": peers["cnn"]}, target))
    for term in ("region", "pixel"):
        torch.testing.assert_close(swapped[f"cnn/{term}"], here[f"vit/{term}"])
        torch.testing.assert_close(swapped[f"vit/{term}"], here[f"cnn/{term}"])


def test_the_masks_are_disjoint_and_cover_all_but_the_unlabelled_and_the_ties() -> None:  # 6
    peers, target = twins()
    first, second = (outputs.logits.detach().clone() for outputs in peers.values())
    second[:, :, 5] = first[:, :, 5]  # a row of ties
    errors = [pixel_errors(logits, target) for logits in (first, second)]
    valid = target != 255
    one, other = learners(*errors, valid)
    ties = torch.zeros_like(valid)
    ties[:, 5] = True
    assert not bool((one & other).any()) and one.any() and other.any()
    assert torch.equal(one | other, valid & ~ties)


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_at_an_ignored_pixel_changes_a_selective_term_but_features_unless_masked(masked: bool) -> None:  # 7
    peers, target = twins()
    ignored = (target == 255)[:, None]
    method = build(TWIN, VIT, **BSD, mask_region_features=masked)
    before = flat(method(peers, target))

    def spoil(maps: Tensor) -> Tensor:
        return torch.where(ignored, 100 * torch.randn_like(maps), maps)

    after = flat(method({name: each._replace(logits=spoil(each.logits)) for name, each in peers.items()}, target))
    for key, loss in before.items():
        torch.testing.assert_close(after[key], loss, rtol=1e-12, atol=0)
    features = {name: each._replace(last_feature=spoil(each.last_feature)) for name, each in peers.items()}
    moved = abs(flat(method(features, target))["cnn/region"] - before["cnn/region"]) > 1e-3
    assert bool(moved) != masked


@pytest.mark.parametrize("changes", [{}, {"normalize": "all"}, {"selection": False}, {"mask_region_features": True}])
def test_a_batch_without_labels_gives_zeros_with_a_graph(changes: dict[str, Any]) -> None:  # 7
    peers, target = scene()
    method = build(**BSD, **changes)
    found = flat(method(peers, torch.full_like(target, 255)))
    assert len(found) == 4 and all(loss.item() == 0.0 for loss in found.values())
    sum(found.values()).backward()
    for outputs in peers.values():
        assert all(bool((leaf.grad == 0).all()) for leaf in (outputs.logits, outputs.last_feature))
    assert all(parameter.grad is not None for parameter in method.parameters())


@pytest.mark.parametrize("hfd", ["cross_op", "direct", "aux_op"])
@pytest.mark.parametrize("normalize", ["per_direction", "all"])
def test_a_batch_twice_is_the_batch_once(hfd: str, normalize: str) -> None:  # 8
    peers, target = scene()
    method = build(hfd=hfd, normalize=normalize, region_grid=3)
    twice = {name: mapped(outputs, lambda maps: torch.cat([maps, maps])) for name, outputs in peers.items()}
    once, again = flat(method(peers, target)), flat(method(twice, torch.cat([target, target])))
    for key, loss in once.items():
        torch.testing.assert_close(again[key], loss)


@pytest.mark.parametrize("normalize", ["per_direction", "all"])
def test_places_where_the_other_learns_do_not_dilute_a_term_divided_per_direction(normalize: str) -> None:  # 8
    peers, target = twins()
    target = target % CLASSES  # labelled everywhere, so that both images count alike
    oracle = 20.0 * torch.nn.functional.one_hot(target, CLASSES).movedim(-1, 1).double()
    known = torch.arange(2)[:, None, None, None]  # the CNN knows all of image 0, the transformer all of image 1
    peers["cnn"] = peers["cnn"]._replace(logits=torch.where(known == 0, oracle, peers["cnn"].logits))
    peers["vit"] = peers["vit"]._replace(logits=torch.where(known == 1, oracle, peers["vit"].logits))
    method = build(TWIN, VIT, **BSD, normalize=normalize)
    both = flat(method(peers, target))
    single = {name: mapped(outputs, lambda maps: maps[:1]) for name, outputs in peers.items()}
    alone = flat(method(single, target[:1]))
    for term in ("region", "pixel"):
        share = 1.0 if normalize == "per_direction" else 0.5
        assert both[f"vit/{term}"] > 1e-2 and alone[f"cnn/{term}"].item() == 0.0
        torch.testing.assert_close(both[f"vit/{term}"], share * alone[f"vit/{term}"])


@pytest.mark.parametrize("hfd", ["direct", "cross_op"])
def test_the_scale_of_a_feature_does_not_matter(hfd: str) -> None:  # 9
    peers, target = scene()
    student = Student()
    student.attention = nn.Conv2d(4, 4, kernel_size=3, padding=1, bias=False)  # type: ignore[assignment]
    method = build(student=student, hfd=hfd, region_grid=3)
    scaled = {
        name: outputs._replace(features=(factor * outputs.features[0],), last_feature=factor * outputs.last_feature)
        for (name, outputs), factor in zip(peers.items(), (0.01, 37.0), strict=True)
    }
    before, after = flat(method(peers, target)), flat(method(scaled, target))
    for key, loss in before.items():
        torch.testing.assert_close(after[key], loss)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_without_selection_the_pixel_term_is_mutual_learning(temperature: float) -> None:  # 10
    peers, target = scene()
    mutual, config = parse_method({"name": "dml", "temperature": temperature, "upsample": True}, "methods.0")
    expected = flat(mutual(config, {"cnn": CNN, "vit": VIT})(peers, target))
    found = flat(build(**BSD, selection=False, temperature=temperature)(peers, target))
    for name in peers:
        torch.testing.assert_close(found[f"{name}/pixel"], expected[f"{name}/kl"])


def test_the_two_directions_over_all_pixels_are_the_parts_of_mutual_learning() -> None:  # 10
    """Divided by all labelled pixels, selected and not selected parts of the same divergence add up to it."""
    peers, target = twins()
    selected = flat(build(TWIN, VIT, **BSD, normalize="all")(peers, target))
    everywhere = flat(build(TWIN, VIT, **BSD, selection=False)(peers, target))
    errors = [pixel_errors(outputs.logits, target) for outputs in peers.values()]
    better = (target != 255) & (errors[0] < errors[1])  # where the CNN does not learn
    left_out = [
        plain.kl(peers["vit"].logits[b, :, i, j], peers["cnn"].logits[b, :, i, j])
        for b, i, j in plain.pixels(better)
        if better[b, i, j]
    ]
    rest = sum(left_out) / (target != 255).sum()
    torch.testing.assert_close(selected["cnn/pixel"] + rest, everywhere["cnn/pixel"])


# -- a real pair ------------------------------------------------------------------------------------------------------


def segmenter(encoder: str, stride: int) -> Segmenter:
    settings = {
        "architecture": "Segformer", "encoder": encoder, "output_stride": stride,
        "decoder": {"decoder_segmentation_channels": 16},
    }  # fmt: skip
    return build_segmenter(parse(ModelConfig, settings, "model"), CLASSES)


@pytest.mark.parametrize("hfd", ["cross_op", "aux_op"])
def test_a_real_pair_learns_and_exports_exactly_the_plain_students(hfd: str, tmp_path: Path) -> None:  # 11
    students = {"cnn": segmenter("mobilenetv3_small_050", 16), "vit": segmenter("mit_b0", 32)}
    names = {name: [key for key, _ in student.named_parameters()] for name, student in students.items()}
    state = {name: list(student.state_dict()) for name, student in students.items()}
    config = parse_method({"name": "hfd_bsd", "hfd": hfd}, "methods.0")[1]
    method: Any = build_online([config], {name: student.info for name, student in students.items()})["hfd_bsd"]
    method.attach(students)
    images, target = torch.rand(2, 3, 64, 64), torch.randint(CLASSES, (2, 64, 64))
    found = flat(method({name: student(images) for name, student in students.items()}, target))
    assert len(found) == 6 and all(bool(loss.isfinite()) for loss in found.values())
    sum(found.values()).backward()
    for name, student in students.items():
        # DropPath, Dropout and the selection may leave a layer out, the first layer never.
        first = next(parameter for parameter in student.parameters())
        assert first.grad is not None and bool((first.grad != 0).any())
        assert [key for key, _ in student.named_parameters()] == names[name]
        assert list(student.state_dict()) == state[name]
        save_model(tmp_path, name, student.eval(), {})
        loaded, document = load_model(tmp_path, name)
        assert document["params"] == sum(parameter.numel() for parameter in student.parameters())
        torch.testing.assert_close(loaded.logits(images), student.logits(images))
    block: Any = students["vit"].encoder.block1[-1]
    only_hfd = torch.autograd.grad(
        flat(method({name: student(images) for name, student in students.items()}, target))["cnn/hfd"],
        [block.attn.q.weight, block.norm1.weight],
        allow_unused=True,
    )
    assert only_hfd == (None, None)


# -- switches ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_specification() -> None:
    ours = {
        "weight": 1.0, "ramp": 0.0, "hfd_weight": 1.0, "region_weight": 1.0, "pixel_weight": 1.0, "hfd": "cross_op",
        "hfd_tap": "stage1", "distance": "cosine", "region_tap": "last_feature", "region_grid": None,
        "region_distance": "cosine", "mask_region_features": False, "selection": True, "normalize": "per_direction",
        "temperature": 1.0, "upsample": True, "mask_ignore": True,
    }  # fmt: skip
    assert to_dict(parse_method({"name": "hfd_bsd"}, "methods.0")[1]) == {"name": "hfd_bsd"} | ours


@pytest.mark.parametrize("term", ["hfd", "region", "pixel"])
def test_each_part_alone_is_what_it_is_in_company_and_builds_only_its_own_helpers(term: str) -> None:
    peers, target = scene()
    student = Student()
    whole = build(student=student, region_grid=3)
    others = {f"{other}_weight": 0.0 for other in ("hfd", "region", "pixel") if other != term}
    alone = build(student=student, region_grid=3, weight=2.0, **others)
    assert alone.weights == {term: 2.0}
    assert {key.split(".")[2] for key in alone.state_dict()} == ({term} if term != "pixel" else set())
    alone.load_state_dict({key: whole.state_dict()[key] for key in alone.state_dict()})
    expected = flat(whole(peers, target))
    found = flat(alone(peers, target))
    assert set(found) == {f"cnn/{term}", f"vit/{term}"}
    for key, loss in found.items():
        torch.testing.assert_close(loss, expected[key])


def test_the_default_grid_has_a_region_for_every_cell_of_a_stride_32_feature() -> None:
    """An image of 40 x 80 has 2 x 3 of them."""
    generator = torch.Generator().manual_seed(5)
    outputs = {name: draw(VIT, (10, 20), seed=seed) for seed, name in enumerate(("cnn", "vit"))}
    target = torch.randint(CLASSES, (2, 40, 80), generator=generator)
    logits = {name: each.logits for name, each in outputs.items()}
    features = {name: each.last_feature for name, each in outputs.items()}
    small = plain.nearest(target, (10, 20))
    slow = reference.bsd(logits, features, small, size=(10, 20), grid=(2, 3))
    found = flat(build(TWIN, VIT, hfd_weight=0, upsample=False)(outputs, target))
    for name in outputs:
        torch.testing.assert_close(found[f"{name}/region"], slow[f"{name}/region"])
    square = flat(build(TWIN, VIT, hfd_weight=0, upsample=False, region_grid=3)(outputs, target))
    assert abs(square["cnn/region"] - found["cnn/region"]) > 1e-4


@pytest.mark.parametrize("tap", ["stage1", "last_feature"])
def test_both_taps_can_be_moved(tap: str) -> None:
    peers, target = scene()
    moved = build(hfd="direct", hfd_tap=tap, region_tap=tap, region_grid=3)
    widths = {"stage1": (3, 4), "last_feature": (5, 7)}[tap]
    for helper in moved.helpers["cnn"].values():
        assert helper.weight.shape[:2] == widths[::-1]
    found = flat(moved(peers, target))
    for name, outputs in peers.items():
        used, unused = outputs.last_feature, outputs.features[0]
        if tap == "stage1":
            used, unused = unused, used
        for term in ("hfd", "region"):
            there, not_there = gradients(found[f"{name}/{term}"], used, unused)
            assert there is not None and not_there is None


def test_equal_widths_need_no_projection_and_the_source_is_never_projected() -> None:
    assert not list(build(TWIN, VIT, hfd="direct").parameters())
    peers, target = scene()
    method = build(**BSD)
    before = flat(method(peers, target))
    with torch.no_grad():
        method.helpers["vit"]["region"].weight.normal_()
    after = flat(method(peers, target))
    assert after["cnn/region"] == before["cnn/region"] and after["vit/region"] != before["vit/region"]


def test_loose_operators_train_with_the_student_that_learns_through_them() -> None:
    peers, target = scene()
    method = build(hfd="aux_op", region_weight=0, pixel_weight=0)
    found = flat(method(peers, target))
    sum(found.values()).backward()
    for name in peers:
        for key, parameter in method.helpers[name].named_parameters():
            assert parameter.grad is not None and bool((parameter.grad != 0).any()), key
        owned = {id(parameter) for parameter in method.helper_parameters(name)}
        assert owned == {id(parameter) for parameter in method.helpers[name].parameters()}
    torch.testing.assert_close(
        found["cnn/hfd"],
        reference.hfd(
            method.helpers["cnn"]["operator"](
                plain.resized(method.helpers["cnn"]["hfd"](peers["cnn"].features[0]), (4, 5), False)
            ),
            peers["vit"].features[0],
            "cosine",
        ),
    )


def test_the_order_in_which_the_students_are_named_does_not_matter() -> None:
    peers, target = scene()
    student = Student().double()
    config = parse_method({"name": "hfd_bsd", "region_grid": 3}, "methods.0")[1]
    one, other = (
        build_online([config], dict(order))["hfd_bsd"].double()
        for order in ([("cnn", CNN), ("vit", VIT)], [("vit", VIT), ("cnn", CNN)])
    )
    for method in (one, other):
        method.attach({"cnn": nn.Identity(), "vit": student})
    other.load_state_dict(one.state_dict())
    expected, found = flat(one(peers, target)), flat(other(peers, target))
    assert set(found) == set(expected)
    for key, loss in found.items():
        torch.testing.assert_close(loss, expected[key])


def test_no_term_asks_the_device_for_a_value() -> None:
    """As in the contract, which leaves the students that a method borrows from on the CPU."""
    student = Student()
    method = build(student=student).to("meta")
    student.to("meta")
    peers, target = scene()
    peers = {
        name: mapped(outputs, lambda maps: maps.detach().to("meta").requires_grad_()) for name, outputs in peers.items()
    }
    found = flat(method(peers, target.to("meta")))
    sum(found.values()).backward()
    assert len(found) == 6 and student.mlp.weight.grad is not None and student.attention.weights.grad is None


def test_dead_features_and_a_single_pixel_give_finite_gradients() -> None:
    for distance in ("cosine", "l2", "kl"):
        dead = torch.zeros(2, 3, 1, 1, dtype=torch.float64, requires_grad=True)
        target = torch.randn(2, 3, 1, 1, dtype=torch.float64)
        target[0] = 0.0
        feature_distances(region_means(dead, (2, 2)), region_means(target, (2, 2)), distance=distance).sum().backward()
        assert dead.grad is not None and bool(dead.grad.isfinite().all())


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_other_than_two_students_are_refused(count: int) -> None:
    method, config = parse_method({"name": "hfd_bsd"}, "methods.0")
    with pytest.raises(UserError, match="exactly two students"):
        method(config, {f"student{index}": CNN for index in range(count)})


@pytest.mark.parametrize("hfd", ["cross_op", "aux_op"])
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_two_of_a_kind_are_refused_with_the_alternatives(hfd: str, kind: str) -> None:
    pair = replace(CNN, kind=kind), replace(VIT, kind=kind)
    with pytest.raises(
        UserError, match=rf"hfd: {hfd} takes .* cnn \({kind}\) and vit \({kind}\); choose hfd: direct, or hfd_weight: 0"
    ):
        build(*pair, hfd=hfd)
    peers, target = scene()
    for changes in ({"hfd": "direct"}, {"hfd_weight": 0}):
        method = build(*pair, **{"hfd": hfd, **changes})
        assert set(flat(method(peers, target))) == {f"{name}/{term}" for name in peers for term in method.weights}


def test_an_encoder_without_operators_to_borrow_is_refused_with_the_alternatives() -> None:
    student = segmenter("mobilenetv3_small_050", 16)
    with pytest.raises(UserError, match=r"student 'vit': encoder 'mobilenetv3_small_050' .* or choose hfd: aux_op"):
        build(student=student)
    build(student=student, hfd="aux_op")


def test_operators_of_the_first_stage_do_not_serve_another() -> None:
    with pytest.raises(UserError, match=r"do not fit hfd_tap: stage2; take stage1"):
        build(hfd_tap="stage2")
    assert build(hfd="aux_op", hfd_tap="last_feature").helpers["cnn"]["hfd"].weight.shape[:2] == (7, 5)


def test_students_must_be_attached() -> None:
    method, config = parse_method({"name": "hfd_bsd"}, "methods.0")
    with pytest.raises(RuntimeError, match="attach the students"):
        method(config, {"cnn": CNN, "vit": VIT})(*scene())
