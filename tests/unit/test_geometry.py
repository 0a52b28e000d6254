"""One rule says which image points a cell stands for: in losses, between networks, in evaluation and in the data."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from segdistill import geometry
from segdistill.config import parse
from segdistill.data.settings import AugmentationConfig
from segdistill.data.transforms import Augmentation, cut
from segdistill.engine.inference import Views, class_scores
from segdistill.engine.settings import InferenceConfig
from segdistill.losses import align, supervised
from segdistill.methods import build_offline, build_online, parse_method
from segdistill.models.outputs import ModelInfo, Outputs
from segdistill.models.segmenter import logits_at

STRIDES = [4, 8, 16, 32]
SIZES = st.tuples(st.integers(1, 150), st.integers(1, 150))


def cells(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)


def ramp(size: tuple[int, int], stride: int) -> Tensor:
    """What a network would give that knows where it is: row and column of the centre of each cell, [1, 2, h, w]."""
    axes = [torch.arange(count) * stride + (stride - 1) / 2 for count in cells(size, stride)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def ideal_logits(target: Tensor, stride: int, classes: int = 2) -> Tensor:
    """The share of each class in each cell's part of the image, as steep logits: the best that a map can know."""
    shares = F.one_hot(target, classes).movedim(-1, 1).double()
    return 20 * F.avg_pool2d(shares, stride, ceil_mode=True)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(size=SIZES, strides=st.tuples(*[st.sampled_from([1, 2, *STRIDES])] * 2))
def test_the_sizes_of_two_maps_of_an_image_tell_the_ratio_of_their_strides(
    size: tuple[int, int], strides: tuple[int, int]
) -> None:
    fine, coarse = sorted(strides)
    few = cells(size, coarse)
    ratio = geometry.cells_within(cells(size, fine), few)
    assert ratio == coarse // fine or (ratio is not None and few == (1, 1))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(size=SIZES, strides=st.tuples(*[st.sampled_from([1, 2, *STRIDES])] * 2))
def test_a_cell_keeps_its_place_in_the_image_whatever_the_two_strides(
    size: tuple[int, int], strides: tuple[int, int]
) -> None:
    old, new = strides
    placed = geometry.resize(ramp(size, old), cells(size, new))
    wanted = ramp(size, new)
    assert placed.shape == wanted.shape
    for axis, count in enumerate(cells(size, old)):
        end = count * old  # what the old cells cover
        if new <= old:  # nothing is extrapolated beyond the outermost centres
            expected, known = wanted[:, axis].clamp((old - 1) / 2, end - (old + 1) / 2), wanted[:, axis] >= 0
        else:  # the last cell may hold fewer of the old ones
            expected, known = wanted[:, axis], wanted[:, axis] + (new - 1) / 2 < end
        torch.testing.assert_close(placed[:, axis][known], expected[known])


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("size", [(33, 47), (97, 65), (64, 96)])
def test_training_and_evaluation_place_logits_alike(size: tuple[int, int], stride: int) -> None:
    logits = torch.randn(1, 2, *cells(size, stride), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    evaluated = logits_at(logits, size, stride)
    torch.testing.assert_close(align.resize_logits(logits.float(), size), evaluated, rtol=0, atol=0)
    target = evaluated.argmax(1)
    right = F.cross_entropy(evaluated.double(), target)
    torch.testing.assert_close(supervised.cross_entropy(logits, target).double(), right, rtol=1e-5, atol=1e-6)


def test_ideal_logits_at_33_pixels_and_stride_32_are_right_in_training_as_in_evaluation() -> None:
    target = torch.zeros(1, 33, 33, dtype=torch.int64)
    target[..., 32:] = 1
    # Two cells: the first ends with pixel 31, the second begins with pixel 32, so the border is between them.
    logits = ideal_logits(target, 32)
    for full in (align.resize_logits(logits, (33, 33)), logits_at(logits, (33, 33), 32)):
        assert (full.argmax(1) == target).double().mean() == 1.0


def test_the_cross_entropy_of_ideal_logits_at_crop_713_and_stride_8() -> None:
    # Columns 8 pixels wide, alternating: a stretch of 90 cells over 713 pixels is 7 pixels out at the end.
    target = (torch.arange(713) // 8 % 2).expand(1, 16, 713).contiguous()
    logits = ideal_logits(target, 8)
    covered = F.interpolate(logits, size=(16, 720), mode="bilinear", align_corners=False)[..., :713]
    right = F.cross_entropy(covered, target)
    torch.testing.assert_close(supervised.cross_entropy(logits, target), right)
    stretched = F.interpolate(logits, size=(16, 713), mode="bilinear", align_corners=False)
    assert F.cross_entropy(stretched, target) > 5 * right


@pytest.mark.parametrize("coarse", [8, 16, 32])
@pytest.mark.parametrize("size", [(33, 70), (65, 129)])
def test_of_a_finer_student_every_cell_gets_a_gradient(size: tuple[int, int], coarse: int) -> None:
    for align_corners in (False, True):
        student = torch.randn(2, 3, *cells(size, 4), requires_grad=True)
        pooled = geometry.resize(student, cells(size, coarse), align_corners=align_corners)
        (gradient,) = torch.autograd.grad(pooled.sum(), student)
        assert (gradient > 0).all()
        ratio, last = coarse // 4, pooled.shape[-2] - 1
        torch.testing.assert_close(pooled[..., 0, 0], student[..., :ratio, :ratio].mean((-2, -1)))
        torch.testing.assert_close(pooled[..., last, 0], student[..., last * ratio :, :ratio].mean((-2, -1)))


def test_at_equal_sizes_nothing_is_computed() -> None:
    maps, target = torch.randn(1, 2, 5, 7), torch.zeros(1, 5, 7, dtype=torch.int64)
    assert geometry.resize(maps, (5, 7)) is maps
    assert geometry.average(maps, (5, 7)) is maps
    assert geometry.resize_labels(target, (5, 7)) is target


@settings(max_examples=100, deadline=None, derandomize=True)
@given(size=SIZES, stride=st.sampled_from(STRIDES))
def test_the_label_of_a_cell_lies_at_its_centre_and_in_the_image(size: tuple[int, int], stride: int) -> None:
    grid = cells(size, stride)
    places = torch.arange(size[0])[None, :, None] * 1000 + torch.arange(size[1])
    taken = geometry.resize_labels(places, grid)
    for axis, found in enumerate((taken[0, :, 0] // 1000, taken[0, 0] % 1000)):
        first = torch.arange(grid[axis]) * stride
        assert bool((found >= first).all()) and bool((found < first + stride).all()) and found.max() < size[axis]
        whole = first + stride <= size[axis]
        assert bool((found == first + stride // 2)[whole].all()) or grid == (1, 1)


def test_maps_of_no_common_image_are_laid_edge_to_edge() -> None:
    maps = torch.randn(1, 2, 20, 30)
    torch.testing.assert_close(geometry.resize(maps, (64, 97)), F.interpolate(maps, size=(64, 97), mode="bilinear"))
    torch.testing.assert_close(geometry.resize(maps, (7, 9)), F.adaptive_avg_pool2d(maps, (7, 9)))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("old", "size", "ratio"), [((3, 4), (24, 32), 8), ((3, 4), (21, 26), 8), ((1, 2), (3, 7), 4)])
def test_a_map_is_enlarged_by_products_as_by_the_kernel(
    old: tuple[int, int], size: tuple[int, int], ratio: int, align_corners: bool
) -> None:
    maps = torch.randn(2, 3, *old, dtype=torch.float64, requires_grad=True)
    ways = [
        way(maps, size, ratio, align_corners=align_corners) for way in (geometry.enlarge, geometry.enlarge_by_products)
    ]
    torch.testing.assert_close(*ways, rtol=1e-12, atol=1e-12)
    weights = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad((way * weights).sum(), maps)[0] for way in ways))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_by_products_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    maps = torch.randn(1, 2, 3, 4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = geometry.enlarge_by_products(maps, (12, 16), 4)
    assert found.dtype == dtype and torch.equal(found, geometry.enlarge(maps.float(), (12, 16), 4).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_resized_as_they_are(dtype: torch.dtype) -> None:
    maps = torch.randn(1, 2, 9, 13)
    for size in ((3, 4), (33, 50)):
        narrow = geometry.resize(maps.to(dtype), size)
        assert narrow.dtype == dtype
        torch.testing.assert_close(narrow.float(), geometry.resize(maps, size), rtol=2e-2, atol=2e-2)


# -- methods ---------------------------------------------------------------------------------------------------------


def info(stride: int) -> ModelInfo:
    return ModelInfo(2, (2,) * 4, (stride,) * 4, 2, stride, stride, "cnn")


def knowing(target: Tensor, stride: int) -> Outputs:
    """The outputs of a network that knows the labels as well as its stride allows; features are its logits."""
    logits = ideal_logits(target, stride).float()
    return Outputs(logits, (logits,) * 4, logits)


def halves(size: tuple[int, int], border: int) -> Tensor:
    """Labels 0 left of a border and 1 from there on."""
    return (torch.arange(size[1]) >= border).long().expand(1, *size).contiguous()


OFFLINE = ["kd", "dkd", "dist", "cwd", "fitnet", "apd", "skd"]
PLAIN: dict[str, dict[str, Any]] = {
    "apd": {"student_head": "identity", "teacher_head": "identity", "local_weight": 0.0, "prototype_weight": 0.0},
    "dkd": {"non_target_weight": 0.0},
    "kd": {"upsample": True},
}


@pytest.mark.parametrize("strides", [(4, 8), (8, 32), (32, 8), (16, 4)])
@pytest.mark.parametrize("name", OFFLINE)
def test_an_ideal_student_imitates_an_ideal_teacher_as_well_in_an_odd_crop(name: str, strides: tuple[int, int]) -> None:
    # The border of the classes is one of both grids, so beside it both networks know the same. A crop that ends within
    # a cell must not move one against the other: then the terms are as small as in a crop that ends with a cell.
    ours, theirs = strides
    losses_at = {}
    for width in (96, 97, 127, 128):
        target = halves((96, width), 64)
        method, config = parse_method({"name": name, **PLAIN.get(name, {})}, "methods.0")
        built = build_offline([config], info(ours), info(theirs))[name]
        found = built(knowing(target, ours), knowing(target, theirs), target)
        losses_at[width] = sum(float(built.weights[term] * loss) for term, loss in found.items())
    assert method.kind == "offline"
    for width in (97, 127):
        assert losses_at[width] <= 1.05 * max(losses_at[96], losses_at[128]) + 1e-5, losses_at


@pytest.mark.parametrize("name", ["dml", "kdcl"])
def test_ideal_peers_of_different_strides_agree_as_well_in_an_odd_crop(name: str) -> None:
    losses_at = {}
    for width in (96, 97, 127, 128):
        target = halves((96, width), 64)
        config = parse_method({"name": name}, "methods.0")[1]
        built = build_online([config], {"fine": info(4), "coarse": info(32)})[name]
        found = built({"fine": knowing(target, 4), "coarse": knowing(target, 32)}, target)
        losses_at[width] = sum(float(loss) for losses in found.values() for loss in losses.values())
    for width in (97, 127):
        assert losses_at[width] <= 1.05 * max(losses_at[96], losses_at[128]) + 1e-5, losses_at


def test_regions_of_32_pixels_hold_the_same_pixels_in_both_peers_at_an_odd_crop() -> None:
    from segdistill.methods.hfd_bsd.selection import region_errors, region_means

    labels, errors = halves((33, 70), 64), torch.zeros(1, 33, 70)
    errors[:, 32:, 64:] = 1.0  # the last region: 1 x 6 pixels, 1 x 2 cells of stride 4
    grid = (2, 3)
    assert region_errors(errors, labels, grid).tolist() == [[[0, 0, 0], [0, 0, 1]]]
    for stride in STRIDES:
        shares = F.avg_pool2d(errors[:, None], stride, ceil_mode=True)
        assert region_means(shares, grid)[0, 0].tolist() == [[0, 0, 0], [0, 0, 1]]


# -- data and views --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 0.7, 0.8, 1.3, 2.0])
def test_masks_are_scaled_on_the_grid_of_the_images(scale: float) -> None:
    # A ramp of brightness whose label is its brightness: wherever the image was sampled, the mask must have been.
    ramp_of_pixels = np.arange(200, dtype=np.uint8)[None].repeat(40, 0)
    config = {"crop_size": (8, round(200 * scale)), "scale": (scale, scale), "flip": 0.0, "color_jitter": 0.0}
    transform = Augmentation(parse(AugmentationConfig, config, "augmentation"))
    crop = transform.draw(ramp_of_pixels.shape, seed=0)
    pixels = cut(ramp_of_pixels[..., None].repeat(3, -1), ramp_of_pixels, crop.window, pinned=False)
    (image,), (label,) = transform([(pixels, crop)], torch.device("cpu"))
    apart = (image[0] * 255 - label)[:, 4:-4]
    assert apart.abs().max() <= 1.0
    assert abs(float(apart.mean())) <= (0.3 if scale != 0.5 else 0.55)  # at 0.5 a cell's centre is between two pixels


@pytest.mark.parametrize("width", [63, 100, 137, 160, 333])
def test_pillow_scales_masks_on_the_grid_of_the_images(width: int) -> None:
    # What prepare (max_side) and the report's overlays count on.
    ramp_of_pixels = Image.fromarray(np.arange(200, dtype=np.uint8)[None].repeat(40, 0))
    image, label = (
        np.asarray(ramp_of_pixels.resize((width, 20), how), dtype=float)[:, 3:-3]
        for how in (Image.Resampling.BILINEAR, Image.Resampling.NEAREST)
    )
    assert np.abs(image - label).max() <= 1.0
    assert abs((image - label).mean()) <= (0.55 if width == 100 else 0.3)


@pytest.mark.parametrize("size", [(64, 64), (65, 33), (31, 47)])
def test_scores_of_a_scaled_view_lie_where_the_image_does(size: tuple[int, int]) -> None:
    class Positions(torch.nn.Module):
        info = info(1)

        def logits(self, images: Tensor) -> Tensor:
            return images[:, :2]

    base = {"batch_size": 1, "input_scale": 0.5, "window": None, "window_stride": 1.0}
    images = F.pad(ramp(size, 1), (0, 0, 0, 0, 0, 1))
    views = Views(parse(InferenceConfig, base, "inference"))
    (scores,) = class_scores(Positions(), images, size, views)  # type: ignore[arg-type]
    torch.testing.assert_close(scores[..., 2:-2, 2:-2], ramp(size, 1)[..., 2:-2, 2:-2], rtol=0, atol=0.6)
