"""Bytes and time of requests to a server that is sent photographs, as docs/serving.md has them.

python benchmarks/serving.py photo.jpg --url http://127.0.0.1:5001
"""

import argparse
import base64
import json
import statistics
import time
import urllib.request
from pathlib import Path


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("image", type=Path)
    arguments.add_argument("--url", default="http://127.0.0.1:5001")
    arguments.add_argument("--requests", type=int, default=20, help="warm ones, one after another (%(default)s)")
    given = arguments.parse_args()
    content = given.image.read_bytes()
    body = json.dumps({"inputs": {"image": [base64.b64encode(content).decode()]}}).encode()
    request = urllib.request.Request(f"{given.url}/invocations", body, {"Content-Type": "application/json"})
    answer, seconds = b"", []
    for _ in range(given.requests + 3):  # the first ones only warm up
        started = time.perf_counter()
        with urllib.request.urlopen(request) as response:
            answer = response.read()
        seconds.append(time.perf_counter() - started)
    (prediction,) = json.loads(answer)["predictions"]
    size = f"{prediction['width']} x {prediction['height']}"
    print(f"{size}: file {len(content)} bytes, request {len(body)}, answer {len(answer)},", end=" ")
    print(f"of which the mask is {len(base64.b64decode(prediction['mask']))} as PNG")
    warm = seconds[3:]
    print(f"{len(warm)} when warm: median {1000 * statistics.median(warm):.1f} ms, fastest {1000 * min(warm):.1f} ms")


if __name__ == "__main__":
    main()
