"""Models as files: what is saved comes back, and what does not fit is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from segdistill.config import parse
from segdistill.errors import UserError
from segdistill.models.config import ModelConfig
from segdistill.models.export import (
    ExportedSegmenter,
    count_macs,
    count_parameters,
    load_model,
    load_weights,
    model_names,
    save_model,
)
from segdistill.models.segmenter import Segmenter, build_segmenter, logits_at

CNN = {
    "architecture": "DeepLabV3Plus",
    "encoder": "tu-mobilenetv3_small_050",
    "output_stride": 16,
    "decoder": {"decoder_channels": 64},
}
VIT = {
    "architecture": "Segformer",
    "encoder": "mit_b0",
    "output_stride": 32,
    "decoder": {"decoder_segmentation_channels": 64},
}
TEACHER = {
    "architecture": "UPerNet",
    "encoder": "resnet18",
    "output_stride": 32,
    "decoder": {"decoder_channels": 64},
    "aux": True,
}
CLASSES = [
    {"name": "sky", "color": [0, 0, 255]},
    {"name": "road", "color": [90, 90, 90]},
    {"name": "ä", "color": [0] * 3},
]
DEFAULTS = pytest.mark.parametrize("settings", [CNN, VIT, TEACHER], ids=["cnn", "vit", "teacher"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def build(settings: dict[str, Any], **more: Any) -> Segmenter:
    return build_segmenter(parse(ModelConfig, settings | more, "model"), len(CLASSES))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path, "cnn", build(CNN), {"classes": CLASSES})
    return tmp_path


def rewrite(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Other weights under the name of the saved ones, and a description that vouches for them."""
    import hashlib

    save_file(weights, folder / "cnn.safetensors")
    document = json.loads((folder / "cnn.json").read_text())
    document["sha256"] = hashlib.sha256((folder / "cnn.safetensors").read_bytes()).hexdigest()
    (folder / "cnn.json").write_text(json.dumps(document))


@DEFAULTS
def test_what_is_loaded_gives_the_same_logits_as_what_was_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    segmenter = build(settings)
    segmenter(torch.rand(2, 3, 64, 64))  # moves the running statistics
    segmenter.mean.fill_(0.25)  # as if trained with another normalisation
    segmenter.to(memory_format=torch.channels_last)
    save_model(tmp_path / "new" / "folder", "model", segmenter, {"classes": CLASSES, "val_miou": 0.5})
    loaded, document = load_model(tmp_path / "new" / "folder", "model")

    images = torch.rand(1, 3, 64, 64)
    segmenter.to(memory_format=torch.contiguous_format)  # other kernels round otherwise
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, segmenter.eval()(images).logits)
    assert not loaded.training
    assert loaded.config == segmenter.config and loaded.info == segmenter.info
    assert document["classes"] == CLASSES and document["val_miou"] == 0.5
    assert document["num_classes"] == 3 and document["params"] == count_parameters(segmenter)
    assert document["model"]["encoder"] == settings["encoder"]
    files = sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    assert files == ["model.json", "model.safetensors"]  # no temporary file is left


def test_the_same_model_is_the_same_bytes(tmp_path: Path) -> None:
    segmenter = build(CNN)
    for folder in ("a", "b"):
        save_model(tmp_path / folder, "cnn", segmenter, {"classes": CLASSES})
    for suffix in ("safetensors", "json"):
        assert (tmp_path / "a" / f"cnn.{suffix}").read_bytes() == (tmp_path / "b" / f"cnn.{suffix}").read_bytes()


def test_loading_draws_no_random_numbers_and_needs_no_network_or_first_weights(saved: Path) -> None:
    document = json.loads((saved / "cnn.json").read_text())
    document["model"]["encoder_weights"] = "/where/it/once/lay.safetensors"
    (saved / "cnn.json").write_text(json.dumps(document))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    loaded, _ = load_model(saved, "cnn")
    assert torch.equal(torch.rand(1), expected)
    assert loaded.config.encoder_weights == "/where/it/once/lay.safetensors"


def test_any_missing_unexpected_or_mismatched_key_is_an_error_that_names_file_and_key(saved: Path) -> None:
    weights = load_file(saved / "cnn.safetensors")
    key = "decoder.block1.0.weight"
    changes = [
        ({name: value for name, value in weights.items() if name != key}, f"'{key}' is missing"),
        (weights | {"more": torch.zeros(1)}, "'more' is unexpected"),
        (weights | {key: torch.zeros(1)}, rf"'{key}' is torch.float32 \[1\]"),
        (weights | {key: weights[key].half()}, f"'{key}' is torch.float16"),
        ({name: value for name, value in weights.items() if name.startswith("encoder.")}, "is missing"),
    ]
    for changed, message in changes:
        rewrite(saved, changed)
        with pytest.raises(UserError, match=message) as caught:
            load_model(saved, "cnn")
        assert "cnn.safetensors" in str(caught.value)


def test_a_strict_load_changes_nothing_when_it_fails(tmp_path: Path) -> None:
    segmenter = build(CNN)
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    others = {name: value + 1 for name, value in before.items() if name != "classifier.bias"}
    save_file(others, tmp_path / "partial.safetensors")
    with pytest.raises(UserError, match=r"classifier\.bias"):
        load_weights(segmenter, tmp_path / "partial.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())


def test_damaged_or_foreign_or_absent_files_are_user_errors(saved: Path) -> None:
    with pytest.raises(UserError, match=r"cnm\.json: no such file.*did you mean 'cnn'"):
        load_model(saved, "cnm")
    good = (saved / "cnn.safetensors").read_bytes()
    (saved / "cnn.safetensors").write_bytes(good[:-100])
    with pytest.raises(UserError, match=r"cnn\.safetensors: not the weights that cnn\.json describes"):
        load_model(saved, "cnn")
    (saved / "cnn.safetensors").unlink()
    with pytest.raises(UserError, match=r"cnn\.safetensors: no such file"):
        load_model(saved, "cnn")
    (saved / "cnn.safetensors").write_bytes(good)
    document = json.loads((saved / "cnn.json").read_text())
    for text, message in [
        ("{", "not valid JSON"),
        ("[]", "no 'model'"),
        (json.dumps(document | {"num_classes": "three"}), "no 'num_classes' of type int"),
        (json.dumps(document | {"model": document["model"] | {"encodr": 1}}), r"cnn\.json: model\.encodr: unknown key"),
    ]:
        (saved / "cnn.json").write_text(text)
        with pytest.raises(UserError, match=message):
            load_model(saved, "cnn")


def test_names_are_those_of_complete_pairs(saved: Path) -> None:
    (saved / "metrics.json").write_text("{}")
    (saved / "half.safetensors").write_bytes(b"")
    assert model_names(saved) == ["cnn"]
    assert model_names(saved / "absent") == []


def test_a_name_that_leaves_the_folder_and_a_wrong_class_list_are_refused(tmp_path: Path) -> None:
    segmenter = build(CNN)
    with pytest.raises(UserError, match="not a name for a model"):
        save_model(tmp_path, "../cnn", segmenter, {})
    with pytest.raises(ValueError, match="2 classes in metadata, 3 in the model"):
        save_model(tmp_path, "cnn", segmenter, {"classes": CLASSES[:2]})
    assert list(tmp_path.iterdir()) == []


@DEFAULTS
def test_an_exported_program_gives_the_same_logits_at_other_sizes(settings: dict[str, Any]) -> None:
    exported = ExportedSegmenter(build(settings)).eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        exported, (torch.rand(2, 3, 64, 96),), dynamic_shapes={"images": {0: dynamic, 2: dynamic, 3: dynamic}}
    ).module()
    for shape in [(1, 3, 64, 64), (3, 3, 97, 65), (1, 3, 60, 128)]:
        images = torch.rand(shape)
        with torch.no_grad():
            expected = exported(images)
            torch.testing.assert_close(program(images), expected)
        assert expected.shape == (shape[0], len(CLASSES), *shape[2:]) and expected.dtype == torch.float32


def test_what_is_served_is_what_is_evaluated() -> None:
    segmenter = build(TEACHER).eval()
    images = torch.rand(2, 3, 61, 97)
    with torch.no_grad():
        expected = logits_at(segmenter(images).logits, (61, 97))
        torch.testing.assert_close(ExportedSegmenter(segmenter)(images), expected)


def test_parameters_are_counted_without_the_auxiliary_head() -> None:
    with_head, without = build(TEACHER), build(TEACHER, aux=False)
    assert count_parameters(with_head) == count_parameters(without) == sum(p.numel() for p in without.parameters())
    assert sum(p.numel() for p in with_head.parameters()) > count_parameters(with_head)


def test_macs_equal_a_count_by_hooks_over_convolutions() -> None:
    # A convolution does (output cells) x (output channels) x (input channels / groups) x (kernel area) products.
    segmenter = build(CNN).train()
    total = 0

    def count(module: Any, inputs: Any, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in segmenter.modules() if isinstance(m, torch.nn.Conv2d)]
    macs = count_macs(segmenter, (64, 96))
    assert macs == total > 0
    assert segmenter.training
    for hook in hooks:
        hook.remove()


def test_macs_of_attention_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    # One attention over N tokens of width D costs 2 * N * N * D products beside its projections; without them the count
    # would be that of linear layers and convolutions alone.
    settings = {
        "architecture": "DPT",
        "encoder": "vit_tiny_patch16_224",
        "output_stride": 16,
        "decoder": {"decoder_fusion_channels": 8, "decoder_intermediate_channels": [8] * 4},
    }
    segmenter = build(settings)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        segmenter.eval()(torch.zeros(1, 3, 64, 64))
    by_op = counter.get_flop_counts()["Global"]
    plain = sum(
        flops
        for op, flops in by_op.items()
        if "convolution" in str(op) or "addmm" in str(op) or "mm" in str(op).split(".")
    )
    tokens, width, blocks = 4 * 4 + 1, 192, 12
    assert count_macs(segmenter, (64, 64)) - plain // 2 == blocks * 2 * tokens * tokens * width


def test_macs_of_an_image_that_no_memory_would_bear_are_counted() -> None:
    settings = {"architecture": "Segformer", "encoder": "mit_b0", "output_stride": 32, "decoder": {}}
    assert count_macs(build(settings), (32 * 1024, 32 * 1024)) > 1024**2 * count_macs(build(settings), (32, 32))


def test_logits_at_agrees_with_plain_interpolation_where_nothing_is_padded() -> None:
    logits = torch.rand(1, 3, 16, 24)
    expected = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(logits_at(logits, (64, 96)), expected)
