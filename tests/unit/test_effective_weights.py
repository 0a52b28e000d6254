"""Published weights in our reduction: each code's loss, reduced as it does, against ours with the weight translated.

The formulas are a few lines of torch written from the specification. Losses and gradients agree in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from segdistill.commands.catalogue import entry
from segdistill.methods import parse_method
from segdistill.methods.method import Method
from segdistill.models.outputs import ModelInfo, Outputs

# Torch warns of the very reductions that this is about.
pytestmark = pytest.mark.filterwarnings("ignore:reduction")

NARROW, WIDE = 4, 7  # channels of student and teacher


@dataclass(frozen=True)
class Sizes:
    """What reductions divide by, or forget to."""

    images: int = 8
    classes: int = 19
    height: int = 3
    width: int = 5

    @property
    def label_size(self) -> tuple[int, int]:
        return 3 * self.height, 3 * self.width


def draw(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(sizes: Sizes, size: tuple[int, int] | None = None) -> Tensor:
    """Labels of which a quarter is missing."""
    generator = torch.Generator().manual_seed(3)
    found = torch.randint(sizes.classes, (sizes.images, *(size or sizes.label_size)), generator=generator)
    return found.masked_fill(torch.rand(found.shape, generator=generator) < 0.25, 255)


def build(name: str, classes: int = 19, **changes: Any) -> Method:
    method, config = parse_method({"name": name, **changes}, "methods.0")
    student, teacher = (
        ModelInfo(classes, (width,) * 4, (4, 8, 16, 32), width, 4, 4, "cnn") for width in (NARROW, WIDE)
    )
    return method(config, student, teacher).double()


def ours(method: Method, target: Tensor, *, logits: Any = None, features: Any = None) -> Tensor:
    """The weighted sum of a method's terms, given (student, teacher) logits or features."""
    nothing = torch.zeros(len(target), 1, 1, 1)
    sides = [
        Outputs(
            nothing if logits is None else logits[side],
            ((nothing if features is None else features[side]),) * 4,
            nothing if features is None else features[side],
        )
        for side in (0, 1)
    ]
    terms = method(*sides, target)
    assert terms and set(terms) == set(method.weights)
    return sum(method.weights[term] * loss for term, loss in terms.items())  # type: ignore[return-value]


def assert_same(found: Tensor, published: Tensor, *learning: Tensor, constant: Tensor | float = 0.0) -> None:
    """Equal but for a known constant, and with equal gradients."""
    assert float(published.detach()) > 0
    torch.testing.assert_close(found, published - constant, rtol=1e-10, atol=0)
    gradients = (torch.autograd.grad(loss, learning, retain_graph=True) for loss in (found, published))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)
        assert float(other.abs().max()) > 0


# --- pixel-wise KD: "the same loss" in six codes ---


def kl(student: Tensor, teacher: Tensor, temperature: float, reduction: str) -> Tensor:
    return F.kl_div((student / temperature).log_softmax(1), (teacher / temperature).softmax(1), reduction=reduction)


def pixel_rows(logits: Tensor) -> Tensor:
    return logits.permute(0, 2, 3, 1).reshape(-1, logits.shape[1])


def upsampled(logits: Tensor) -> Tensor:
    return F.interpolate(logits, size=Sizes().label_size, mode="bilinear", align_corners=True)


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    assert temperature == 1
    return -(teacher.softmax(1) * student.log_softmax(1)).sum() / student.shape[2] / student.shape[3]


@dataclass(frozen=True)
class Code:
    """How a public code computes it, what it multiplies it by, and the weight that is the same for ``kd``."""

    formula: Callable[[Tensor, Tensor, float], Tensor]  # of student and teacher logits and the temperature
    weight: float
    translate: Callable[[float, Sizes], float]
    documented: str  # the line in kd's docstring begins so
    squared: bool = False  # whether the code multiplies by the squared temperature, as kd does
    settings: dict[str, Any] = field(default_factory=dict)


CODES = {
    "CIRKD": Code(
        lambda s, t, T: T**2 * kl(pixel_rows(s), pixel_rows(t), T, "batchmean"),
        weight=1,
        translate=lambda weight, sizes: weight,
        documented="CIRKD",
        squared=True,
    ),
    "TorchDistiller, IFVD": Code(
        lambda s, t, T: kl(s, t, T, "mean"),
        weight=10,
        translate=lambda weight, sizes: weight / sizes.classes,
        documented="TorchDistiller, IFVD, APD",
    ),
    "APD": Code(
        lambda s, t, T: kl(upsampled(s), upsampled(t), T, "mean"),
        weight=10,
        translate=lambda weight, sizes: weight / sizes.classes,
        documented="TorchDistiller, IFVD, APD",
        settings={"upsample": True, "align_corners": True},
    ),
    "structure_knowledge_distillation": Code(
        soft_cross_entropy,
        weight=10,
        translate=lambda weight, sizes: weight * sizes.images,
        documented="structure_knowledge_distillation",
    ),
    "mmrazor batchmean": Code(
        lambda s, t, T: T**2 * kl(s, t, T, "batchmean"),
        weight=1,
        translate=lambda weight, sizes: weight * sizes.height * sizes.width,
        documented="mmrazor, batchmean",
        squared=True,
    ),
    "mmrazor mean": Code(
        lambda s, t, T: T**2 * kl(s, t, T, "mean"),
        weight=1,
        translate=lambda weight, sizes: weight / sizes.classes,
        documented="mmrazor, mean",
        squared=True,
    ),
}
HOT = [name for name in CODES if name != "structure_knowledge_distillation"]


@pytest.mark.parametrize(("name", "temperature"), [*((name, 1.0) for name in CODES), *((name, 4.0) for name in HOT)])
def test_kd_with_the_translated_weight_is_the_published_loss(name: str, temperature: float) -> None:
    code, sizes = CODES[name], Sizes()
    shape = (sizes.images, sizes.classes, sizes.height, sizes.width)
    student, teacher = draw(*shape, seed=1).requires_grad_(), draw(*shape, seed=2)
    weight = code.translate(code.weight, sizes) / (1 if code.squared else temperature**2)
    method = build("kd", weight=weight, temperature=temperature, mask_ignore=False, **code.settings)
    published = code.weight * code.formula(student, teacher, temperature)
    # A cross-entropy is the divergence plus the teacher's entropy, which trains nobody.
    entropy = code.weight * code.formula(teacher, teacher, temperature)
    assert_same(ours(method, labels(sizes), logits=(student, teacher)), published, student, constant=entropy)


@pytest.mark.parametrize(
    ("name", "sizes", "effective", "documented"),
    [
        ("CIRKD", Sizes(), 1.0, "1 -> 1.0"),
        ("TorchDistiller, IFVD", Sizes(classes=19), 0.53, "10 -> 0.53 at K = 19"),
        ("TorchDistiller, IFVD", Sizes(classes=21), 0.48, None),
        ("TorchDistiller, IFVD", Sizes(classes=11), 0.91, None),
        ("TorchDistiller, IFVD", Sizes(classes=150), 0.067, None),
        ("APD", Sizes(classes=19), 0.53, "10 -> 0.53 at K = 19"),
        ("structure_knowledge_distillation", Sizes(images=8), 80, "10 -> 80 at B = 8"),
        ("mmrazor batchmean", Sizes(height=64, width=128), 8192, "1 -> 8192 at 64 x 128"),
        ("mmrazor mean", Sizes(classes=19), 0.053, None),
    ],
)
def test_the_effective_weights_are_those_that_are_documented(
    name: str, sizes: Sizes, effective: float, documented: str | None
) -> None:
    code = CODES[name]
    assert code.translate(code.weight, sizes) == pytest.approx(effective, rel=0.01)
    (line,) = [
        line for line in entry("kd").sections["Weights"].splitlines() if line.strip().startswith(code.documented)
    ]
    assert documented is None or line.endswith(documented)


def test_the_shipped_settings_of_one_loss_differ_by_four_orders_of_magnitude() -> None:
    weights = [code.translate(code.weight, Sizes(8, 19, 64, 128)) for code in CODES.values() if code.weight != 1]
    weights += [CODES[name].translate(1, Sizes(8, 19, 64, 128)) for name in ("CIRKD", "mmrazor batchmean")]
    assert 1e4 < max(weights) / min(weights) < 1e5


# --- the others whose default is a translation ---


def test_apd_divides_its_published_10_by_the_number_of_classes() -> None:
    sizes = Sizes()
    shape = (sizes.images, sizes.classes, sizes.height, sizes.width)
    student, teacher = draw(*shape, seed=1).requires_grad_(), draw(*shape, seed=2)
    method = build("apd", local_weight=0.0, prototype_weight=0.0)
    assert method.weights == {"global": pytest.approx(10 / 19)}
    published = 10 * kl(upsampled(student), upsampled(teacher), 1.0, "mean")
    assert_same(ours(method, labels(sizes), logits=(student, teacher)), published, student)


def features(sizes: Sizes) -> tuple[Tensor, Tensor]:
    size = (sizes.height, sizes.width)
    return (
        draw(sizes.images, NARROW, *size, seed=1).requires_grad_(),
        draw(sizes.images, WIDE, *size, seed=2),
    )


def space_kl_sum(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    student, teacher = (maps.flatten(2) / temperature for maps in (student, teacher))
    return temperature**2 * F.kl_div(student.log_softmax(2), teacher.softmax(2), reduction="sum")


def test_cwd_on_features_takes_the_weight_of_cirkd_times_the_ratio_of_the_widths() -> None:
    sizes = Sizes()
    student, teacher = features(sizes)
    method = build("cwd", logits_weight=0.0, feature_weight=50 * WIDE / NARROW)
    projection: Any = method.projection
    published = 50 * space_kl_sum(projection(student), teacher, 4.0) / (sizes.images * NARROW)
    learning = (student, *projection.parameters())
    assert_same(ours(method, labels(sizes), features=(student, teacher)), published, *learning)
    assert 50 * 256 / 128 == 100 and "feature 50 -> 100" in entry("cwd").sections["Weights"]


def test_cwd_on_logits_takes_the_published_weight_as_it_is() -> None:
    sizes = Sizes()
    shape = (sizes.images, sizes.classes, sizes.height, sizes.width)
    student, teacher = draw(*shape, seed=1).requires_grad_(), draw(*shape, seed=2)
    published = 3 * space_kl_sum(student, teacher, 4.0) / (sizes.images * sizes.classes)
    assert_same(ours(build("cwd"), labels(sizes), logits=(student, teacher)), published, student)


def test_at_divides_the_published_weight_by_the_number_of_positions() -> None:
    sizes = Sizes()
    student, teacher = features(sizes)
    maps = [F.normalize(maps.pow(2).mean(1).flatten(1), dim=1) for maps in (student, teacher)]
    published = 10000 * (maps[0] - maps[1]).pow(2).mean()
    for changes in ({"weight": 10000 / (sizes.height * sizes.width)}, {"weight": 10000, "reduction": "mean"}):
        assert_same(ours(build("at", **changes), labels(sizes), features=(student, teacher)), published, student)


@pytest.mark.parametrize(
    ("weight", "size", "effective"),
    [
        (10000, (64, 128), "1.2 at 64 x 128"),
        (10000, (64, 64), "2.4 at 64 x 64"),
        (10000, (45, 45), "4.9 at 45 x 45"),
        (1000, (56, 56), "0.32 at 56 x 56"),
        (1000, (28, 28), "1.3 at 28 x 28"),
        (1000, (14, 14), "5.1 at 14 x 14"),
    ],
)
def test_the_documented_weights_of_at_are_right(weight: float, size: tuple[int, int], effective: str) -> None:
    height, width = size
    assert f"{weight / (height * width):.2g} at {height} x {width}" == effective
    (line,) = [line for line in entry("at").sections["Weights"].splitlines() if effective in line]
    assert f"{weight:.0f} " in line
    assert entry("at").weights["weight"] == "1.2"


def test_mgd_multiplies_the_published_weight_by_what_it_was_summed_over() -> None:
    sizes = Sizes()
    student, teacher = features(sizes)
    mean = 2e-5 * WIDE * sizes.height * sizes.width
    for changes in ({"weight": mean, "reduction": "mean"}, {}):
        method = build("mgd", mask_ratio=0.0, **changes)
        generated = method.generator(method.projection(student))  # type: ignore[operator]
        published = 2e-5 * (generated - teacher).pow(2).sum() / sizes.images
        learning = (student, *method.parameters())
        assert_same(ours(method, labels(sizes), features=(student, teacher)), published, *learning)
    assert float(entry("mgd").weights["weight"]) == 2e-5 and round(2e-5 * 2048 * 64 * 128) == 336


def test_c2vkd_divides_its_published_feature_weights_by_the_widths() -> None:
    sizes = Sizes()
    student, teacher = features(sizes)
    method = build("c2vkd", pdd_weight=0.0, patch_weight=0.0, linguistic_weight=0.0)
    projection: Any = method.visual_projection
    published = 0.1 * kl(projection(student), teacher, 1.0, "mean")
    learning = (student, *projection.parameters())
    assert_same(ours(method, labels(sizes), features=(student, teacher)), published, *learning)
    assert [f"{weight / width:.0e}" for weight, width in ((0.1, 2048), (0.5, 512))] == ["5e-05", "1e-03"]
    assert "(5e-5 at D = 2048, 1e-3 at d = 512)" in " ".join(entry("c2vkd").sections["Weights"].split())


def centred_cosines(maps: Tensor, target: Tensor) -> Tensor:
    """Of each pixel with the mean of its class in its image; an ignored pixel is its own centre, as published."""
    centres = maps.clone()
    for image, found in zip(range(len(maps)), target, strict=True):
        for c in set(found.unique().tolist()) - {255}:
            member = found == c
            centres[image, :, member] = maps[image, :, member].mean(1, keepdim=True).expand(-1, int(member.sum()))
    return F.cosine_similarity(maps, centres, dim=1)


def test_ifvd_has_the_published_mean_over_all_pixels_or_that_over_the_valid_share() -> None:
    sizes = Sizes(classes=3)
    student, teacher = features(sizes)
    target = labels(sizes, (sizes.height, sizes.width))
    share = float((target != 255).double().mean())
    published = 200 * F.mse_loss(centred_cosines(student, target), centred_cosines(teacher, target))
    for changes in ({"keep_ignored_in_mean": True}, {"weight": 200 * share}):
        method = build("ifvd", sizes.classes, **changes)
        assert_same(ours(method, target, features=(student, teacher)), published, student)


def test_dkd_takes_the_published_factors_with_pixels_as_samples() -> None:
    sizes = Sizes()
    shape = (sizes.images, sizes.classes, sizes.height, sizes.width)
    student, teacher = draw(*shape, seed=1).requires_grad_(), draw(*shape, seed=2)
    target = labels(sizes, (sizes.height, sizes.width))
    valid = target.flatten() != 255
    (zs, zt), y = (pixel_rows(logits)[valid] / 4 for logits in (student, teacher)), target.flatten()[valid, None]
    other = torch.ones_like(zs, dtype=torch.bool).scatter(1, y, value=False)
    a, b = (z.softmax(1).gather(1, y) for z in (zs, zt))
    tckd = F.kl_div(torch.cat([a, 1 - a], 1).log(), torch.cat([b, 1 - b], 1), reduction="batchmean")
    rest = [z[other].view(len(z), -1) for z in (zs, zt)]
    nckd = F.kl_div(rest[0].log_softmax(1), rest[1].softmax(1), reduction="batchmean")
    published = 4**2 * (1.0 * tckd + 8.0 * nckd)
    method = build("dkd", target_weight=1.0, non_target_weight=8.0, temperature=4.0)
    assert_same(ours(method, target, logits=(student, teacher)), published, student)
    assert f"ramp {20 / 240:.3f}" in entry("dkd").sections["Weights"]
