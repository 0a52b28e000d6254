"""Damaged files of trainings and evaluations: every flipped byte is one sentence, none is silent, none a traceback."""

import ast
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml
from _folders import make_folder, prepare
from PIL import Image

from segdistill.config import parse
from segdistill.engine import checkpoint
from segdistill.errors import UserError
from segdistill.files import read_sealed_json, seal
from segdistill.metrics.confusion import iou_counts
from segdistill.models.config import ModelConfig
from segdistill.models.export import load_model, save_model
from segdistill.models.segmenter import build_segmenter
from segdistill.report.inputs import read_job
from segdistill.report.overlays import _read_mask
from segdistill.stages import evaluate

FLIPS = 40
CLASSES = ["road", "sky"]


def flip(path: Path, number: int) -> None:
    content = bytearray(path.read_bytes())
    generator = random.Random(f"{path.name} {number}")
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def every_flip_is_a_sentence(path: Path, read: Callable[[], Any]) -> None:
    whole = path.read_bytes()
    read()
    for number in range(FLIPS):
        flip(path, number)
        with pytest.raises(UserError) as error:
            read()
        assert path.name in str(error.value) and "\n" not in str(error.value), number
        path.write_bytes(whole)
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            read()
    path.write_bytes(whole)


def test_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "resume.safetensors"
    state = {"weights": {"a": torch.randn(40), "b": torch.ones(3, dtype=torch.int64)}, "step": 7, "none": None}
    checkpoint.save(path, state)
    every_flip_is_a_sentence(path, lambda: checkpoint.load(path))


def test_a_swap_of_two_tensors_is_seen(tmp_path: Path) -> None:
    """Names and shapes are part of what is hashed."""
    checkpoint.save(tmp_path / "c", {"aa": torch.zeros(4), "bb": torch.ones(4)})
    content = (tmp_path / "c").read_bytes()
    for name, other in ((b'"/aa":', b'"/xx":'), (b'"/bb":', b'"/aa":'), (b'"/xx":', b'"/bb":')):
        content = content.replace(name, other, 1)
    (tmp_path / "c").write_bytes(content)
    with pytest.raises(UserError, match="its content and its hash differ"):
        checkpoint.load(tmp_path / "c")


@pytest.fixture
def job(tmp_path: Path) -> tuple[Path, Path]:
    """A training's folder and an evaluation's, as the stages leave them."""
    model, evaluation = tmp_path / "model", tmp_path / "evaluation"
    (model / "curves").mkdir(parents=True)
    (evaluation / "overlays/cnn").mkdir(parents=True)
    (model / "curves/cnn.csv").write_text("step,train/loss/total,val/miou\n4,1.5,0.25\n8,1.25,0.5\n")
    (model / "metrics.json").write_text(json.dumps({"students": {"cnn": {"val/miou": 0.5}}, "settings": {"a": 1}}))
    (model / "cnn.json").write_text(json.dumps({"sha256": "0" * 64}))
    per_image = np.arange(12, dtype=np.int64).reshape(3, 2, 2)
    confusion = per_image.sum(0)
    counts = np.stack(iou_counts(per_image), axis=-2)
    np.savez_compressed(evaluation / "cnn.npz", confusion=confusion, counts=counts, ids=np.array(["a", "b", "c"]))
    iou = np.diag(confusion) / (confusion.sum(0) + confusion.sum(1) - np.diag(confusion))
    scores = {"test/miou": float(iou.mean()), "weights_sha256": "0" * 64}
    (evaluation / "evaluation.json").write_text(json.dumps({"models": {"cnn": scores}, "classes": CLASSES}))
    Image.fromarray(np.eye(16, dtype=np.uint8)).save(evaluation / "overlays/cnn/a.png")
    seal(model)
    seal(evaluation)
    return model, evaluation


@pytest.mark.parametrize(
    "name",
    ["model/metrics.json", "model/cnn.json", "model/curves/cnn.csv", "evaluation/evaluation.json", "evaluation/cnn.npz",
     "evaluation/overlays/cnn/a.png"],
)  # fmt: skip
def test_what_compare_reads(job: tuple[Path, Path], name: str) -> None:
    model, evaluation = job

    def read() -> None:
        read_job(model, evaluation, "kd", 0, ["cnn"], CLASSES)
        _read_mask(evaluation / "overlays/cnn/a.png", (16, 16))

    every_flip_is_a_sentence(model.parent / name, read)


@pytest.mark.parametrize("part", ["model", "evaluation"])
def test_a_damaged_seal_accepts_nothing(job: tuple[Path, Path], part: str) -> None:
    """A flip in the hash of a file that nobody reads here, or in white space, changes nothing that is read."""
    model, evaluation = job
    path = model.parent / part / "checksums.json"
    whole, told = path.read_bytes(), 0
    for number in range(FLIPS):
        flip(path, number)
        try:
            read_job(model, evaluation, "kd", 0, ["cnn"], CLASSES)
        except UserError as error:
            told += "\n" not in str(error)
        path.write_bytes(whole)
    assert told > FLIPS / 2
    path.unlink()
    with pytest.raises(UserError, match="run the stage"):
        read_job(model, evaluation, "kd", 0, ["cnn"], CLASSES)


def test_a_student_and_its_description(tmp_path: Path) -> None:
    config = ModelConfig(architecture="FPN", encoder="tu-mobilenetv3_small_050", output_stride=32)
    network = build_segmenter(config, 2)
    save_model(tmp_path, "cnn", network, {"classes": [{"name": name, "color": [0, 0, 0]} for name in CLASSES]})
    (tmp_path / "metrics.json").write_text('{"students": {}}')
    seal(tmp_path)
    for name in ("cnn.safetensors", "cnn.json"):
        path = tmp_path / name
        whole = path.read_bytes()
        for number in range(8):
            flip(path, number)
            with pytest.raises(UserError, match=r"cnn\.(safetensors|json)"):
                load_model(tmp_path, "cnn")
            path.write_bytes(whole)
    assert read_sealed_json(tmp_path, "metrics.json", mend="x") == {"students": {}}


def test_a_network_of_other_classes_or_of_these_in_another_order_is_refused_with_both_lists(tmp_path: Path) -> None:
    config = ModelConfig(architecture="FPN", encoder="tu-mobilenetv3_small_050", output_stride=32)
    classes = [{"name": name, "color": [0, 0, 0]} for name in CLASSES]
    save_model(tmp_path, "teacher", build_segmenter(config, 2), {"classes": classes})
    load_model(tmp_path, "teacher", classes=CLASSES)
    with pytest.raises(UserError, match=r"teacher\.json: .* in another order: road, sky; the data set has sky, road"):
        load_model(tmp_path, "teacher", classes=CLASSES[::-1])
    save_model(tmp_path, "mute", build_segmenter(config, 2), {})
    with pytest.raises(UserError, match="it names none; the data set has road, sky"):
        load_model(tmp_path, "mute", classes=CLASSES)


def test_every_stage_that_loads_a_network_says_of_which_classes_it_must_be() -> None:
    for path in (Path(__file__).parents[2] / "segdistill/stages").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "load_model":
                assert "classes" in {keyword.arg for keyword in call.keywords}, f"{path}, line {call.lineno}"


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path: Path) -> None:
    """Running statistics among them: in training mode nobody sees those."""
    config = ModelConfig(architecture="FPN", encoder="tu-mobilenetv3_small_050", output_stride=32)
    network = build_segmenter(config, 2)
    save_model(tmp_path, "cnn", network, {})
    name, buffer = next((name, value) for name, value in network.named_buffers() if name.endswith("running_var"))
    buffer[0] = float("inf")
    with pytest.raises(UserError, match=f"dead: '{name}' is not finite"):
        save_model(tmp_path, "dead", network, {})
    assert not list(tmp_path.glob("dead*"))
    from safetensors.torch import save_file

    from segdistill.models.export import load_weights

    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"x\.safetensors: key '{name}' is not finite"):
        load_weights(network, tmp_path / "x.safetensors")


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_network_that_is_gone_is_not_taken_for_one_that_never_was(tmp_path: Path, suffix: str) -> None:
    prepared = prepare(make_folder(tmp_path / "data"), tmp_path / "prepared")
    model = tmp_path / "model"
    network = build_segmenter(ModelConfig(architecture="FPN", encoder="tu-mobilenetv3_small_050", output_stride=32), 2)
    save_model(model, "cnn", network, {"classes": [{"name": "a"}, {"name": "b"}]})
    (model / "metrics.json").write_text('{"students": {"cnn": {}}}')
    seal(model)
    (model / f"cnn.{suffix}").unlink()
    config = parse(evaluate.Config, yaml.safe_load(Path("params.yaml").read_text())["evaluate"], "evaluate")
    with pytest.raises(UserError, match=rf"cnn\.{suffix}: no such file"):
        evaluate.measure(config, {tmp_path / "e": model}, prepared=prepared, names={tmp_path / "e": {"cnn": "kd-s0"}},
                         tracker=Mock(), device="cpu")  # fmt: skip
    assert not (tmp_path / "e").exists()
