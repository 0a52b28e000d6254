"""A teacher cannot be trained, wrapped, or saved."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from segdistill.models.config import ModelConfig
from segdistill.models.segmenter import build_segmenter
from segdistill.models.teacher import Teacher


@pytest.fixture
def teacher() -> Teacher:
    torch.manual_seed(0)
    config = ModelConfig(
        architecture="UPerNet", encoder="resnet18", output_stride=32, decoder={"decoder_channels": 8}, aux=True
    )
    return Teacher(build_segmenter(config, num_classes=3))


class Holder(nn.Module):
    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.student = nn.Conv2d(3, 3, 1)


def state_of(teacher: Teacher) -> dict[str, Any]:
    return copy.deepcopy(teacher.segmenter.state_dict())


def test_train_mode_of_whatever_holds_it_does_not_reach_it(teacher: Teacher) -> None:
    holder, before = Holder(teacher), state_of(teacher)
    holder.train()
    assert not teacher.training
    assert not any(module.training for module in teacher.segmenter.modules())
    images = torch.rand(2, 3, 64, 64)
    first, second = teacher(images), teacher(images)
    assert torch.equal(first.logits, second.logits)  # no dropout, no batch statistics
    after = state_of(teacher)
    assert before.keys() == after.keys() and len(before) > 50
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_its_outputs_have_no_gradient_but_may_enter_a_loss_that_has(teacher: Teacher) -> None:
    holder = Holder(teacher).requires_grad_(True)
    images = torch.rand(2, 3, 64, 64)
    outputs = teacher(images)
    assert not any(tensor.requires_grad for tensor in (outputs.logits, *outputs.features, outputs.last_feature))
    assert not any(parameter.requires_grad for parameter in teacher.segmenter.parameters())
    student = nn.functional.interpolate(holder.student(images), size=outputs.logits.shape[-2:])
    (student * outputs.logits).sum().backward()
    assert holder.student.weight.grad is not None
    assert all(parameter.grad is None for parameter in teacher.segmenter.parameters())


def test_no_optimiser_and_no_checkpoint_finds_it(teacher: Teacher) -> None:
    holder = Holder(teacher)
    assert [name for name, _ in holder.named_parameters()] == ["student.weight", "student.bias"]
    assert list(holder.state_dict()) == ["student.weight", "student.bias"]
    assert list(holder.buffers()) == []  # DDP would broadcast them
    holder.load_state_dict(holder.state_dict(), strict=True)


def test_moves_do_reach_it(teacher: Teacher) -> None:
    Holder(teacher).to(torch.float64)
    assert teacher.segmenter.mean.dtype == torch.float64
    assert teacher(torch.rand(1, 3, 64, 64, dtype=torch.float64)).logits.dtype == torch.float64


def test_it_gives_what_its_segmenter_gives(teacher: Teacher) -> None:
    images = torch.rand(1, 3, 65, 64)
    expected = teacher.segmenter(images)
    assert torch.equal(teacher(images).logits, expected.logits)
    assert torch.equal(teacher(images).aux_logits, expected.aux_logits)
    assert teacher.info is teacher.segmenter.info
