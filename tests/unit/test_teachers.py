"""Teachers of other libraries: tiny ones, drawn at random, in the files that those libraries write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from segdistill.config import to_dict
from segdistill.errors import UserError
from segdistill.methods import build_offline, parse_method
from segdistill.models.config import ModelConfig
from segdistill.models.export import count_macs, load_model, save_model
from segdistill.models.segmenter import build_segmenter
from segdistill.models.teachers import files_hash, licence, open_teacher, outline, require_labels

NAMES = ("Road", "side walk", "sky", "car", "truck")
CLASSES = ["sky", "sidewalk", "road", "vehicle"]
LABELS = {"car": "vehicle", "truck": "vehicle"}
MEAN, STD = [0.3, 0.4, 0.5], [0.2, 0.25, 0.3]
WIDTHS = (8, 16, 32, 64)


def segformer(names: tuple[str, ...] = NAMES) -> Any:
    transformers = pytest.importorskip("transformers")
    labels = dict(enumerate(names))
    config = transformers.SegformerConfig(
        hidden_sizes=list(WIDTHS), depths=[1] * 4, num_attention_heads=[1, 2, 4, 8], decoder_hidden_size=16,
        id2label=labels, label2id={name: index for index, name in labels.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.SegformerForSemanticSegmentation(config).eval()


def upernet() -> Any:
    transformers = pytest.importorskip("transformers")
    stages = [f"stage{number}" for number in range(1, 5)]
    encoder = transformers.ConvNextConfig(hidden_sizes=list(WIDTHS), depths=[1] * 4, out_features=stages)
    labels = dict(enumerate(NAMES))
    config = transformers.UperNetConfig(
        backbone_config=encoder, hidden_size=16, auxiliary_in_channels=32, auxiliary_channels=8, id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.UperNetForSemanticSegmentation(config).eval()


def mask2former() -> Any:
    transformers = pytest.importorskip("transformers")
    stages, labels = [f"stage{number}" for number in range(1, 5)], dict(enumerate(NAMES))
    encoder = transformers.SwinConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_features=stages
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=encoder, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16,
        encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=16, num_queries=7, id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Mask2FormerForUniversalSegmentation(config).eval()


def saved(network: Any, folder: Path) -> Path:
    network.save_pretrained(folder)
    document = {
        "image_mean": MEAN,
        "image_std": STD,
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(segformer(), tmp_path_factory.mktemp("segformer"))


def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def normalised() -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images() - mean) / std


def in_our_order(logits: torch.Tensor) -> torch.Tensor:
    return torch.stack([logits[:, 2], logits[:, 1], logits[:, 0], logits[:, 3:].logsumexp(1)], 1)


def semantic(network: Any) -> torch.Tensor:
    """What post_process_semantic_segmentation makes of Mask2Former, before it is enlarged."""
    outputs = network(normalised())
    classes, masks = outputs.class_queries_logits.softmax(-1)[..., :-1], outputs.masks_queries_logits.sigmoid()
    return torch.einsum("bqc,bqhw->bchw", classes, masks).log()


@pytest.mark.parametrize(
    ("draw", "score", "last"),
    [
        (segformer, lambda network: network(normalised()).logits, 16),
        (upernet, lambda network: network(normalised()).logits, 16),
        (mask2former, semantic, 0),
    ],
)
@torch.no_grad()
def test_a_teacher_gives_what_its_library_gives_in_the_order_of_our_classes(
    draw: Callable[[], Any], score: Callable[[Any], torch.Tensor], last: int, tmp_path: Path
) -> None:
    network = draw()
    expected = in_our_order(score(network))
    teacher = open_teacher([saved(network, tmp_path / "theirs")], CLASSES, LABELS)
    outputs = teacher(images())
    assert [tuple(feature.shape[1:]) for feature in outputs.features] == [
        (width, 64 // stride, 96 // stride) for width, stride in zip(WIDTHS, (4, 8, 16, 32), strict=True)
    ]
    assert outputs.last_feature.shape == (2, last, 16, 24) and teacher.info.last_channels == last
    logits = outputs.logits
    if draw is upernet:  # its library enlarges the logits of its own classes
        logits = F.interpolate(logits, size=(64, 96), mode="bilinear")
        single = [0, 1, 2]  # a logsumexp of enlarged logits is not the enlarged logsumexp
        logits, expected = logits[:, single], expected[:, single]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert teacher(images()[..., :50, :70]).logits.shape == (2, 4, 13, 18)
    assert count_macs(teacher, (128, 192)) == pytest.approx(4 * count_macs(teacher, (64, 96)), rel=0.5)
    known = outline([tmp_path / "theirs"])
    assert (known.feature_channels, known.last_channels) == (WIDTHS, last)

    save_model(tmp_path / "ours", "teacher", teacher, {"classes": [{"name": name} for name in CLASSES]})
    again, _ = load_model(tmp_path / "ours", "teacher", classes=CLASSES)
    assert torch.equal(again(images()).logits, outputs.logits)


def backbone(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = {
        "Dinov2Model": lambda: transformers.Dinov2Config(**common, mlp_ratio=2, patch_size=14, image_size=70),
        "Dinov2WithRegistersModel": lambda: transformers.Dinov2WithRegistersConfig(
            **common, mlp_ratio=2, patch_size=14, image_size=70, num_register_tokens=3
        ),
        "DINOv3ViTModel": lambda: transformers.DINOv3ViTConfig(**common, patch_size=16, num_register_tokens=3),
    }[name]()
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def with_head(network: Any, folder: Path, shape: tuple[int, ...] = (5, 16)) -> dict[str, torch.Tensor]:
    saved(network, folder)
    head = {"weight": torch.randn(shape), "bias": torch.randn(shape[0])}
    save_file(head, folder / "head.safetensors")
    (folder / "head.json").write_text(json.dumps({"classes": NAMES}))
    return head


@pytest.mark.parametrize(
    ("name", "stride", "shape"),
    [("Dinov2Model", 8, (5, 16)), ("Dinov2WithRegistersModel", 8, (5, 16, 1, 1)), ("DINOv3ViTModel", 16, (5, 16))],
)
@torch.no_grad()
def test_a_linear_head_reads_the_patch_tokens_of_a_dino_backbone(
    name: str, stride: int, shape: tuple[int, ...], tmp_path: Path
) -> None:
    network = backbone(name)
    head = with_head(network, tmp_path / "dino", shape)
    teacher = open_teacher([tmp_path / "dino"], CLASSES, LABELS)
    side, drawn = network.config.patch_size, images()[..., :64, :64]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    padded = F.pad((drawn - mean) / std, (0, -64 % side) * 2, mode="replicate")
    cells = -(-64 // side)
    tokens = network(padded).last_hidden_state[:, -cells * cells :]
    scores = (tokens @ head["weight"].flatten(1).T + head["bias"]).transpose(1, 2).reshape(2, 5, cells, cells)
    if side == 14:  # enlarged to pixels, of which each of our cells of 8 has its middle between two
        pixels = F.interpolate(scores, scale_factor=14, mode="bilinear")
        scores = F.avg_pool2d(pixels[..., 3:-3, 3:-3], 2, 8)
    expected = in_our_order(scores[..., : 64 // stride, : 64 // stride])
    outputs = teacher(drawn)
    singles = slice(0, 3)  # a logsumexp of resampled scores is not the resampled logsumexp, but of one class it is
    torch.testing.assert_close(outputs.logits[:, singles], expected[:, singles], rtol=1e-4, atol=1e-4)
    assert (teacher.info.logits_stride, teacher.info.last_channels, teacher.info.kind) == (stride, 16, "vit")
    assert outputs.last_feature.shape == (2, 16, 64 // stride, 64 // stride) and not outputs.features
    assert teacher(images()[..., :50, :70]).logits.shape[2:] == (-(-50 // stride), -(-70 // stride))
    assert outline([tmp_path / "dino"]).last_stride == stride

    save_model(tmp_path / "ours", "teacher", teacher, {"classes": [{"name": name} for name in CLASSES]})
    again, _ = load_model(tmp_path / "ours", "teacher", classes=CLASSES)
    assert torch.equal(again(drawn).logits, outputs.logits)


def test_a_head_that_does_not_fit_its_backbone_is_refused(tmp_path: Path) -> None:
    with_head(backbone("DINOv3ViTModel"), tmp_path, (5, 12))
    with pytest.raises(UserError, match=r"head.safetensors: key 'weight' has shape \[5, 12\]; .* of shape \[5, 16\]"):
        open_teacher([tmp_path], CLASSES, LABELS)
    (tmp_path / "head.json").unlink()
    with pytest.raises(UserError, match=r"head.json: no such file"):
        open_teacher([tmp_path], CLASSES, LABELS)


@torch.no_grad()
def test_merged_classes_have_the_sum_of_their_probabilities(folder: Path) -> None:
    labels = {**LABELS, "side walk": "rest", "sky": "rest", "Road": "rest"}
    merged = open_teacher([folder], ["vehicle", "rest"], labels).logits(images()).softmax(1)
    theirs = segformer()(normalised()).logits.softmax(1)
    torch.testing.assert_close(merged[:, 0], theirs[:, 3:].sum(1))


def test_a_class_without_source_is_refused_with_both_lists(folder: Path) -> None:
    sentence = r"none of its classes is tree, vehicle; it has Road, side walk, .*; the data set has sky, tree, vehicle"
    with pytest.raises(UserError, match=sentence):
        open_teacher([folder], ["sky", "tree", "vehicle"], {})


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ({"cars": "vehicle"}, "no teacher has a class 'cars'; did you mean 'car'"),
        ({**LABELS, "car": "lorry"}, "train_teacher.labels.car: 'lorry' is no class of the data set"),
    ],
)
def test_a_table_of_labels_names_classes_that_exist(folder: Path, labels: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        open_teacher([folder], CLASSES, labels)


@pytest.mark.parametrize(
    ("card", "stated"),
    [
        ("---\nlicense: other\nlicense_name: a | b\ntags: [x]\n---\n# Card\n", "other, a b (of 'one')"),
        ("# A card without a head\n", None),
        ("---\nlicense: [\n---\n", None),
    ],
)
def test_a_licence_is_what_the_head_of_a_card_states(card: str, stated: str | None, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    (one / "README.md").write_text(card)
    assert licence([one]) == stated
    (two / "metrics.json").write_text(json.dumps({"licence": "mit"}))
    first = stated or "not stated (of 'one')"
    assert licence([one, two]) == f"{first}; mit (of 'two')"


def copy_of(folder: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_pickled_weights_are_never_read(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model.bin, which is pickled and never read"):
        open_teacher([copy], CLASSES, LABELS)


def test_an_index_cannot_lead_to_a_pickled_file(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../pytorch_model.bin"}}))
    with pytest.raises(UserError, match=r"names '../pytorch_model.bin', which is no \*.safetensors file"):
        open_teacher([copy], CLASSES, LABELS)


def test_a_missing_weight_is_named(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path)
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if name.endswith("classifier.weight"))
    del weights[name]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"key '.*classifier.weight' is missing"):
        open_teacher([copy], CLASSES, LABELS)


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("preprocessor_config.json", None, "how the network's images are normalised"),
        ("preprocessor_config.json", {"image_mean": None}, "no 'image_mean' of three numbers"),
        ("config.json", {"architectures": ["BertModel"]}, "'BertModel' cannot teach; allowed: SegformerFor"),
        ("config.json", {"hidden_sizes": [8, 16]}, "transformers cannot build this network"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_in_a_sentence(
    folder: Path, tmp_path: Path, file: str, change: dict[str, Any] | None, sentence: str
) -> None:
    copy = copy_of(folder, tmp_path)
    if change is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **change}))
    with pytest.raises(UserError, match=sentence):
        open_teacher([copy], CLASSES, LABELS)


def test_the_hash_of_a_teacher_is_of_all_its_files(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path)
    assert files_hash([copy]) == files_hash([folder])
    (copy / "preprocessor_config.json").write_text("{}")
    assert files_hash([copy]) != files_hash([folder])


def own(folder: Path, classes: list[str]) -> Path:
    config = ModelConfig(
        architecture="UPerNet", encoder="resnet18", output_stride=32, decoder={"decoder_channels": 8}
    )  # fmt: skip
    torch.manual_seed(3)
    network = build_segmenter(config, len(classes)).eval()
    save_model(folder, "teacher", network, {"classes": [{"name": name} for name in classes]})
    return folder


@torch.no_grad()
def test_several_teachers_teach_the_mean_of_their_logits_and_no_feature(folder: Path, tmp_path: Path) -> None:
    both = [own(tmp_path / "own", CLASSES), folder]
    teacher = open_teacher(both, CLASSES, LABELS)
    one, other = (open_teacher([each], CLASSES, LABELS if each == folder else {}).logits(images()) for each in both)
    torch.testing.assert_close(teacher.logits(images()), (one + other) / 2)
    save_model(tmp_path / "mean", "teacher", teacher, {"classes": [{"name": name} for name in CLASSES]})
    again, document = load_model(tmp_path / "mean", "teacher", classes=CLASSES)
    assert torch.equal(again.logits(images()), teacher.logits(images()))
    assert document["model"]["family"] == "ensemble"
    for name in ("at", "cirkd", "fitnet", "ifvd", "mgd", "skd"):
        with pytest.raises(
            UserError, match=r"the teacher has no feature '\w+', of which the method learns; it has logits"
        ):
            build_offline([parse_method({"name": name}, name)[1]], again.info, outline(both))
    for name in ("kd", "dkd", "dist", "cwd"):
        build_offline([parse_method({"name": name}, name)[1]], again.info, outline(both))


@torch.no_grad()
def test_a_torchvision_checkpoint_teaches(tmp_path: Path) -> None:
    from torchvision.models import segmentation

    torch.manual_seed(0)
    network = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).eval()
    (tmp_path / "torchvision.json").write_text(
        json.dumps({"model": "lraspp_mobilenet_v3_large", "classes": list(NAMES)})
    )
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    require_labels([tmp_path], LABELS)
    teacher = open_teacher([tmp_path], CLASSES, LABELS)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = network((images() - mean) / std)["out"]
    logits = F.interpolate(teacher.logits(images()), size=(64, 96), mode="bilinear")
    torch.testing.assert_close(logits[:, :3], expected[:, [2, 1, 0]], rtol=1e-4, atol=1e-5)
    assert to_dict(teacher.config)["architecture"] == "lraspp_mobilenet_v3_large"
