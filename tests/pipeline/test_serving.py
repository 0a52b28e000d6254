"""The image face of a registered model: the masks of `predict`, and a real server that is asked as the docs say."""

import ast
import base64
import io
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from model_server import model_server
from PIL import Image
from torch import Tensor, nn

from segdistill.adapters.image_model import BadRequest, ImageModel
from segdistill.adapters.mlflow_artifact import CODE, DECODING, IMAGE_MODEL, ONNX, SealedModel, check_files
from segdistill.adapters.mlflow_registry import Submission, register
from segdistill.adapters.mlflow_store import default_store
from segdistill.adapters.mlflow_tracking import MlflowTracker, Settings
from segdistill.config import parse
from segdistill.engine.inference import Views, predict
from segdistill.engine.settings import InferenceConfig
from segdistill.errors import UserError
from segdistill.models import portable

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
DOCS = Path(__file__).parents[2] / "docs/serving.md"
CLASSES = [{"name": name, "color": [10 * place, 0, 9]} for place, name in enumerate(("road", "sky", "car"))]
WHOLE = {"input_scale": 1.0, "window": None, "window_stride": 0.67}


class Tiny(nn.Module):
    """Any classes, of a pixel and its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images)


class Network(portable.PortableNetwork):
    """As evaluation asks it."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = Tiny().eval()

    def logits(self, images: Tensor) -> Tensor:
        return self.tiny(images)


@pytest.fixture(scope="module")
def program():
    return portable.to_program(Tiny())


def onnx_file(program, folder: Path, inference: dict) -> bytes:
    portable.save_checked(program, Tiny().eval(), folder / "model.onnx", {"classes": CLASSES, "inference": inference})
    return (folder / "model.onnx").read_bytes()


def photograph(height: int, width: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


@pytest.mark.parametrize(
    "shown", [{}, {"input_scale": 0.4}, {"input_scale": 1.7}, {"window": [16, 24]}], ids=str
)  # fmt: skip
def test_the_served_mask_is_that_of_evaluate(shown: dict, program, tmp_path: Path) -> None:
    inference = WHOLE | shown
    folder = tmp_path / "model"
    model = SealedModel(program, 3, {}, {ONNX: onnx_file(program, tmp_path, inference)})
    model.save_model(str(folder), mlflow_model=mlflow.models.Model())
    check_files(folder, model.checksums, "models:/x/1", to_serve=True)
    content = photograph(37, 53)
    (answer,) = mlflow.pyfunc.load_model(str(folder)).predict({"image": [content]})
    pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(content)))).permute(2, 0, 1)[None].float() / 255
    settings = parse(InferenceConfig, {"batch_size": 1, **inference}, "inference")
    with torch.no_grad():
        expected = predict(Network(), pixels, (37, 53), Views(settings)).classes[0].numpy()
    mask = np.array(Image.open(io.BytesIO(base64.b64decode(answer["mask"]))))
    assert mask.shape == expected.shape == (37, 53) and len(np.unique(mask)) > 1
    assert (mask == expected).mean() > 0.999  # equal but for ties
    assert (answer["width"], answer["height"], answer["classes"]) == (53, 37, CLASSES)


def test_what_a_server_runs_imports_nothing_of_this_package_and_is_refused_where_it_is_not_ours(
    program, tmp_path: Path
) -> None:
    for source in CODE.values():
        for node in ast.walk(ast.parse(source.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(str(module).startswith(("segdistill", "torch")) for module in modules)
    model = SealedModel(program, 3, {}, {ONNX: b"onnx"})
    model.save_model(str(tmp_path / "model"), mlflow_model=mlflow.models.Model())
    ours, proof = CODE[IMAGE_MODEL].read_bytes(), tmp_path / "it-ran"
    from segdistill.files import file_hash, seal

    (tmp_path / "model" / IMAGE_MODEL).write_bytes(ours + f"open({str(proof)!r}, 'w')\n".encode())
    seal(tmp_path / "model")
    checksums = file_hash(tmp_path / "model/checksums.json")  # of one who may write tags, too
    check_files(tmp_path / "model", checksums, "models:/x/1")  # `predict` runs none of it
    with pytest.raises(UserError, match=r"'image_model.py' is not the code of this version of segdistill"):
        check_files(tmp_path / "model", checksums, "models:/x/1", to_serve=True)
    assert not proof.exists()


def commands(heading: str) -> list[str]:
    """The indented lines of a section of docs/serving.md."""
    section = DOCS.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line.strip() for line in section.splitlines() if line.startswith("    ")]


@pytest.mark.slow
def test_mlflow_serves_the_champion_and_the_documented_commands_get_its_mask(
    program, tmp_path: Path, database: bytes
) -> None:
    (tmp_path / "mlflow.db").write_bytes(database)
    beside = {ONNX: onnx_file(program, tmp_path, WHOLE)}
    submission = Submission("kd", 0, "cnn", 0.5, 0.5, "t", "w", ("road", "sky", "car"), {}, {}, program, beside=beside)
    run = MlflowTracker("register", Settings(default_store(tmp_path), tmp_path / "spool", "p"))
    register(Tiny().eval(), submission, name="segdistill-student", min_gain=0, tracker=run)
    run.close()
    (tmp_path / "photo.jpg").write_bytes(photograph(360, 480))
    serve, *asked = commands("A server that is sent photographs")[:3]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"MLFLOW_TRACKING_URI": default_store(tmp_path).uri, "PATH": path}
    with model_server(serve, tmp_path, environment) as port:
        url = f"http://127.0.0.1:{port}"
        for command in (line.replace("5001", port) for line in asked):
            subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True)
        assert Image.open(tmp_path / "mask.png").size == (480, 360)
        (answer,) = json.loads((tmp_path / "answer.json").read_text())["predictions"]
        assert (answer["width"], answer["height"], answer["classes"]) == (480, 360, CLASSES)

        large = io.BytesIO()
        Image.new("1", (8192, 8192)).save(large, "PNG")
        for content, sentence in (
            (b"", "image 0: empty; a JPEG or PNG file in base64 is due"),
            (b"GIF89a", "image 0: not a JPEG or PNG file, or its header is damaged"),
            (large.getvalue(), "image 0: 67 million pixels; at most 34 million are read: cut it into tiles"),
        ):
            body = json.dumps({"inputs": {"image": [base64.b64encode(content).decode()]}}).encode()
            request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(request)
            assert error.value.code == 400
            assert json.loads(error.value.read())["message"] == sentence


def test_a_server_of_other_channels_takes_arrays_and_refuses_photographs_in_one_sentence(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(5, 3, 3, padding=1).eval()
    document = {"classes": CLASSES, "inference": WHOLE, "input": {"shape": ["batch", 5, "height", "width"], "bits": 16}}
    portable.save_checked(portable.to_program(network, 5), network, tmp_path / "model.onnx", document)
    served = ImageModel()
    served.load_context(
        SimpleNamespace(artifacts={"network": str(tmp_path / "model.onnx"), "decoding": CODE[DECODING]})
    )
    pixels = np.random.default_rng(0).integers(0, 65536, (20, 30, 5)).astype(np.uint16)
    stream = io.BytesIO()
    np.save(stream, pixels)
    (answer,) = served.predict(None, pd.DataFrame({"image": [base64.b64encode(stream.getvalue()).decode()]}))
    with torch.no_grad():
        logits = network(torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 65535)
    mask = np.array(Image.open(io.BytesIO(base64.b64decode(answer["mask"]))))
    np.testing.assert_array_equal(mask, logits[0].argmax(0).numpy())
    with pytest.raises(BadRequest) as caught:
        served.predict(None, pd.DataFrame({"image": [photograph(20, 30)]}))
    assert caught.value.sentence == (
        "image 0: 3 channels of 8 bits, but the network is made for images with 5 channels of 16 bits; send those as"
        " .npy"
    )
