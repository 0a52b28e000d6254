"""Pixels as a viewer shows them, or a sentence that says why not."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _folders import make_folder, prepare, save
from PIL import Image, ImageOps, PngImagePlugin

from segdistill.data import decoding
from segdistill.data.checks import inspect
from segdistill.data.decoding import BadFile, decode_image, decode_mask
from segdistill.data.importing import import_dataset
from segdistill.data.layouts import open_layout
from segdistill.data.shards import ShardDataset

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def turned(form: str, orientation: int, pixels: np.ndarray = PIXELS) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    return encoded(Image.fromarray(pixels), form, exif=exif, **options)


def png(width: int, height: int, bits: int, colour: int, rows: bytes, *more: tuple[bytes, bytes]) -> bytes:
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    parts = [header, *more, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    checked = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(checked)


def problem(read: Any, content: bytes) -> str:
    with pytest.raises(BadFile) as caught:
        read(content)
    return str(caught.value)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_is_read_upright_whatever_its_exif_orientation(form: str, orientation: int) -> None:
    content = turned(form, orientation)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(np.asarray(decode_image(content)), np.asarray(expected))
    if orientation == 3:
        assert np.abs(np.asarray(decode_image(content)).astype(int) - PIXELS[::-1, ::-1]).max() < 60


def test_a_mask_is_turned_as_its_exif_says() -> None:
    labels = np.arange(96, dtype=np.uint8).reshape(8, 12)
    assert np.array_equal(decode_mask(turned("PNG", 6, labels)).values, np.rot90(labels, -1))


@pytest.mark.parametrize("max_side", [None, 16])
def test_a_turned_photograph_lies_on_its_mask_in_facts_shards_and_imports(tmp_path: Path, max_side: int | None) -> None:
    data = make_folder(tmp_path / "data", {"train": 2, "val": 1, "test": 1}, size=(24, 20))
    upright = np.zeros((20, 24, 3), dtype=np.uint8)
    upright[:10] = 255
    (data / "images/train/0000.jpg").write_bytes(turned("JPEG", 6, np.rot90(upright).copy()))
    layout = open_layout("folder", data)
    (facts, *_) = inspect(layout, list(layout.samples("train")), workers=1)
    assert facts.image_size == facts.mask_size == (24, 20)
    import_dataset("folder", data, tmp_path / "imported", workers=1)
    for source in (data, tmp_path / "imported"):
        image, label = ShardDataset(
            prepare(source, tmp_path / f"{source.name}-out/prepared", max_side=max_side), "train"
        )[0]
        assert image.shape[:2] == label.shape == ((20, 24) if max_side is None else (13, 16))
        assert image[:4].mean() > 250 and image[-4:].mean() < 5


def test_exif_that_nobody_can_read_turns_nothing() -> None:
    content = encoded(Image.fromarray(PIXELS), "JPEG", quality=100, exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert decode_image(content).size == (12, 8)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (png(2, 1, 16, 2, bytes(13)), "16-bit RGB; an image must have 8 bits a channel"),
        (png(2, 1, 16, 0, bytes(5)), "16-bit grey; an image must have 8 bits a channel"),
        (encoded(Image.new("CMYK", (4, 4)), "JPEG"), "CMYK: how its inks look"),
        (encoded(Image.new("RGBA", (4, 4), (9, 9, 9, 254))), "has transparent pixels"),
        (encoded(Image.new("LA", (4, 4), (9, 0))), "has transparent pixels"),
        (encoded(Image.new("P", (4, 4)), transparency=0), "has transparent pixels"),
        (encoded(Image.new("RGB", (4, 4), (7, 8, 9)), transparency=(7, 8, 9)), "has transparent pixels"),
        (encoded(Image.new("L", (4, 4), 7), transparency=7), "has transparent pixels"),
        (encoded(Image.new("RGB", (4, 4)), "BMP"), "not a JPEG or PNG file"),
    ],
)
def test_what_rgb_cannot_say_without_a_guess_is_refused(content: bytes, said: str) -> None:
    assert problem(decode_image, content).startswith(said)


@pytest.mark.parametrize("image", [
    Image.new("RGBA", (4, 4), (9, 9, 9, 255)), Image.new("LA", (4, 4), (9, 255)), Image.new("P", (4, 4), 1),
    Image.new("1", (4, 4), 1), Image.new("L", (4, 4), 9), Image.new("RGB", (4, 4), (1, 2, 3)),
])  # fmt: skip
def test_what_rgb_can_say_is_read_as_such(image: Image.Image) -> None:
    assert np.array_equal(np.asarray(decode_image(encoded(image))), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("palette", [False, True])
def test_a_mask_of_few_bits_holds_the_values_that_it_stores(bits: int, palette: bool) -> None:
    values = np.arange(2**bits, dtype=np.uint8)
    packed = b"\0" + np.packbits(np.unpackbits(values[:, None], axis=1)[:, -bits:].ravel()).tobytes()
    colours = [(b"PLTE", bytes(range(3)) * 2**bits), (b"tRNS", bytes(2**bits))] if palette else [(b"tRNS", b"\0\1")]
    mask = decode_mask(png(len(values), 1, bits, 3 if palette else 0, packed, *colours))
    assert np.array_equal(mask.values, values[None])
    assert mask.palette == (((0, 1, 2),) * 2**bits if palette else ())


def test_a_flipped_bit_anywhere_in_a_png_is_noticed() -> None:
    whole = encoded(Image.fromarray(PIXELS), pnginfo=_text())
    random = np.random.default_rng(0)
    for position in {*range(len(whole) - 80, len(whole)), *random.integers(0, len(whole), 120).tolist()}:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(random.integers(8))
        problem(decode_image, bytes(damaged))


def _text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Title", "a street")
    return info


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("forgiving", [False, True])
def test_a_missing_end_is_noticed_however_short_and_forgiving_the_decoder(
    form: str, forgiving: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", forgiving)
    whole = encoded(Image.fromarray(PIXELS), form, **({"progressive": True} if form == "JPEG" else {}))
    decode_image(whole), decode_image(whole + b"\0 what cameras append")
    for missing in (1, 2, 13, len(whole) // 2):
        assert problem(decode_image, whole[:-missing]).startswith("damaged or truncated")


def test_a_too_large_picture_says_its_pixels_and_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for side, pixels in ((13_000, 169), (2**31 - 1, 4_611_686_014_132)):
            said = f"{pixels} million pixels; at most 100 million are read: cut it into tiles"
            assert problem(decode_mask, png(side, side, 8, 0, b"")) == said
            assert problem(decode_image, png(side, side, 8, 2, b"")) == said
    monkeypatch.setattr(decoding, "MOST_PIXELS", 95)
    assert "million pixels; at most 0 million" in problem(decode_image, encoded(Image.fromarray(PIXELS), "JPEG"))


def test_masks_in_jpeg_are_refused_for_that_reason(tmp_path: Path) -> None:
    data = make_folder(tmp_path)
    (data / "masks/train/0001.png").rename(data / "masks/train/0001.jpg")
    save(data / "masks/train/0001.jpg", np.zeros((8, 12), dtype=np.uint8))
    layout = open_layout("folder", data)
    facts = list(inspect(layout, list(layout.samples("train")), workers=1))[1]
    assert facts.mask == "masks/train/0001.jpg" and facts.mask_problem is not None
    assert facts.mask_problem.startswith("a JPEG: its compression changes labels")
