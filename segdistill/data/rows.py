"""Images and labels that are stored decoded, of which a reader takes and verifies only the rows it needs.

Each is a .npy file within its shard: its type and shape, then its rows as they lie in memory. The sealed manifest has
the CRC-32 of that header and of every band of rows, so that no row is believed before it is known to be whole, and
nothing is read for it but its band.
"""

import io
import os
import zlib
from collections.abc import Sequence

import numpy as np

BAND = 32  # rows that are verified together; a window reads at most so many too much above and below


def encode_rows(values: np.ndarray) -> bytes:
    """The .npy file of an array of 8 or 16 bits, such as an image [H, W, C] or a label [H, W]."""
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(values), allow_pickle=False)
    return stream.getvalue()


def band_checksums(content: bytes) -> list[int]:
    """The CRC-32 of the header of such a file, and of each band of its rows."""
    begin = _header_size(content)
    shape, dtype = _shape_and_type(content[:begin])
    band = BAND * _row_size(shape, dtype)
    view = memoryview(content)
    bands = [view[start : start + band] for start in range(begin, len(content), band)]
    return [zlib.crc32(part) for part in (view[:begin], *bands)]


def read_rows(file: int, offset: int, rows: slice, checksums: Sequence[int]) -> np.ndarray:
    """Some rows of an array that lies in an open file.

    Read, not mapped: where a disk fails or a file has become shorter, a map would end the process.

    Args:
        offset: where in the file the array begins.
        rows: from the first one wanted to the one behind the last.
        checksums: see :func:`band_checksums`.

    Shape:
        returns [rows.stop - rows.start, ...].

    Raises:
        ValueError: not there, or not what the checksums say.
    """
    header = _read(file, offset, _header_size(_read(file, offset, 12)))
    if zlib.crc32(header) != checksums[0]:
        raise ValueError(DAMAGED)
    shape, dtype = _shape_and_type(header)
    first, last = rows.start // BAND, -(-rows.stop // BAND)  # bands
    start, stop = first * BAND, min(last * BAND, shape[0])  # rows
    values = np.empty((stop - start, *shape[1:]), dtype)
    content = memoryview(values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    size = _row_size(shape, dtype)
    try:
        count = os.preadv(file, [content], offset + len(header) + start * size)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    parts = (content[begin : begin + BAND * size] for begin in range(0, len(content), BAND * size))
    if count != len(content) or [zlib.crc32(part) for part in parts] != list(checksums[1 + first : 1 + last]):
        raise ValueError(DAMAGED)
    return values[rows.start - start : rows.stop - start]


DAMAGED = "damaged, or cut off: not what the manifest records"


def _read(file: int, offset: int, size: int) -> bytes:
    try:
        return os.pread(file, size, offset)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def _header_size(begin: bytes) -> int:
    """Bytes before the values, from the first twelve of a .npy file of version 1 (which all of ours have)."""
    if not begin.startswith(b"\x93NUMPY\x01\x00"):
        raise ValueError(DAMAGED)
    return 10 + int.from_bytes(begin[8:10], "little")


def _shape_and_type(header: bytes) -> tuple[tuple[int, ...], np.dtype]:
    stream = io.BytesIO(header)
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return shape, dtype


def _row_size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of a row."""
    return int(np.prod(shape[1:])) * dtype.itemsize
