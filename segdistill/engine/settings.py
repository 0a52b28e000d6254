"""Settings of a training run. Importing them costs nothing: no torch here."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from segdistill.config import Beta, Fraction, LearningRate, config
from segdistill.data.settings import AugmentationConfig, Scale, Workers

Iterations = Annotated[int, Field(ge=1, le=100_000_000)]
Images = Annotated[int, Field(ge=1, le=65536)]
WindowSide = Annotated[int, Field(ge=16, le=16384)]  # pixels
Decay = Annotated[float, Field(ge=0, le=10)]
Multiplier = Annotated[float, Field(ge=1e-3, le=1000)]
# In one forward pass of all processes. A thousand times what one GPU takes at 1024 x 1024; beyond it is a slip.
MOST_PIXELS = 2**30


@config
class PolySchedule:
    """lr * (1 - progress)^power after a linear warm-up; progress runs over the budget, iterations or seconds."""

    name: Literal["poly"] = "poly"
    power: Annotated[float, Field(ge=0, le=10)] = 0.9
    # Part of the budget over which the learning rate rises linearly.
    warmup_fraction: Fraction = 0.0
    # Where the warm-up starts and where the decay ends, as parts of the learning rate.
    warmup_ratio: Fraction = 1e-3
    floor_ratio: Fraction = 0.0


@config
class ConstantSchedule:
    """The learning rate as it is."""

    name: Literal["constant"] = "constant"


Schedule = Annotated[PolySchedule | ConstantSchedule, Field(discriminator="name")]


@config
class SGDConfig:
    """Stochastic gradient descent with momentum: the CNN recipe of the segmentation literature."""

    name: Literal["sgd"] = "sgd"
    lr: LearningRate
    momentum: Beta = 0.9
    weight_decay: Decay = 1e-4
    nesterov: bool = False
    # The learning rate of decoder, classifier and method helpers is this many times the encoder's.
    decoder_multiplier: Multiplier = 1.0
    schedule: Schedule = Field(default_factory=PolySchedule)

    @pydantic.model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "SGDConfig":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


@config
class AdamWConfig:
    """AdamW without decay on norms and biases: the ViT recipe."""

    name: Literal["adamw"] = "adamw"
    lr: LearningRate
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: Decay = 0.01
    # The learning rate of decoder, classifier and method helpers is this many times the encoder's.
    decoder_multiplier: Multiplier = 1.0
    schedule: Schedule = Field(default_factory=PolySchedule)


@config
class AdamConfig:
    """Adam, as APD uses it for the teacher's head: constant learning rate unless told otherwise."""

    name: Literal["adam"] = "adam"
    lr: LearningRate
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: Decay = 0.0
    decoder_multiplier: Multiplier = 1.0
    schedule: Schedule = Field(default_factory=ConstantSchedule)


OptimizerConfig = Annotated[SGDConfig | AdamWConfig | AdamConfig, Field(discriminator="name")]


@config
class TrainConfig:
    """One training loop: budget, batch, augmentation, precision, and how often it speaks, validates and saves."""

    # The budget: this many iterations (optimiser steps), or this many seconds of training from the end of the first
    # step on. One of the two.
    iterations: Iterations | None
    seconds: Annotated[float, Field(ge=1e-3, le=1e7)] | None
    # Images an optimiser step, over all processes and accumulation pieces.
    batch_size: Images
    # Forward passes an optimiser step; batch_size, and unlabelled, must be divisible by this times the number of
    # processes.
    accumulate: Images
    augmentation: AugmentationConfig
    # fp32, or autocast to bf16 or fp16 on a GPU.
    precision: Literal["fp32", "bf16", "fp16"]
    channels_last: bool
    # torch.compile the students and the teacher.
    compile: bool
    # Largest gradient norm; null is off.
    max_grad_norm: Annotated[float, Field(ge=1e-6, le=1e6)] | None
    # Threads that read, decode and cut samples ahead of the training; 0 does so between its steps.
    workers: Workers
    # Memory for decoded samples, in GiB; what does not fit is decoded again each time. Auto: half of what is free.
    cache_gib: Annotated[float, Field(ge=0, le=1e6)] | Literal["auto"]
    # Iterations between two log entries, two validations and two checkpoints.
    log_every: Iterations
    validate_every: Iterations
    checkpoint_every: Iterations
    # Iterations between two measurements of each term's share of the gradient at the last feature; 0 is off.
    gradient_share_every: Annotated[int, Field(ge=0, le=100_000_000)]
    # Which weights are kept: those of the last iteration, or of the best validation.
    select: Literal["last", "best"]
    # Images without labels beside those of batch_size in each step, from the split 'unlabelled'. Methods see them;
    # what has no method does not.
    unlabelled: Annotated[int, Field(ge=0, le=65536)] = 0

    @pydantic.model_validator(mode="after")
    def _one_budget(self) -> "TrainConfig":
        if (self.iterations is None) == (self.seconds is None):
            raise ValueError("give the budget either as iterations or as seconds, and null for the other")
        if self.compile and self.gradient_share_every:
            raise ValueError("gradient_share_every cannot look inside a compiled step; set it to 0 or compile to false")
        for key in ("batch_size", "unlabelled"):
            if getattr(self, key) % self.accumulate:
                raise ValueError(f"{key} {getattr(self, key)} is not divisible by accumulate {self.accumulate}")
        height, width = self.augmentation.crop_size
        crops = (self.batch_size + self.unlabelled) // self.accumulate
        if crops * height * width > MOST_PIXELS:
            raise ValueError(
                f"{crops} crops of {height} x {width} in one forward pass are more than"
                f" {MOST_PIXELS} pixels; lower batch_size or crop_size, or raise accumulate"
            )
        return self


@config
class InferenceConfig:
    """How a network is applied to a stored image; the headline protocol is the whole image, one scale, no flip."""

    # Images a forward pass.
    batch_size: Images
    # The network sees the image resized by this factor; its logits are resized to the label.
    input_scale: Scale
    # Height and width of a sliding window, null for the whole image.
    window: tuple[WindowSide, WindowSide] | None
    # Distance of two windows, as a part of the window.
    window_stride: Annotated[float, Field(ge=0.1, le=1)]
