"""A network as one file for programs that know nothing of this package: an exported program (.pt2), or ONNX.

Either takes any batch and any image size, and holds in its metadata, under the key ``segdistill``, a JSON document with
all that its user must know (:func:`contract`): classes, colours, what goes in and what comes out. The normalisation is
part of the graph.
"""

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import segdistill
from segdistill.errors import UserError
from segdistill.files import parse_json, require_regular
from segdistill.images import of_contract
from segdistill.models.outputs import Network, SegmentationNetwork

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FORMATS = ("onnx", "pt2")
OPSET = 20  # of ONNX: onnxruntime knows it from 1.17 on
DOCUMENT = "segdistill"  # the key in a file's metadata
INPUT, OUTPUT = "images", "logits"
EXAMPLE = (2, 64, 96)  # two images, since a batch of one would fix the batch size
CHECKED = ((1, 96, 128), (2, 97, 75), (3, 60, 33))  # images and sizes at which a file is compared with torch
TOLERANCE = 1e-3  # of the largest logit: other kernels add in another order
_CONFIG = re.compile(r"(^|/)data/(weights|constants)/[^/]+_config\.json$")


class PortableNetwork(Network):
    """A network from a file, whose logits come at the size of the images."""

    info = SimpleNamespace(logits_stride=1)


class ProgramNetwork(PortableNetwork):
    """An exported program, run by torch."""

    def __init__(self, program: "ExportedProgram", device: torch.device) -> None:
        super().__init__()
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, str(device))
        self._module = [program.module()]  # in a list: such a module has no train() and no eval()

    def logits(self, images: Tensor) -> Tensor:
        return self._module[0](images)


class OnnxNetwork(PortableNetwork):
    """An ONNX graph, run by onnxruntime.

    Args:
        path: the file.
        device: "cuda" asks for onnxruntime's GPU build; without it the graph runs on the CPU.
        threads: of the CPU; as many as torch uses if left out.
    """

    def __init__(self, path: Path, device: torch.device, threads: int | None = None) -> None:
        super().__init__()
        onnxruntime = import_export("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        wanted = {"cuda": ["CUDAExecutionProvider"]}.get(device.type, [])
        providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
        try:
            self._session = onnxruntime.InferenceSession(
                path, sess_options=options, providers=[*providers, "CPUExecutionProvider"]
            )
        except Exception as error:  # its own classes, which share no other base
            raise UserError(f"{path}: onnxruntime cannot load it: {str(error).splitlines()[0]}") from None
        self.metadata = dict(self._session.get_modelmeta().custom_metadata_map)

    def logits(self, images: Tensor) -> Tensor:
        (logits,) = self._session.run([OUTPUT], {INPUT: images.contiguous().cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)


def import_export(module: str) -> Any:
    """A library of the extra ``export``; a UserError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{module} is not installed, which ONNX needs: pip install 'segdistill[export]'") from None


def contract(
    document: Mapping[str, Any], segmenter: SegmentationNetwork | None, inference: Mapping[str, Any]
) -> dict[str, Any]:
    """What a file of this network says of itself.

    Args:
        document: the JSON beside the saved model, or a contract.
        segmenter: whose normalisation to state, if it has one and not each of several its own; None where ``document``
            states it.
        inference: how images were shown to the network when it was scored: ``input_scale``, ``window``,
            ``window_stride``.
    """
    normalisation = document.get("input", {}).get("normalisation") or {}
    if segmenter is not None:
        buffers = dict(segmenter.named_buffers(recurse=False))
        values = {key: buffers[key].flatten().tolist() for key in ("mean", "std") if key in buffers}
        normalisation = {"within the graph": True, **values}
    images = of_contract(document) if segmenter is None else segmenter.images
    return {
        "name": document["name"],
        "classes": [{"name": entry["name"], "color": list(entry["color"])} for entry in document["classes"]],
        "input": {
            "name": INPUT, "type": "float32", "shape": ["batch", images.channels, "height", "width"],
            "channels": "RGB" if images.is_rgb else "those of the data set, in the order of its files",
            "bits": images.bits, "range": [0, 1], "size": "any; images are not resized", "normalisation": normalisation,
        },
        "output": {
            "name": OUTPUT, "type": "float32", "shape": ["batch", len(document["classes"]), "height", "width"],
            "meaning": "one logit a class and pixel of the input; the class is the argmax over the second axis",
        },
        "inference": {key: inference[key] for key in ("input_scale", "window", "window_stride")},
        "weights_sha256": document.get("sha256") or document.get("weights_sha256"),
        "data_content": document.get("data_content"),
        "segdistill": segdistill.__version__,
    }  # fmt: skip


def to_program(network: nn.Module, channels: int = 3) -> "ExportedProgram":
    """The graph of what maps images of so many channels to logits, for any batch and image size.

    Raises:
        UserError: torch cannot make it, which happens to networks of other libraries.
    """
    dynamic, example = torch.export.Dim.DYNAMIC, torch.rand(EXAMPLE[0], channels, *EXAMPLE[1:])
    try:
        with torch.no_grad():
            return torch.export.export(
                network.eval(), (example,), dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},)
            )
    except Exception as error:  # whatever the code of a network, and torch's own, may raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"torch cannot trace this network for images of any size: {reason}") from error


def save_checked(
    program: "ExportedProgram", expected: nn.Module, path: Path, document: Mapping[str, Any]
) -> tuple[float, PortableNetwork]:
    """Writes a program with its contract as ``.pt2`` or ``.onnx``, as the path ends, and compares what it gives.

    Args:
        expected: the network that the program was traced from.
        document: the contract.

    Returns:
        The largest difference of logits, as a share of the largest logit, and the network in the file.

    Raises:
        UserError: it is more than rounding; the file is there nevertheless.
    """
    save = save_onnx if path.suffix == ".onnx" else save_program
    save(program, path, document)
    network, _ = load_portable(path, torch.device("cpu"))
    return check_same(expected, network, path.name, of_contract(document).channels), network


def save_program(program: "ExportedProgram", path: Path, document: Mapping[str, Any]) -> None:
    """Writes a ``.pt2`` with its contract."""
    torch.export.save(program, path, extra_files={DOCUMENT: json.dumps(document)})


def load_program(path: Path) -> tuple["ExportedProgram", dict[str, Any] | None]:
    """An exported program and its contract, if it has one; nothing is unpickled that could run code.

    Raises:
        UserError: not such a file, or one with parts that torch would unpickle or load as code.
    """
    require_regular(path)
    _require_plain(path)
    extra = {DOCUMENT: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
    except Exception as error:  # of a format by another version of torch
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: torch {torch.__version__} cannot load this program: {reason}") from None
    text = extra[DOCUMENT]
    return program, parse_json(text, f"{path}: its metadata") if text else None


def _require_plain(path: Path) -> None:
    """Refuses an archive of which ``torch.export.load`` would unpickle more than tensors, or load libraries."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
            raw = set()
            for name in filter(_CONFIG.search, names):
                for entry in json.loads(archive.read(name))["config"].values():
                    if entry["use_pickle"] is False and entry["path_name"].startswith(("weight_", "tensor_")):
                        raw.add(f"{name.rsplit('/', 1)[0]}/{entry['path_name']}")
                    else:
                        raise UserError(f"{path}: '{entry['path_name']}' would be unpickled; it is not loaded")
            for name in names:
                if name not in raw and not _CONFIG.search(name) and not _is_plain(name, archive):
                    raise UserError(f"{path}: holds '{name}', which a program of segdistill has not; it is not loaded")
    except (zipfile.BadZipFile, ValueError, KeyError, TypeError, AttributeError, OSError):
        raise UserError(f"{path}: not an exported program (.pt2), or damaged") from None


def _is_plain(name: str, archive: zipfile.ZipFile) -> bool:
    last = name.rsplit("/", 1)[-1]
    if last in ("version", "archive_format", "archive_version", "byteorder", "serialization_id", "data_version"):
        return archive.getinfo(name).file_size <= 256
    if re.search(r"(^|/)(extra/[^/]+|models/[^/]+\.json|\.data/[^/]+)$", name):
        return True
    if re.search(r"(^|/)data/sample_inputs/[^/]+\.pt$", name):
        try:  # what the restricted unpickler takes calls nothing but torch's makers of tensors, in any unpickler
            torch.load(io.BytesIO(archive.read(name)), weights_only=True)  # noqa: TID251
        except Exception:
            return False
        return True
    return False


def save_onnx(program: "ExportedProgram", path: Path, document: Mapping[str, Any]) -> None:
    """Writes an ONNX file with its contract, whose batch, height and width are free."""
    onnx = import_export("onnx")
    import_export("onnxscript")
    with warnings.catch_warnings():
        # torch copies a tree of its own in run_decompositions, and warns of how it does.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=[INPUT], output_names=[OUTPUT], verbose=False
        )
    assert exported is not None
    model = exported.model_proto
    for value in (*model.graph.input, *model.graph.output):
        for axis, name in ((0, "batch"), (2, "height"), (3, "width")):
            value.type.tensor_type.shape.dim[axis].dim_param = name
    onnx.helper.set_model_props(model, {DOCUMENT: json.dumps({**document, "opset": OPSET})})
    onnx.checker.check_model(model)
    onnx.save(model, path)


def quantize(source: Path, path: Path, batches: Iterable[Any], document: Mapping[str, Any]) -> None:
    """Writes the int8 version of an ONNX file: static, per channel, with the ranges of the given images.

    Convolutions and matrix products are quantised; what lies between them stays float32.

    Args:
        source: the float32 file.
        batches: float32 arrays [B, C, H, W] in 0..1, of training images.
        document: the contract.
    """
    onnx = import_export("onnx")
    import_export("onnxruntime")
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {INPUT: batch}

    prepared = path.with_name("prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)  # which knows no free sizes
    quantization.quantize_static(
        str(prepared), str(path), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"], activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {DOCUMENT: json.dumps({**document, "opset": OPSET, "weights": "int8"})})
    onnx.save(model, path)


def load_portable(path: Path, device: torch.device) -> tuple[PortableNetwork, dict[str, Any]]:
    """The network in a ``.pt2`` or ``.onnx`` file that ``segdistill export`` wrote, and its contract.

    Raises:
        UserError: it is not such a file.
    """
    network: PortableNetwork
    require_regular(path)
    if path.suffix == ".onnx":
        network = OnnxNetwork(path, device)
        text = network.metadata.get(DOCUMENT)
        document = parse_json(text, f"{path}: its metadata") if text else None
    else:
        program, document = load_program(path)
        network = ProgramNetwork(program, device)
    return network, require_contract(document, path)


def require_contract(document: Any, where: object) -> dict[str, Any]:
    """A contract that came from outside, or a UserError where it is none."""
    try:
        classes = [{"name": str(entry["name"]), "color": [int(x) for x in entry["color"]]}
                   for entry in document["classes"]]  # fmt: skip
        of_contract(document)
        if all(len(entry["color"]) == 3 for entry in classes):  # type: ignore[arg-type]
            return {**document, "classes": classes}
    except (TypeError, KeyError, ValueError, IndexError, AttributeError):
        pass
    raise UserError(f"{where}: no classes with names and colours in its metadata; was it written by segdistill export?")


def check_same(expected: nn.Module, network: PortableNetwork, where: object, channels: int = 3) -> float:
    """The largest difference of two networks' logits, as a share of the largest logit, at several sizes.

    Raises:
        UserError: it is more than rounding.
    """
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for number, *size in CHECKED:
        shape = (number, channels, *size)
        images = torch.rand(shape, generator=generator)
        with torch.no_grad():
            wanted, given = expected(images), network.logits(images)
        if wanted.shape != given.shape:
            raise UserError(f"{where}: logits of {list(given.shape)} at images of {list(shape)}")
        difference = float((wanted - given).abs().max()) / max(1.0, float(wanted.abs().max()))
        if not difference <= TOLERANCE:
            raise UserError(f"{where}: its logits at images of {list(shape)} differ from torch's by {difference:g}")
        largest = max(largest, difference)
    return largest
