"""One contract for every method in the table. Where a method departs from it on purpose, a table here says so."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from formulas import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segdistill.config import parse, to_dict
from segdistill.errors import UserError
from segdistill.losses.divergence import pixel_kl
from segdistill.losses.masks import IGNORE_INDEX, UNLABELLED
from segdistill.methods import METHODS, build_offline, build_online, load, parse_method
from segdistill.methods.method import Evidence, Method
from segdistill.models.outputs import ModelInfo, Outputs

# Settings that take trainable helpers out of the way, so that equal outputs must give the minimum.
IDENTITY: dict[str, dict[str, Any]] = {
    "apd": {"student_head": "identity", "teacher_head": "identity"},
    "cirkd": {"projector": "identity"},
    "fitnet": {"always_project": False, "standardize": False},
    "hfd_bsd": {"hfd": "direct"},
}
# Terms that are not zero there, each with its reason.
NOT_A_DISTANCE: dict[str, dict[str, str]] = {
    "c2vkd": {"pdd": "zero where the student has the mean of teacher and label, not where it has the teacher"},
    "mgd": {"generation": "a drawn generator stands between the two features, and there is no identity in its place"},
    "pseudo": {"ce": "least where the student is sure of the teacher's class, not where it has the teacher's doubts"},
    "skd": {"critic": "the hinge of a critic that cannot tell them apart is 2"},
    "dist": {"aux": "the published epsilon beside the norms leaves some 1e-6 where a map has two pixels"},
}
# Settings under which ignored pixels do not matter, for the methods whose official code does not mask ...
MASKED: dict[str, dict[str, Any]] = {
    "apd": {"mask_ignore_global": True, "mask_ignore_local": True},
    "cirkd": {"projector": "identity"},
    "cwd": {"mask_ignore": True},
    "fitnet": {"mask_ignore": True},
    "hfd_bsd": {"mask_region_features": True},
}
# ... and the terms that see ignored pixels by default, as those codes have it.
UNMASKED_TERMS: dict[str, set[str]] = {
    "apd": {"global", "local"},
    "cirkd": {"pixel", "region"},
    "cwd": {"logits", "feature"},
    "fitnet": {"regression"},
    "hfd_bsd": {"region"},
}
# Terms that no label enters, under any setting: they see every pixel, and a batch without labels changes nothing.
LABEL_FREE: dict[str, set[str]] = {
    "at": {"attention"},
    "c2vkd": {"visual", "patch", "linguistic"},
    "cirkd": {"minibatch"},
    "hfd_bsd": {"hfd"},
    "mgd": {"generation"},
    "skd": {"pairwise", "holistic", "critic"},
}
# Terms that need the class of a pixel: images without labels add nothing to them. All others teach on such images too.
NEED_LABELS: dict[str, set[str]] = {
    "apd": {"prototype", "teacher_head"},
    "c2vkd": {"pdd"},
    "dkd": {"target", "non_target"},
    "hfd_bsd": {"region", "pixel"},
    "ifvd": {"variation"},
    "kdcl": {"kl"},
}
# Settings that switch on what is off by default, so that the contract covers every term.
COMPLETE: dict[str, dict[str, Any]] = {
    "cwd": {"feature_weight": 50.0},
    "fitnet": {"always_project": True, "standardize": True},
    "skd": {"holistic_weight": 0.1},
}
# Terms that have no least value: a critic's score may have any sign.
SIGNED: dict[str, set[str]] = {"skd": {"holistic"}}
# Settings that leave nothing to chance, for the comparison of two devices, whose generators differ.
WITHOUT_CHANCE: dict[str, dict[str, Any]] = {"mgd": {"mask_ratio": 0.0}}

EVERY = pytest.mark.parametrize("name", METHODS)
ONLINE = pytest.mark.parametrize("name", [name for name in METHODS if load(name).kind == "online"])


@dataclass(frozen=True)
class Shape:
    """The geometry of one network's outputs."""

    logits: tuple[int, int] = (6, 7)
    last: tuple[int, int] = (6, 7)
    width: int = 8


FIRST, SECOND = Shape(), Shape()
CASE = Shape((2, 4), (2, 4), 4)  # of the numeric case
GEOMETRIES = {
    "equal": (Shape(), Shape(), (24, 28)),
    "odd": (Shape((5, 3), (5, 3)), Shape((5, 3), (5, 3)), (37, 21)),
    "finer student": (Shape((12, 14), (12, 14), 6), Shape((6, 7), (6, 7), 11), (48, 56)),
    "finer teacher": (Shape((5, 7), (5, 7), 5), Shape((10, 14), (20, 27), 9), (40, 53)),
    "one pixel": (Shape((1, 1), (1, 1)), Shape((1, 1), (1, 1)), (4, 4)),
}


def info(shape: Shape, num_classes: int, kind: str = "cnn") -> ModelInfo:
    return ModelInfo(num_classes, (4, 6, 8, 10), (4, 8, 16, 32), shape.width, 4, 4, kind, aux=True)


def outputs(
    shape: Shape,
    num_classes: int,
    *,
    batch: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    grad: bool = True,
) -> Outputs:
    generator = torch.Generator().manual_seed(seed)

    def draw(channels: int, size: tuple[int, int]) -> Tensor:
        values = torch.randn(batch, channels, *size, generator=generator).to(dtype)
        return values.requires_grad_(grad)

    height, width = shape.last
    stages = [(-(-height // 2**level), -(-width // 2**level)) for level in range(4)]
    features = tuple(draw(channels, size) for channels, size in zip((4, 6, 8, 10), stages, strict=True))
    aux = draw(num_classes, stages[2])
    return Outputs(draw(num_classes, shape.logits), features, draw(shape.width, shape.last), aux)


def labels(size: tuple[int, int], num_classes: int, *, batch: int = 2, seed: int = 0, ignored: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(num_classes, (batch, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = IGNORE_INDEX
    return target


class Student(torch.nn.Module):
    """What a method may borrow from a student: the operators of its first stage, 4 channels wide."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = (torch.nn.Conv2d(4, 4, kernel_size=1, bias=False) for _ in range(2))


def build(name: str, first: Shape = FIRST, second: Shape = SECOND, *, num_classes: int = 5, **changes: Any) -> Method:
    """The method between a CNN and a ViT: the student and its teacher, or two peers."""
    torch.manual_seed(0)
    method, config = parse_method({"name": name, **COMPLETE.get(name, {}), **changes}, "methods.0")
    if method.kind == "offline":
        student, teacher = info(first, num_classes, "vit"), info(second, num_classes, "cnn")
        built = build_offline([config], student, teacher)[name]
        return attached(built, {"student": Student()})
    built = build_online(
        [config], {"first": info(first, num_classes, "cnn"), "second": info(second, num_classes, "vit")}
    )[name]
    return attached(built, {"first": Student(), "second": Student()})


def attached(method: Method, students: dict[str, torch.nn.Module]) -> Method:
    method.attach(students)
    method.students = students  # in a dict, so that they are no submodules, and can be moved with the method
    return method


def on(method: Method, device: str) -> Method:
    for student in method.students.values():
        student.to(device)
    return method.to(device)


def terms(method: Method, first: Outputs, second: Outputs, target: Tensor) -> dict[str, Tensor]:
    """Raw terms; ``first`` is the student and ``second`` the teacher, or both are peers: ``first/kl``. Repeatable."""
    torch.manual_seed(1)
    if method.kind == "offline":
        return method(first, second, target)
    nested = method({"first": first, "second": second}, target)
    return {f"{peer}/{term}": loss for peer, losses in nested.items() for term, loss in losses.items()}


def total(method: Method, found: Mapping[str, Tensor]) -> Tensor:
    return sum(method.weights[key.rpartition("/")[2]] * loss for key, loss in found.items())


def tensors(given_outputs: Outputs) -> list[Tensor]:
    assert given_outputs.aux_logits is not None
    return [given_outputs.logits, *given_outputs.features, given_outputs.last_feature, given_outputs.aux_logits]


def moved(given_outputs: Outputs, device: str) -> Outputs:
    return rebuilt([leaf.detach().to(device).requires_grad_() for leaf in tensors(given_outputs)])


def rebuilt(values: Sequence[Tensor]) -> Outputs:
    """The inverse of :func:`tensors`."""
    logits, *features, last, aux = values
    return Outputs(logits, tuple(features), last, aux)


def reached(given_outputs: Outputs) -> bool:
    return any(leaf.grad is not None and bool((leaf.grad != 0).any()) for leaf in tensors(given_outputs))


def untouched(given_outputs: Outputs) -> bool:
    return all(leaf.grad is None for leaf in tensors(given_outputs))


def finite(found: Mapping[str, Tensor]) -> bool:
    return all(bool(loss.isfinite()) for loss in found.values())


@EVERY
def test_the_default_config_is_complete_and_survives_the_round_trip(name: str) -> None:
    method, config = parse_method({"name": name}, "methods.0")
    assert config.name == name
    assert parse(method.Config, to_dict(config), "methods.0") == config
    assert all(heading in (method.__doc__ or "") for heading in ("Formula:", "Reference:"))
    assert method.paper and method.needs and method.evidence in get_args(Evidence)


@EVERY
def test_terms_are_finite_float32_scalars_named_as_their_weights(name: str) -> None:
    method = build(name)
    found = terms(method, outputs(FIRST, 5), outputs(SECOND, 5, seed=1), labels((24, 28), 5))
    assert {key.rpartition("/")[2] for key in found} == set(method.weights)
    if method.kind == "online":
        assert {key.partition("/")[0] for key in found} == {"first", "second"}
    for loss in found.values():
        assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad and bool(loss.isfinite())


def check_formula(name: str) -> None:
    """The terms and their gradients against the formula written a second time, in float64."""
    if name not in CASES:
        raise AssertionError(f"tests/contracts/formulas.py has no numeric case of '{name}': write its formula there")
    case = CASES[name]
    method = build(name, CASE, CASE, num_classes=4, **case.settings).double()
    case.prepare(method)
    first, second = case_outputs(0), case_outputs(1)
    target = torch.tensor([[[0, 1, 1, 255], [0, 0, 255, 2]], [[2, 2, 1, 0], [255, 255, 1, 1]]])  # no class 3
    found, expected = terms(method, first, second, target), case.formula(method, first, second, target)
    assert set(found) == set(expected)
    leaves = [*tensors(first), *tensors(second), *method.parameters()]
    for key in expected:
        gradients = (
            torch.autograd.grad(term[key], leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            for term in (found, expected)
        )
        for one, other in [(found[key], expected[key]), *zip(*gradients, strict=True)]:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")


def case_outputs(seed: int) -> Outputs:
    """All maps at the size of the labels."""
    generator = torch.Generator().manual_seed(seed)
    widths = [4, 4, 6, 8, 10, CASE.width, 4]
    drawn = [torch.randn(2, width, *CASE.logits, generator=generator, dtype=torch.float64) for width in widths]
    return rebuilt([values.requires_grad_() for values in drawn])


@EVERY
def test_terms_and_gradients_are_those_of_the_formula_in_float64(name: str) -> None:
    check_formula(name)


def test_a_new_method_is_asked_for_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "new", METHODS["kd"])
    with pytest.raises(AssertionError, match="no numeric case of 'new'"):
        check_formula("new")


WRONG: dict[str, Callable[..., Tensor]] = {
    "reversed": lambda student, teacher, valid=None, *, temperature, **settings: pixel_kl(
        teacher.detach(), student, valid, temperature=temperature, **settings
    ) + 0 * student.sum(),
    "without the squared temperature": lambda student, teacher, valid=None, *, temperature, **settings: pixel_kl(
        student, teacher, valid, temperature=temperature, **settings
    ) / temperature**2,
    "a mean over classes too": lambda student, teacher, valid=None, *, temperature, **settings: pixel_kl(
        student, teacher, valid, temperature=temperature, **settings
    ) / student.shape[1],
    "a gradient half as large": lambda student, teacher, valid=None, *, temperature, **settings: pixel_kl(
        (student + student.detach()) / 2, teacher, valid, temperature=temperature, **settings
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_formula_keeps_every_other_contract_and_fails_its_case(
    mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segdistill.methods.kd.pixel_kl", WRONG[mistake])
    test_terms_are_finite_float32_scalars_named_as_their_weights("kd")
    test_terms_are_zero_when_student_equals_teacher("kd")
    test_ignored_pixels_matter_only_where_the_method_says_so("kd", masked=True)
    if mistake != "reversed":
        test_gradient_reaches_students_and_every_trainable_helper_and_never_the_teacher("kd")
    with pytest.raises(AssertionError, match="kl"):
        check_formula("kd")


@EVERY
def test_terms_are_zero_when_student_equals_teacher(name: str) -> None:
    method = build(name, **IDENTITY.get(name, {}))
    found = terms(method, outputs(FIRST, 5), outputs(SECOND, 5), labels((24, 28), 5))
    assert found
    for key, loss in found.items():
        if key.rpartition("/")[2] not in NOT_A_DISTANCE.get(name, {}):
            assert abs(loss.item()) < 1e-6, key


@EVERY
def test_gradient_reaches_students_and_every_trainable_helper_and_never_the_teacher(name: str) -> None:
    method = build(name)
    first, second = outputs(FIRST, 5), outputs(SECOND, 5, seed=1)
    total(method, terms(method, first, second, labels((24, 28), 5))).backward()
    assert reached(first)
    if method.kind == "offline":
        assert untouched(second)
    else:
        assert reached(second)
    for parameter_name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and bool((parameter.grad != 0).any()), parameter_name


@EVERY
def test_a_term_that_trains_helpers_alone_says_so_and_no_weight_of_the_students_terms_scales_it(name: str) -> None:
    method = build(name)
    alone = set()
    for term in method.weights:
        first, second = outputs(FIRST, 5), outputs(SECOND, 5, seed=1)
        found = terms(method, first, second, labels((24, 28), 5))
        total(method, {key: loss for key, loss in found.items() if key.rpartition("/")[2] == term}).backward()
        if untouched(first) and untouched(second):
            alone.add(term)
    assert alone == set(method.helper_terms)
    doubled = build(name, weight=2 * method.config.weight).weights
    assert doubled == {key: factor * (1 if key in alone else 2) for key, factor in method.weights.items()}


@ONLINE
def test_a_term_of_one_peer_trains_that_peer_alone(name: str) -> None:
    method = build(name)
    for sink in ("first", "second"):
        peers = {"first": outputs(FIRST, 5), "second": outputs(SECOND, 5, seed=1)}
        found = terms(method, peers["first"], peers["second"], labels((24, 28), 5))
        total(method, {key: loss for key, loss in found.items() if key.startswith(f"{sink}/")}).backward()
        assert reached(peers.pop(sink))
        assert untouched(*peers.values())


@EVERY
def test_every_trainable_helper_has_exactly_one_optimiser(name: str) -> None:
    method = build(name)
    students = ["student"] if method.kind == "offline" else ["first", "second"]
    owned = [parameter for student in students for parameter in method.helper_parameters(student)]
    owned += [parameter for parameters, _ in method.own_optimizers().values() for parameter in parameters]
    trainable = [parameter for parameter in method.parameters() if parameter.requires_grad]
    assert sorted(map(id, owned)) == sorted(map(id, trainable))


def spoiled(clean: Outputs, ignored: Tensor) -> Outputs:
    """Other values where there is no label, at the same size in all maps but the encoder's coarser stages."""
    noise = torch.Generator().manual_seed(99)

    def spoil(maps: Tensor) -> Tensor:
        if maps.shape[-2:] != ignored.shape[-2:]:
            return maps
        return torch.where(ignored[:, None], 5 * torch.randn(maps.shape, generator=noise), maps)

    return rebuilt([spoil(maps) for maps in tensors(clean)])


@EVERY
@pytest.mark.parametrize("masked", [True, False])
def test_ignored_pixels_matter_only_where_the_method_says_so(name: str, masked: bool) -> None:
    method = build(name, **(MASKED.get(name, {}) if masked else {}))
    first, second = outputs(FIRST, 5), outputs(SECOND, 5, seed=1)
    target = labels(FIRST.logits, 5)
    ignored = target == IGNORE_INDEX
    clean = terms(deepcopy(method), first, second, target)
    dirty = terms(method, spoiled(first, ignored), spoiled(second, ignored), target)
    changed = {key.rpartition("/")[2] for key in clean if abs(clean[key].item() - dirty[key].item()) > 1e-6}
    label_free = LABEL_FREE.get(name, set())
    assert changed - label_free == (set() if masked else UNMASKED_TERMS.get(name, set()))


@EVERY
def test_an_all_ignored_batch_gives_zeros_with_a_graph_to_everything_that_trains(name: str) -> None:
    method = build(name, **MASKED.get(name, {}))
    first, second = outputs(FIRST, 5), outputs(SECOND, 5, seed=1)
    found = terms(method, first, second, torch.full((2, 24, 28), IGNORE_INDEX))
    label_free = LABEL_FREE.get(name, set())
    assert finite(found)
    found = {key: loss for key, loss in found.items() if key.rpartition("/")[2] not in label_free}
    assert all(loss.item() == 0.0 for loss in found.values())
    if not found:
        return
    total(method, found).backward()
    assert any(leaf.grad is not None for leaf in tensors(first))
    leaves = [*tensors(first), *tensors(second), *method.parameters()]
    assert all(bool((leaf.grad == 0).all()) for leaf in leaves if leaf.grad is not None)
    if not label_free:
        assert all(parameter.grad is not None for parameter in method.parameters() if parameter.requires_grad)


@EVERY
def test_an_image_without_labels_teaches_where_no_label_is_needed_and_adds_nothing_where_one_is(name: str) -> None:
    method, needing = build(name, **WITHOUT_CHANCE.get(name, {})), NEED_LABELS.get(name, set())
    target = labels((24, 28), 5, batch=3)
    target[2] = UNLABELLED
    target[2, :6] = IGNORE_INDEX  # padding
    first, second = outputs(FIRST, 5, batch=3), outputs(SECOND, 5, batch=3, seed=1)
    one, other = (rebuilt([leaf.detach()[:2].requires_grad_() for leaf in tensors(each)]) for each in (first, second))
    alone, beside = terms(deepcopy(method), one, other, target[:2]), terms(method, first, second, target)
    leaves, leaves_alone = ([*tensors(a), *tensors(b)] for a, b in ((first, second), (one, other)))
    for key, loss in beside.items():
        if (term := key.rpartition("/")[2]) in method.helper_terms and term not in needing:
            continue
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        assert any(bool((gradient[2] != 0).any()) for gradient in gradients) == (term not in needing), key
        if term in needing:
            torch.testing.assert_close(loss, alone[key], rtol=1e-5, atol=1e-7)
            expected = torch.autograd.grad(
                alone[key], leaves_alone, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for whole, part in zip(gradients, expected, strict=True):
                torch.testing.assert_close(whole[:2], part, rtol=1e-4, atol=1e-7)


@EVERY
def test_a_batch_with_one_class_gives_finite_terms_and_gradients(name: str) -> None:
    method = build(name)
    first, second = outputs(FIRST, 5), outputs(SECOND, 5, seed=1)
    found = terms(method, first, second, torch.full((2, 24, 28), 3))
    total(method, found).backward()
    assert finite(found)
    assert all(bool(leaf.grad.isfinite().all()) for leaf in tensors(first) if leaf.grad is not None)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_the_float32_loss_of_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    method, target = build(name), labels((24, 28), 5)
    first, second = outputs(FIRST, 5, dtype=dtype), outputs(SECOND, 5, seed=1, dtype=dtype)
    half = terms(deepcopy(method), first, second, target)
    widened = [rebuilt([leaf.float() for leaf in tensors(one)]) for one in (first, second)]
    full = terms(method, *widened, target)
    for key, loss in half.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, full[key], rtol=1e-2, atol=1e-4)
    total(method, half).backward()
    assert all(bool(leaf.grad.isfinite().all()) for leaf in tensors(first) if leaf.grad is not None)


@EVERY
def test_under_autocast_the_terms_stay_float32_and_close(name: str) -> None:
    method, target = build(name), labels((24, 28), 5)
    first, second = outputs(FIRST, 5), outputs(SECOND, 5, seed=1)
    plain = terms(deepcopy(method), first, second, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = terms(method, first, second, target)
    for key, loss in mixed.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain[key], rtol=5e-2, atol=1e-3)


@EVERY
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_any_pair_of_sizes_and_widths_works(name: str, geometry: str, batch: int) -> None:
    first, second, size = GEOMETRIES[geometry]
    for one, other in ((first, second), (second, first)):
        method = build(name, one, other)
        student, teacher = outputs(one, 5, batch=batch), outputs(other, 5, batch=batch, seed=1)
        found = terms(method, student, teacher, labels(size, 5, batch=batch))
        assert finite(found)
        total(method, found).backward()
        assert all(bool(leaf.grad.isfinite().all()) for leaf in tensors(student) if leaf.grad is not None)


@EVERY
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    num_classes=st.integers(2, 12),
    ignored=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=st.integers(0, 1000),
)
def test_any_shape_class_count_and_ignore_pattern_gives_finite_terms(
    name: str, batch: int, num_classes: int, ignored: float, size: tuple[int, int], seed: int
) -> None:
    shape = Shape(size, size, 4)
    method = build(name, shape, shape, num_classes=num_classes)
    first, second = (outputs(shape, num_classes, batch=batch, seed=seed + peer) for peer in range(2))
    target = labels((2 * size[0], 2 * size[1]), num_classes, batch=batch, seed=seed, ignored=ignored)
    found = terms(method, first, second, target)
    total(method, found).backward()
    signed = SIGNED.get(name, set())
    assert finite(found)
    assert all(loss.item() > -1e-6 for key, loss in found.items() if key.rpartition("/")[2] not in signed)
    assert all(bool(leaf.grad.isfinite().all()) for leaf in tensors(first) if leaf.grad is not None)


@EVERY
def test_inputs_are_left_as_they_were(name: str) -> None:
    method = build(name)
    first, second, target = outputs(FIRST, 5), outputs(SECOND, 5, seed=1), labels((24, 28), 5)
    before = [value.detach().clone() for value in (*tensors(first), *tensors(second), target)]
    total(method, terms(method, first, second, target)).backward()
    assert all(
        torch.equal(old, new) for old, new in zip(before, (*tensors(first), *tensors(second), target), strict=True)
    )


@EVERY
def test_state_survives_a_checkpoint(name: str) -> None:
    method, target = build(name), labels((24, 28), 5)
    first, second = outputs(FIRST, 5), outputs(SECOND, 5, seed=1)
    for _ in range(2):  # whatever a method keeps from step to step
        terms(method, first, second, target)
    state = {key: value.clone() for key, value in method.state_dict().items()}
    restored = build(name)
    for parameter in restored.parameters():
        torch.nn.init.zeros_(parameter)
    restored.load_state_dict(state)  # what is borrowed from a student is not in it, and was built alike
    expected, found = (terms(each, first, second, target) for each in (method, restored))
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@EVERY
def test_what_is_switched_off_is_neither_built_nor_returned(name: str) -> None:
    _, config = parse_method({"name": name, "weight": 0.0}, "methods.0")
    infos = info(FIRST, 5), info(SECOND, 5, "vit")
    if load(name).kind == "offline":
        assert build_offline([config], *infos) == {}
    else:
        assert build_online([config], dict(zip(("first", "second"), infos, strict=True))) == {}
    first, second, target = outputs(FIRST, 5), outputs(SECOND, 5, seed=1), labels((24, 28), 5)
    for field in to_dict(build(name).config):
        if field.endswith("_weight"):
            method = build(name, **{field: 0.0})
            assert field.removesuffix("_weight") not in method.weights
            assert {key.rpartition("/")[2] for key in terms(method, first, second, target)} == set(method.weights)


@EVERY
def test_no_term_asks_the_device_for_a_value(name: str) -> None:
    """A meta tensor has no values, so a branch on one, ``.item()`` or ``nonzero`` raises where a GPU would wait."""
    method = on(build(name), "meta")
    first, second = moved(outputs(FIRST, 5), "meta"), moved(outputs(SECOND, 5, seed=1), "meta")
    total(method, terms(method, first, second, labels((24, 28), 5).to("meta"))).backward()


@EVERY
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_terms_are_those_of_the_cpu_without_a_synchronisation(name: str) -> None:
    first, second, target = outputs(FIRST, 5), outputs(SECOND, 5, seed=1), labels((24, 28), 5)
    method = build(name, **WITHOUT_CHANCE.get(name, {}))
    expected = terms(deepcopy(method), first, second, target)
    on(method, "cuda")
    one, other = moved(first, "cuda"), moved(second, "cuda")
    target = target.cuda()
    terms(method, one, other, target)  # libraries load on first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = terms(method, one, other, target)
        total(method, found).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for key, loss in found.items():
        # SKD's holistic term is a small difference of a critic's large scores.
        torch.testing.assert_close(loss.cpu(), expected[key], rtol=1e-3, atol=1e-4 if name == "skd" else 1e-5)


@EVERY
def test_networks_with_other_classes_are_refused(name: str) -> None:
    config = parse_method({"name": name}, "methods.0")[1]
    one, other = info(FIRST, 5, "cnn"), info(FIRST, 6, "vit")
    with pytest.raises(UserError, match="same classes"):
        if load(name).kind == "offline":
            build_offline([config], one, other)
        else:
            build_online([config], {"first": one, "second": other})


@EVERY
def test_a_method_of_the_other_kind_is_refused_with_the_reason(name: str) -> None:
    config = parse_method({"name": name}, "methods.0")[1]
    one = info(FIRST, 5)
    with pytest.raises(UserError, match=f"method '{name}' takes .* not "):
        if load(name).kind == "offline":
            build_online([config], {"first": one, "second": one})
        else:
            build_offline([config], one, one)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "kd", "temprature": 2}, r"^x\.0\.temprature: unknown key; did you mean 'temperature'\?$"),
        ({"name": "kdd"}, r"^x\.0\.name: unknown method 'kdd'; did you mean 'kd'\?$"),
        ({"name": None}, r"^x\.0\.name: unknown method None; allowed: kd, "),
        ({"weight": 1}, r"^x\.0\.name: missing"),
        ("kd", r"^x\.0: expected a mapping"),
        ({"name": "kd", "temperature": 0}, r"^x\.0\.temperature: input should be greater than or equal to 0.01, not 0"),
        ({"name": "dml", "weight": -1}, r"^x\.0\.weight: input should be greater than or equal to 0"),
        ({"name": "apd", "scope": "picture"}, r"^x\.0\.scope: 'picture' is not allowed; allowed: 'batch' or 'image'$"),
    ],
)
def test_a_mistyped_method_is_named_with_its_path(data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_method(data, "x.0")


def test_methods_of_one_name_combine() -> None:
    configs = [parse_method({"name": "kd", "temperature": value}, "x")[1] for value in (1.0, 4.0)]
    methods = build_offline(configs, info(FIRST, 5), info(SECOND, 5))
    assert list(methods) == ["kd", "kd-2"]
    assert [method.config.temperature for method in methods.values()] == [1.0, 4.0]
