"""Optimisers and schedules from their settings."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from segdistill.engine.settings import AdamConfig, AdamWConfig, OptimizerConfig, PolySchedule, Schedule, SGDConfig
from segdistill.methods.method import Method
from segdistill.models.segmenter import Segmenter


def student_optimizer(
    config: OptimizerConfig, student: Segmenter, methods: Iterable[Method], name: str
) -> torch.optim.Optimizer:
    """The optimiser of one student and of the method helpers that it trains."""
    helpers = [parameter for method in methods for parameter in method.helper_parameters(name)]
    groups = [
        (list(student.encoder_parameters()), 1.0),
        ([*student.decoder_parameters(), *helpers], config.decoder_multiplier),
    ]
    return build_optimizer(config, groups)


def build_optimizer(
    config: OptimizerConfig, groups: Iterable[tuple[Iterable[nn.Parameter], float]]
) -> torch.optim.Optimizer:
    """An optimiser over (parameters, learning rate multiplier) groups.

    AdamW leaves vectors (norms, biases) without decay, as the transformer recipes do; SGD and Adam decay all.
    """
    settings: list[dict[str, Any]] = []
    for parameters, multiplier in groups:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        vectors = [parameter for parameter in trained if parameter.ndim <= 1] if isinstance(config, AdamWConfig) else []
        skip = {id(parameter) for parameter in vectors}
        matrices = [parameter for parameter in trained if id(parameter) not in skip]
        for members, decay in ((matrices, config.weight_decay), (vectors, 0.0)):
            if members:
                lr = config.lr * multiplier
                settings.append({"params": members, "lr": lr, "base_lr": lr, "weight_decay": decay})
    match config:
        case SGDConfig():
            momentum, nesterov = config.momentum, config.nesterov
            return torch.optim.SGD(settings, lr=config.lr, momentum=momentum, nesterov=nesterov, fused=True)
        case AdamWConfig():
            return torch.optim.AdamW(settings, lr=config.lr, betas=config.betas, fused=True)
        case AdamConfig():
            return torch.optim.Adam(settings, lr=config.lr, betas=config.betas, fused=True)


def factor(schedule: Schedule, progress: float) -> float:
    """What the schedule multiplies the learning rate with, at a progress in 0..1 through the budget."""
    if not isinstance(schedule, PolySchedule):
        return 1.0
    progress = min(max(progress, 0.0), 1.0)
    decayed = schedule.floor_ratio + (1.0 - schedule.floor_ratio) * (1.0 - progress) ** schedule.power
    if progress >= schedule.warmup_fraction:
        return decayed
    risen = progress / schedule.warmup_fraction
    return decayed * (schedule.warmup_ratio + (1.0 - schedule.warmup_ratio) * risen)


def set_learning_rates(optimizer: torch.optim.Optimizer, schedule: Schedule, progress: float) -> None:
    """Sets each group's learning rate for the step to come."""
    scale = factor(schedule, progress)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * scale
