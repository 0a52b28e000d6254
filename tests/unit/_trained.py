"""A tiny data set and a tiny network, for the tests of what is done with a trained one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import segmentation

from segdistill.config import parse
from segdistill.engine.tracker import Tracker
from segdistill.models.config import ModelConfig
from segdistill.models.export import save_model
from segdistill.models.segmenter import build_segmenter
from segdistill.models.teachers import open_teacher
from segdistill.stages import prepare

CLASSES = [
    {"name": "road", "color": [200, 0, 0]},
    {"name": "sky", "color": [0, 200, 0]},
    {"name": "car", "color": [0, 0, 200]},
]
SIZES = [(48, 64), (48, 64), (48, 64), (33, 70), (65, 40)]  # of the test images: a batch, and odd ones


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of the layout ``folder`` with its prepared form beside it."""
    root, generator = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for split, sizes in (("train", SIZES[:1]), ("val", SIZES[:1]), ("test", SIZES)):
        for kind in ("images", "masks"):
            (root / "data" / kind / split).mkdir(parents=True)
        for number, (height, width) in enumerate(sizes):
            pixels = generator.integers(0, 255, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"data/images/{split}/{number}.png")
            labels = generator.integers(0, 3, (height, width), dtype=np.uint8)
            labels[:5] = 255
            Image.fromarray(labels).save(root / f"data/masks/{split}/{number}.png")
    (root / "data/classes.json").write_text(json.dumps({"classes": CLASSES, "ignore_index": 255}))
    (root / "report").mkdir()
    (root / "report/summary.json").write_text(json.dumps({"success": True, "layout": "folder"}))
    config = prepare.Config(layout="folder", shard_samples=8, max_side=None, workers=1)
    prepare.run(
        config, data=root / "data", report=root / "report", prepared=root / "prepared", tracker=Tracker()
    )  # fmt: skip
    return root


@pytest.fixture(scope="module", params=["segformer", "torchvision"])
def foreign_teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny teacher of another library, as the stage ``train_teacher`` leaves it."""
    source, names = tmp_path_factory.mktemp("source"), ["Car", "tree", "ROAD", "sky"]
    torch.manual_seed(1)
    if request.param == "torchvision":
        network = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=len(names))
        save_file(network.state_dict(), source / "model.safetensors")
        document = {"model": "lraspp_mobilenet_v3_large", "classes": names}
        (source / "torchvision.json").write_text(json.dumps(document))
    else:
        transformers = pytest.importorskip("transformers")
        config = transformers.SegformerConfig(
            hidden_sizes=[8, 16, 24, 32], depths=[1] * 4, num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=16,
            id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)},
        )  # fmt: skip
        transformers.SegformerForSemanticSegmentation(config).save_pretrained(source)
        normalisation = {"image_mean": [0.3, 0.4, 0.5], "image_std": [0.2] * 3}
        (source / "preprocessor_config.json").write_text(json.dumps(normalisation))
    teacher = open_teacher([source], [entry["name"] for entry in CLASSES], {})
    save_model(source / "teacher", "teacher", teacher, {"classes": CLASSES, "data_content": "d"})
    return source / "teacher"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(1)
    config = {
        "architecture": "DeepLabV3Plus",
        "encoder": "tu-mobilenetv3_small_050",
        "output_stride": 16,
        "decoder": {"decoder_channels": 16},
    }
    segmenter = build_segmenter(parse(ModelConfig, config, "model"), len(CLASSES))
    save_model(folder, "cnn", segmenter, {"classes": CLASSES, "data_content": "d"})
    return folder
