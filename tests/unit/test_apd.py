"""Adaptive perspective distillation: terms against the slow loop, and the invariants of its specification."""

import math
from dataclasses import replace
from itertools import product
from typing import Any

import _reference as reference
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segdistill.config import to_dict
from segdistill.errors import UserError
from segdistill.losses.masks import class_members
from segdistill.methods import parse_method
from segdistill.methods.apd import AdaptivePerspective
from segdistill.models.outputs import ModelInfo, Outputs

CLASSES = 6
STUDENT, TEACHER = (ModelInfo(CLASSES, (4,) * 4, (4, 8, 16, 32), width, 8, 8, "cnn") for width in (5, 7))
IDENTITY = {"student_head": "identity", "teacher_head": "identity"}
LOCAL = ("local", "prototype")


def build(student: ModelInfo = STUDENT, teacher: ModelInfo = TEACHER, **changes: Any) -> AdaptivePerspective:
    torch.manual_seed(0)
    narrow = {"name": "apd", "hidden_channels": 9, "out_channels": 8}
    method, config = parse_method(narrow | changes, "methods.0")
    return method(config, student, teacher).double()


def draw(channels: int, size: tuple[int, int] = (4, 5), seed: int = 0) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, CLASSES, *size, generator=generator, dtype=torch.float64)
    last = torch.randn(3, channels, *size, generator=generator, dtype=torch.float64)
    return Outputs(logits.requires_grad_(), (), last.requires_grad_())


def labels(size: tuple[int, int] = (13, 17)) -> Tensor:
    """Classes 0, 2 and 5 in other mixtures an image, the others absent; a band without label."""
    generator = torch.Generator().manual_seed(4)
    palette = torch.tensor([[0, 2], [2, 5], [5, 5]])
    choice = torch.randint(2, (3, *size), generator=generator)
    target = palette.gather(1, choice.flatten(1)).reshape(choice.shape)
    target[:, 4:8] = 255
    return target


def with_last(outputs: Outputs, last: Tensor) -> Outputs:
    return outputs._replace(last_feature=last)


# -- against the slow loop --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "masked", "reduction"), product(["batch", "image"], [False, True], ["element_mean", "per_pixel"])
)
@pytest.mark.parametrize("normalize", [True, False])
def test_local_terms_and_their_gradients_equal_the_slow_loop(
    scope: str, masked: bool, reduction: str, normalize: bool
) -> None:
    method = build(scope=scope, mask_ignore_local=masked, reduction=reduction, normalize=normalize, cosine_scale=7.0)
    student, teacher, target = draw(5), draw(7, seed=1), labels()
    fast = method(student, teacher, target)
    assert method.student_head is not None and method.teacher_head is not None
    slow = reference.apd_local(
        method.student_head(student.last_feature),
        method.teacher_head(teacher.last_feature.detach()),
        target,
        CLASSES,
        scale=7.0,
        scope=scope,
        masked=masked,
        element_mean=reduction == "element_mean",
        normalize=normalize,
    )
    leaves = [student.last_feature, *method.parameters()]
    for term, expected in slow.items():
        torch.testing.assert_close(fast[term], expected, rtol=1e-9, atol=1e-12)
        gradients = (
            torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) for loss in (fast[term], expected)
        )
        for found, wanted in zip(*gradients, strict=True):
            assert (found is None) == (wanted is None)
            if found is not None:
                torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-11)


def test_without_normalisation_prototypes_keep_their_length_worked_by_hand() -> None:
    """Two pixels, two classes, cosine_scale 1. Student (2, 0) and (0, 1), teacher (1, 0) and (0, 3), prototypes alike.

    Local logits at the first pixel: student (4, 0), teacher (1, 0); at the second: student (0, 1), teacher (0, 9).
    The prototypes' products are 2 and 3, so the prototype term is 0.5 * mean(1 - 2, 1 - 3) = -0.75.
    """
    two = replace(STUDENT, last_channels=2)
    method = build(two, two, normalize=False, cosine_scale=1.0, global_weight=0.0, **IDENTITY)
    student, teacher = (
        Outputs(torch.empty(0), (), torch.tensor(pixels).T[None, :, None])
        for pixels in ([[2.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 3.0]])
    )
    found = method(student, teacher, torch.tensor([[[0, 1]]]))

    def kl(teacher: float, student: float) -> float:
        t, s = 1 / (1 + math.exp(-teacher)), 1 / (1 + math.exp(-student))
        return t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s))

    assert found["local"].item() == pytest.approx((kl(1, 4) + kl(9, 1)) / 2 / 2)
    assert found["prototype"].item() == pytest.approx(-0.75)


def test_an_image_without_label_is_left_out_of_prototypes_per_image() -> None:
    method, student, teacher, target = build(scope="image"), draw(5), draw(7, seed=1), labels()
    target[1] = 255
    assert method.student_head is not None and method.teacher_head is not None
    slow = reference.apd_local(
        method.student_head(student.last_feature),
        method.teacher_head(teacher.last_feature),
        target,
        CLASSES,
        scope="image",
    )
    fast = method(student, teacher, target)
    for term in slow:
        torch.testing.assert_close(fast[term], slow[term], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("upsample", "masked"), product([True, False], repeat=2))
def test_the_global_term_equals_the_slow_loop(upsample: bool, masked: bool) -> None:
    method = build(upsample=upsample, mask_ignore_global=masked, temperature=2.0)
    student, teacher, target = draw(5, (3, 4)), draw(7, seed=1), labels()
    size = (13, 17) if upsample else (4, 5)
    slow = reference.pixel_kl(
        reference.resized(student.logits, size, align_corners=True),
        reference.resized(teacher.logits, size, align_corners=True),
        reference.nearest(target, size) if masked else None,
        temperature=2.0,
    )
    torch.testing.assert_close(method(student, teacher, target)["global"], slow, rtol=1e-10, atol=0)


def test_features_of_other_size_are_brought_to_the_teachers_size_before_the_head() -> None:
    method, target = build(), labels()
    teacher = draw(7, seed=1)
    for size in ((2, 3), (8, 10)):
        student = draw(5, size)
        fitted = with_last(student, reference.resized(student.last_feature, (4, 5), align_corners=True))
        found, expected = method(student, teacher, target), method(fitted, teacher, target)
        for term in LOCAL:
            torch.testing.assert_close(found[term], expected[term])


def test_two_pixels_by_hand() -> None:
    # Unit features e1, e2 with labels 0, 1: prototypes e1, e2, so the student's cosines are (1, 0) and (0, 1).
    # The teacher sees one direction for both: cosines (1, 1), Q = (1/2, 1/2). With scale 1 the student's Q is
    # (e, 1) / (e + 1) = (0.7311, 0.2689) and KL = log(1/2) - (log 0.7311 + log 0.2689) / 2 = 0.12011 at each pixel.
    # Element mean: 0.12011 / 2. Prototypes: <e1, e1> = 1 and <e2, e1> = 0, so 0.5 * mean(0, 1) = 0.25.
    info = ModelInfo(2, (2,) * 4, (4, 8, 16, 32), 2, 4, 4, "cnn")
    method = build(info, info, **IDENTITY, cosine_scale=1.0)
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
    teacher = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
    found = method(Outputs(student, (), 3 * student), Outputs(student, (), teacher), torch.tensor([[[0, 1]]]))
    assert found["local"].item() == pytest.approx(0.120115 / 2, abs=1e-6)
    assert found["prototype"].item() == pytest.approx(0.25)


def test_the_teacher_heads_loss_has_logit_zero_for_absent_classes() -> None:
    method = build()
    teacher, target = draw(7, seed=1), labels((4, 5))
    assert method.teacher_head is not None
    vectors = F.normalize(method.teacher_head(teacher.last_feature), dim=1).movedim(1, -1)
    rows, flat = vectors.reshape(-1, 8), target.reshape(-1)
    present = [0, 2, 5]
    cosines = torch.stack([rows @ F.normalize(rows[flat == c].mean(0), dim=0) for c in present], 1)
    full = torch.zeros(len(rows), CLASSES, dtype=torch.float64)
    full[:, present] = 10 * cosines
    expected = F.cross_entropy(full, flat, ignore_index=255)
    torch.testing.assert_close(method(draw(5), teacher, target)["teacher_head"], expected)


# -- gradients: table b.5 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["global", "local", "prototype", "teacher_head"])
def test_each_term_trains_what_the_table_says_and_nothing_else(term: str) -> None:
    method, student, teacher = build(), draw(5), draw(7, seed=1)
    method(student, teacher, labels())[term].backward()
    assert method.student_head is not None and method.teacher_head is not None
    trained = {
        "student logits": [student.logits],
        "student feature": [student.last_feature],
        "teacher": [teacher.logits, teacher.last_feature],
        "student head": list(method.student_head.parameters()),
        "teacher head": list(method.teacher_head.parameters()),
    }
    expected = {
        "global": {"student logits"},
        "local": {"student feature", "student head"},
        "prototype": {"student feature", "student head"},
        "teacher_head": {"teacher head"},
    }[term]
    for name, leaves in trained.items():
        for leaf in leaves:
            assert (leaf.grad is not None) == (name in expected), name
            assert leaf.grad is None or bool((leaf.grad != 0).any()), name


def test_one_backward_pass_of_the_sum_equals_the_released_codes_two_steps() -> None:
    def train(joint: bool) -> list[Tensor]:
        method, student, teacher, target = build(), draw(5), draw(7, seed=1), labels()
        ((own, settings),) = method.own_optimizers().values()
        assert settings == {"name": "adam", "lr": 1e-5, "betas": [0.9, 0.99], "weight_decay": 0.0}
        adam = torch.optim.Adam(own, lr=1e-2, betas=(0.9, 0.99))
        sgd = torch.optim.SGD([student.last_feature, student.logits, *method.helper_parameters("student")], lr=0.1)
        for _ in range(3):
            found = method(student, teacher, target)
            adam.zero_grad()
            sgd.zero_grad()
            weighted = {term: method.weights[term] * loss for term, loss in found.items()}
            if joint:
                sum(weighted.values()).backward()
                sgd.step()
                adam.step()
            else:
                weighted.pop("teacher_head").backward()
                adam.step()
                sum(weighted.values()).backward()
                sgd.step()
        return [student.last_feature, student.logits, *method.parameters()]

    for together, apart in zip(train(joint=True), train(joint=False), strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-14)


def test_the_teacher_head_stays_as_drawn_when_its_loss_is_off() -> None:
    method = build(teacher_head_weight=0.0)
    assert method.teacher_head is not None
    assert "teacher_head" not in method.weights and method.own_optimizers() == {}
    assert not any(parameter.requires_grad for parameter in method.teacher_head.parameters())
    student, teacher = draw(5), draw(7, seed=1)
    sum(method(student, teacher, labels()).values()).backward()
    assert all(parameter.grad is None for parameter in method.teacher_head.parameters())
    assert student.last_feature.grad is not None and teacher.last_feature.grad is None


# -- invariants: section (g) ------------------------------------------------------------------------------------------


def test_identical_features_and_heads_leave_nothing_to_learn() -> None:
    method = build(STUDENT, STUDENT)
    assert method.student_head is not None and method.teacher_head is not None
    method.teacher_head.load_state_dict(method.student_head.state_dict())
    outputs = draw(5)
    found = method(outputs, outputs, labels())
    assert all(abs(found[term].item()) < 1e-7 for term in LOCAL)


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_with_identity_heads_the_scale_of_a_feature_does_not_matter(scope: str) -> None:
    method, target = build(STUDENT, STUDENT, **IDENTITY, scope=scope), labels()
    student, teacher = draw(5), draw(5, seed=1)
    plain = method(student, teacher, target)
    per_pixel = 0.1 + torch.rand(3, 1, 4, 5, dtype=torch.float64)
    for one, other in ((100.0, 1.0), (1.0, 0.01), (per_pixel, 1.0)):
        scaled = method(
            with_last(student, student.last_feature * one), with_last(teacher, teacher.last_feature * other), target
        )
        for term in LOCAL:
            torch.testing.assert_close(scaled[term], plain[term], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_labels_of_255_alone_give_zeros_and_never_a_prototype(scope: str) -> None:
    method, student = build(scope=scope), draw(5)
    target = torch.full((3, 13, 17), 255)
    found = method(student, draw(7, seed=1), target)
    assert set(found) == {"global", "local", "prototype", "teacher_head"}
    assert all(loss.item() == 0 and loss.requires_grad for loss in found.values())
    assert not bool(class_members(target, 256)[:, :255].any())
    sum(found.values()).backward()
    assert student.last_feature.grad is not None and bool((student.last_feature.grad == 0).all())


@pytest.mark.parametrize("scope", ["batch", "image"])
def test_renaming_the_classes_changes_nothing_local(scope: str) -> None:
    method, student, teacher, target = build(scope=scope), draw(5), draw(7, seed=1), labels()
    names = torch.tensor([3, 5, 0, 1, 2, 4])
    renamed = torch.where(target == 255, 255, names[target.clamp_max(CLASSES - 1)])
    plain, other = method(student, teacher, target), method(student, teacher, renamed)
    for term in (*LOCAL, "teacher_head"):
        torch.testing.assert_close(other[term], plain[term])


def test_features_at_ignored_pixels_shape_no_prototype_but_are_distilled_unless_masked() -> None:
    target = labels((4, 5))
    target[:, 1] = 255
    ignored = (target == 255)[:, None]
    student, teacher = draw(5), draw(7, seed=1)
    spoiled = with_last(student, torch.where(ignored, draw(5, seed=9).last_feature, student.last_feature))
    for masked in (False, True):
        method = build(mask_ignore_local=masked)
        plain, other = method(student, teacher, target), method(spoiled, teacher, target)
        torch.testing.assert_close(other["prototype"], plain["prototype"])
        assert (abs(other["local"] - plain["local"]) > 1e-5) != masked


@pytest.mark.filterwarnings("ignore:reduction")
def test_the_weighted_global_term_is_the_published_element_mean() -> None:
    student, teacher, target = draw(5), draw(7, seed=1), labels((4, 5))
    method = build()
    published = 10 * nn.KLDivLoss()(student.logits.log_softmax(1), teacher.logits.softmax(1))
    raw = method(student, teacher, target)["global"]
    torch.testing.assert_close(method.weights["global"] * raw, published)
    torch.testing.assert_close(raw, CLASSES * published / 10)


def test_weights_follow_the_reduction() -> None:
    by_element = {"global": 10 / CLASSES, "local": 10.0, "prototype": 10.0, "teacher_head": 1.0}
    assert build().weights == pytest.approx(by_element)
    assert build(reduction="per_pixel").weights == by_element | {"global": 10.0}
    assert build(weight=0.5).weights == pytest.approx(
        {"global": 5 / CLASSES, "local": 5.0, "prototype": 5.0, "teacher_head": 1.0}
    )


def test_with_one_class_the_local_term_is_zero_and_the_prototypes_still_learn() -> None:
    found = build()(draw(5), draw(7, seed=1), torch.full((3, 13, 17), 2))
    assert found["local"].item() == 0.0
    assert 0 < found["prototype"].item() <= 1 and found["teacher_head"].item() > 0


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_prototype_term_lies_between_zero_and_one(sign: float) -> None:
    method, student = build(STUDENT, STUDENT, **IDENTITY), draw(5)
    teacher = with_last(student, sign * student.last_feature)
    value = method(student, teacher, labels())["prototype"].item()
    assert value == pytest.approx(0.0 if sign > 0 else 1.0, abs=1e-9)


def test_two_images_of_one_scope_are_two_batches_of_one() -> None:
    method, student, teacher, target = build(scope="image"), draw(5), draw(7, seed=1), labels()
    whole = method(student, teacher, target)
    single = [
        method(
            *(Outputs(o.logits[i : i + 1], (), o.last_feature[i : i + 1]) for o in (student, teacher)),
            target[i : i + 1],
        )
        for i in range(3)
    ]
    for term in LOCAL:
        torch.testing.assert_close(whole[term], torch.stack([found[term] for found in single]).mean())
    assert abs(whole["prototype"] - build(scope="batch")(student, teacher, target)["prototype"]) > 1e-4


# -- switches ---------------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_released_codes() -> None:
    released = {
        "weight": 1.0, "ramp": 0.0, "global_weight": 10.0, "local_weight": 10.0, "prototype_weight": 10.0,
        "teacher_head_weight": 1.0, "reduction": "element_mean", "temperature": 1.0,
        "cosine_scale": 10.0, "scope": "batch", "student_head": "mlp", "teacher_head": "mlp",
        "hidden_channels": 512, "out_channels": 512, "normalize": True,
        "mask_ignore_global": False, "mask_ignore_local": False, "upsample": True, "align_corners": True,
        "teacher_head_lr": 1e-5, "teacher_head_betas": [0.9, 0.99],
    }  # fmt: skip
    assert to_dict(parse_method({"name": "apd"}, "methods.0")[1]) == {"name": "apd"} | released


def test_the_heads_are_two_convolutions_with_bias_and_cost_half_a_million_parameters_each() -> None:
    info = ModelInfo(19, (4,) * 4, (4, 8, 16, 32), 512, 8, 8, "cnn")
    method, config = parse_method({"name": "apd"}, "methods.0")
    heads = method(config, info, info)
    assert sum(parameter.numel() for parameter in heads.parameters()) == 2 * 2 * (512 * 512 + 512)


def test_without_local_terms_no_head_is_built() -> None:
    method = build(local_weight=0, prototype_weight=0)
    assert set(method.weights) == {"global"} and not list(method.parameters())
    assert set(method(draw(5), draw(7, seed=1), labels())) == {"global"}


def test_an_identity_teacher_head_has_no_loss_of_its_own() -> None:
    method = build(teacher_head="identity", out_channels=7)
    assert "teacher_head" not in method.weights and method.own_optimizers() == {}
    assert "teacher_head" not in method(draw(5), draw(7, seed=1), labels())


def test_prototypes_of_unequal_width_are_refused_unless_they_are_not_compared() -> None:
    with pytest.raises(
        UserError, match=r"5 behind the student_head \(identity\) and 7 behind the teacher_head \(identity\)"
    ):
        build(**IDENTITY)
    with pytest.raises(UserError, match=r"8 behind the student_head \(mlp\) and 7"):
        build(teacher_head="identity")
    method = build(**IDENTITY, prototype_weight=0)
    assert set(method(draw(5), draw(7, seed=1), labels())) == {"global", "local"}


def test_a_dead_feature_gives_finite_gradients() -> None:
    method, student = build(STUDENT, STUDENT, **IDENTITY), draw(5)
    dead = student.last_feature.detach().clone()
    dead[:, :, :2] = 0.0
    dead.requires_grad_()
    found = method(with_last(student, dead), draw(5, seed=1), labels())
    sum(found[term] for term in LOCAL).backward()
    assert dead.grad is not None and float(dead.grad.abs().max()) < 1e3
