"""Random augmentation as a function of (seed, sample number): no worker, process or order changes a pixel."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from segdistill.data.settings import AugmentationConfig
from segdistill.losses import IGNORE_INDEX


class RandomScale(v2.Transform):
    """Resizes image and mask by one random factor; the aspect ratio stays."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        factor = self.low + (self.high - self.low) * torch.rand(()).item()
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Mask):
            return functional.resize(inpt, params["size"], antialias=True)
        # The mask's own kernel takes the pixel at a cell's corner, up to half a pixel beside the image's.
        exact = InterpolationMode.NEAREST_EXACT
        return tv_tensors.wrap(functional.resize_image(inpt[None], params["size"], exact)[0], like=inpt)


class Augmentation:
    """Random scale, crop, flip and colour of one (image, label) pair."""

    def __init__(self, config: AugmentationConfig) -> None:
        steps: list[v2.Transform] = []
        if config.scale != (1.0, 1.0):
            steps.append(RandomScale(*config.scale))
        fill = {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE_INDEX}
        steps.append(v2.RandomCrop(config.crop_size, pad_if_needed=True, fill=fill))
        if config.flip:
            steps.append(v2.RandomHorizontalFlip(config.flip))
        if config.color_jitter:
            strength = config.color_jitter
            steps.append(v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength))
        self.transform = v2.Compose(steps)

    def __call__(self, image: np.ndarray, label: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
        """Augments one sample.

        Shape:
            image: [H, W, 3] uint8; label: [H, W] uint8.
            Returns [3, h, w] uint8 and [h, w] uint8, with (h, w) the crop size.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a call for a GPU each time
            pair = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), tv_tensors.Mask(torch.from_numpy(label))
            scaled, mask = self.transform(*pair)
        return scaled.as_subclass(Tensor), mask.as_subclass(Tensor)
