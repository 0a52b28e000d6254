"""Encoded pictures -> pixels, in one way for all who read pixels or sizes: checks, import, shards, predictions.

A JPEG or PNG is read as every viewer shows it: turned as its EXIF orientation says. What 8 bits of red, green and blue
cannot say without a guess (transparency, inks, 16 bits) is refused. A TIFF or .npy file gives its channels as they are,
of 8 or 16 bits. Colour profiles and gamma are not applied, here as in training and in use. A registered model has a
copy of this file (adapters/image_model.py), so it imports nothing of this package.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image

FILE_LIMIT = 256 * 2**20  # bytes of one image or mask
MOST_PIXELS = 100_000_000  # of one image or mask: 300 MB as RGB
MOST_CHANNELS = 256  # of an image; its values may be as many as those of the largest RGB image

IMAGE_MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "YCbCr")  # 8 bits a channel: nothing is lost as RGB
INDEX_MASKS = tuple(f"{bits}-bit {colour}" for colour in ("grey", "palette") for bits in (1, 2, 4, 8))
COLOUR_MASKS = ("8-bit RGB", "8-bit RGBA")  # read where the classes' colours are known, and nowhere else
MATRIX_MASKS = ("MATLAB file",)  # with a matrix of class indices
MATRIX = "LabelMap"  # its name
_PNG_COLOURS = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
_PNG_BEGIN, _JPEG_BEGIN, _MATLAB_BEGIN = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"MATLAB 5.0 MAT-file"
# Little and big endian, and of more than 4 GB; what ends a picture is said by its own header.
_TIFF_BEGIN, _NPY_BEGIN = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), b"\x93NUMPY"
# What brings a picture upright, by EXIF orientation; 1, and any value without a meaning, leaves it as it is.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadFile(Exception):
    """Why a file cannot be used, in words that follow its name and a colon."""


@dataclass(frozen=True)
class Mask:
    """What a mask stores."""

    values: np.ndarray  # [H, W] uint8 or uint16, class indices as stored
    palette: tuple[tuple[int, int, int], ...]  # the colour of each index; empty where the file has no palette


def image_format(content: bytes) -> str:
    """``png``, ``tiff``, ``npy`` or ``jpeg``, of what :func:`decode_pixels` accepts."""
    begins: dict[str, bytes | tuple[bytes, ...]] = {"png": _PNG_BEGIN, "tiff": _TIFF_BEGIN, "npy": _NPY_BEGIN}
    return next((name for name, begin in begins.items() if content.startswith(begin)), "jpeg")


def decode_pixels(content: bytes, *, verified: bool = False, most_pixels: int | None = None) -> np.ndarray:
    """The pixels of an image file: what :func:`decode_image` gives, or all channels of a TIFF or .npy file.

    Shape:
        returns [H, W, C] uint8 or uint16; it may be read-only.

    Raises:
        BadFile: another format, damaged, too large, or pixels that cannot be taken as they are.
    """
    kind = image_format(content)
    if kind not in ("tiff", "npy"):
        return np.asarray(decode_image(content, verified=verified, most_pixels=most_pixels))
    try:
        return (_read_tiff if kind == "tiff" else _read_array)(content, most_pixels or MOST_PIXELS)
    except BadFile:
        raise
    except Exception as error:  # a decoder fed with garbage may raise anything
        raise BadFile(f"damaged or truncated: {str(error).strip() or type(error).__name__}") from None


def encode_pixels(pixels: np.ndarray) -> bytes:
    """A file that keeps every value: a PNG of 8-bit RGB, a .npy of anything else.

    Shape:
        pixels: [H, W, C] uint8 or uint16.
    """
    if pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return encode_png(Image.fromarray(pixels))
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(pixels), allow_pickle=False)
    return stream.getvalue()


def resize_pixels(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The same image at another width and height, averaged where it gets smaller.

    Shape:
        pixels: [H, W, C] uint8 or uint16; returns [size[1], size[0], C] of that type.
    """
    if pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))
    planes = (Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR)
              for plane in pixels.transpose(2, 0, 1).astype(np.float32))  # fmt: skip
    return np.rint(np.stack([np.asarray(plane) for plane in planes], axis=2)).astype(pixels.dtype)


def decode_image(content: bytes, *, verified: bool = False, most_pixels: int | None = None) -> Image.Image:
    """The upright RGB image in a JPEG or PNG file.

    Args:
        content: the file.
        verified: the bytes are known to be whole, so that their checksums need no second look.
        most_pixels: beyond which it is too large, if not :data:`MOST_PIXELS`.

    Raises:
        BadFile: another format, damaged, too large, or pixels that are no 8-bit RGB without a guess.
    """
    if content.startswith(_PNG_BEGIN) and content[24:25] == b"\x10":  # Pillow would drop the lower byte without a word
        raise BadFile(f"{mask_kind(content)}; an image must have 8 bits a channel as PNG: save 16 as TIFF or .npy")
    image = _decode(content, ("JPEG", "PNG"), verified, most_pixels)
    if image.mode == "CMYK":
        raise BadFile("CMYK: how its inks look as colours is not said in the file; save it as RGB")
    if image.mode not in IMAGE_MODES:
        raise BadFile(f"pixels of mode {image.mode}; an image must have 8 bits a channel")
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema()[0] != 255:
        raise BadFile("has transparent pixels, and what is behind them is not said; save it without transparency")
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_mask(
    content: bytes, kinds: Sequence[str] = INDEX_MASKS, colours: Mapping[tuple[int, int, int], int] | None = None
) -> Mask:
    """The values that a mask stores, upright.

    Args:
        content: the file.
        kinds: those of :func:`mask_kind` that are accepted.
        colours: the value of each colour, where masks are pictures in the classes' colours.

    Raises:
        BadFile: of another kind, damaged, too large, or with a colour that has no value.
    """
    kind = mask_kind(content)
    if kind not in kinds:
        raise BadFile(not_of_these(kind, kinds))
    if kind in MATRIX_MASKS:
        return Mask(_read_matrix(content), ())
    if kind in COLOUR_MASKS:
        return Mask(_values_of_colours(np.asarray(decode_image(content)), colours or {}), ())
    image = _decode(content, ("PNG",), verified=False)
    values = np.asarray(image, dtype=np.uint8)
    if kind in ("2-bit grey", "4-bit grey"):
        values = values // np.uint8(85 if kind == "2-bit grey" else 17)  # Pillow widens them to 0-255
    palette = image.getpalette("RGB") if image.mode == "P" else None
    return Mask(values, tuple(zip(*[iter(palette or ())] * 3, strict=True)))  # type: ignore[arg-type]


def _read_matrix(content: bytes) -> np.ndarray:
    """[H, W] uint16: the matrix of class indices in a MATLAB file, of which nothing else is read."""
    from scipy.io import loadmat, whosmat

    try:
        shape = next((shape for name, shape, _ in whosmat(io.BytesIO(content)) if name == MATRIX), None)
        if shape is None or len(shape) != 2:
            raise BadFile(f"has no matrix '{MATRIX}' of class indices")
        if shape[0] * shape[1] > MOST_PIXELS:
            raise BadFile(_too_large(shape[0] * shape[1], MOST_PIXELS))
        stored = loadmat(io.BytesIO(content), variable_names=[MATRIX])[MATRIX]
        values = stored.astype(np.uint16)
        if not np.array_equal(values, stored):
            raise BadFile(f"its matrix '{MATRIX}' has values that are no class indices")
    except BadFile:
        raise
    except Exception as error:  # a decoder fed with garbage may raise anything
        raise BadFile(f"damaged or truncated: {error}") from None
    return values  # type: ignore[no-any-return]


def _values_of_colours(pixels: np.ndarray, colours: Mapping[tuple[int, int, int], int]) -> np.ndarray:
    """[H, W, 3] colours -> [H, W] uint8 values."""
    packed = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)  # [H, W]
    values, known = np.zeros(packed.shape, dtype=np.uint8), np.zeros(packed.shape, dtype=bool)
    for (red, green, blue), value in colours.items():
        places = packed == (red << 16 | green << 8 | blue)
        values[places] = value
        known |= places
    if not known.all():
        first = int(packed[~known][0])
        raise BadFile(f"{(~known).sum()} pixels of a colour that no class has, such as #{first:06x}")
    return values


def mask_kind(content: bytes) -> str:
    """Bit depth and colour type of a PNG, as its header says: a decoder would hide them by widening the values.

    A MATLAB file is one of MATRIX_MASKS.

    Raises:
        BadFile: neither.
    """
    if content.startswith(_MATLAB_BEGIN):
        return MATRIX_MASKS[0]
    if content.startswith(_JPEG_BEGIN):
        raise BadFile("a JPEG: its compression changes labels; make masks as PNG, from the source of this one")
    if not content.startswith(_PNG_BEGIN) or content[12:16] != b"IHDR" or len(content) < 26:
        raise BadFile("not a PNG file")
    return f"{content[24]}-bit {_PNG_COLOURS.get(content[25], 'unknown')}"


def not_of_these(kind: str, kinds: Sequence[str]) -> str:
    """The words for a mask of another kind than is accepted."""
    words = {
        INDEX_MASKS: "an index mask is due (grey or palette of at most 8 bits, value = class)",
        COLOUR_MASKS: "a picture in the classes' colours is due (8-bit RGB)",
        MATRIX_MASKS: f"a MATLAB file with the matrix '{MATRIX}' is due",
    }
    return f"{kind} where {' or '.join(text for group, text in words.items() if group[0] in kinds)}"


def encode_jpeg(image: Image.Image, quality: int) -> bytes:
    """A JPEG file, which has other pixels than the image: see ``prepare.images``."""
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=quality)
    return stream.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """A PNG file."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()


def _read_tiff(content: bytes, most_pixels: int) -> np.ndarray:
    """[H, W, C]: the channels of its one page, or of its pages if each is one channel; overviews are passed over."""
    try:
        import tifffile
    except ImportError:
        raise BadFile("tifffile is not installed, which TIFF files need: pip install tifffile") from None
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        if len(file.pages) > 4 * MOST_CHANNELS:
            raise BadFile(f"{len(file.pages)} pages; at most {MOST_CHANNELS} are read, each as a channel")
        pages = [page for page in (each.aspage() for each in file.pages) if not page.is_reduced and not page.is_mask]
        if not pages:
            raise BadFile("damaged or truncated: it has no page")
        first, samples = pages[0], sum(page.samplesperpixel for page in pages)
        kinds = {(page.imagelength, page.imagewidth, page.dtype) for page in pages}
        if len(kinds) > 1 or (len(pages) > 1 and samples > len(pages)) or first.imagedepth > 1:
            raise BadFile(
                f"{len(pages)} pages; one page with all channels is due, or pages of one channel and one size"
            )
        _require_values((first.imagelength, first.imagewidth, samples), first.dtype, most_pixels)
        colour = tifffile.PHOTOMETRIC(first.photometric).name
        if colour not in ("MINISBLACK", "RGB"):
            raise BadFile(f"its pixels are {colour}; MINISBLACK or RGB is due: channels as they were measured")
        if (turn := first.tags.valueof(274, 1)) not in (0, 1):
            raise BadFile(f"its orientation tag is {turn}; save it upright")
        try:
            parts = [page.asarray() for page in pages]  # each [H, W], [H, W, C] or, where it is stored so, [C, H, W]
        except Exception as error:
            if "imagecodecs" not in str(error):
                raise
            compression = tifffile.COMPRESSION(first.compression).name
            raise BadFile(
                f"its compression {compression} needs the library imagecodecs, which is not installed; save it with"
                " Deflate or without compression"
            ) from None
    if first.planarconfig == tifffile.PLANARCONFIG.SEPARATE and parts[0].ndim == 3:
        parts = [parts[0].transpose(1, 2, 0)]
    pixels = np.concatenate([part.reshape(first.imagelength, first.imagewidth, -1) for part in parts], axis=2)
    return np.ascontiguousarray(pixels, dtype=pixels.dtype.newbyteorder("="))


def _read_array(content: bytes, most_pixels: int) -> np.ndarray:
    """[H, W, C] of a .npy file that holds that, or [H, W]; nothing is unpickled."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    if len(shape) not in (2, 3):
        raise BadFile(f"an array of shape {list(shape)}; [height, width] or [height, width, channels] is due")
    _require_values((*shape, 1)[:3], dtype, most_pixels)
    values = np.frombuffer(content, dtype, offset=stream.tell())
    if values.size != np.prod(shape, dtype=np.int64):
        raise BadFile(f"damaged or truncated: {values.size} values where its shape {list(shape)} needs others")
    pixels = values.reshape(shape, order="F" if fortran else "C").reshape(*shape[:2], -1)
    return np.ascontiguousarray(pixels, dtype=dtype.newbyteorder("="))


def _require_values(shape: tuple[int, ...], dtype: np.dtype | None, most_pixels: int) -> None:
    """Refuses what is no image of 8 or 16 bits before its pixels are looked at."""
    height, width, channels = shape
    if dtype is None or dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise BadFile(
            f"values of type {dtype}; uint8 or uint16 is due: scale floats to 0..65535, all files alike, and round"
        )
    if not 1 <= channels <= MOST_CHANNELS or not height or not width:
        raise BadFile(f"{height} x {width} pixels of {channels} channels (height, width, channels); at most"
                      f" {MOST_CHANNELS} channels are read, and no empty image")  # fmt: skip
    most = most_pixels * 3 // max(3, channels * dtype.itemsize)
    if height * width > most:
        raise BadFile(_too_large(height * width, most))


def _decode(content: bytes, formats: tuple[str, ...], verified: bool, most_pixels: int | None = None) -> Image.Image:
    most_pixels = most_pixels or MOST_PIXELS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata, which is of no concern here
            image = Image.open(io.BytesIO(content), formats=formats)
            if image.width * image.height > most_pixels:
                raise BadFile(_too_large(image.width * image.height, most_pixels))
            if not verified:
                (_check_png if image.format == "PNG" else _check_jpeg)(content)
            image.load()
            turn = _TURNS.get(_orientation(image))
            return image if turn is None else image.transpose(turn)
    except Image.UnidentifiedImageError:
        raise BadFile(f"not a {' or '.join(formats)} file, or its header is damaged") from None
    except Image.DecompressionBombError as error:  # beyond Pillow's own limit, which lies above ours
        raise BadFile(_too_large(int(re.findall(r"\d+", str(error))[0]), most_pixels)) from None
    except BadFile:
        raise
    except Exception as error:  # a decoder fed with garbage may raise anything
        raise BadFile(f"damaged or truncated: {error}") from None


def _too_large(pixels: int, most_pixels: int) -> str:
    return f"{pixels / 1e6:.0f} million pixels; at most {most_pixels / 1e6:.0f} million are read: cut it into tiles"


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # EXIF data that nobody can read turns no picture, in no viewer
        return 1


def _check_png(content: bytes) -> None:
    """Pillow looks neither at the checksums of pixel data nor for the end of the file."""
    view, position = memoryview(content), len(_PNG_BEGIN)
    while position + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, position)
        end = position + 12 + length
        if end > len(content):
            break
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise BadFile(f"damaged or truncated: the checksum of its part {kind.decode('latin-1')} is wrong")
        if kind == b"IEND":
            return
        position = end
    raise BadFile("damaged or truncated: its end is missing")


def _check_jpeg(content: bytes) -> None:
    """Decoders make up the end of a JPEG that has none. It has no checksums."""
    marker, position = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])", re.DOTALL), 2
    while found := marker.search(content, position):
        kind, position = found[1][0], found.end()
        if kind == 0xD9:
            return
        if kind not in (0x01, 0xD8):  # every other part says how long it is
            position += int.from_bytes(content[position : position + 2], "big")
    raise BadFile("damaged or truncated: its end is missing")
