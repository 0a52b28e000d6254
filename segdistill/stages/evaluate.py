"""Networks on the test split, at the resolution of the labels: accuracy, cost, and pictures."""

import io
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from segdistill.config import config as config_class
from segdistill.data.settings import Scale
from segdistill.engine.settings import InferenceConfig
from segdistill.engine.tracker import Tracker
from segdistill.files import new_folder, read_sealed, read_sealed_json, seal
from segdistill.report.highlights import Highlights, scores_of

if TYPE_CHECKING:
    from segdistill.data.shards import DatasetInfo, ShardDataset
    from segdistill.engine.distributed import Processes
    from segdistill.engine.evaluate import Evaluation
    from segdistill.models.segmenter import Segmenter


AGAIN = "run the stage 'evaluate' again"
COUNTS_LIMIT = 4 * 2**30  # bytes of one network's counts, which grow with the test images


@config_class
class Config:
    """Section ``evaluate`` of params.yaml."""

    inference: InferenceConfig
    # Further columns beside the headline: mirrored views averaged, and several scales with mirrored views averaged.
    flip: bool
    scales: Annotated[list[Scale], Field(max_length=20)]
    # Test images, evenly spread, whose predictions are kept as pictures.
    overlays: Annotated[int, Field(ge=0, le=10_000)]
    # Forward passes of one image, of which the fastest is the latency.
    latency_repeats: Annotated[int, Field(ge=1, le=100_000)]


def run(
    config: Config, *, prepared: Path, model: Path, evaluation: Path, tracker: Tracker, device: str = "auto"
) -> dict[str, float]:
    """Writes ``evaluation``: ``evaluation.json``, confusion counts and overlays of every network in ``model``."""
    from segdistill.data.shards import ShardDataset, read_dataset_info
    from segdistill.engine.distributed import processes as join
    from segdistill.models.export import load_model

    started = time.monotonic()
    info, test_set = read_dataset_info(prepared), ShardDataset(prepared, "test")
    facts = read_sealed_json(model, "metrics.json", mend="run the stage that trains it again")
    models: dict[str, Any] = {}
    names = sorted(facts["students"])  # not what lies there: a network that is gone must not be one that never was
    classes = [item.name for item in info.classes]
    with join(device) as processes:
        # The other ranks count with us and keep nothing.
        place: Any = new_folder(evaluation) if processes.is_main else tempfile.TemporaryDirectory()
        with place as written:
            folder = Path(written)
            for name in names:
                network, document = load_model(model, name, processes.device, classes=classes)
                models[name] = _measure(network, name, test_set, info, config, folder, processes)
                models[name]["weights_sha256"] = document["sha256"]
            report = {
                "models": models, "split": "test", "samples": len(test_set), "classes": classes,
                "data_content": info.content_hash,
            }  # fmt: skip
            (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
            seal(folder)
        if not processes.is_main:
            return {}
    for name in names:
        _track(tracker.child(_run_name(name, names, facts)), name, models[name], evaluation)
    return {"evaluation": time.monotonic() - started}


def _run_name(name: str, names: list[str], facts: dict[str, Any]) -> str:
    """The name of the run that trained this network, so that its test scores stand beside its curves."""
    experiment = facts.get("experiment")
    if experiment is None:
        return name
    return f"{experiment}-s{facts['seed']}" if len(names) == 1 else f"{experiment}.{name}-s{facts['seed']}"


def _measure(
    network: "Segmenter", name: str, test_set: "ShardDataset", info: "DatasetInfo", config: Config, folder: Path,
    processes: "Processes",
) -> dict[str, Any]:  # fmt: skip
    import numpy as np

    from segdistill.engine.evaluate import evaluate
    from segdistill.metrics.confusion import iou
    from segdistill.models.export import count_macs, count_parameters

    def score(**views: Any) -> dict[str, float]:
        found = evaluate(
            network, test_set, config.inference, num_classes=info.num_classes, processes=processes, **views
        )  # fmt: skip
        return {"test/miou": found.miou, "test/pixel_accuracy": found.accuracy}

    network.eval()
    found = evaluate(network, test_set, config.inference, num_classes=info.num_classes, processes=processes)
    np.savez_compressed(
        folder / f"{name}.npz", confusion=found.confusion, per_image=found.per_image, ids=np.array(found.ids)
    )
    _pictures(network, name, test_set, info, found, config, folder, processes)
    height, width = test_set[0][1].shape
    scale = config.inference.input_scale
    size = (round(height * scale), round(width * scale))
    latency = _latency(network, size, config.latency_repeats, processes)
    per_class = [None if np.isnan(value) else float(value) for value in iou(found.confusion)]
    return {
        "test/miou": found.miou,
        "test/pixel_accuracy": found.accuracy,
        "per_class_iou": dict(zip([item.name for item in info.classes], per_class, strict=True)),
        "params": count_parameters(network),
        "macs": count_macs(network, size),
        "latency_ms": 1000 * latency,
        "images_per_second": 1 / latency,
        "input_size": list(size),
        "flip": score(flip=True) if config.flip else None,
        "multi_scale": score(flip=True, scales=config.scales) if config.scales else None,
    }


def _latency(network: "Segmenter", size: tuple[int, int], repeats: int, processes: "Processes") -> float:
    """Seconds of one image's fastest forward pass: slower ones tell what else the machine was doing."""
    import torch

    image = torch.rand((1, 3, *size), device=processes.device)
    wait = torch.cuda.synchronize if processes.device.type == "cuda" else lambda: None
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 3):  # the first ones only warm up
            wait()
            started = time.perf_counter()
            network(image)
            wait()
            times.append(time.perf_counter() - started)
    return min(times[3:])


def _pictures(
    network: "Segmenter", name: str, test_set: "ShardDataset", info: "DatasetInfo", found: "Evaluation",
    config: Config, folder: Path, processes: "Processes",
) -> None:  # fmt: skip
    """The confusion map, and predictions on evenly spread test images: the same ones for every network.

    ``overlays/<name>/<id>.png`` holds class ids, for the comparison; ``pictures/<name>`` is what people look at.
    """
    import numpy as np
    import torch
    from PIL import Image

    from segdistill.engine.evaluate import predict
    from segdistill.report.pictures import confusion_map, overlay

    out, pictures = folder / "overlays" / name, folder / "pictures" / name
    out.mkdir(parents=True)
    pictures.mkdir(parents=True)
    if not processes.is_main:
        return
    confusion_map(found.confusion, [item.name for item in info.classes], pictures / "confusion.png")
    colors = [item.color for item in info.classes]
    chosen: list[int] = np.unique(np.linspace(0, len(test_set) - 1, config.overlays).round().astype(int)).tolist()
    for index in chosen:
        image, label = test_set[index]
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].to(processes.device).float() / 255
        with torch.inference_mode():
            scores = predict(network, pixels, label.shape, config.inference)  # type: ignore[arg-type]
        mask = scores.argmax(1)[0].to(torch.uint8).cpu().numpy()
        file = f"{test_set.sample_id(index)}.png"
        Image.fromarray(mask).save(out / file)
        overlay(image, label, mask, colors).save(pictures / file)


def _track(tracker: Tracker, name: str, result: dict[str, Any], folder: Path) -> None:
    tracker.metrics(
        {
            "test/miou": result["test/miou"],
            "test/pixel_accuracy": result["test/pixel_accuracy"],
            "perf/params": result["params"],
            "perf/macs": result["macs"],
            "perf/latency_ms": result["latency_ms"],
            **{f"test/iou/{key}": value for key, value in result["per_class_iou"].items() if value is not None},
        }
    )
    for column in ("flip", "multi_scale"):
        if result[column]:
            tracker.metrics({f"{key}_{column}": value for key, value in result[column].items()})
    tracker.artifact(folder / "pictures" / name, "pictures")
    tracker.close()


def highlights(paths: Mapping[str, Any]) -> Highlights:
    """Scores and cost, and the confusion matrix; of several networks, that of the best."""
    import numpy as np

    folder = paths["evaluation"]
    networks = read_sealed_json(folder, "evaluation.json", mend=AGAIN)["models"]
    best = max(networks, key=lambda name: networks[name]["test/miou"])
    with np.load(io.BytesIO(read_sealed(folder, f"{best}.npz", mend=AGAIN, limit=COUNTS_LIMIT))) as counted:
        confusion = counted["confusion"].tolist()
    names = ("test/miou", "test/pixel_accuracy", "params", "images_per_second")
    return Highlights(scores_of(networks, names), (list(networks[best]["per_class_iou"]), confusion))
