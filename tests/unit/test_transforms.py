"""What becomes of a sample: drawn from its seed alone, and the same pixels in every batch."""

from typing import Any

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional

from segdistill.config import parse
from segdistill.data.settings import AugmentationConfig
from segdistill.data.transforms import Augmentation, Crop, cut, jitter
from segdistill.losses.masks import IGNORE_INDEX

CPU = torch.device("cpu")
SIZE = (60, 90)


def augmentation(**changes: Any) -> Augmentation:
    base = {"crop_size": (32, 48), "scale": (0.5, 2.0), "flip": 0.5, "color_jitter": 0.4}
    return Augmentation(parse(AugmentationConfig, base | changes, "augmentation"))


def sample(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (*SIZE, 3), dtype=np.uint8), random.integers(0, 5, SIZE, dtype=np.uint8)


def crops(augment: Augmentation, count: int) -> list[tuple[torch.Tensor, Crop]]:
    drawn = [augment.draw(SIZE, seed) for seed in range(count)]
    return [(cut(*sample(seed), crop.window, pinned=False), crop) for seed, crop in enumerate(drawn)]


def test_a_sample_has_the_same_pixels_alone_and_in_a_batch() -> None:
    augment = augmentation()
    samples = crops(augment, 6)
    images, labels = augment(samples, CPU)
    for number, one in enumerate(samples):
        image, label = augment([one], CPU)
        assert torch.equal(image[0], images[number]) and torch.equal(label[0], labels[number])


@pytest.mark.parametrize("crop_size", [(32, 48), (80, 160)])
def test_windows_and_places_fit_and_have_the_drawn_scale(crop_size: tuple[int, int]) -> None:
    augment = augmentation(crop_size=crop_size, scale=(0.7, 0.7))
    for seed in range(50):
        crop = augment.draw(SIZE, seed)
        for window, place, length, side in zip(crop.window, crop.place, SIZE, crop_size, strict=True):
            assert 0 <= window.start < window.stop <= length and 0 <= place.start < place.stop <= side
            assert abs((window.stop - window.start) * 0.7 - (place.stop - place.start)) <= 0.5
            assert window == slice(0, length) or place == slice(0, side), "void only where the image ends"


def test_every_place_of_the_image_is_shown_and_void_comes_on_every_side() -> None:
    augment = augmentation(scale=(1.0, 1.0))
    starts = {tuple(side.start for side in augment.draw(SIZE, seed).window) for seed in range(400)}
    assert {rows for rows, _ in starts} == set(range(29)) and {columns for _, columns in starts} == set(range(43))
    void = augmentation(crop_size=(64, 94), scale=(1.0, 1.0))
    places = [void.draw(SIZE, seed).place for seed in range(100)]
    assert {rows.start for rows, _ in places} == {columns.start for _, columns in places} == set(range(5))


def test_bytes_and_floats_are_resized_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    # A GPU resizes floats; a CPU bytes, rounded after each side.
    augment = augmentation(color_jitter=0.0)
    samples = crops(augment, 8)
    images, _ = augment(samples, CPU)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    floats, _ = augment(samples, CPU)
    assert 0 < (images - floats).abs().max() * 255 <= 1.01


def test_where_nothing_is_cut_off_the_jitter_is_that_of_torchvision_in_any_order() -> None:
    images = 100 + 40 * torch.rand(2, 3, 8, 8)
    factors = torch.tensor([[1.2, 0.9, 1.3], [0.8, 1.1, 0.7]])
    adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        expected = []
        for image, row in zip(images, factors.tolist(), strict=True):
            changed = tv_tensors.Image(image / 255)
            for step in order:
                changed = adjust[step](changed, row[step])
            expected.append(torch.as_tensor(changed))
        # torchvision's shares of the colours have four digits and sum to 0.9999.
        torch.testing.assert_close(jitter(images.clone(), factors), torch.stack(expected), rtol=0, atol=2e-4)


def test_what_is_brighter_than_white_is_white() -> None:
    images = jitter(torch.full((1, 3, 2, 2), 250.0), torch.tensor([[2.0, 1.0, 1.0]]))
    assert (images == 1).all()


def test_void_has_no_label_and_a_flip_turns_it_too() -> None:
    augment = augmentation(crop_size=(80, 120), scale=(1.0, 1.0), color_jitter=0.0)
    (pixels, crop), *_ = [one for one in crops(augment, 20) if one[1].flip]
    images, labels = augment([(pixels, crop)], CPU)
    assert torch.equal(labels[0][crop.place], pixels[3].flip(-1)) and torch.equal(
        images[0][:, *crop.place], pixels[:3].flip(-1) / 255
    )
    assert (labels == IGNORE_INDEX).sum() == 80 * 120 - pixels[3].numel()
