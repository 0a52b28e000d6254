"""Images and labels that are stored decoded, of which a reader takes and verifies only the rows it needs.

Each is a .npy file within its shard: its type and shape, then its rows as they lie in memory. The sealed manifest has
the CRC-32 of that header and of every band of rows, so that no row is believed before it is known to be whole, and
nothing is read for it but its band: what type and shape are, the index says, too.
"""

import io
import os
import zlib
from collections.abc import Sequence

import numpy as np

BAND = 32  # rows that are verified together; a window reads at most so many too much above and below
DAMAGED = "damaged, or cut off: not what the manifest records"


def encode_rows(values: np.ndarray) -> tuple[bytes, list[int]]:
    """The .npy file of an array of 8 or 16 bits, [H, W, C] or [H, W]; the CRC-32 of its header and of each band."""
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(values), allow_pickle=False)
    content = stream.getvalue()
    begin, band = len(content) - values.nbytes, BAND * values[0].nbytes
    view = memoryview(content)
    bands = [view[start : start + band] for start in range(begin, len(content), band)]
    return content, [zlib.crc32(part) for part in (view[:begin], *bands)]


def read_rows(
    file: int, end: int, rows: slice, checksums: Sequence[int], shape: tuple[int, ...], dtype: type
) -> np.ndarray:
    """Some rows of an array that lies in an open file.

    Read, not mapped: where a disk fails or a file has become shorter, a map would end the process.

    Args:
        end: where in the file the array ends.
        rows: from the first one wanted to the one behind the last.
        checksums: see :func:`encode_rows`.
        shape: of the array, as ``dtype``.

    Shape:
        returns [rows.stop - rows.start, ...].

    Raises:
        ValueError: not there, or not what the checksums say.
    """
    first, last = rows.start // BAND, -(-rows.stop // BAND)  # bands
    start, stop = first * BAND, min(last * BAND, shape[0])  # rows
    values = np.empty((stop - start, *shape[1:]), dtype)
    content = memoryview(values.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    size = values[0].nbytes
    try:
        count = os.preadv(file, [content], end - (shape[0] - start) * size)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    parts = (content[begin : begin + BAND * size] for begin in range(0, len(content), BAND * size))
    if count != len(content) or [zlib.crc32(part) for part in parts] != list(checksums[1 + first : 1 + last]):
        raise ValueError(DAMAGED)
    return values[rows.start - start : rows.stop - start]
