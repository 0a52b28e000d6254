# ruff: noqa: F811 -- fixtures are imported, and asked for by their names
"""``segdistill export``: files that stand alone, compared with torch, and an int8 one that is measured."""

import itertools
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from _trained import CLASSES, data, foreign_teacher, model  # noqa: F401 -- fixtures
from PIL import Image

from segdistill.__main__ import main
from segdistill.commands._model import open_model
from segdistill.errors import UserError
from segdistill.models import portable
from segdistill.stages import _formats

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.slow  # torch traces a network, and writes it as ONNX
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, common = tmp_path_factory.mktemp("files"), ["--size", "48", "64"]
    assert main(["export", str(model), "--out", str(folder / "cnn.pt2"), *common]) == 0
    int8 = ["--int8", "--prepared", str(data / "prepared"), "--max-loss", "100"]
    # From the program, which spares tracing the network again; and int8 from that.
    for source, name, options in (("cnn.pt2", "cnn.onnx", []), ("cnn.onnx", "int8.onnx", int8)):
        assert main(["export", str(folder / source), "--out", str(folder / name), *common, *options]) == 0
    return folder


def test_predict_needs_nothing_but_the_file(files: Path, model: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (51, 83, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    masks = {}
    for name, path in {
        "folder": model,
        **{name: files / name for name in ("cnn.pt2", "cnn.onnx", "int8.onnx")},
    }.items():
        assert main(["predict", str(path), str(tmp_path / "a.png"), "--out", str(tmp_path / name)]) == 0
        masks[name] = np.array(Image.open(tmp_path / name / "masks/a.png"))
        facts = json.loads((tmp_path / name / "classes.json").read_text())
        assert facts["classes"] == CLASSES
    for name in ("cnn.pt2", "cnn.onnx"):
        assert (masks[name] == masks["folder"]).mean() > 0.999, name  # equal but for ties
    assert (masks["int8.onnx"] == masks["folder"]).mean() > 0.8


def test_a_teacher_of_another_library_is_the_same_network_as_a_file(
    data: Path, foreign_teacher: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    program, graph = tmp_path / "teacher.pt2", tmp_path / "teacher.onnx"
    for source, file in ((foreign_teacher, program), (program, graph)):  # each compares its logits with torch's
        assert main(["export", str(source), "--out", str(file), "--size", "48", "64"]) == 0
    assert not [one for one in recwarn if "LeafSpec" in str(one.message)], "of torch's own tree, and not of our doing"
    masks = {}
    for name, source in (("folder", foreign_teacher), ("program", program), ("graph", graph)):
        out = tmp_path / name
        assert main(["predict", str(source), str(data / "data/images/test"), "--out", str(out)]) == 0
        masks[name] = [np.array(Image.open(path)) for path in sorted((out / "masks").iterdir())]
    for name in ("program", "graph"):
        for mask, expected in zip(masks[name], masks["folder"], strict=True):
            assert (mask == expected).mean() > 0.999, name  # equal but for ties


def test_a_network_that_torch_cannot_trace_is_one_sentence() -> None:
    class ByValue(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images if images.sum().item() > 0 else -images

    with pytest.raises(UserError, match="torch cannot trace this network for images of any size: "):
        portable.to_program(ByValue())


def test_an_onnx_file_says_what_goes_in_and_what_comes_out(files: Path) -> None:
    import onnx

    graph = onnx.load(files / "cnn.onnx")
    assert [entry.version for entry in graph.opset_import if not entry.domain] == [portable.OPSET]
    shapes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
              for value in (*graph.graph.input, *graph.graph.output)]  # fmt: skip
    assert shapes == [["batch", 3, "height", "width"], ["batch", 3, "height", "width"]]
    contract = json.loads({entry.key: entry.value for entry in graph.metadata_props}["segdistill"])
    assert contract["opset"] == portable.OPSET and contract["classes"] == CLASSES
    assert contract["input"]["range"] == [0, 1] and len(contract["input"]["normalisation"]["mean"]) == 3
    assert contract["inference"] == {"input_scale": 1.0, "window": None, "window_stride": 0.67}
    int8 = onnx.load(files / "int8.onnx")
    assert any(node.op_type == "QuantizeLinear" for node in int8.graph.node)
    assert (files / "int8.onnx").stat().st_size < (files / "cnn.onnx").stat().st_size


def test_an_int8_file_that_loses_too_much_is_refused_by_export_and_left_out_by_register(
    files: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = itertools.cycle([0.50, 0.40])
    monkeypatch.setattr(_formats, "validation_miou", lambda *_: next(scores))
    sentence = "int8 loses 10.00 points, more than the 1 that it may; it is not kept"
    options = ["--int8", "--prepared", str(data / "prepared"), "--calibration", "1"]
    assert main(["export", str(files / "cnn.onnx"), "--out", str(tmp_path / "int8.onnx"), *options]) == 2
    assert sentence in capsys.readouterr().err and not list(tmp_path.iterdir())

    model = open_model(str(files / "cnn.pt2"), None, CPU)
    made, formats = _formats.measured(
        model, ("onnx", "int8"), data / "prepared", megabytes=1.0, val_miou=0.5, max_loss=1.0
    )
    assert set(made) == {"onnx"} and [one.name for one in formats.formats] == ["torch", "onnx"]
    assert sentence in formats.lines()[-1]


def test_the_formats_of_a_version_are_a_table_of_size_score_and_time(files: Path, data: Path) -> None:
    model = open_model(str(files / "cnn.pt2"), None, CPU)
    made, formats = _formats.measured(model, ("int8",), data / "prepared", megabytes=1.0, val_miou=0.5, max_loss=100.0)
    torch_row, int8 = formats.formats
    assert set(made) == {"int8"} and int8.megabytes == len(made["int8"]) / 1e6 < torch_row.megabytes
    assert 0 <= int8.val_miou <= 1 and int8.latency_ms > 0 and not formats.refused
    lines = formats.lines()
    assert lines[2].startswith("| torch | 1.0 | 50.00 | ") and lines[3].startswith("| int8 | ")
    assert lines[-1].endswith(f"one image of {' x '.join(map(str, formats.size))} on the CPU with 1 thread.")


def test_a_file_that_gives_other_logits_is_refused(files: Path) -> None:
    network, _ = portable.load_portable(files / "cnn.onnx", CPU)

    class Other(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return network.logits(images) + 0.5

    with pytest.raises(UserError, match="differ from torch's by"):
        portable.check_same(Other(), network, "cnn.onnx")


def test_a_program_with_parts_that_torch_would_unpickle_is_not_loaded(files: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(files / "cnn.pt2") as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (config,) = [name for name in parts if name.endswith("_weights_config.json")]
    (inputs,) = [name for name in parts if "sample_inputs" in name]
    root = config.split("/data/")[0]
    evil = b"cos\nsystem\n(S'touch it-ran'\ntR."
    for changed in (
        {config: parts[config].replace(b'"use_pickle": false', b'"use_pickle": true')},
        {inputs: evil},
        {f"{root}/data/aotinductor/model/evil.so": b"\x7fELF"},
    ):
        with zipfile.ZipFile(tmp_path / "evil.pt2", "w") as archive:
            for name, content in (parts | changed).items():
                archive.writestr(name, content)
        with pytest.raises(UserError, match=r"evil\.pt2: .*it is not loaded"):
            portable.load_program(tmp_path / "evil.pt2")


def test_what_cannot_be_exported_is_one_sentence(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, sentence in (
        (["--out", str(tmp_path / "a.bin")], "a.bin: a file's name ends with .onnx or .pt2"),
        (["--out", str(tmp_path)], "a file's name ends with"),
        (["--out", str(tmp_path / "a.onnx"), "--size", "0", "9"], "--size.0: input should be greater"),
        (["--out", str(tmp_path / "a.onnx"), "--int8", "--prepared", "gone"], "the stage 'prepare' writes it"),
        (["--out", str(tmp_path / "a.pt2"), "--int8"], "only with --format onnx"),
        (["--out", str(tmp_path / "a.onnx")], "is an ONNX file already"),
    ):
        assert main(["export", str(files / "cnn.onnx"), *options]) == 2
        assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
