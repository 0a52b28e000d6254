"""C2VKD: terms against the slow loop, and the invariants of its specification."""

import math
from pathlib import Path
from typing import Any

import _reference as reference
import _reference_c2vkd as slow
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from segdistill.config import to_dict
from segdistill.errors import UserError
from segdistill.methods import parse_method
from segdistill.methods.c2vkd import CNNToViT, channel_kl, patch_distance
from segdistill.methods.c2vkd.attention_pool import AttentionPool, load_attention_pool
from segdistill.methods.c2vkd.decoupling import blended_two_way
from segdistill.models.outputs import ModelInfo, Outputs

CLASSES, OURS, THEIRS = 5, 6, 8
STUDENT = ModelInfo(CLASSES, (4, 4, 4, OURS), (4, 8, 16, 32), 7, 4, 4, "vit")
TEACHER = ModelInfo(CLASSES, (4, 4, 4, THEIRS), (4, 8, 8, 8), 9, 8, 8, "cnn")
LABEL_FREE = ("visual", "patch", "linguistic")
HEADS, VECTOR = 4, 3


def build(student: ModelInfo = STUDENT, teacher: ModelInfo = TEACHER, **changes: Any) -> CNNToViT:
    torch.manual_seed(0)
    method, config = parse_method({"name": "c2vkd"} | changes, "methods.0")
    return method(config, student, teacher).double()


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(channels: int, size: tuple[int, int], seed: int = 0) -> Outputs:
    """Two images; stage 4 at ``size``, the last feature and the logits at twice that."""
    stages = [normal(2, 4, 2, 2, seed=seed).requires_grad_() for _ in range(3)]
    stages.append(2 * normal(2, channels, *size, seed=seed + 1))
    double = (2 * size[0], 2 * size[1])
    last = normal(2, 7 if channels == OURS else 9, *double, seed=seed + 2).requires_grad_()
    stages[3].requires_grad_()
    return Outputs((2 * normal(2, CLASSES, *double, seed=seed + 3)).requires_grad_(), tuple(stages), last)


def pair() -> tuple[Outputs, Outputs]:
    return draw(OURS, (2, 3)), draw(THEIRS, (3, 4), seed=10)


def labels(size: tuple[int, int] = (7, 9), *, ignored: float = 0.25) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    target = torch.randint(CLASSES, (2, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    return target


def with_stage4(outputs: Outputs, feature: Tensor) -> Outputs:
    return outputs._replace(features=(*outputs.features[:3], feature))


def rows(feature: Tensor) -> Tensor:
    return feature.movedim(1, -1).flatten(0, 2)


def two_way(s_y: Tensor, classes: int = CLASSES) -> Tensor:
    """Logits [1, K, 1, N] of N pixels with these probabilities of class 0, the others alike."""
    rest = ((1 - s_y) / (classes - 1)).log()
    return torch.stack([s_y.log(), *[rest] * (classes - 1)])[None, :, None]


def zeros(pixels: int) -> Tensor:
    return torch.zeros(1, 1, pixels, dtype=torch.int64)


# -- against the slow loop --------------------------------------------------------------------------------------------


def assert_same(fast: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(fast, expected, rtol=1e-9, atol=1e-13)
    gradients = (torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) for loss in (fast, expected))
    for found, wanted in zip(*gradients, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("kl_direction", ["teacher_to_student", "student_to_teacher"])
@pytest.mark.parametrize("upsample", [True, False])
def test_the_method_and_its_gradients_equal_the_slow_loop(kl_direction: str, upsample: bool) -> None:
    method = build(kl_direction=kl_direction, upsample=upsample)
    (student, teacher), target = pair(), labels()
    found = method(student, teacher, target)
    assert method.visual_projection is not None and method.linguistic_projection is not None
    ours, theirs = student.features[3], teacher.features[3]
    visual = reference.resized(method.visual_projection(ours), (3, 4))
    vector = method.linguistic_projection(ours.mean((2, 3))[:, :, None, None])[:, :, 0, 0]
    size = (7, 9) if upsample else (6, 8)
    logits = [reference.resized(outputs.logits, size) for outputs in (student, teacher)]
    expected = {
        "pdd": slow.pdd(*logits, reference.nearest(target, size)),
        "visual": slow.channel_kl(rows(visual), rows(theirs), kl_direction),
        "patch": slow.patch(visual, theirs),
        "linguistic": slow.channel_kl(vector, theirs.mean((2, 3)), kl_direction),
    }
    assert set(found) == set(expected)
    for term, value in expected.items():
        assert_same(found[term], value, [student.logits, ours, *method.parameters()])


@pytest.mark.parametrize("reading", ["mix", "literal", "dkd"])
@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (0.9, 0.1), (0.0, 1.0)])
def test_every_reading_of_the_decoupled_term_equals_the_slow_loop(reading: str, a: float, b: float) -> None:
    temperature = 3.0 if reading == "dkd" else 1.0
    method = build(pdd=reading, target_factor=a, other_factor=b, temperature=temperature, upsample=False)
    (student, teacher), target = pair(), labels((6, 8))
    size = (6, 8)
    expected = slow.pdd(
        reference.resized(student.logits, size, False),
        teacher.logits,
        target,
        reading=reading,
        a=a,
        b=b,
        temperature=temperature,
    )
    assert_same(method(student, teacher, target)["pdd"], expected, [student.logits])


def test_the_taps_are_those_of_the_config() -> None:
    method = build(student_tap="last_feature", teacher_tap="stage4")
    (student, teacher), target = pair(), labels()
    found = method(student, teacher, target)
    assert method.visual_projection is not None
    visual = reference.resized(method.visual_projection(student.last_feature), (3, 4), False)
    torch.testing.assert_close(
        found["visual"], slow.channel_kl(rows(visual), rows(teacher.features[3]), "teacher_to_student")
    )
    assert build(teacher_tap="last_feature").visual_width == 9


# -- visual and linguistic --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:reduction")
def test_the_weighted_terms_are_the_published_element_means() -> None:
    method, (student, teacher) = build(), pair()
    found = method(student, teacher, labels())
    assert method.visual_projection is not None and method.linguistic_projection is not None
    published = nn.KLDivLoss(reduction="mean", log_target=True)
    ours, theirs = student.features[3], teacher.features[3]
    visual = F.interpolate(method.visual_projection(ours), (3, 4), mode="bilinear")
    vector = method.linguistic_projection(F.adaptive_avg_pool2d(ours, 1)).flatten(1)
    for term, weight, s, t in (("visual", 0.1, visual, theirs), ("linguistic", 0.5, vector, theirs.mean((2, 3)))):
        expected = weight * published(s.log_softmax(1), t.log_softmax(1))
        torch.testing.assert_close(method.weights[term] * found[term], expected, rtol=1e-10, atol=0)


def test_the_reduction_changes_the_factors_and_not_the_raw_terms() -> None:
    (student, teacher), target = pair(), labels()
    by_element, by_location = build(), build(reduction="per_location")
    assert by_element.weights == pytest.approx(
        {"pdd": 1.0, "visual": 0.1 / THEIRS, "patch": 0.1, "linguistic": 0.5 / THEIRS}
    )
    assert by_location.weights == {"pdd": 1.0, "visual": 0.1, "patch": 0.1, "linguistic": 0.5}
    assert build(reduction="per_location", weight=2.0).weights["visual"] == 0.2
    assert by_element(student, teacher, target) == by_location(student, teacher, target)


def test_equal_features_give_zero_and_a_constant_per_location_changes_nothing() -> None:
    student, teacher = normal(2, 6, 3, 4), normal(2, 6, 3, 4, seed=1)
    for direction in ("teacher_to_student", "student_to_teacher"):
        plain = channel_kl(student, teacher, direction=direction)
        assert channel_kl(student, student, direction=direction).item() == 0.0 < plain.item()
        shifted = channel_kl(student + normal(2, 1, 3, 4, seed=2), teacher, direction=direction)
        torch.testing.assert_close(shifted, plain)
        uneven = channel_kl(student + normal(1, 6, 1, 1, seed=2), teacher, direction=direction)
        assert abs(uneven - plain) > 1e-3


def test_the_two_directions_are_each_others_with_the_sides_exchanged() -> None:
    student, teacher = normal(2, 6, 3, 4), normal(2, 6, 3, 4, seed=1)
    code = channel_kl(student, teacher, direction="teacher_to_student")
    torch.testing.assert_close(channel_kl(teacher, student, direction="student_to_teacher"), code)
    assert abs(channel_kl(student, teacher, direction="student_to_teacher") - code) > 1e-2


def test_a_label_changes_no_feature_term_and_a_batch_without_labels_keeps_them() -> None:
    method, (student, teacher) = build(), pair()
    plain = method(student, teacher, labels())
    without = method(student, teacher, torch.full((2, 7, 9), 255))
    assert all(torch.equal(plain[term], without[term]) for term in LABEL_FREE)
    assert without["pdd"].item() == 0.0 and plain["pdd"].item() > 0.0


# -- patch relation ---------------------------------------------------------------------------------------------------


SIZES = [(3, 1), (3, 4)]  # no more locations of two images than the 6 channels, whose pairs are formed; and more


def test_two_locations_by_hand() -> None:
    # Student vectors (3, 4) and (1, 0): of unit length (0.6, 0.8), (1, 0), centred (-0.1, 0.1), (0.5, -0.5). Their
    # relations, over C - 1 = 1: 0.02, 0.5 and twice -0.1. The teacher's two vectors are equal: (1, 0), so 0.5 each.
    student = torch.tensor([[3.0, 1.0], [4.0, 0.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
    teacher = torch.tensor([[2.0, 5.0], [0.0, 0.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
    expected = (0.48**2 + 2 * 0.6**2 + 0.0) / 4
    assert patch_distance(student, teacher).item() == pytest.approx(expected, rel=1e-12)
    # Three more copies of each location: more locations than channels, and the same mean over pairs.
    copies = (each.repeat(1, 1, 4, 1) for each in (student, teacher))
    assert patch_distance(*copies).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [(1, 2), *SIZES])
def test_the_relation_equals_the_slow_loop_with_and_without_pairs(size: tuple[int, int]) -> None:
    student, teacher = normal(2, 6, *size).requires_grad_(), normal(2, 6, *size, seed=1)
    assert_same(patch_distance(student, teacher), slow.patch(student, teacher), [student])


@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-3])
def test_without_pairs_float32_is_as_exact_as_with_them_however_near_the_sides_are(noise: float) -> None:
    teacher = normal(2, 6, 8, 8, seed=1).relu() + 0.1
    student = (teacher + noise * normal(2, 6, 8, 8)).requires_grad_()
    exact = patch_distance(student, teacher)
    (expected,) = torch.autograd.grad(exact, student)
    leaf = student.detach().float().requires_grad_()
    value = patch_distance(leaf, teacher.float())
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    (found,) = torch.autograd.grad(value, leaf)
    assert (found.double() - expected).norm().item() < 1e-3 * expected.norm().item()


@pytest.mark.parametrize("size", SIZES)
def test_relations_ignore_positive_scale_and_a_joint_permutation_but_not_a_shift(size: tuple[int, int]) -> None:
    student, teacher = normal(2, 6, *size), normal(2, 6, *size, seed=1)
    plain = patch_distance(student, teacher)
    assert patch_distance(student, student).item() < 1e-30 < plain.item()
    scale = normal(2, 1, *size, seed=2).exp()
    torch.testing.assert_close(patch_distance(3 * student, scale * teacher), plain)
    assert abs(patch_distance(student + 1.0, teacher) - plain) > 0.05 * plain
    count = 2 * size[0] * size[1]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))  # moves locations between the images
    moved = (rows(each)[order].unflatten(0, (2, *size)).movedim(-1, 1) for each in (student, teacher))
    torch.testing.assert_close(patch_distance(*moved), plain)


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-5), (True, 5e-3)])
@pytest.mark.parametrize("noise", [1.0, 0.03])
def test_rounded_products_leave_value_and_gradient_of_the_relation_within_half_a_percent_of_float64(
    half: bool, tolerance: float, noise: float
) -> None:
    theirs = torch.randn(2, 32, 12, 16).bfloat16().float()
    ours = (theirs + noise * torch.randn(2, 32, 12, 16)).bfloat16().float().requires_grad_()
    found = patch_distance(ours, theirs, half=half)
    exact_leaf = ours.detach().double().requires_grad_()
    exact = patch_distance(exact_leaf, theirs.double())
    assert abs(found.item() - exact.item()) < tolerance * exact.item()
    slopes, exact_slopes = (torch.autograd.grad(*pair)[0] for pair in ((found, ours), (exact, exact_leaf)))
    assert (slopes - exact_slopes).norm() < tolerance * exact_slopes.norm()


def test_products_are_rounded_where_features_come_in_half_precision_and_it_is_not_forbidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student, teacher = (with_stage4(one, 3 * one.features[3].detach()) for one in pair())
    asked = []
    for allowed, dtype in ((True, torch.float32), (True, torch.bfloat16), (False, torch.bfloat16)):
        method = build(half_products=allowed, pdd_weight=0.0, linguistic_weight=0.0).float()
        sides = [with_stage4(one, one.features[3].to(dtype)) for one in (student, teacher)]
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
            pytest.MonkeyPatch.context() as patch,
        ):
            patch.setattr("segdistill.methods.c2vkd.patch_distance", lambda *_, half, **__: asked.append(half))
            method(*sides, labels())
    assert asked == [False, True, False]


@pytest.mark.parametrize("size", SIZES)
def test_pairs_cross_the_borders_of_the_images(size: tuple[int, int]) -> None:
    student, teacher = normal(2, 6, *size), normal(2, 6, *size, seed=1)
    alone = [patch_distance(student[i : i + 1], teacher[i : i + 1]) for i in range(2)]
    assert abs(patch_distance(student, teacher) - torch.stack(alone).mean()) > 1e-4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_locations_relate_to_none_and_give_finite_gradients(dtype: torch.dtype, size: tuple[int, int]) -> None:
    student, teacher = normal(2, 6, *size).to(dtype), normal(2, 6, *size, seed=1).to(dtype)
    student[:, :, 0], teacher[0] = 0.0, 0.0
    student.requires_grad_()
    loss = patch_distance(student, teacher)
    loss.backward()
    assert bool(loss.isfinite()) and student.grad is not None
    assert bool((student.grad[:, :, 0] == 0).all()) and 0 < float(student.grad.abs().max()) < 1


# -- the decoupled term -----------------------------------------------------------------------------------------------


def test_the_blend_is_never_negative_and_zero_only_halfway_between_teacher_and_label() -> None:
    t_y = torch.linspace(0.01, 0.99, 40, dtype=torch.float64)
    best = (1 + t_y) / 2
    values = {
        shift: torch.stack([
            blended_two_way(two_way(s[None]), two_way(t[None]), zeros(1))
            for s, t in zip(best + shift * (1 - best), t_y, strict=True)
        ])
        for shift in (-0.5, -0.05, 0.0, 0.05, 0.5)
    }  # fmt: skip
    assert values[0.0].abs().max().item() < 1e-15
    assert all(bool((values[shift] > 1e-7).all()) for shift in values if shift)
    # at the teacher's own distribution it is not zero: the label corrects the teacher
    assert blended_two_way(two_way(t_y), two_way(t_y), zeros(40)).item() > 0.05


@pytest.mark.parametrize(("t_y", "optimum"), [(1 - 1e-12, 1.0), (1e-12, 0.5), (0.6, 0.8)])
def test_a_right_teacher_is_followed_and_a_wrong_one_half_corrected(t_y: float, optimum: float) -> None:
    grid = torch.linspace(0.01, 1 - 1e-6, 199, dtype=torch.float64)
    teacher = two_way(torch.tensor([t_y], dtype=torch.float64))
    values = [blended_two_way(two_way(s[None]), teacher, zeros(1)).item() for s in grid]
    assert grid[min(range(len(grid)), key=values.__getitem__)].item() == pytest.approx(optimum, abs=5e-3)


def test_a_certain_teacher_counts_in_full_and_is_not_cut_off() -> None:
    """s = (1/2, 1/2), q = (1, e^-40 / 2): (1/2 log(1/2) + 1/2 log(e^40)) / 2 = 9.83; cut off at 1e-8 it is 4.26."""
    student, teacher = (torch.tensor([zs]).double()[:, :, None, None] for zs in ((0.0, 0.0), (40.0, 0.0)))
    found = blended_two_way(student, teacher, zeros(1))
    assert found.item() == pytest.approx((math.log(1 / 2) + 40) / 4)


def test_the_literal_form_is_lower_by_half_a_log_2_with_the_same_gradient_at_equal_factors() -> None:
    student, teacher = (2 * normal(2, CLASSES, 4, 6)).requires_grad_(), normal(2, CLASSES, 4, 6, seed=1)
    target = labels((4, 6))
    forms = [blended_two_way(student, teacher, target, normalized=normalized) for normalized in (True, False)]
    torch.testing.assert_close(forms[0] - forms[1], torch.tensor(0.5 * math.log(2), dtype=torch.float64))
    gradients = [torch.autograd.grad(form, student)[0] for form in forms]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-15)
    uneven = [
        blended_two_way(student, teacher, target, target_factor=0.9, other_factor=0.1, normalized=normalized)
        for normalized in (True, False)
    ]
    gradients = [torch.autograd.grad(form, student)[0] for form in uneven]
    assert float((gradients[0] - gradients[1]).abs().max()) > 1e-3


@pytest.mark.parametrize(("s_y", "gradient"), [(0.05, -0.103), (1 / 150, -0.021), (1e-3, -0.004)])
def test_the_gradient_at_the_labelled_logit_is_the_documented_one_and_vanishes_where_the_student_is_wrong(
    s_y: float, gradient: float
) -> None:
    student = two_way(torch.tensor([s_y], dtype=torch.float64)).requires_grad_()
    blended_two_way(student, two_way(torch.tensor([0.6], dtype=torch.float64)), zeros(1)).backward()
    assert student.grad is not None
    found = student.grad[0, 0, 0, 0].item()
    assert found == pytest.approx(gradient, abs=6e-4)
    formula = 0.5 * s_y * (1 - s_y) * (math.log(s_y / 0.8) - math.log((1 - s_y) / 0.2))
    assert found == pytest.approx(formula, rel=1e-9)


def test_the_order_of_the_teachers_other_classes_does_not_matter_to_the_blend() -> None:
    student, teacher = normal(1, CLASSES, 1, 6).requires_grad_(), normal(1, CLASSES, 1, 6, seed=1)
    renamed = teacher[:, [0, 3, 1, 4, 2]]
    plain, other = (blended_two_way(student, each, zeros(6)) for each in (teacher, renamed))
    torch.testing.assert_close(other, plain, rtol=1e-12, atol=0)


def test_other_logits_are_pushed_in_proportion_to_their_probability() -> None:
    student = normal(1, CLASSES, 1, 1).requires_grad_()
    blended_two_way(student, normal(1, CLASSES, 1, 1, seed=1), zeros(1)).backward()
    assert student.grad is not None
    ratios = student.grad[0, 1:, 0, 0] / student.detach().softmax(1)[0, 1:, 0, 0]
    torch.testing.assert_close(ratios, ratios[:1].expand(CLASSES - 1), rtol=1e-9, atol=0)
    torch.testing.assert_close(student.grad.sum(), torch.zeros((), dtype=torch.float64))


@pytest.mark.parametrize("reading", ["mix", "literal", "dkd"])
def test_ignored_pixels_get_no_gradient_and_all_ignored_gives_zero_with_a_graph(reading: str) -> None:
    method, (student, teacher), target = build(pdd=reading, upsample=False), pair(), labels((6, 8))
    student = student._replace(logits=normal(2, CLASSES, 6, 8, seed=3).requires_grad_())
    (gradient,) = torch.autograd.grad(method(student, teacher, target)["pdd"], student.logits)
    ignored = (target == 255)[:, None].expand_as(gradient)
    assert bool((gradient[ignored] == 0).all()) and bool((gradient[~ignored] != 0).all())
    none = method(student, teacher, torch.full_like(target, 255))["pdd"]
    (gradient,) = torch.autograd.grad(none, student.logits)
    assert none.item() == 0.0 and bool((gradient == 0).all())


def test_the_dkd_reading_is_zero_where_student_equals_teacher() -> None:
    method, (student, teacher) = build(pdd="dkd"), pair()
    same = student._replace(logits=teacher.logits)
    assert abs(method(same, teacher, labels())["pdd"].item()) < 1e-15 < method(student, teacher, labels())["pdd"].item()


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("student_margin", [-1e4, -120.0, 120.0, 1e4])
@pytest.mark.parametrize("teacher_margin", [-1e4, -120.0, 120.0, 1e4])
def test_extreme_logits_give_the_float64_value_and_finite_gradients(
    normalized: bool, student_margin: float, teacher_margin: float
) -> None:
    base = normal(1, CLASSES, 1, 1)
    student, teacher = base.clone(), normal(1, CLASSES, 1, 1, seed=1)
    student[:, 0] += student_margin
    teacher[:, 0] += teacher_margin
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = student.to(dtype).requires_grad_()
        loss = blended_two_way(leaf, teacher.to(dtype), zeros(1), normalized=normalized)
        loss.backward()
        assert bool(loss.isfinite()) and leaf.grad is not None and bool(leaf.grad.isfinite().all())
        found.append((loss.double(), leaf.grad.double()))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)  # float32 holds logits of 1e4 to 1e-3


# -- the attention pool -----------------------------------------------------------------------------------------------


def pool_tensors(width: int = THEIRS, vector: int = VECTOR, side: int = 3) -> dict[str, Tensor]:
    tensors = {"positional_embedding": normal(side * side + 1, width, seed=20)}
    for seed, name in enumerate(("q_proj", "k_proj", "v_proj", "c_proj")):
        height = vector if name == "c_proj" else width
        tensors[f"{name}.weight"] = 0.5 * normal(height, width, seed=21 + seed)
        tensors[f"{name}.bias"] = normal(height, seed=31 + seed)
    return {key: value.float() for key, value in tensors.items()}


def saved(folder: Path, tensors: dict[str, Tensor], prefix: str = "") -> Path:
    save_file({prefix + key: value for key, value in tensors.items()}, folder / "pool.safetensors")
    return folder / "pool.safetensors"


@pytest.mark.parametrize("size", [(3, 3), (2, 5), (6, 6), (1, 1)])
def test_the_pool_is_torchs_attention_asked_by_the_mean_token(size: tuple[int, int], tmp_path: Path) -> None:
    tensors = pool_tensors()
    pool = load_attention_pool(saved(tmp_path, tensors), HEADS).double()
    wide = {key: value.double() for key, value in tensors.items()}
    feature = normal(2, THEIRS, *size)
    grid = wide["positional_embedding"][1:].T.reshape(1, THEIRS, 3, 3)
    grid = F.interpolate(grid, size, mode="bilinear", align_corners=False)[0].flatten(1).T
    positions = torch.cat([wide["positional_embedding"][:1], grid])[:, None]  # [N, 1, C]
    cells = feature.flatten(2).permute(2, 0, 1)
    tokens = torch.cat([cells.mean(0, keepdim=True), cells]) + positions  # [N, B, C]
    expected, _ = F.multi_head_attention_forward(
        query=tokens, key=tokens, value=tokens, embed_dim_to_check=THEIRS, num_heads=HEADS, in_proj_weight=None,
        in_proj_bias=torch.cat([wide["q_proj.bias"], wide["k_proj.bias"], wide["v_proj.bias"]]), bias_k=None,
        bias_v=None, add_zero_attn=False, dropout_p=0.0, out_proj_weight=wide["c_proj.weight"],
        out_proj_bias=wide["c_proj.bias"], use_separate_proj_weight=True, training=False, need_weights=False,
        q_proj_weight=wide["q_proj.weight"], k_proj_weight=wide["k_proj.weight"], v_proj_weight=wide["v_proj.weight"],
    )  # fmt: skip
    torch.testing.assert_close(pool(feature), expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slow.attention_pool(feature, wide, HEADS), expected[0], rtol=1e-10, atol=1e-12)


def clip(folder: Path, **changes: Any) -> CNNToViT:
    path = saved(folder, pool_tensors(), "visual.attnpool.")
    return build(pool="clip", pool_weights=str(path), pool_heads=HEADS, **changes)


def test_the_linguistic_term_with_the_pool_equals_the_slow_loop(tmp_path: Path) -> None:
    method, (student, teacher) = clip(tmp_path), pair()
    assert method.linguistic_projection is not None
    vector = method.linguistic_projection(student.features[3].mean((2, 3))[:, :, None, None])[:, :, 0, 0]
    wide = {key: value.double() for key, value in pool_tensors().items()}
    answer = slow.attention_pool(teacher.features[3], wide, HEADS)
    expected = slow.channel_kl(vector, answer, "teacher_to_student")
    found = method(student, teacher, labels())
    assert_same(found["linguistic"], expected, [student.features[3], *method.parameters()])
    assert method.weights["linguistic"] == pytest.approx(0.5 / VECTOR)
    assert method.weights["visual"] == pytest.approx(0.1 / THEIRS)


@pytest.mark.parametrize("pool", ["gap", "clip"])
def test_both_visual_features_go_through_one_frozen_pool_as_in_the_released_script(pool: str, tmp_path: Path) -> None:
    method = clip(tmp_path, student_vector="pool") if pool == "clip" else build(student_vector="pool")
    assert method.linguistic_projection is None and method.visual_projection is not None
    student, teacher = pair()
    ours, theirs = student.features[3], teacher.features[3]
    visual = F.interpolate(method.visual_projection(ours), theirs.shape[-2:], mode="bilinear")
    vectors = [features.mean((2, 3)) if method.pool is None else method.pool(features) for features in (visual, theirs)]
    expected = slow.channel_kl(*vectors, "teacher_to_student")
    assert_same(method(student, teacher, labels())["linguistic"], expected, [ours, *method.parameters()])


def test_with_the_pool_on_both_sides_the_linguistic_term_alone_builds_the_visual_projection() -> None:
    method = build(student_vector="pool", pdd_weight=0.0, visual_weight=0.0, patch_weight=0.0)
    assert set(method.state_dict()) == {"visual_projection.weight"} and set(method(*pair(), labels())) == {"linguistic"}


def test_the_pool_is_frozen_and_neither_trained_nor_checkpointed_but_moves_along(tmp_path: Path) -> None:
    method, (student, teacher) = clip(tmp_path), pair()
    assert method.pool is not None and not list(method.pool.parameters())
    assert set(method.state_dict()) == {"visual_projection.weight", "linguistic_projection.weight"}
    assert {name for name, _ in method.named_parameters()} == set(method.state_dict())
    before = [buffer.clone() for buffer in method.pool.buffers()]
    method.train()
    sum(method(student, teacher, labels()).values()).backward()
    assert all(not buffer.requires_grad and buffer.grad is None for buffer in method.pool.buffers())
    assert all(torch.equal(old, new) for old, new in zip(before, method.pool.buffers(), strict=True))
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in method.parameters())
    assert all(leaf.grad is None for leaf in (teacher.logits, *teacher.features, teacher.last_feature))
    assert {buffer.device.type for buffer in method.to("meta").pool.buffers()} == {"meta"}


def test_a_restored_method_takes_the_pool_from_the_file(tmp_path: Path) -> None:
    method, (student, teacher) = clip(tmp_path), pair()
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1)
    restored = clip(tmp_path)
    restored.load_state_dict(method.state_dict())
    assert restored(student, teacher, labels()) == method(student, teacher, labels())


def test_the_projection_into_the_pools_space_is_built_even_where_widths_agree(tmp_path: Path) -> None:
    path = saved(tmp_path, pool_tensors(vector=OURS))
    method = build(pool="clip", pool_weights=str(path), pool_heads=HEADS)
    assert isinstance(method.linguistic_projection, nn.Conv2d) and method.linguistic_projection.bias is None
    assert not list(build(TEACHER).parameters())  # the features' projections are not


def test_a_whole_clip_in_half_precision_loads_by_its_prefix(tmp_path: Path) -> None:
    tensors = {"visual.attnpool." + key: value.half() for key, value in pool_tensors().items()}
    tensors |= {"positional_embedding": torch.zeros(77, 5).half(), "visual.conv1.weight": torch.zeros(2, 3, 3, 3)}
    pool = load_attention_pool(saved(tmp_path, tensors), HEADS)
    assert isinstance(pool, AttentionPool) and (pool.in_channels, pool.out_channels) == (THEIRS, VECTOR)
    assert {buffer.dtype for buffer in pool.buffers()} == {torch.float32}


def spoil(key: str, value: Tensor | None) -> dict[str, Tensor]:
    tensors = pool_tensors()
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    return tensors


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (spoil("k_proj.bias", None), r"key 'k_proj\.bias' of the attention pool is missing"),
        (spoil("k_proj.scale", torch.zeros(2)), r"key 'k_proj\.scale' is not in an attention pool"),
        (spoil("v_proj.weight", torch.zeros(8, 7)), r"key 'v_proj\.weight' has shape \(8, 7\), .* needs \(8, 8\)"),
        (spoil("c_proj.weight", torch.zeros(4, 8)), r"key 'c_proj\.weight' has shape \(4, 8\), .* needs \(3, 8\)"),
        (spoil("positional_embedding", torch.zeros(9, 8)), r"key 'positional_embedding' has shape \(9, 8\)"),
        (spoil("q_proj.bias", torch.full((8,), math.nan)), r"key 'q_proj\.bias' holds values that are no finite"),
        (spoil("q_proj.bias", torch.zeros(8, dtype=torch.int64)), r"key 'q_proj\.bias' holds values that are no"),
    ],
)
def test_wrong_weights_are_refused_by_file_and_key(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"pool\.safetensors: {message}"):
        load_attention_pool(saved(tmp_path, tensors), HEADS)
    with pytest.raises(UserError, match=r"key 'visual\.attnpool\."):
        load_attention_pool(saved(tmp_path, tensors, "visual.attnpool."), HEADS)


def test_files_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    for name, content, message in (
        ("pool.pt", b"", r"pool\.pt: not a \.safetensors file"),
        ("cut.safetensors", b"\x08\x00\x00", r"cut\.safetensors: not a readable safetensors file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_attention_pool(tmp_path / name, HEADS)
    with pytest.raises(UserError, match=r"absent\.safetensors: no such file"):
        load_attention_pool(tmp_path / "absent.safetensors", HEADS)
    with pytest.raises(UserError, match="8 wide, which 3 heads do not divide"):
        load_attention_pool(saved(tmp_path, pool_tensors()), 3)


def test_a_teacher_of_another_width_than_the_pool_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"takes 8 channels and the teacher's last_feature has 9: a pool fits only"):
        clip(tmp_path, teacher_tap="last_feature")
    assert clip(tmp_path, teacher_tap="last_feature", linguistic_weight=0.0).pool is None


# -- switches ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_released_codes_with_the_fallback_pool() -> None:
    released = {
        "weight": 1.0, "ramp": 0.0, "pdd_weight": 1.0, "visual_weight": 0.1, "patch_weight": 0.1,
        "linguistic_weight": 0.5, "pdd": "mix", "target_factor": 0.5, "other_factor": 0.5, "temperature": 1.0,
        "upsample": True, "kl_direction": "teacher_to_student", "reduction": "element_mean", "student_tap": "stage4",
        "teacher_tap": "stage4", "student_vector": "projection", "pool": "gap", "pool_weights": None, "pool_heads": 32,
        "half_products": True,
    }  # fmt: skip
    assert to_dict(parse_method({"name": "c2vkd"}, "methods.0")[1]) == {"name": "c2vkd"} | released


def test_at_the_published_widths_the_factors_are_the_documented_ones() -> None:
    teacher = ModelInfo(19, (256, 512, 1024, 2048), (4, 8, 16, 16), 256, 4, 4, "cnn")
    student = ModelInfo(19, (32, 64, 160, 256), (4, 8, 16, 32), 256, 4, 4, "vit")
    method = build(student, teacher)
    assert method.weights["visual"] == pytest.approx(4.9e-5, rel=0.01)
    assert sum(parameter.numel() for parameter in method.parameters()) == 2 * 256 * 2048


@pytest.mark.parametrize("term", ["pdd", *LABEL_FREE])
def test_each_term_works_alone_and_builds_only_its_own(term: str) -> None:
    others = {f"{name}_weight": 0.0 for name in ("pdd", *LABEL_FREE) if name != term}
    method, (student, teacher) = build(**others), pair()
    complete = build()(student, teacher, labels())[term]
    assert set(method(student, teacher, labels())) == set(method.weights) == {term}
    expected = {"pdd": set(), "linguistic": {"linguistic_projection.weight"}}.get(term, {"visual_projection.weight"})
    assert {name for name, _ in method.named_parameters()} == expected
    if term == "pdd":
        assert torch.equal(method(student, teacher, labels())[term], complete)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 4.0}, "temperature 4.0 belongs to pdd: dkd; pdd: mix has none"),
        ({"pool": "clip"}, "pool: clip needs pool_weights"),
        ({"pool_weights": "pool.safetensors"}, r"pool_weights pool\.safetensors belongs to pool: clip"),
    ],
)
def test_settings_without_effect_or_without_what_they_need_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**changes)


def test_a_single_class_is_refused_as_there_are_no_others() -> None:
    one = ModelInfo(1, (4, 4, 4, OURS), (4, 8, 16, 32), 7, 4, 4, "vit")
    with pytest.raises(UserError, match="pdd parts the labelled class from the others and needs two, not 1"):
        build(one, one)
    assert "pdd" not in build(one, one, pdd_weight=0.0).weights


def test_one_cell_and_one_image_give_finite_terms() -> None:
    method = build()
    outputs = [
        Outputs(normal(1, CLASSES, 1, 1), (*[normal(1, 4, 1, 1)] * 3, normal(1, width, 1, 1)), normal(1, 7, 1, 1))
        for width in (OURS, THEIRS)
    ]
    found = method(*outputs, torch.zeros(1, 3, 3, dtype=torch.int64))
    assert all(bool(loss.isfinite()) for loss in found.values())
