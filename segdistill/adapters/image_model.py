"""What `mlflow models serve` runs: an encoded image in, the class of each of its pixels out, as a PNG.

A registered model has a copy of this file, of data/decoding.py, and the network as ONNX, and MLflow runs that copy. So
it imports nothing of this package, and a server needs no more than mlflow, numpy, pillow and onnxruntime. Images go the
way of engine/inference.py, whose resizing and windows stand here once more, without torch; a test compares the masks.
"""

import base64
import importlib.util
import json
import math
from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

MOST_PIXELS = 2**25  # of one image: 33 million; the scores of its pixels have to fit into the server's memory


class BadRequest(MlflowException):
    """Answered with status 400 and this sentence alone."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence, error_code=INVALID_PARAMETER_VALUE)
        self.sentence = sentence

    def serialize_as_json(self) -> str:
        """The body of the answer; MLflow would print the data, too."""
        return json.dumps({"error_code": self.error_code, "message": self.sentence})


class ImageModel(PythonModel):
    """Masks of encoded images, each at its own size."""

    def load_context(self, context: Any) -> None:
        """Opens the network; ``context`` says where it and the decoder lie."""
        import onnxruntime

        spec = importlib.util.spec_from_file_location("segdistill_decoding", context.artifacts["decoding"])
        assert spec is not None and spec.loader is not None
        self.decoding = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.decoding)
        known = ("CUDAExecutionProvider", "CPUExecutionProvider")
        providers = [name for name in known if name in onnxruntime.get_available_providers()]
        self.session = onnxruntime.InferenceSession(context.artifacts["network"], providers=providers)
        contract = json.loads(self.session.get_modelmeta().custom_metadata_map["segdistill"])
        self.classes, self.inference = contract["classes"], contract["inference"]
        described = contract.get("input", {})
        self.channels, self.bits = described.get("shape", (0, 3))[1], described.get("bits", 8)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One answer an image.

        Args:
            context: as above.
            model_input: has a column ``image``: JPEG, PNG or .npy files, as bytes or base64; TIFF with tifffile.
            params: none are known.

        Raises:
            BadRequest: an image is none, or too large.
        """
        return [self._answer(place, content) for place, content in enumerate(model_input["image"])]

    def _answer(self, place: int, content: Any) -> dict[str, Any]:
        content = content.encode() if isinstance(content, str) else content
        try:
            if not content.startswith(
                (b"\xff\xd8", b"\x89PNG", b"\x93NUMPY", b"II*\0", b"MM\0*")
            ):  # MLflow decodes what comes in some formats only
                content = base64.b64decode(content, validate=True)
        except (AttributeError, ValueError):
            raise BadRequest(f"image {place}: neither a JPEG or PNG file nor the base64 of one") from None
        if not content:
            raise BadRequest(f"image {place}: empty; a JPEG or PNG file in base64 is due")
        try:
            pixels = self.decoding.decode_pixels(content, most_pixels=MOST_PIXELS)  # [H, W, C]
        except self.decoding.BadFile as error:
            raise BadRequest(f"image {place}: {error}") from None
        if (pixels.shape[2], 8 * pixels.dtype.itemsize) != (self.channels, self.bits):
            raise BadRequest(
                f"image {place}: {pixels.shape[2]} channels of {8 * pixels.dtype.itemsize} bits, but the network is"
                f" made for images with {self.channels} channels of {self.bits} bits; send those as .npy"
            )
        mask = self._logits(pixels)[0].argmax(0).astype(np.uint8)
        png = self.decoding.encode_png(self.decoding.Image.fromarray(mask))
        height, width = mask.shape
        return {"mask": base64.b64encode(png).decode(), "width": width, "height": height, "classes": self.classes}

    def _logits(self, pixels: np.ndarray) -> np.ndarray:
        """Shape: pixels [H, W, C] uint8 or uint16; returns [1, K, H, W] float32."""
        images = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None]).astype(np.float32) / np.float32(2**self.bits - 1)
        size, scale = images.shape[-2:], self.inference["input_scale"]
        if scale != 1.0:
            scaled = [max(1, round(length * scale)) for length in size]
            images = resize(images, scaled, antialias=scale < 1.0)
        logits = self._slide(images) if self.inference["window"] else self._run(images)
        return resize(logits, size, antialias=False)

    def _run(self, images: np.ndarray) -> np.ndarray:
        return self.session.run(["logits"], {"images": np.ascontiguousarray(images)})[0]

    def _slide(self, images: np.ndarray) -> np.ndarray:
        """Logits of overlapping windows, averaged by how often a pixel was seen."""
        sizes = [min(*pair) for pair in zip(self.inference["window"], images.shape[-2:], strict=True)]
        starts = []
        for length, window in zip(images.shape[-2:], sizes, strict=True):
            step = max(1, int(window * self.inference["window_stride"]))
            starts.append(sorted({*range(0, length - window, step), length - window}))
        total = np.zeros((1, len(self.classes), *images.shape[-2:]), np.float32)
        hits = np.zeros((1, 1, *images.shape[-2:]), np.float32)
        for top in starts[0]:
            for left in starts[1]:
                area = (..., slice(top, top + sizes[0]), slice(left, left + sizes[1]))
                total[area] += self._run(images[area])
                hits[area] += 1
        return total / hits


def resize(images: np.ndarray, size: Any, *, antialias: bool) -> np.ndarray:
    """Bilinear, as torch's ``interpolate`` without ``align_corners``.

    Shape:
        images: [..., H, W] float32; returns [..., *size].
    """
    for axis, target in ((-2, size[0]), (-1, size[1])):
        length = images.shape[axis]
        if target == length:
            continue
        reach = max(1.0, length / target) if antialias else 1.0  # how far away a pixel still counts
        centers = (np.arange(target) + 0.5) * (length / target)
        if not antialias:
            centers = centers.clip(0.5, length - 0.5)
        first = np.floor(centers - reach).astype(int)
        total, weights = np.float32(0), np.zeros(target)
        for tap in range(2 * math.ceil(reach) + 1):
            index = first + tap
            weight = (1 - abs(index + 0.5 - centers) / reach).clip(0) * ((index >= 0) & (index < length))
            shape = (target, 1) if axis == -2 else (target,)
            total = total + images.take(index.clip(0, length - 1), axis) * weight.astype(np.float32).reshape(shape)
            weights += weight
        images = total / weights.astype(np.float32).reshape(shape)
    return images


set_model(ImageModel())
