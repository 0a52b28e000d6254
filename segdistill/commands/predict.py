"""A network on photographs of one's own: masks, and what else is asked for, as files.

Pixels go the way of ``evaluate``: decoded and turned upright in the same way, shown at the same scale or in the same
windows as when the network was scored, and the class of a pixel is the highest logit at the image's own size.
"""

import argparse
import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segdistill.commands import _model
from segdistill.config import parse, to_dict
from segdistill.data.checks import format_of
from segdistill.data.decoding import FILE_LIMIT, BadFile, decode_pixels
from segdistill.data.layouts.layout import IMAGE_SUFFIXES, require_utf8
from segdistill.data.pairing import list_files
from segdistill.data.parallel import READERS, ahead
from segdistill.engine.settings import InferenceConfig
from segdistill.errors import UserError
from segdistill.files import new_folder, read_bytes, read_text, require_free, require_regular, write_file
from segdistill.images import ImageFormat

if TYPE_CHECKING:
    import torch

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v")
EXTRAS = ("color", "overlay", "confidence")  # folders beside the masks, each where its switch is given


@dataclass(frozen=True)
class Picture:
    """An image to predict."""

    name: str  # of the files that are written: relative, without a suffix
    pixels: np.ndarray  # [H, W, C] uint8 or uint16, upright


@dataclass(frozen=True)
class Prediction:
    """What the network says of a picture."""

    mask: np.ndarray  # [H, W] uint8, the class of each pixel
    confidence: np.ndarray | None  # [H, W] uint8, the probability of that class, 255 for 1


def command(arguments: argparse.Namespace) -> None:
    """Predicts what the command line names."""
    require_free(arguments.out)
    source = Source(arguments.input, every=arguments.every)
    from segdistill.engine.distributed import processes as join
    from segdistill.engine.progress import progress_bar

    with join(arguments.device) as processes:
        model = _model.open_model(arguments.model, arguments.student, processes.device)
        inference = _settings(model.inference, arguments)
        with new_folder(arguments.out) as partial, progress_bar(True, "{task.completed} images") as bar:
            writer = Writer(partial, model.contract["classes"], [name for name in EXTRAS if getattr(arguments, name)])
            task = bar.add_task("prediction", total=source.total)
            for pictures in batches(source.pictures(), inference.batch_size):
                require_format(pictures, model.images)
                for picture, prediction in zip(
                    pictures, predict(model.network, pictures, inference, processes.device, arguments.confidence),
                    strict=True,
                ):  # fmt: skip
                    writer.write(picture, prediction)
                bar.update(task, advance=len(pictures))
            if not writer.rows:
                raise UserError(f"{arguments.input}: no image in it")
            writer.finish(arguments.areas, {"model": arguments.model, **model.contract})
    print(f"{writer.images} masks in {arguments.out / 'masks'}")


def _settings(known: InferenceConfig, arguments: argparse.Namespace) -> InferenceConfig:
    """How images are shown to the network: as it says, where the command line does not."""
    given = {"batch_size": arguments.batch_size, "input_scale": arguments.scale, "window": arguments.window,
             "window_stride": arguments.window_stride}  # fmt: skip
    values = {**to_dict(known), **{key: value for key, value in given.items() if value is not None}}
    return parse(InferenceConfig, values, "predict")


class Source:
    """What INPUT names.

    Args:
        path: an image, a folder, a list or a video.
        every: of a video, which frames.

    Raises:
        UserError: it names nothing to predict, or two images whose masks would have one name.
    """

    def __init__(self, path: Path, *, every: int = 1) -> None:
        self.path, self.every, self.files = path, every, dict[str, Path]()
        suffix = path.suffix.lower()
        if every < 1:
            raise UserError(f"--every: {every}; allowed: 1 and more")
        self.is_video = suffix in VIDEO_SUFFIXES and not path.is_dir()
        if path.is_dir():
            files = sorted(file for file in list_files(path) if file.suffix.lower() in IMAGE_SUFFIXES)
            root = path
        elif suffix in IMAGE_SUFFIXES:
            files, root = [require_utf8(path)], path.parent
        elif suffix == ".txt":
            lines = [line.strip() for line in read_text(path).splitlines()]
            files = [path.parent / line for line in lines if line]
            folders = [os.path.normpath(Path.cwd() / file.parent) for file in files]
            root = Path(os.path.commonpath(folders)) if files else path.parent
        elif not self.is_video:
            require_regular(path)
            known = ", ".join((*IMAGE_SUFFIXES, ".txt", *VIDEO_SUFFIXES))
            raise UserError(f"{path}: neither a folder nor a file of a known kind; allowed: {known}")
        if self.is_video:
            require_regular(path)
            return
        if not files:
            raise UserError(f"{path}: no image in it; allowed: {', '.join(IMAGE_SUFFIXES)}")
        for file in files:
            name = Path(os.path.relpath(file, root)).with_suffix("").as_posix()
            if name in self.files:
                raise UserError(f"{file}: its mask would have the name of that of {self.files[name]}; rename one")
            self.files[name] = file

    @property
    def total(self) -> int | None:
        """How many images there are, where that is known."""
        return None if self.is_video else len(self.files)

    def pictures(self) -> Iterator[Picture]:
        """Every image in turn; only a few are held at any time.

        Raises:
            UserError: one is damaged.
        """
        if self.is_video:
            yield from self._frames()
            return
        yield from ahead(_read, self.files.items(), READERS)

    def _frames(self) -> Iterator[Picture]:
        try:
            import av
        except ImportError:
            raise UserError("av is not installed, which videos need: pip install 'segdistill[video]'") from None
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise UserError(f"{self.path}: has no pictures in it")
                for number, frame in enumerate(container.decode(video=0)):
                    if number % self.every == 0:
                        pixels = frame.to_ndarray(format="rgb24")
                        turned = np.rot90(pixels, round(frame.rotation / 90))  # counter-clockwise, as FFmpeg counts
                        yield Picture(f"{number:06d}", np.ascontiguousarray(turned))
        except av.error.FFmpegError as error:
            raise UserError(f"{self.path}: damaged, or of a kind that FFmpeg does not know: {error.strerror}") from None


def _read(named: tuple[str, Path]) -> Picture:
    name, file = named
    try:
        return Picture(name, decode_pixels(read_bytes(file, limit=FILE_LIMIT)))
    except BadFile as error:
        raise UserError(f"{file}: {error}") from None


def batches(pictures: Iterator[Picture], size: int) -> Iterator[list[Picture]]:
    """Neighbouring pictures of equal size."""
    group: list[Picture] = []
    for picture in pictures:
        if group and (len(group) == size or picture.pixels.shape != group[0].pixels.shape):
            yield group
            group = []
        group.append(picture)
    if group:
        yield group


def require_format(pictures: Sequence[Picture], images: ImageFormat) -> None:
    """Raises a UserError for a picture with other channels or bits than the network is shown."""
    for picture in pictures:
        given = format_of(picture.pixels)
        if (given.channels, given.bits) != (images.channels, images.bits):
            raise UserError(f"{picture.name}: {given}, but the network is made for images with {images}")


def predict(
    network: Any, pictures: Sequence[Picture], inference: InferenceConfig, device: "torch.device", confidence: bool
) -> Iterator[Prediction]:
    """The predictions of pictures of one size.

    Raises:
        UserError: the network's scores are no numbers.
    """
    import torch

    from segdistill.data.transforms import unit_range
    from segdistill.engine import inference as engine

    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
    images = unit_range(pixels.permute(0, 3, 1, 2).to(device))
    height, width = pictures[0].pixels.shape[:2]
    with torch.inference_mode():
        prediction = engine.predict(network, images, (height, width), engine.Views(inference), probability=confidence)
        if not prediction.finite:
            raise UserError(f"{pictures[0].name}: the network's scores are not finite; it is no use")
        masks = prediction.classes.to(torch.uint8).cpu().numpy()
        shares = None
        if prediction.probability is not None:
            shares = (255 * prediction.probability).round().to(torch.uint8).cpu().numpy()
    for index, mask in enumerate(masks):
        yield Prediction(mask, None if shares is None else shares[index])


class Writer:
    """Files of predictions, in a folder that is not complete before :meth:`finish`.

    Args:
        folder: to fill.
        classes: names and colours.
        extras: which of :data:`EXTRAS` to write.
    """

    def __init__(self, folder: Path, classes: Sequence[dict[str, Any]], extras: Sequence[str]) -> None:
        self.folder, self.extras, self.rows = folder, extras, list[tuple[str, str, int, float]]()
        self.names = [entry["name"] for entry in classes]
        self.colors = [tuple(entry["color"]) for entry in classes]
        self.images = 0

    def write(self, picture: Picture, prediction: Prediction) -> None:
        """One image's files."""
        from segdistill.report.pictures import colorize, visible

        self._save("masks", picture, prediction.mask)
        if {"color", "overlay"} & set(self.extras):
            colored = colorize(prediction.mask, self.colors)
            if "color" in self.extras:
                self._save("color", picture, colored)
            if "overlay" in self.extras:
                self._save(
                    "overlay", picture, ((visible(picture.pixels).astype(np.uint16) + colored) // 2).astype(np.uint8)
                )
        if prediction.confidence is not None:
            self._save("confidence", picture, prediction.confidence)
        counts = np.bincount(prediction.mask.ravel(), minlength=len(self.names))
        self.rows += [(picture.name, name, int(count), float(count / prediction.mask.size))
                      for name, count in zip(self.names, counts, strict=True)]  # fmt: skip
        self.images += 1

    def _save(self, kind: str, picture: Picture, pixels: np.ndarray) -> None:
        from PIL import Image

        path = self.folder / kind / f"{picture.name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=1)

    def finish(self, areas: str | None, facts: dict[str, Any]) -> None:
        """Writes the table, and ``classes.json`` with what the masks' values mean."""
        import json

        columns = ("image", "class", "pixels", "share")
        if areas == "csv":
            with (self.folder / "areas.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([columns, *self.rows])
        elif areas == "parquet":
            import pyarrow.parquet

            table = pyarrow.table(dict(zip(columns, zip(*self.rows, strict=True), strict=True)))
            pyarrow.parquet.write_table(table, self.folder / "areas.parquet")
        write_file(self.folder / "classes.json", (json.dumps(facts, indent=2) + "\n").encode())
