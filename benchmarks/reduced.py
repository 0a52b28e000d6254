"""A JPEG decoded at half its sides against the resize that training uses: milliseconds of a core, and the pixels.

python benchmarks/reduced.py
"""

import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from segdistill import streets

SIZE = (1024, 512)  # width, height
HALF = (SIZE[0] // 2, SIZE[1] // 2)


def decoded(content: bytes, reduced: bool) -> np.ndarray:
    image = Image.open(io.BytesIO(content))
    if reduced:
        image.draft("RGB", HALF)
    return np.asarray(image)


def resized(pixels: np.ndarray) -> np.ndarray:
    image = torch.tensor(pixels).permute(2, 0, 1)[None].float()
    return functional.interpolate(image, size=HALF[::-1], mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def main() -> None:
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        streets.write(Path(folder) / "data", seed=0, size=SIZE, samples={"train": 2, "val": 1, "test": 1})
        pictures = [np.asarray(Image.open(path)) for path in sorted(Path(folder).rglob("images/*/*.*"))]
    for noise in (0, 8):
        times, differences = [], []
        for pixels in pictures:
            noisy = np.clip(pixels + random.normal(0, noise, pixels.shape), 0, 255).astype(np.uint8)
            stream = io.BytesIO()
            Image.fromarray(noisy).save(stream, "JPEG", quality=95)
            clock = [time.process_time()]
            whole = decoded(stream.getvalue(), False)
            clock.append(time.process_time())
            half = decoded(stream.getvalue(), True)
            clock.append(time.process_time())
            difference = np.abs(resized(whole) - half)
            clock.append(time.process_time())
            times.append(np.diff(clock))
            differences.append((difference.mean(), np.percentile(difference, 99)))
        whole_ms, half_ms, resize_ms = 1000 * np.median(times, 0)
        mean, most = np.mean(differences, 0)
        print(f"noise {noise}: whole {whole_ms:.1f} ms, at half {half_ms:.1f} ms, resize {resize_ms:.1f} ms;"
              f" pixels differ by {mean:.1f} of 255 in the mean, {most:.0f} at the 99th percentile")  # fmt: skip


if __name__ == "__main__":
    main()
