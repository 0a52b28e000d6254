"""The pure functions: values and gradients against slow loops, masks, resizing, precision."""

from collections.abc import Callable

import _reference as reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from segdistill import geometry
from segdistill.losses import align, divergence, masks, precision, supervised
from segdistill.losses.precision import product
from segdistill.losses.vectors import unit
from segdistill.methods.apd.perspective import Scope, local_perspective, present_classes

IGNORE = masks.IGNORE_INDEX


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits and labels of any small shape, with any share of ignored pixels."""
    batch, classes = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    height, width = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    share, seed = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        3 * torch.randn(batch, classes, height, width, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.randint(classes, (batch, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < share] = IGNORE
    return student.requires_grad_(), teacher, labels


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, leaf, allow_unused=True)[0] if loss.requires_grad else None
    return torch.zeros_like(leaf) if found is None else found


@settings(max_examples=30, deadline=None, derandomize=True)
@given(scene=scenes(), temperature=st.sampled_from([0.5, 1.0, 4.0]), masked=st.booleans())
def test_pixel_kl_and_its_gradient_equal_the_slow_loop(
    scene: tuple[Tensor, Tensor, Tensor], temperature: float, masked: bool
) -> None:
    student, teacher, labels = scene
    valid = masks.valid_mask(labels) if masked else None
    fast = divergence.pixel_kl(student, teacher, valid, temperature=temperature)
    slow = reference.pixel_kl(student, teacher, labels if masked else None, temperature)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(fast, student), gradient(slow, student), rtol=1e-8, atol=1e-12)
    assert fast >= -1e-12
    narrow = divergence.pixel_kl(student.float(), teacher.float(), valid, temperature=temperature)
    torch.testing.assert_close(narrow, slow.float(), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(scene=scenes())
def test_cross_entropy_and_its_gradient_equal_the_slow_loop(scene: tuple[Tensor, Tensor, Tensor]) -> None:
    student, _, labels = scene
    fast, slow = supervised.cross_entropy(student, labels), reference.cross_entropy(student, labels)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient(fast, student), gradient(slow, student), rtol=1e-8, atol=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    old=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    new=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    align_corners=st.booleans(),
)
def test_resizing_equals_the_slow_loop(old: tuple[int, int], new: tuple[int, int], align_corners: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, *old, generator=generator, dtype=torch.float64)
    labels = torch.randint(256, (2, *old), generator=generator)
    for resize in (align.resize_logits, geometry.resize):
        resized = resize(maps, new, align_corners=align_corners)
        torch.testing.assert_close(resized, reference.resized(maps, new, align_corners), rtol=1e-10, atol=1e-12)
    assert torch.equal(geometry.resize_labels(labels, new), reference.nearest(labels, new))


def test_one_pixel_by_hand() -> None:
    # Teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 log(3/2) + 1/4 log(1/2) = 0.130812.
    teacher = torch.tensor([3.0, 1.0]).log().reshape(1, 2, 1, 1)
    student = torch.zeros(1, 2, 1, 1)
    assert divergence.pixel_kl(student, teacher).item() == pytest.approx(0.130812, abs=1e-6)
    assert supervised.cross_entropy(student, torch.zeros(1, 1, 1, dtype=torch.int64)).item() == pytest.approx(0.693147)


def test_gradient_of_pixel_kl_is_the_difference_of_the_distributions() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64)
    student.requires_grad_()
    valid = torch.rand(2, 3, 4) > 0.4
    divergence.pixel_kl(student, teacher, valid, temperature=3.0).backward()
    difference = (student / 3).softmax(1) - (teacher / 3).softmax(1)
    torch.testing.assert_close(student.grad, (3.0 / valid.sum() * difference * valid[:, None]).detach())


def test_cross_entropy_resizes_the_logits_and_not_the_labels() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randint(3, (2, 9, 11))
    target[:, :3] = IGNORE
    for align_corners in (False, True):
        large = reference.resized(logits, (9, 11), align_corners)
        expected = F.cross_entropy(large, target, ignore_index=IGNORE)
        torch.testing.assert_close(supervised.cross_entropy(logits, target, align_corners=align_corners), expected)


def test_cross_entropy_stays_exact_over_millions_of_pixels() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(1, 2, 1024, 1024), torch.randint(2, (1, 1024, 1024))
    exact = supervised.cross_entropy(logits.double(), target)
    torch.testing.assert_close(supervised.cross_entropy(logits, target).double(), exact, rtol=1e-6, atol=0)


def test_resizing_probabilities_is_something_else() -> None:
    torch.manual_seed(0)
    logits = 4 * torch.randn(1, 3, 4, 4)
    after = align.resize_logits(logits, (8, 8)).softmax(1)
    before = align.resize_logits(logits.softmax(1), (8, 8))
    assert (after - before).abs().max() > 0.05


def test_finest_takes_the_size_with_most_pixels_and_the_first_of_equals() -> None:
    assert geometry.finest([(4, 4), (8, 8), (2, 2)]) == (8, 8)
    assert geometry.finest([(2, 8), (4, 4), (8, 2)]) == (2, 8)


def test_labels_of_equal_size_are_not_copied_and_ignore_survives_resizing() -> None:
    target = torch.full((1, 6, 6), IGNORE)
    assert geometry.resize_labels(target, (6, 6)) is target
    assert bool((geometry.resize_labels(target, (5, 3)) == IGNORE).all())


@pytest.mark.parametrize("loss", ["cross_entropy", "pixel_kl", "masked_mean"])
def test_an_all_ignored_batch_gives_zero_with_a_graph(loss: str) -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    target = torch.full((2, 4, 4), IGNORE)
    valid = masks.valid_mask(target)
    value = {
        "cross_entropy": lambda: supervised.cross_entropy(logits, target),
        "pixel_kl": lambda: divergence.pixel_kl(logits, torch.randn(2, 3, 4, 4), valid),
        "masked_mean": lambda: masks.masked_mean(logits[:, 0], valid),
    }[loss]()
    assert value.item() == 0.0
    value.backward()
    assert logits.grad is not None and bool((logits.grad == 0).all())


def test_garbage_at_ignored_pixels_reaches_neither_value_nor_gradient() -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 4, requires_grad=True)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1] = False
    spoiled = values.detach().clone()
    spoiled[1] = torch.nan
    spoiled.requires_grad_()
    for leaf in (values, spoiled):
        masks.masked_mean(leaf**2, mask).backward()
    assert torch.equal(masks.masked_mean(spoiled, mask), masks.masked_mean(values, mask))
    assert torch.equal(values.grad[0], spoiled.grad[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student, teacher = (10 * torch.randn(2, 2, 150, 6, 6)).to(dtype)
    target = torch.randint(150, (2, 12, 12))
    kl = divergence.pixel_kl(student, teacher)
    ce = supervised.cross_entropy(student, target)
    assert kl.dtype == ce.dtype == torch.float32
    torch.testing.assert_close(kl, divergence.pixel_kl(student.float(), teacher.float()), rtol=0, atol=0)
    torch.testing.assert_close(ce, supervised.cross_entropy(student.float(), target), rtol=0, atol=0)


def test_autocast_is_off_inside_a_loss() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 16, 5, 5)
    members = masks.class_members(torch.randint(3, (2, 5, 5)), 3)
    arguments = {"scope": "batch", "cosine_scale": 10.0, "normalize": True}
    outside = local_perspective(features, members, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = local_perspective(features, members, **arguments)
        assert (features.flatten(2) @ features.flatten(2).mT).dtype == torch.bfloat16  # autocast is on out here
    exact = local_perspective(features.double(), members, **arguments)
    assert torch.equal(outside.logits, inside.logits) and inside.logits.dtype == torch.float32
    torch.testing.assert_close(inside.logits.double(), exact.logits, rtol=1e-5, atol=1e-5)


def test_in_float32_keeps_float64_and_what_is_no_tensor() -> None:
    @precision.in_float32
    def kinds(a: Tensor, b: Tensor, *, c: Tensor | None, d: int) -> list[object]:
        return [a.dtype, b.dtype, c if c is None else c.dtype, d]

    half, double = torch.zeros(1).half(), torch.zeros(1).double()
    assert kinds(half, double, c=None, d=3) == [torch.float32, torch.float64, None, 3]
    assert kinds(double, half, c=half > 0, d=3) == [torch.float64, torch.float32, torch.bool, 3]


def test_many_losses_can_be_compiled_each_on_its_own_with_and_without_autocast() -> None:
    from torch._dynamo.utils import counters

    def loss(number: int) -> Callable[[Tensor], Tensor]:
        @precision.in_float32
        def shifted(values: Tensor) -> Tensor:
            return (values + number).sum()

        return shifted

    several = [loss(number) for number in range(10)]

    def step(values: Tensor) -> list[Tensor]:
        found = []
        for one in several:
            torch._dynamo.graph_break()  # in a loop: this frame is given up, and every loss is compiled for itself
            found.append(one(values))
        return found

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(step, backend="eager")
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert [value.item() for value in compiled(torch.ones(2))] == [2 + 2 * number for number in range(10)]
    assert not counters["recompile_limit"], "all losses went by one code object"
    assert counters["frames"]["ok"] >= 10


def test_products_of_rounded_factors_are_summed_in_full() -> None:
    """Against float64, sums of 4096: rounded factors are off by 2^-9 each, which averages out."""
    first, second = torch.randn(64, 4096), torch.randn(4096, 64)
    exact = first.double() @ second.double()
    for half, tolerance in ((False, 2e-6), (True, 4e-3)):
        error = product(first, second, half=half).double() - exact
        assert error.norm() < tolerance * exact.norm()
    rounded = first.bfloat16().double() @ second.bfloat16().double()
    torch.testing.assert_close(product(first, second, half=True).double(), rounded, rtol=1e-5, atol=1e-3)


def test_unit_vectors_have_length_one_and_zero_vectors_no_gradient() -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    lengths = unit(vectors, dim=1)
    torch.testing.assert_close(lengths, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    (lengths * torch.randn(2, 2)).sum().backward()
    assert bool((vectors.grad[1] == 0).all()) and bool(vectors.grad[0].isfinite().all())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(scene=scenes(), scope=st.sampled_from(["batch", "image"]))
def test_prototypes_equal_the_slow_loop(scene: tuple[Tensor, Tensor, Tensor], scope: Scope) -> None:
    features, _, labels = scene
    classes = 6
    members = masks.class_members(labels, classes)
    present = present_classes(members, scope)
    found = local_perspective(features, members, scope=scope, cosine_scale=2.0, normalize=False).prototypes
    groups = [range(len(labels))] if scope == "batch" else [range(b, b + 1) for b in range(len(labels))]
    for group, images in enumerate(groups):
        expected = reference.prototypes(features, labels, images, normalize=False)
        assert present[group].nonzero().flatten().tolist() == list(expected)
        for c in range(classes):
            wanted = expected.get(c, torch.zeros_like(found[group, c]))
            torch.testing.assert_close(found[group, c], wanted, rtol=1e-9, atol=1e-11)
