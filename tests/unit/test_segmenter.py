"""The taps, strides and sizes that every segmenter promises, whatever is inside."""

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from segdistill.config import parse
from segdistill.errors import UserError
from segdistill.models.batch_norm import synchronised
from segdistill.models.config import ModelConfig
from segdistill.models.segmenter import Segmenter, build_segmenter, logits_at

CLASSES = 5
SHARED_WEIGHTS = Path(__file__).resolve().parents[2].parent / "shared" / "weights" / "tf_efficientnet_lite0.safetensors"
needs_weights = pytest.mark.skipif(
    not SHARED_WEIGHTS.is_file(), reason=f"{SHARED_WEIGHTS.name} is not beside the project"
)

DEEPLAB = {"decoder_channels": 16}
UPERNET = {"decoder_channels": 16}
SEGFORMER = {"decoder_segmentation_channels": 16}
FPN = {"decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32}
PSPNET = {"psp_out_channels": 16}
DPT = {"decoder_fusion_channels": 8, "decoder_intermediate_channels": [8, 8, 8, 8]}

# architecture, encoder, output stride, decoder, channels of the four stages, of the last feature, stride of the logits
CASES: list[tuple[str, str, int, dict[str, Any], tuple[int, ...], int, int]] = [
    ("DeepLabV3", "resnet18", 8, DEEPLAB, (64, 128, 256, 512), 16, 8),
    ("DeepLabV3Plus", "resnet18", 16, DEEPLAB, (64, 128, 256, 512), 16, 4),
    ("UPerNet", "resnet18", 32, UPERNET, (64, 128, 256, 512), 16, 4),
    ("PSPNet", "mobilenetv2_050", 8, PSPNET, (16, 16, 48, 160), 16, 8),
    ("FPN", "mobilenetv2_050", 32, FPN, (16, 16, 48, 160), 32, 4),
    ("DeepLabV3Plus", "mobilenetv2_050", 8, DEEPLAB, (16, 16, 48, 160), 16, 4),
    ("DeepLabV3Plus", "tu-mobilenetv3_small_050", 16, DEEPLAB, (8, 16, 24, 288), 16, 4),
    ("Segformer", "mobilenetv3_small_050", 16, SEGFORMER, (8, 16, 24, 288), 16, 4),
    ("DeepLabV3", "tf_efficientnet_lite0", 16, DEEPLAB, (24, 40, 112, 320), 16, 16),
    ("UPerNet", "tf_efficientnet_lite0", 8, UPERNET, (24, 40, 112, 320), 16, 4),
    ("PSPNet", "tf_efficientnet_lite0", 32, PSPNET, (24, 40, 112, 320), 16, 32),
    ("Segformer", "mit_b0", 32, SEGFORMER, (32, 64, 160, 256), 16, 4),
    ("UPerNet", "mit_b0", 32, UPERNET, (32, 64, 160, 256), 16, 4),
    ("FPN", "pvt_v2_b0", 32, FPN, (32, 64, 160, 256), 32, 4),
    ("Segformer", "pvt_v2_b0", 32, SEGFORMER, (32, 64, 160, 256), 16, 4),
    ("DPT", "vit_tiny_patch16_224", 16, DPT, (192,) * 4, 8, 2),
    ("DPT", "tu-deit_tiny_distilled_patch16_224", 16, DPT, (192,) * 4, 8, 2),
]
VITS = {"mit_b0", "pvt_v2_b0", "vit_tiny_patch16_224", "tu-deit_tiny_distilled_patch16_224"}
every_case = pytest.mark.parametrize("case", CASES, ids=[f"{case[0]}-{case[1]}-{case[2]}" for case in CASES])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(architecture: str, encoder: str, stride: int, decoder: dict[str, Any], **more: Any) -> Segmenter:
    settings = {"architecture": architecture, "encoder": encoder, "output_stride": stride, "decoder": decoder, **more}
    return build_segmenter(parse(ModelConfig, settings, "model"), CLASSES)


def test_a_model_config_is_importable_without_torch() -> None:
    code = "import sys, segdistill.models.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@every_case
@pytest.mark.parametrize("size", [(64, 64), (97, 65)], ids=["64x64", "97x65"])
def test_taps_have_the_promised_channels_and_strides_at_any_size(case: Any, size: tuple[int, int]) -> None:
    architecture, encoder, stride, decoder, channels, last_channels, logits_stride = case
    segmenter = build(architecture, encoder, stride, decoder, aux=True).eval()
    info, images = segmenter.info, torch.rand(2, 3, *size)
    with torch.no_grad():
        outputs = segmenter(images)
        served = segmenter.logits(images)

    strides = (stride,) * 4 if architecture == "DPT" else tuple(min(full, stride) for full in (4, 8, 16, 32))
    assert (info.feature_strides, info.feature_channels) == (strides, channels)
    assert (info.last_channels, info.last_stride, info.logits_stride) == (last_channels, logits_stride, logits_stride)
    assert (info.kind, info.num_classes) == ("vit" if encoder in VITS else "cnn", CLASSES)

    def shape(number: int, tap_stride: int) -> tuple[int, ...]:
        return (2, number, -(-size[0] // tap_stride), -(-size[1] // tap_stride))

    assert [tuple(feature.shape) for feature in outputs.features] == [
        shape(*pair) for pair in zip(channels, strides, strict=True)
    ]
    assert tuple(outputs.last_feature.shape) == shape(last_channels, logits_stride)
    assert tuple(outputs.logits.shape) == shape(CLASSES, logits_stride)
    assert outputs.aux_logits is not None and tuple(outputs.aux_logits.shape) == shape(CLASSES, strides[2])

    classifier = segmenter.classifier
    assert classifier.kernel_size == (1, 1)
    by_hand = F.conv2d(outputs.last_feature, classifier.weight, classifier.bias)
    torch.testing.assert_close(by_hand, outputs.logits)
    torch.testing.assert_close(served, outputs.logits)
    assert logits_at(outputs.logits, size).shape == (2, CLASSES, *size)


@every_case
def test_a_batch_of_one_trains_and_every_parameter_gets_a_gradient(case: Any) -> None:
    segmenter = build(*case[:4], aux=True).train()
    outputs = segmenter(torch.rand(1, 3, 64, 64))
    assert outputs.aux_logits is not None
    (outputs.logits.square().mean() + outputs.aux_logits.square().mean()).backward()
    # DDP waits for ever for the gradient of a parameter that never runs.
    assert [name for name, parameter in segmenter.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in segmenter.parameters() if parameter.grad is not None)


@every_case
def test_one_crop_of_one_cell_trains_because_a_single_value_has_no_statistics(case: Any) -> None:
    architecture, encoder, stride, decoder = case[:4]
    # FPN's group norm has the same wish, in any mode, where it is given as many groups as channels: it is not here.
    segmenter = build(architecture, encoder, stride, {} if architecture == "FPN" else decoder, aux=True).train()
    outputs = segmenter(torch.rand(1, 3, 32, 32))
    assert outputs.aux_logits is not None
    (outputs.logits.square().mean() + outputs.aux_logits.square().mean()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in segmenter.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenetv3_small_050"])
def test_batch_statistics_of_all_processes_leave_the_activations_where_they_were(encoder: str) -> None:
    segmenter, images = build("Segformer", encoder, 32, {}).eval(), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        alone = segmenter.logits(images)
        together = synchronised(segmenter)
        assert not any(type(module).__name__.startswith(("BatchNorm", "SingleValue")) for module in together.modules())
        torch.testing.assert_close(together.logits(images), alone)


def test_the_pooled_branch_uses_the_batch_again_as_soon_as_there_are_two() -> None:
    segmenter = build("UPerNet", "resnet18", 32, UPERNET).train()
    pooled = segmenter.decoder.get_submodule("psp.blocks.0.1.1")
    assert isinstance(pooled, nn.BatchNorm2d)
    before = pooled.running_mean.clone()
    segmenter(torch.rand(1, 3, 64, 64))
    assert torch.equal(pooled.running_mean, before)
    segmenter(torch.rand(2, 3, 64, 64))
    assert not torch.equal(pooled.running_mean, before)


@pytest.mark.parametrize("encoder", ["resnet18", "tf_efficientnet_lite0"])
def test_dilation_keeps_the_parameters(encoder: str) -> None:
    shapes = [
        {name: value.shape for name, value in build("UPerNet", encoder, stride, UPERNET).state_dict().items()}
        for stride in (8, 16, 32)
    ]
    assert shapes[0] == shapes[1] == shapes[2]


def test_without_the_option_there_is_no_auxiliary_head() -> None:
    segmenter = build("FPN", "resnet18", 32, FPN)
    assert segmenter.aux_head is None
    assert segmenter(torch.rand(2, 3, 64, 64)).aux_logits is None


def test_encoder_and_decoder_parameters_are_disjoint_and_complete() -> None:
    segmenter = build("DPT", "vit_tiny_patch16_224", 16, DPT, aux=True)
    encoder = {id(parameter) for parameter in segmenter.encoder_parameters()}
    decoder = {id(parameter) for parameter in segmenter.decoder_parameters()}
    assert encoder and decoder and not encoder & decoder
    assert encoder | decoder == {id(parameter) for parameter in segmenter.parameters()}
    assert id(segmenter.classifier.weight) in decoder


def test_images_are_normalised_as_the_encoder_was_trained() -> None:
    lite = build("FPN", "tf_efficientnet_lite0", 32, FPN)
    assert lite.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    resnet = build("FPN", "resnet18", 32, FPN).eval()
    torch.testing.assert_close(resnet.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(resnet.std.flatten(), torch.tensor([0.229, 0.224, 0.225]))
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = resnet.encoder((images - resnet.mean) / resnet.std)[-1]
        torch.testing.assert_close(resnet(images).features[-1], expected)


@pytest.mark.parametrize("stride", [4, 16])
def test_logits_at_undoes_the_stride_without_a_shift(stride: int) -> None:
    # Logits that are a ramp over the pixels: cell i of stride s has its centre at pixel s*i + (s - 1) / 2.
    height, width = 97, 65
    rows, columns = -(-height // stride), -(-width // stride)
    centres = torch.arange(rows) * stride + (stride - 1) / 2
    logits = centres.view(1, 1, rows, 1).expand(1, 1, rows, columns).half()
    full = logits_at(logits, (height, width))
    assert full.dtype == torch.float32
    inside = torch.arange(stride, height - stride)
    torch.testing.assert_close(full[0, 0, inside, 0], inside.float())
    torch.testing.assert_close(full, logits_at(logits, (height, width), stride))


def test_logits_of_another_scale_are_stretched() -> None:
    logits = torch.rand(1, 2, 20, 30)
    expected = F.interpolate(logits, size=(64, 96), mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits_at(logits, (64, 96)), expected)


def test_an_odd_image_gives_the_logits_of_its_padded_self() -> None:
    segmenter = build("DeepLabV3Plus", "mobilenetv3_small_050", 16, DEEPLAB).eval()
    images = torch.rand(1, 3, 61, 50)
    padded = F.pad(images, (0, 14, 0, 3), mode="replicate")
    with torch.no_grad():
        torch.testing.assert_close(segmenter(images).logits, segmenter(padded).logits[..., :16, :13])


def test_a_compiled_segmenter_is_one_graph_without_breaks() -> None:
    segmenter = build("DeepLabV3Plus", "mobilenetv3_small_050", 16, DEEPLAB).eval()
    compiled = torch.compile(segmenter, backend="eager", fullgraph=True)
    images = torch.rand(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, segmenter(images).logits)


@needs_weights
@pytest.mark.parametrize("stride", [16, 32])
def test_local_weights_give_the_features_that_timm_gives(stride: int) -> None:
    import timm

    more = {} if stride == 32 else {"output_stride": stride}
    overlay = {"file": str(SHARED_WEIGHTS)}
    reference = timm.create_model(
        "tf_efficientnet_lite0", pretrained=True, features_only=True, pretrained_cfg_overlay=overlay, **more
    ).eval()
    segmenter = build("UPerNet", "tf_efficientnet_lite0", stride, UPERNET, encoder_weights=str(SHARED_WEIGHTS)).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = reference((images - 0.5) / 0.5)
        for ours, theirs in zip(segmenter(images).features, expected[-4:], strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("architecture", "encoder", "stride", "decoder"),
    [
        ("DPT", "vit_tiny_patch16_224", 16, DPT),  # its final norm and head are dropped, the file has them
        ("FPN", "convnext_atto", 32, FPN),  # its extractor renames stages.0 to stages_0
        ("FPN", "resnet18", 32, FPN),
        ("Segformer", "mit_b0", 32, SEGFORMER),
    ],
)
def test_a_whole_classifiers_file_fills_the_encoder(
    architecture: str, encoder: str, stride: int, decoder: dict[str, Any], tmp_path: Path
) -> None:
    import segmentation_models_pytorch as smp
    import timm

    path = tmp_path / "weights.safetensors"
    native = encoder in ("resnet18", "mit_b0")
    whole = smp.encoders.get_encoder(encoder, weights=None) if native else timm.create_model(encoder)
    state = {name: torch.rand_like(value.float()).to(value.dtype) for name, value in whole.state_dict().items()}
    save_file(state | ({"fc.weight": torch.rand(2, 2)} if native else {}), path)
    segmenter = build(architecture, encoder, stride, decoder, encoder_weights=str(path))
    theirs = {name.replace(".", "_"): value for name, value in state.items()}
    for name, value in segmenter.encoder.state_dict().items():
        assert torch.equal(value, theirs[name.removeprefix("model.").replace(".", "_")]), name


@needs_weights
@pytest.mark.parametrize(
    ("encoder", "change", "message"),
    [
        ("mobilenetv2_050", {}, "is not in encoder 'mobilenetv2_050'"),
        ("tf_efficientnet_lite1", {}, "of encoder 'tf_efficientnet_lite1' is missing"),
        ("tf_efficientnet_lite0", {"conv_stem.weight": None}, "'conv_stem.weight' of encoder"),
        ("tf_efficientnet_lite0", {"conv_stem.weight": torch.zeros(1)}, "'conv_stem.weight' has shape"),
        ("tf_efficientnet_lite0", {"something.else": torch.zeros(1)}, "'something.else' is not in encoder"),
    ],
)
def test_wrong_weights_are_refused_by_file_and_key(
    encoder: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.safetensors"
    state = {name: value for name, value in (load_file(SHARED_WEIGHTS) | change).items() if value is not None}
    save_file(state, path)
    with pytest.raises(UserError, match=message) as caught:
        build("UPerNet", encoder, 32, UPERNET, encoder_weights=str(path))
    assert str(path) in str(caught.value)


def test_a_pickled_or_damaged_or_absent_weights_file_is_a_user_error(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not safetensors at all")
    for value, message in [
        ("imagnet", "allowed: none, imagenet, or the path of a .safetensors file"),
        (str(tmp_path / "weights.pth"), "is not a .safetensors file"),
        (str(tmp_path / "absent.safetensors"), "no such file"),
        (str(damaged), "not a readable safetensors file"),
    ]:
        with pytest.raises(UserError, match=message):
            build("UPerNet", "resnet18", 32, UPERNET, encoder_weights=value)


@pytest.mark.parametrize("encoder", ["resnet18", "mobilenetv3_small_050"])
def test_imagenet_weights_without_a_network_fail_in_seconds_and_say_what_to_do(
    encoder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    from segdistill.models import weights

    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:  # accepts and never answers
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(weights, "HUB_TIMEOUT_SECONDS", 0.5)
        began = time.monotonic()
        with pytest.raises(UserError, match=r"network does not answer.*local \.safetensors file"):
            build("UPerNet", encoder, 32, UPERNET, encoder_weights="imagenet")
        assert time.monotonic() - began < 10
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("DeepLabV3", "resnet18", 32, {}), r"model.output_stride: 32 .*'resnet18'.*'DeepLabV3'; allowed: 8, 16"),
        (("FPN", "resnet18", 16, {}), r"model.output_stride: 16 .*; allowed: 32"),
        (("Segformer", "mit_b0", 16, {}), r"'mit_b0' and architecture 'Segformer'; allowed: 32"),
        (("UPerNet", "pvt_v2_b0", 8, {}), r"'pvt_v2_b0' and architecture 'UPerNet'; allowed: 32"),
        (("DeepLabV3Plus", "mit_b0", 16, {}), r"the encoder allows 32 and the architecture 8, 16"),
        (("DPT", "vit_tiny_patch16_224", 32, {}), r"model.output_stride: 32 .*; allowed: 16"),
        (("UPerNet", "resnet81", 32, {}), r"model.encoder: unknown encoder 'resnet81'; did you mean 'resnet18'\?"),
        (("UPerNet", "vit_tiny_patch16_224", 32, {}), r"architecture 'DPT' takes plain vision transformers"),
        (("DPT", "resnet18", 16, {}), r"DPT takes plain vision transformers"),
        (("UPerNet", "resnet18", 32, {"decoder_chanels": 8}), r"decoder_chanels: .*did you mean 'decoder_channels'\?"),
        (("UPerNet", "resnet18", 32, {"encoder_depth": 3}), r"encoder_depth: unknown key .*decoder_channels"),
        (("UPerNet", "resnet18", 32, {"decoder_channels": "many"}), r"cannot be built .*'decoder_channels': 'many'"),
        (("UPerNet", "swin_tiny_patch4_window7_224", 32, {}), r"does not run on a 64x64 image"),
    ],
)
def test_what_cannot_be_built_is_one_sentence_that_says_what_can(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(*settings)
    assert "\n" not in str(caught.value)
