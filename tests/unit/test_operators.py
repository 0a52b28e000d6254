"""The operators of a transformer's first stage are the block's own, and nothing of the network changes for them."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from segdistill.config import parse
from segdistill.errors import UserError
from segdistill.methods.hfd_bsd.operators import Borrowed
from segdistill.models.config import ModelConfig
from segdistill.models.operators import first_stage_operators, loose_operators
from segdistill.models.segmenter import Segmenter, build_segmenter

SEGFORMER = {"decoder_segmentation_channels": 16}
DPT = {"decoder_fusion_channels": 8, "decoder_intermediate_channels": [8, 8, 8, 8]}
CASES = {
    "mit_b0": ("Segformer", "mit_b0", 32, SEGFORMER),
    "pvt_v2_b0": ("Segformer", "tu-pvt_v2_b0", 32, SEGFORMER),
    "vit": ("DPT", "tu-vit_tiny_patch16_224", 16, DPT),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(architecture: str, encoder: str, stride: int, decoder: dict[str, Any]) -> Segmenter:
    settings = {"architecture": architecture, "encoder": encoder, "output_stride": stride, "decoder": decoder}
    return build_segmenter(parse(ModelConfig, settings, "model"), 5)


def last_block(name: str, segmenter: Segmenter) -> tuple[Any, int]:
    """The block that gives the first stage, and its reduction of keys and values."""
    encoder: Any = segmenter.encoder
    if name == "mit_b0":
        return encoder.block1[1], 8
    if name == "pvt_v2_b0":
        return encoder.model.stages_0.blocks[1], 8
    return encoder.model.blocks[2], 1  # of the 12 blocks, those with index 2, 5, 8 and 11 are stages


def whole_block(name: str, block: nn.Module, maps: Tensor) -> Tensor:
    """The block on a map, as the library runs it."""
    if name == "mit_b0":
        return block(maps)
    tokens, size = maps.flatten(2).transpose(1, 2), maps.shape[-2:]
    tokens = block(tokens, size) if name == "pvt_v2_b0" else block(tokens)
    return tokens.transpose(1, 2).unflatten(2, size)


@pytest.mark.parametrize("name", CASES)
def test_the_operators_are_the_two_branches_of_the_block_that_ends_the_first_stage(name: str) -> None:
    segmenter = build(*CASES[name]).eval()  # no drop path
    block, _ = last_block(name, segmenter)
    for parameter in block.parameters():  # biases are zero and norms one at first, and would hide an omission
        nn.init.normal_(parameter, std=0.3)
    maps = torch.randn(2, segmenter.info.feature_channels[0], 16, 24)
    attention, mlp = segmenter.attention, segmenter.mlp
    between = maps + attention(maps)
    torch.testing.assert_close(between + mlp(between), whole_block(name, block, maps), rtol=1e-4, atol=1e-4)
    zeroed = [block.mlp.fc2.weight, block.mlp.fc2.bias]  # and each by itself
    with torch.no_grad():
        for parameter in zeroed:
            parameter.zero_()
    torch.testing.assert_close(attention(maps), whole_block(name, block, maps) - maps, rtol=1e-3, atol=1e-4)
    assert attention(maps).abs().mean() > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_no_map_is_too_small_or_too_odd(name: str) -> None:
    segmenter = build(*CASES[name]).eval()
    channels = segmenter.info.feature_channels[0]
    reduction = last_block(name, segmenter)[1]
    for size in ((1, 1), (3, 7), (9, 16)):
        maps = torch.randn(1, channels, *size)
        for operator in (segmenter.attention, segmenter.mlp):
            assert operator(maps).shape == maps.shape and bool(operator(maps).isfinite().all())
    maps = torch.randn(1, channels, 10, 16)
    padded = torch.cat([maps, maps[:, :, -1:].expand(-1, -1, -10 % reduction, -1)], 2)
    torch.testing.assert_close(segmenter.attention(maps), segmenter.attention(padded)[:, :, :10])


@pytest.mark.parametrize("name", CASES)
def test_to_look_at_the_operators_leaves_the_network_as_it_was(name: str) -> None:
    segmenter = build(*CASES[name])
    state, modules = list(segmenter.state_dict()), [key for key, _ in segmenter.named_modules()]
    count = sum(parameter.numel() for parameter in segmenter.parameters())
    attention, mlp = segmenter.attention, segmenter.mlp
    Borrowed(attention).frozen(torch.randn(1, segmenter.info.feature_channels[0], 8, 8))
    assert list(segmenter.state_dict()) == state and [key for key, _ in segmenter.named_modules()] == modules
    assert sum(parameter.numel() for parameter in segmenter.parameters()) == count
    own = {id(parameter) for parameter in segmenter.parameters()}
    assert all(id(parameter) in own for operator in (attention, mlp) for parameter in operator.parameters())
    assert all(not parameter.is_meta for parameter in segmenter.parameters())
    assert segmenter.training and attention.training


def test_a_layer_scale_is_part_of_the_branch() -> None:
    model = timm.create_model("vit_tiny_patch16_224", init_values=0.5)
    block = model.blocks[2]
    assert not isinstance(block.ls1, nn.Identity)
    segmenter = build(*CASES["vit"]).eval()
    encoder: Any = segmenter.encoder
    encoder.model.blocks[2] = block.eval()
    maps = torch.randn(1, 192, 4, 4)
    between = maps + segmenter.attention(maps)
    torch.testing.assert_close(between + segmenter.mlp(between), whole_block("vit", block, maps), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("encoder", "kind"), [("resnet18", "cnn"), ("tu-mobilevitv2_050", "vit")])
def test_other_encoders_are_refused_by_name_with_those_that_work(encoder: str, kind: str) -> None:
    segmenter = build("Segformer", encoder, 32, SEGFORMER)
    assert segmenter.info.kind == kind
    for operator in ("attention", "mlp"):
        with pytest.raises(UserError, match=rf"encoder '{encoder}' has no .* mit_b0 to mit_b5, pvt_v2_\* and"):
            getattr(segmenter, operator)


def test_frozen_weights_are_constants_and_live_ones_are_trained() -> None:
    layer = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5), nn.BatchNorm2d(3))
    borrowed, maps = Borrowed(layer), torch.randn(2, 3, 4, 4, requires_grad=True)
    first, second = borrowed.frozen(maps), borrowed.frozen(maps)
    assert torch.equal(first, second) and layer.training and layer[2].num_batches_tracked == 0
    torch.testing.assert_close(first, layer.eval()(maps))
    first.square().sum().backward()
    assert maps.grad is not None and all(parameter.grad is None for parameter in layer.parameters())
    layer.train()
    borrowed(maps).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    with torch.no_grad():
        layer[0].weight.zero_()
    assert not torch.equal(borrowed.frozen(maps), first)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (9, 6)])
def test_loose_operators_keep_the_shape_and_are_drawn_anew(size: tuple[int, int]) -> None:
    maps = torch.randn(2, 8, *size)
    for one, other in zip(loose_operators(8), loose_operators(8), strict=True):
        assert one(maps).shape == maps.shape and not torch.equal(one(maps), other(maps))
        assert one(maps.bfloat16()).isfinite().all()


def test_the_loose_attention_sees_the_whole_map_and_the_loose_mlp_its_neighbours() -> None:
    maps = torch.randn(1, 8, 9, 9)
    other = maps.clone()
    other[:, :, 4, 4] += torch.randn(8)  # a constant would vanish in the norm
    attention, mlp = loose_operators(8)
    assert bool(((attention(maps) - attention(other)).abs().sum(1) > 0).all())
    changed = (mlp(maps) - mlp(other)).abs().sum(1)[0] > 0
    expected = torch.zeros(9, 9, dtype=torch.bool)
    expected[3:6, 3:6] = True
    assert torch.equal(changed, expected)


def test_the_loose_attention_matrix_is_bounded() -> None:
    seen: list[tuple[int, ...]] = []
    attention: Any = loose_operators(8).attention
    attention.operator.kv.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape)))
    attention(torch.randn(1, 8, 40, 40))
    assert seen == [(1, 49, 16)]  # 49 windows, whatever the map's size; keys and values of 8 channels


def test_the_operators_can_be_had_from_an_encoder_alone() -> None:
    segmenter = build(*CASES["mit_b0"])
    found = first_stage_operators(segmenter.encoder, "mit_b0")
    assert [type(operator).__name__ for operator in found] == ["Branch", "Branch"]
    with pytest.raises(UserError, match="encoder 'mine'"):
        first_stage_operators(nn.Identity(), "mine")
