"""What a training sample costs, step by step, and a training with its data against the same steps without. Markdown.

    python benchmarks/loading.py [--data data --layout folder] [--prepared artifacts/prepared]

On a GPU, at the size that papers use, in some minutes and without a network; the streets are made for it:

    python benchmarks/loading.py --streets 1024 2048 --samples 64 --crop 512 1024 --scale 0.5 2 --workers 8 \
        --params benchmarks/full_size.yaml --precision bf16 --channels-last

In which form to store images of that size, without a GPU, in about five minutes (docs/results/loading.md):

    python benchmarks/loading.py --streets 1024 2048 --samples 24 --crop 512 1024 --scale 0.5 2 --batch 4 \
        --forms original jpeg decoded --rounds 3

With --s3 also from SeaweedFS on this machine, a real S3 server: cold, where every sample is fetched, and warm.

First, the time of a core that each step takes for one sample, beside the steps that it took before: decoding each
time, and torchvision's transforms, sample by sample. Second, experiments of params.yaml: steps on batches as training
gets them, against steps on one batch that is there. Rounds of the two sides alternate. With --forms instead: what
each form of the prepared data costs by step, and samples a second as training gets them, against PyTorch's DataLoader
over the files.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import step
import torch
from _cost import seconds
from _streets import make_data, make_files, prepare_files
from _table import machine, markdown
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from segdistill.config import parse, read_yaml
from segdistill.data import shards as shards_module
from segdistill.data.layouts import IGNORE_INDEX, open_layout
from segdistill.data.loader import Share, training_batches
from segdistill.data.memory import Memory
from segdistill.data.settings import AugmentationConfig
from segdistill.data.shards import ShardDataset, attach, read_dataset_info
from segdistill.data.transforms import Augmentation, cut, jitter
from segdistill.plan import ExperimentConfig

sys.path.append(str(Path(__file__).resolve().parents[1]))
from tests.s3_server import Server, credentials

CPU = torch.device("cpu")


class Files:
    """The plain way: a list of paths, two files opened for each sample."""

    def __init__(self, data: Path, layout: str) -> None:
        opened = open_layout(layout, data)
        self.samples, self.label_map = list(opened.samples("train")), opened.legend.label_map

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        sample = self.samples[index]
        with Image.open(sample.image) as image, Image.open(sample.mask) as mask:
            return np.array(image.convert("RGB")), self.label_map[np.asarray(mask)]

    def size(self, index: int) -> tuple[int, int]:
        with Image.open(self.samples[index].image) as image:
            return image.height, image.width

    def rows(self, index: int, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        image, label = self[index]
        return image[rows], label[rows]


class Plain(Dataset):  # type: ignore[type-arg]
    """What is written first: files, decoded and augmented sample by sample."""

    def __init__(self, files: Files, config: AugmentationConfig) -> None:
        self.files, self.augment = files, by_torchvision(config)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.augment(*self.files[index])


class RandomScale(v2.Transform):
    """Resizes image and mask by one random factor."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = self.low + (self.high - self.low) * torch.rand(()).item()
        return {"size": [max(1, round(side * factor)) for side in v2.query_size(flat_inputs)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Mask):
            return functional.resize(inpt, params["size"], antialias=True)
        exact = InterpolationMode.NEAREST_EXACT
        return tv_tensors.wrap(functional.resize_image(inpt[None], params["size"], exact)[0], like=inpt)


def by_torchvision(config: AugmentationConfig) -> Callable[[np.ndarray, np.ndarray], tuple[Tensor, Tensor]]:
    """Scale, crop, flip and colour of one sample, as it was done before: the image as floats, and its label."""
    strength, fill = config.color_jitter, {tv_tensors.Image: 0, tv_tensors.Mask: IGNORE_INDEX}
    transform = v2.Compose(
        [
            RandomScale(*config.scale),
            v2.RandomCrop(config.crop_size, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(config.flip),
            v2.ColorJitter(brightness=strength, contrast=strength, saturation=strength),
        ]
    )

    def augment(image: np.ndarray, label: np.ndarray) -> tuple[Tensor, Tensor]:
        pair = tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), tv_tensors.Mask(torch.from_numpy(label))
        image, label = (part.as_subclass(Tensor) for part in transform(*pair))
        return image.float().div_(255), label

    return augment


def core_seconds(action: Callable[[], object]) -> float:
    """What a processor core was busy with it: others on the machine cost no time."""
    started = time.process_time()
    action()
    return time.process_time() - started


def costs(given: argparse.Namespace, config: AugmentationConfig) -> list[list[str]]:
    """A row a step: milliseconds a sample, and samples a second."""
    plain, kept = (ShardDataset(given.prepared, "train", memory) for memory in (None, Memory("auto")))
    order = np.random.default_rng(0).permutation(len(plain))[: given.reads].tolist()
    list(kept)  # all are decoded by now
    pairs = [kept[index] for index in order]
    augment, before = Augmentation(config), by_torchvision(config)
    without_colour = Augmentation(parse(AugmentationConfig, vars(config) | {"color_jitter": 0.0}, "augmentation"))
    crops = [augment.draw(label.shape, seed) for seed, (_, label) in enumerate(pairs)]
    samples = [(cut(*pair, crop.window, pinned=False), crop) for pair, crop in zip(pairs, crops, strict=True)]
    batches = [samples[start : start + given.batch] for start in range(0, len(samples), given.batch)]
    images, factors = augment(batches[0], CPU)[0] * 255, torch.tensor([crop.color for _, crop in batches[0]])

    def read(source: Any) -> None:
        for index in order:
            source[index]

    def unverified() -> None:
        with mock.patch.object(shards_module, "sample_hash", lambda image, label: mock.ANY):
            read(plain)

    def train_on(source: ShardDataset) -> Callable[[], object]:
        share = Share(given.batch)
        batches = training_batches(source, config, seed=0, share=share, first_iteration=0, workers=0)
        return lambda: list(islice(batches, -(-len(order) // given.batch)))

    actions: dict[str, Callable[[], object]] = {}
    if given.data.exists():
        files = Files(given.data, given.layout)
        assert all(np.array_equal(*both) for both in zip(plain[0], files[0], strict=True)), "they read the same"
        actions["read and decode: two files"] = lambda: read(files)
    actions |= {
        "read and decode: a shard": lambda: read(plain),
        "the same, not verified": unverified,
        "read what is kept": lambda: read(kept),
        "augment: torchvision, sample by sample": lambda: [before(*pair) for pair in pairs],
        "draw, and cut the window out": lambda: [
            cut(*pair, augment.draw(pair[1].shape, seed).window, pinned=False) for seed, pair in enumerate(pairs)
        ],
        "scale and flip a batch": lambda: [without_colour(batch, CPU) for batch in batches],
        "its colours": lambda: [jitter(images, factors) for _ in batches],
        "whole, before": lambda: [before(*plain[index]) for index in order],
        "whole, nothing kept": train_on(plain),
        "whole": train_on(kept),
    }
    for action in actions.values():
        action()
    rounds = [[core_seconds(action) / len(order) for action in actions.values()] for _ in range(given.rounds)]
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    earlier = list(actions).index("whole, before")
    ratios = [statistics.median(row[earlier] / row[number] for row in rounds) for number in range(len(actions))]
    return [
        [name, f"{1000 * one:.2f}", f"{1 / one:.0f}", f"{ratio:.2f}" if name.startswith("whole") else ""]
        for name, one, ratio in zip(actions, medians, ratios, strict=True)
    ]


class Side(NamedTuple):
    """One way to get batches."""

    name: str
    size: int  # bytes on the disk
    step: Callable[[int], object]  # of what differs between the sides: reading a sample
    batches: Callable[[int], Iterator[object]]  # without end, with so many workers


def sides(given: argparse.Namespace, config: AugmentationConfig, folder: Path, server: Server | None) -> list[Side]:
    """The files, in the plain way and in ours, and each form of the prepared data."""
    data = make_files(folder / "data", given.streets, given.samples)
    files, augment = Files(data, "folder"), Augmentation(config)
    plain = Plain(files, config)

    def by_loader(workers: int) -> Iterator[object]:
        sampler = RandomSampler(plain, replacement=True, num_samples=10**6)
        return iter(DataLoader(plain, given.batch, sampler=sampler, num_workers=workers))

    def ours(source: Any) -> Callable[[int], Iterator[object]]:
        share = Share(given.batch)
        return lambda workers: training_batches(
            source, config, seed=0, share=share, first_iteration=0, workers=workers, device=torch.device(given.device)
        )

    def read(source: Any) -> Callable[[int], object]:
        return lambda index: source.rows(index, augment.draw(source.size(index), index).window[0])

    size = sum(path.stat().st_size for path in data.glob("*/train/*"))
    found = [
        Side("files, DataLoader and torchvision", size, files.__getitem__, by_loader),
        Side("files, our augmentation", size, read(files), ours(files)),
    ]
    for form in given.forms:
        source = ShardDataset(prepare_files(data, folder / form, images=form), "train")
        size = sum(path.stat().st_size for path in (folder / form / "shards").glob("train-*"))
        found.append(Side(f"shards, {form}", size, read(source), ours(source)))
        if server:
            for name, remote in from_s3(server, folder, form):
                found.append(Side(f"shards, {form}, {name}", size, read(remote), ours(remote)))
    return found


def from_s3(server: Server, folder: Path, form: str) -> Iterator[tuple[str, ShardDataset]]:
    """The same data in the server: with no room in the cache, and with all samples in it."""
    server.client().create_bucket(Bucket=form)
    for path in (folder / form).rglob("*.*"):
        server.client().upload_file(str(path), form, path.relative_to(folder).as_posix())
    attach(f"s3://{form}/{form}", folder / f"attached-{form}")
    for name, gibibytes in (("S3, cold", "0"), ("S3, warm", "64")):
        os.environ |= {"SEGDISTILL_CACHE": str(folder / "cache"), "SEGDISTILL_CACHE_GIB": gibibytes}
        source = ShardDataset(folder / f"attached-{form}", "train")
        for index in range(len(source) if name == "S3, warm" else 0):
            source[index]
        yield name, source


@contextlib.contextmanager
def s3_server(wanted: bool, folder: Path) -> Iterator[Server | None]:
    """A server that is there meanwhile, named by the environment."""
    if not wanted:
        yield None
        return
    (folder / "s3").mkdir()
    server = Server(folder / "s3")
    os.environ |= {"AWS_ENDPOINT_URL_S3": server.endpoint, "AWS_REGION": "us-east-1", **credentials()}
    try:
        server.start()
        yield server
    finally:
        server.stop()


def rate(side: Side, workers: int, given: argparse.Namespace) -> float:
    """Samples a second, once what was read ahead at the start is used up."""
    batches = side.batches(workers)
    for _ in range(2 * workers + 1):
        next(batches)
    count = -(-given.reads // given.batch)
    passed = seconds(lambda: list(islice(batches, count)), torch.device(given.device))
    return count * given.batch / passed


def forms(given: argparse.Namespace, config: AugmentationConfig, folder: Path) -> None:
    """Prints what each form costs by step, and how many samples come in a second."""
    with s3_server(given.s3, folder) as server:
        compare_forms(sides(given, config, folder, server), given, config, folder)


def compare_forms(ways: list[Side], given: argparse.Namespace, config: AugmentationConfig, folder: Path) -> None:
    augment, torchvision = Augmentation(config), by_torchvision(config)
    files = Files(folder / "data", "folder")
    numbers = [number % given.samples for number in range(given.reads)]
    pairs = [files[index] for index in range(min(8, given.samples))]
    crops = [augment.draw(label.shape, seed) for seed, (_, label) in enumerate(pairs)]
    windows = [(cut(*pair, crop.window, pinned=False), crop) for pair, crop in zip(pairs, crops, strict=True)]
    steps: dict[str, tuple[Callable[[], object], int]] = {
        f"{way.name}: read and decode": (lambda way=way: [way.step(index) for index in numbers], len(numbers))
        for way in ways
        if way.name != "files, our augmentation"
    }
    steps["augment: torchvision, the whole image"] = (lambda: [torchvision(*pair) for pair in pairs], len(pairs))
    steps["cut the window out"] = (
        lambda: [cut(*pair, crop.window, pinned=False) for pair, crop in zip(pairs, crops, strict=True)], len(pairs)
    )  # fmt: skip
    steps["augment: scale, flip and colour the window"] = (lambda: augment(windows, CPU), len(windows))
    costs = [[core_seconds(action) / count for action, count in steps.values()] for _ in range(given.rounds)]
    medians = [1000 * statistics.median(column) for column in zip(*costs, strict=True)]
    costed = [[name, f"{cost:.1f}"] for name, cost in zip(steps, medians, strict=True)]
    print(markdown(["step", "ms of a core, a sample"], costed))
    headers = ["data", "MiB a sample", *(f"{count} workers, samples/s (ratio)" for count in given.worker_counts)]
    rows = [[way.name, f"{way.size / given.samples / 2**20:.2f}"] for way in ways]
    for workers in given.worker_counts:
        rounds = [[rate(way, workers, given) for way in ways] for _ in range(given.rounds)]
        for number, row in enumerate(rows):
            ratio = statistics.median(rates[number] / rates[0] for rates in rounds)
            row.append(f"{statistics.median(rates[number] for rates in rounds):.1f} ({ratio:.2f})")
            print(*row, file=sys.stderr, flush=True)
    print(f"\nOn {given.device}, batch {given.batch}; ratio to the first row, median of {given.rounds} rounds.\n")
    print(markdown(headers, rows))


def end_to_end(given: argparse.Namespace, config: AugmentationConfig, name: str) -> list[str]:
    """One row: an experiment's steps with their data against the same steps on a batch that is there."""
    torch.manual_seed(0)
    params, device = read_yaml(given.params), torch.device(given.device)
    layout = torch.channels_last if given.channels_last else torch.contiguous_format
    settings = parse(ExperimentConfig, params["experiments"][name], f"experiments.{name}")
    learner, teacher = step.build(params, name, settings, read_dataset_info(given.prepared).num_classes)
    for module in (learner, *([teacher] if teacher else [])):
        module.to(device, memory_format=layout)  # type: ignore[call-overload]
    optimizers = step.optimizers_of(learner, settings)
    source = ShardDataset(given.prepared, "train", Memory(given.cache))
    loaded = training_batches(
        source, config, seed=0, share=Share(given.batch), first_iteration=0, workers=given.workers, device=device
    )
    there = next(loaded)
    if given.cache == "auto":
        list(source)

    def train(batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        for images, labels in islice(batches, given.steps):
            images = images.contiguous(memory_format=layout)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=given.precision == "bf16"):
                terms = learner(images, labels.long(), None, teacher(images) if teacher else None)
            learner.total(terms).backward()
            for optimizer in optimizers:
                optimizer.step()

    fixed = (there for _ in count())
    train(loaded), train(fixed)
    rounds = [
        [given.batch * given.steps / seconds(lambda side=side: train(side), device) for side in (fixed, loaded)]
        for _ in range(given.rounds)
    ]
    rates = [f"{statistics.median(column):.1f}" for column in zip(*rounds, strict=True)]
    print(name, *rates, file=sys.stderr, flush=True)
    return [name, *rates, f"{statistics.median(with_data / without for without, with_data in rounds):.2f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--layout", default="folder")
    parser.add_argument("--prepared", type=Path, default=Path("artifacts/prepared"))
    parser.add_argument("--streets", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="make data of this size")
    parser.add_argument("--samples", type=int, default=64, help="of the streets that are made")
    parser.add_argument("--forms", nargs="+", choices=["original", "jpeg", "decoded"], help="of prepare.images")
    parser.add_argument("--s3", action="store_true", help="with --forms: also from an S3 server on this machine")
    parser.add_argument("--worker-counts", type=int, nargs="+", default=[0, 1, 2], help="with --forms")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--experiments", nargs="*", default=["none"])
    parser.add_argument("--crop", type=int, nargs=2, default=(96, 128), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--scale", type=float, nargs=2, default=(0.8, 1.5), metavar=("LOW", "HIGH"))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cache", type=lambda text: text if text == "auto" else float(text), default="auto")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--reads", type=int, default=200, help="samples that each step is timed with")
    parser.add_argument("--steps", type=int, default=20, help="training steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args(arguments)
    if given.forms and not given.streets:
        parser.error("--forms needs --streets")
    with tempfile.TemporaryDirectory() as folder:
        if given.streets and not given.forms:
            given.prepared, given.data = make_data(Path(folder), given.streets, given.samples), Path(folder) / "data"
        strengths = {"flip": 0.5, "color_jitter": 0.2}
        config = parse(AugmentationConfig, {"crop_size": given.crop, "scale": given.scale, **strengths}, "augmentation")
        height, width = given.streets if given.forms else ShardDataset(given.prepared, "train").size(0)
        print(
            f"Samples of {width}x{height}, crops of {given.crop[1]}x{given.crop[0]}, scale {given.scale[0]:g} to "
            f"{given.scale[1]:g}, flip, jitter; files in the page cache. {machine(['torch', 'pillow'])}\n"
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        if given.forms:
            forms(given, config, Path(folder))
            return
        print(markdown(["step", "ms of a core", "samples/s of a core", "ratio to before"], costs(given, config)))
        torch.set_num_threads(threads)
        rows = [end_to_end(given, config, name) for name in given.experiments]
    kept = "all samples kept" if given.cache == "auto" else f"{given.cache:g} GiB of samples kept"
    print(f"\nTraining on {given.device}, batch {given.batch}, {given.precision}, {given.workers} workers, {kept}.\n")
    print(markdown(["experiment", "images/s on a fixed batch", "with its data", "ratio (median of rounds)"], rows))


if __name__ == "__main__":
    main()
