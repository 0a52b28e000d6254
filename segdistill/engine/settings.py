"""Settings of a training run. Importing them costs nothing: no torch here."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from segdistill.config import Beta, Fraction, LearningRate, config, parse, to_dict
from segdistill.data.settings import AugmentationConfig, Scale, Workers
from segdistill.files import read_json, read_sealed_json

INFERENCE = "inference.json"  # beside a registered model: how images were shown to it when it was scored
Iterations = Annotated[int, Field(ge=1, le=100_000_000)]
Images = Annotated[int, Field(ge=1, le=65536)]
WindowSide = Annotated[int, Field(ge=16, le=16384)]  # pixels
Decay = Annotated[float, Field(ge=0, le=10)]
Multiplier = Annotated[float, Field(ge=1e-3, le=1000)]
LossWeight = Annotated[float, Field(ge=0, le=1e6)]
# In one forward pass of all processes. A thousand times what one GPU takes at 1024 x 1024; beyond it is a slip.
MOST_PIXELS = 2**30


@config
class PolySchedule:
    """lr * (1 - progress)^power after a linear warm-up; progress runs over the budget, iterations or seconds."""

    name: Literal["poly"] = "poly"
    power: Annotated[float, Field(ge=0, le=10)] = 0.9
    """How fast the learning rate falls; 1 is a straight line."""

    warmup_fraction: Fraction = 0.0
    """Part of the budget over which the learning rate rises linearly."""

    warmup_ratio: Fraction = 1e-3
    """Where the warm-up starts, as a part of the learning rate."""

    floor_ratio: Fraction = 0.0
    """Where the decay ends, as a part of the learning rate."""


@config
class ConstantSchedule:
    """The learning rate as it is."""

    name: Literal["constant"] = "constant"


Schedule = Annotated[PolySchedule | ConstantSchedule, Field(discriminator="name")]


@config
class _Optimizer:
    """What every optimiser can be told."""

    name: str

    lr: LearningRate
    """The encoder's learning rate after the warm-up."""

    weight_decay: Decay = 0.0
    """Strength of the pull of weights towards 0."""

    decoder_multiplier: Multiplier = 1.0
    """The learning rate of decoder, classifier and method helpers is this many times the encoder's."""

    schedule: Schedule = Field(default_factory=PolySchedule)
    """How the learning rate goes over the budget."""


@config
class SGDConfig(_Optimizer):
    """Stochastic gradient descent with momentum: the CNN recipe of the segmentation literature."""

    name: Literal["sgd"] = "sgd"

    weight_decay: Decay = 1e-4
    """Strength of the pull of weights towards 0."""

    momentum: Beta = 0.9
    """The part of the last step that goes on."""

    nesterov: bool = False
    """Whether the momentum looks ahead."""

    @pydantic.model_validator(mode="after")
    def _nesterov_has_momentum(self) -> "SGDConfig":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


@config
class AdamWConfig(_Optimizer):
    """AdamW without decay on norms and biases: the ViT recipe."""

    name: Literal["adamw"] = "adamw"

    weight_decay: Decay = 0.01
    """Strength of the pull of weights towards 0, but for norms and biases."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """How slowly the means of gradients and of their squares forget."""


@config
class AdamConfig(_Optimizer):
    """Adam, as APD uses it for the teacher's head: constant learning rate unless told otherwise."""

    name: Literal["adam"] = "adam"

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """How slowly the means of gradients and of their squares forget."""

    schedule: Schedule = Field(default_factory=ConstantSchedule)
    """How the learning rate goes over the budget."""


OptimizerConfig = Annotated[SGDConfig | AdamWConfig | AdamConfig, Field(discriminator="name")]


@config
class MedianFrequencyConfig:
    """Of class c: median over classes of f / f(c); f(c): its pixels over those of the training images that have it."""

    name: Literal["median_frequency"] = "median_frequency"


@config
class EffectiveNumberConfig:
    """Of class c with n(c) training pixels: (1 - beta) / (1 - beta^n(c)), times what makes the mean of classes 1."""

    name: Literal["effective_number"] = "effective_number"
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """How few pixels say all that there is to know of a class: 1 / (1 - beta). Null: the pixels of a mean class."""


@config
class GivenWeightsConfig:
    """Weights by the names of classes."""

    name: Literal["given"] = "given"
    weights: Annotated[dict[str, LossWeight], Field(min_length=1)]
    """Class name -> weight; a class that is not named has 1."""


ClassWeightsConfig = Annotated[
    MedianFrequencyConfig | EffectiveNumberConfig | GivenWeightsConfig, Field(discriminator="name")
]


@config
class OhemConfig:
    """Which pixels the cross-entropy is taken over: the hard ones."""

    threshold: Fraction
    """A pixel is hard where the probability of its class is below this; 0 keeps the min_kept hardest alone."""

    min_kept: Annotated[int, Field(ge=1, le=MOST_PIXELS)]
    """Pixels an image: if fewer are hard in a forward pass, the hardest up to as many times its images."""


@config
class LossConfig:
    """What the labels teach, whatever the method: a weighted sum, times ``supervised`` of an experiment; an auxiliary
    head the same, times ``auxiliary`` too. A loss of weight 0 is not computed, but for the cross-entropy, which every
    log has."""

    cross_entropy: LossWeight = 1.0
    """Weight of the cross-entropy, the term ce."""

    class_weights: ClassWeightsConfig | None = None
    """How much a pixel of each class counts in the cross-entropy, whose mean is divided by the sum of the weights; null
    is alike."""

    ohem: OhemConfig | None = None
    """Online hard example mining: takes the cross-entropy over hard pixels alone; null takes it over all."""

    dice: LossWeight = 0.0
    """Weight of the Dice loss, the term dice: over the pixels of a forward pass, mean of the classes in its labels."""

    lovasz: LossWeight = 0.0
    """Weight of the Lovasz-softmax loss, the term lovasz: likewise."""

    @pydantic.model_validator(mode="after")
    def _teaches(self) -> "LossConfig":
        if not (self.cross_entropy or self.dice or self.lovasz):
            raise ValueError(
                "cross_entropy, dice and lovasz are all 0: nothing would learn from labels; give one of them a weight"
                " (an experiment without labels has supervised: 0)"
            )
        return self


@config
class TrainConfig:
    """One training loop: budget, batch, augmentation, precision, and how often it speaks, validates and saves."""

    iterations: Iterations | None
    """The budget as optimiser steps; null where it is in seconds."""

    seconds: Annotated[float, Field(ge=1e-3, le=1e7)] | None
    """The budget as seconds of training, from the end of the first step on; null where it is in iterations."""

    batch_size: Images
    """Images an optimiser step, over all processes and accumulation pieces."""

    accumulate: Images
    """Forward passes an optimiser step; batch_size, and unlabelled, must be divisible by this times the number of
    processes."""

    augmentation: AugmentationConfig
    """How training images are varied."""

    precision: Literal["fp32", "bf16", "fp16"]
    """Numbers of forward and backward passes: fp32, or autocast to bf16 or fp16 on a GPU."""

    channels_last: bool
    """Keep images and features channel by channel in memory: faster on a GPU with bf16 or fp16."""

    compile: bool
    """torch.compile the students and the teacher."""

    max_grad_norm: Annotated[float, Field(ge=1e-6, le=1e6)] | None
    """Largest gradient norm; null is off."""

    workers: Workers
    """Threads that read, decode and cut samples ahead of the training; 0 does so between its steps."""

    cache_gib: Annotated[float, Field(ge=0, le=1e6)] | Literal["auto"]
    """Memory for decoded samples, in GiB; what does not fit is decoded again each time. Auto: half of what is free."""

    log_every: Iterations
    """Iterations between two log entries."""

    validate_every: Iterations
    """Iterations between two validations; decides results where select is best."""

    checkpoint_every: Iterations
    """Iterations between two checkpoints, from which a run that was stopped goes on."""

    gradient_share_every: Annotated[int, Field(ge=0, le=100_000_000)]
    """Iterations between two measurements of each term's share of the gradient at the last feature; 0 is off."""

    select: Literal["last", "best"]
    """Which weights are kept: those of the last iteration, or of the best validation."""

    unlabelled: Annotated[int, Field(ge=0, le=65536)] = 0
    """Images without labels beside those of batch_size in each step, from the split 'unlabelled'. Methods see them;
    what has no method does not."""

    loss: LossConfig = Field(default_factory=LossConfig)
    """What the labels teach: cross-entropy, over all or hard pixels, with class weights, Dice, Lovasz."""

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

    batch_size: Images
    """Images a forward pass."""

    input_scale: Scale
    """The network sees the image resized by this factor; its logits are resized to the label."""

    window: tuple[WindowSide, WindowSide] | None
    """Height and width of a sliding window, null for the whole image."""

    window_stride: Annotated[float, Field(ge=0.1, le=1)]
    """Distance of two windows, as a part of the window."""


def inference_of(folder: Path) -> dict[str, Any]:
    """How images were shown to the networks of a folder when they were scored; where it does not say, as they are."""
    settings = InferenceConfig(batch_size=8, input_scale=1.0, window=None, window_stride=0.67)
    if (folder / "metrics.json").is_file():
        metrics = read_sealed_json(folder, "metrics.json", mend="train it again")
        settings = parse(InferenceConfig, metrics["config"]["inference"], f"{folder / 'metrics.json'}: inference")
    elif (folder / INFERENCE).is_file():
        settings = parse(InferenceConfig, read_json(folder / INFERENCE), str(folder / INFERENCE))
    return dict(to_dict(settings))
