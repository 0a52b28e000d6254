"""Controls: what each method can teach, and what it does when there is nothing to learn. Prints Markdown.

    python benchmarks/controls.py --results controls.jsonl [--part positive alone negative parts cause gradients]
    python benchmarks/controls.py --results controls.jsonl --print

A run adds a line of JSON for every student that it has trained to ``--results`` and leaves out what is there;
``--print`` makes the tables of what is there. ``--networks small`` are three small CNNs of our own, minutes on two
cores; the one that is called vit trains with AdamW as a ViT does, and hfd_bsd, whose default needs a ViT's layers, then
runs with ``hfd: direct``. With real networks, bigger, on a GPU:

    python benchmarks/controls.py --results controls.jsonl --networks real --device cuda --size 192 256 --images 960 \
        --iterations 2000 --teacher-iterations 4000 --batch-size 16 --precision bf16

Students have the first tenth of the images (``--images``) with labels. The good teacher (CNN, UPerNet over ResNet-18)
and the good peers (trained alone) had all of them and more iterations. All offline trainings of a seed with one teacher
are one cohort. Scores are points of validation mIoU (``none``'s own, and the others' gain over it).

* *positive*: cross-entropy and the method, good teacher. Online: the peer is good from the start and held (learning
  rate 1e-12), or trains on (``free``). A method that is right gains.
* *alone*: the method without cross-entropy, from random weights. Beside mIoU a linear probe: ridge regression from
  the feature where the method acts to the classes, fitted on the student's training images.
* *negative*: cross-entropy and the method; a teacher with random weights, or a good one whose classes are permuted;
  online a held peer of random weights, or a good one with classes permuted. A gain over ``none`` would be one of
  regularisation.
* *parts*: the positive case with each term of a method alone and with each left out.
* *cause*: two peers that both begin at random, as an experiment has them, against the same two undistilled: which part
  of hfd_bsd and dml costs what.
* *gradients*: of two such peers under hfd_bsd, the norm of each term's gradient on the encoder's weights over that of
  the cross-entropy, and its cosine with it: what takes the encoder along, and what pulls it elsewhere.

What each term can teach by itself, stated before anything was run ("names": whether a student with random weights can
name classes after it; probe: whether its features should tell classes apart better than random ones):

=================== ===== ===== ==============================================================================
term                names probe why
=================== ===== ===== ==============================================================================
kd, dist, dkd, dml  yes   yes   the teacher's distribution over classes at every pixel
kdcl                yes   yes   the same, of an ensemble in which the better peer weighs more
cwd (logits)        part  yes   where each class is strongest; says nothing of classes against each other
apd global          yes   yes   as kd
apd local           no    yes   pixels against class means of their own features: no classifier gets a gradient
apd prototype       no    part  directions of class means alone
c2vkd pdd           part  yes   the labelled class against the rest, but vanishing where badly wrong (its docstring)
c2vkd visual, patch no    yes   features; no gradient reaches the decoder
c2vkd linguistic    no    part  one vector an image: what is in it, not where
fitnet, at, ifvd,   no    yes   features; no gradient reaches the classifier
mgd
skd, cirkd          no    part  relations and a critic; their papers' pixel-wise term is here a kd beside them (the
                                first version of this table counted it in, and was refuted: alone they are at chance)
hfd                 no    part  the other network's first stage: edges and colours, no classes
region BSD          no    yes   last features; no gradient reaches the classifier
pixel BSD           yes   yes   distributions, where the peer is the better one
=================== ===== ===== ==============================================================================
"""

import argparse
import functools
import itertools
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _permuted import Permuted
from _table import machine, markdown
from torch import Tensor, nn

from segdistill import streets
from segdistill.config import parse
from segdistill.data.shards import ShardDataset, read_dataset_info
from segdistill.engine.cohort import Cohort
from segdistill.engine.distributed import Processes
from segdistill.engine.learner import Learner
from segdistill.engine.settings import InferenceConfig, OptimizerConfig, TrainConfig
from segdistill.engine.tracker import Tracker
from segdistill.engine.trainer import Result, Trainer, Training
from segdistill.methods import build_offline, build_online, parse_method
from segdistill.metrics.confusion import mean_iou
from segdistill.models.config import ModelConfig
from segdistill.models.outputs import ModelInfo, Outputs
from segdistill.models.segmenter import Segmenter, build_segmenter
from segdistill.models.teacher import Teacher
from segdistill.stages import prepare

POLY = {"name": "poly", "power": 0.9, "warmup_fraction": 0.05}
CNN: dict[str, Any] = {
    "model": {
        "architecture": "DeepLabV3Plus", "encoder": "mobilenetv3_small_050", "encoder_weights": "none",
        "output_stride": 16, "decoder": {"decoder_channels": 64},
    },
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, "schedule": POLY},
}  # fmt: skip
VIT: dict[str, Any] = {
    "model": {
        "architecture": "Segformer", "encoder": "mit_b0", "encoder_weights": "none", "output_stride": 32,
        "decoder": {"decoder_segmentation_channels": 64},
    },
    "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.01, "schedule": POLY},
}  # fmt: skip
TEACHER: dict[str, Any] = {
    "model": {
        "architecture": "UPerNet", "encoder": "resnet18", "encoder_weights": "none", "output_stride": 32,
        "decoder": {"decoder_channels": 64},
    },
    "optimizer": {"name": "adamw", "lr": 1e-3, "decoder_multiplier": 1.0, "schedule": POLY},
}  # fmt: skip
# Ten times as fast as the real ones, and as like them as needs be.
SMALL = {
    "cnn": {**CNN, "width": 16}, "vit": {**VIT, "width": 20, "optimizer": {**VIT["optimizer"], "lr": 3e-3}},
    "teacher": {**TEACHER, "width": 48, "optimizer": {**TEACHER["optimizer"], "lr": 3e-3}},
}  # fmt: skip
REAL = {"cnn": CNN, "vit": VIT, "teacher": TEACHER}
GRADIENTS_AT = (0, 5, 20, 60)
HELD = {"name": "sgd", "lr": 1e-12, "momentum": 0.0, "weight_decay": 0.0}
INFERENCE = {"batch_size": 8, "input_scale": 1.0, "window": None, "window_stride": 0.67}

PARTS = ("positive", "alone", "negative", "parts", "cause", "gradients")

APD: dict[str, Any] = {"name": "apd", "hidden_channels": 128, "out_channels": 128}
METHODS: dict[str, dict[str, Any]] = {
    "kd": {"name": "kd"},
    "cwd": {"name": "cwd"},
    "dist": {"name": "dist"},
    "dkd": {"name": "dkd"},
    "apd": APD,
    "c2vkd": {"name": "c2vkd"},
    "fitnet": {"name": "fitnet"},
    "at": {"name": "at"},
    "ifvd": {"name": "ifvd"},
    "mgd": {"name": "mgd"},
    "skd": {"name": "skd"},
    "cirkd": {"name": "cirkd"},
    "dml": {"name": "dml"},
    "kdcl": {"name": "kdcl"},
    "hfd_bsd": {"name": "hfd_bsd"},
}
ONLINE = ("dml", "kdcl", "hfd_bsd")
TERMS = {
    "apd": ("global", "local", "prototype"),
    "c2vkd": ("visual", "patch", "linguistic", "pdd"),
    "hfd_bsd": ("hfd", "region", "pixel"),
}
# Where the linear probe reads, of methods and terms that act on features.
TAPS = {"c2vkd": "stage4", "fitnet": "stage4", "at": "stage4", "mgd": "stage4", "hfd": "stage1"}


@dataclass(frozen=True)
class Case:
    """A training: cross-entropy (or not) and perhaps a method, with whom it learns from."""

    part: str
    name: str
    student: str = "cnn"
    method: Mapping[str, Any] | None = None
    source: str = ""  # good, random or permuted: a teacher, or online a peer; "" for none
    held: bool = True  # online: the peer does not move
    supervised: float = 1.0
    tap: str = ""  # where to probe
    changes: Mapping[str, Any] = field(default_factory=dict)  # of the students' learning rates, by student

    @property
    def online(self) -> bool:
        return self.method is not None and self.method["name"] in ONLINE


def without(method: Mapping[str, Any], name: str, *, only: bool) -> dict[str, Any]:
    """A method with one term alone, or with all but that one."""
    off = [term for term in TERMS[method["name"]] if (term != name) == only]
    return {**method, **{f"{term}_weight": 0.0 for term in off}}


def student_of(method: str) -> str:
    return "vit" if method == "c2vkd" else "cnn"


def cases(part: str) -> list[Case]:
    """The trainings of a part; ``none`` of both students is in each."""
    listed = [Case(part, "none", student) for student in ("cnn", "vit")]
    if part == "positive":
        for name, method in METHODS.items():
            listed.append(Case(part, name, student_of(name), method, "good"))
            if name in ONLINE:
                listed.append(Case(part, f"{name} (free peer)", "cnn", method, "good", held=False))
    elif part == "alone":
        for name, method in METHODS.items():
            tap = TAPS.get(name, "last_feature")
            listed.append(Case(part, name, student_of(name), method, "good", supervised=0.0, tap=tap))
            for term in TERMS.get(name, ()):
                own, place = without(method, term, only=True), TAPS.get(term, tap)
                listed.append(Case(part, f"{name}: {term}", student_of(name), own, "good", supervised=0.0, tap=place))
        listed += [  # what a probe finds in features that nothing has trained
            Case(part, f"random weights, {tap}", student, None, supervised=0.0, tap=tap)
            for student in ("cnn", "vit")
            for tap in ("stage1", "stage4", "last_feature")
        ]
    elif part == "negative":
        unselective = {"name": "hfd_bsd", "hfd_weight": 0.0, "selection": False}
        selective = {"name": "hfd_bsd", "hfd_weight": 0.0}
        methods = METHODS | {"hfd_bsd: BSD": selective, "hfd_bsd: BSD, no selection": unselective}
        methods |= {"hfd_bsd: pixel": without(METHODS["hfd_bsd"], "pixel", only=True)}
        for source in ("random", "permuted"):
            for name, method in methods.items():
                listed.append(Case(part, name, student_of(name), method, source))
            listed.append(Case(part, "kd", "vit", METHODS["kd"], source))
    elif part == "parts":
        for name, terms in TERMS.items():
            listed.append(Case(part, name, student_of(name), METHODS[name], "good"))
            for term in terms:
                for only in (True, False):
                    own = without(METHODS[name], term, only=only)
                    label = f"{name}: {term} alone" if only else f"{name}: without {term}"
                    listed.append(Case(part, label, student_of(name), own, "good"))
    elif part == "cause":
        listed += cause()
    else:
        raise ValueError(part)
    return listed


def cause() -> list[Case]:
    """Peers that both begin at random, and what may be wrong with them, in the order of suspicion."""
    full: dict[str, Any] = {"name": "hfd_bsd"}
    pixel, region, hfd = (without(full, term, only=True) for term in ("pixel", "region", "hfd"))
    variants: dict[str, dict[str, Any]] = {
        "hfd_bsd": full,
        "hfd_bsd, 5 to 30 % of the gradient": {**full, "hfd_weight": 0.1, "region_weight": 0.3, "pixel_weight": 0.3},
        "hfd_bsd: pixel alone": pixel,
        "hfd_bsd: region alone": region,
        "hfd_bsd: hfd alone": hfd,
        "hfd_bsd, a tenth of the weight": {**full, "weight": 0.1},
        "hfd_bsd, ramp over the whole run": {**full, "ramp": 1.0},
        "hfd_bsd, normalize: all": {**full, "normalize": "all"},
        "hfd_bsd: pixel alone, normalize: all": {**pixel, "normalize": "all"},
        "hfd_bsd: region alone, normalize: all": {**region, "normalize": "all"},
        "hfd_bsd: hfd alone, direct": {**hfd, "hfd": "direct"},
        "hfd_bsd: hfd alone, a tenth": {**hfd, "weight": 0.1},
        "hfd_bsd: pixel alone, no selection": {**pixel, "selection": False},
        "dml": {"name": "dml"},
        "dml, a tenth of the weight": {"name": "dml", "weight": 0.1},
        "dml, ramp over the whole run": {"name": "dml", "ramp": 1.0},
    }
    listed = [Case("cause", name, "both", method) for name, method in variants.items()]
    halved = {"cnn": 0.5, "vit": 0.5}
    listed += [
        Case("cause", "none, half the learning rate", student, None, changes=halved) for student in ("cnn", "vit")
    ]
    listed.append(Case("cause", "hfd_bsd, half the learning rate", "both", full, changes=halved))
    return listed


class Memory:
    """Decoded samples of a split, the first so many."""

    def __init__(self, split: ShardDataset, count: int | None = None) -> None:
        self.samples = [split[index] for index in range(len(split) if count is None else count)]
        self.ids = [split.sample_id(index) for index in range(len(self.samples))]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.samples[index]

    def rows(self, index: int, rows: slice) -> tuple[Any, Any]:
        image, label = self.samples[index]
        return image[rows], label[rows]

    def size(self, index: int) -> tuple[int, int]:
        return self.samples[index][1].shape

    def sample_id(self, index: int) -> str:
        return self.ids[index]


class SmallSegmenter(nn.Module):
    """Four stages at strides 2 to 16 and a decoder that adds them at stride 4.

    Args:
        width: channels of the first stage; the last has twice as many.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        widths = (width, width, width * 3 // 2, width * 2)
        self.stages = nn.ModuleList(
            _convolution(before, after, stride=2) for before, after in zip((3, *widths), widths, strict=False)
        )
        self.sides = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in widths[1:])
        self.decoder = _convolution(width, width, stride=1)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.info = ModelInfo(num_classes, widths, (2, 4, 8, 16), width, 4, 4, "cnn")

    def forward(self, images: Tensor) -> Outputs:
        features, feature = [], images - 0.5
        for stage in self.stages:
            feature = stage(feature)
            features.append(feature)
        size = features[1].shape[-2:]
        sides = [side(each) for side, each in zip(self.sides, features[1:], strict=True)]
        last = self.decoder(
            torch.stack([nn.functional.interpolate(side, size=size, mode="bilinear") for side in sides]).sum(0)
        )
        return Outputs(self.classifier(last), tuple(features), last)

    def logits(self, images: Tensor) -> Tensor:
        return self(images).logits

    def encoder_parameters(self) -> Iterator[nn.Parameter]:
        return self.stages.parameters()

    def decoder_parameters(self) -> Iterator[nn.Parameter]:
        return itertools.chain(self.sides.parameters(), self.decoder.parameters(), self.classifier.parameters())


def _convolution(before: int, after: int, *, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )


class Laboratory:
    """The data, the good networks, and one cohort after another."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.recipes: Mapping[str, Mapping[str, Any]] = SMALL if given.networks == "small" else REAL
        self.device = torch.device(given.device)
        height, width = given.size
        if not (folder / "prepared").is_dir():
            samples = {"train": given.images, "val": given.val_images, "test": 1}
            streets.write(folder / "data", size=(width, height), samples=samples)
            (folder / "summary.json").write_text('{"success": true, "layout": "folder"}')
            settings = {"layout": "folder", "shard_samples": 256, "max_side": None, "workers": 1}
            config = parse(prepare.Config, settings, "prepare")
            prepare.run(config, data=folder / "data", report=folder, prepared=folder / "prepared", tracker=Tracker())
        self.classes = len(read_dataset_info(folder / "prepared").classes)
        train = ShardDataset(folder / "prepared", "train")
        self.all_labels: Any = Memory(train)
        self.few_labels: Any = Memory(train, max(1, given.images // 10))
        self.val: Any = Memory(ShardDataset(folder / "prepared", "val"))

    # -- trainings ----------------------------------------------------------------------------------------------------

    def settings(self, iterations: int) -> TrainConfig:
        given = self.given
        augmentation = {"crop_size": given.size, "scale": (0.8, 1.5), "flip": 0.5, "color_jitter": 0.2}
        return parse(TrainConfig, {
            "iterations": iterations, "seconds": None, "batch_size": given.batch_size, "accumulate": 1,
            "augmentation": augmentation, "precision": given.precision, "channels_last": False, "compile": False,
            "max_grad_norm": None, "workers": given.workers, "cache_gib": 0, "log_every": 10,
            "validate_every": 10**6, "checkpoint_every": 10**6, "gradient_share_every": 0, "select": "last",
        }, "train")  # fmt: skip

    def train(
        self, trainings: Sequence[Training], data: Any, teacher: Teacher | None, iterations: int, seed: int
    ) -> dict[str, Any]:
        cohort = Cohort(
            trainings, data, self.val, self.settings(iterations), inference=parse(InferenceConfig, INFERENCE, ""),
            seed=seed, teacher=teacher, processes=Processes(0, 1, self.device),
        )  # fmt: skip
        return cohort.run()

    @functools.cached_property
    def good(self) -> dict[str, Segmenter]:
        """A teacher, a CNN and a ViT that were trained alone on all labels."""
        path = self.folder / "good.pt"
        with tempfile.TemporaryDirectory() as work:
            trainings = [
                self.training(name, {name: recipe}, (), Path(work), seed=100) for name, recipe in self.recipes.items()
            ]
            networks = {each.name: each.learner.students[each.name] for each in trainings}
            if path.exists():
                states = torch.load(path, weights_only=True)
                for name, network in networks.items():
                    network.load_state_dict(states[name])
            else:
                outcomes = self.train(trainings, self.all_labels, None, self.given.teacher_iterations, seed=100)
                scores = {name: outcome.evaluations[name].miou for name, outcome in outcomes.items()}
                torch.save({name: network.state_dict() for name, network in networks.items()}, path)
                (self.folder / "good.json").write_text(json.dumps(scores))
        return networks

    def training(
        self, name: str, students: Mapping[str, Any], methods: Sequence[Any], work: Path, *, seed: int,
        teacher: Teacher | None = None, supervised: float = 1.0,
    ) -> Training:  # fmt: skip
        torch.manual_seed(seed)
        networks = {student: self.network(recipe) for student, recipe in students.items()}
        infos = {student: network.info for student, network in networks.items()}
        configs = [parse_method(dict(method), name)[1] for method in methods]
        built: Mapping[str, Any] = {}
        if teacher is not None:
            built = build_offline(configs, next(iter(infos.values())), teacher.info)
        elif configs:
            built = build_online(configs, infos)
        optimizers: dict[str, Any] = {
            student: parse(OptimizerConfig, recipe["optimizer"], name)  # type: ignore[arg-type]
            for student, recipe in students.items()
        }
        learner = Learner(networks, built, supervised=supervised)
        return Training(name, learner, optimizers, "", work / name, dict.fromkeys(students, Tracker()))

    def network(self, recipe: Mapping[str, Any]) -> Segmenter:
        if self.given.networks == "small":
            return SmallSegmenter(recipe["width"], self.classes)  # type: ignore[return-value]
        model: Any = parse(ModelConfig, recipe["model"], "model")
        return build_segmenter(model, self.classes)

    def teacher(self, source: str) -> Teacher:
        if source == "random":
            torch.manual_seed(99)
            return Teacher(self.network(self.recipes["teacher"]))
        network = self.good["teacher"]
        return Teacher(Permuted(network) if source == "permuted" else network)  # type: ignore[arg-type]

    def run(self, group: Sequence[Case], seed: int) -> Iterator[dict[str, Any]]:
        """Trains cases that share a source as one cohort; gives what is known of each student."""
        source = group[0].source if not group[0].online else ""
        teacher = self.teacher(source) if source else None
        with tempfile.TemporaryDirectory() as work:
            made = [self.of_case(f"{number}", case, Path(work), seed, teacher) for number, case in enumerate(group)]
            trained = [each for each, case in zip(made, group, strict=True) if case.method or case.supervised]
            outcomes = self.train(trained, self.few_labels, teacher, self.given.iterations, seed) if trained else {}
        for case, training in zip(group, made, strict=True):
            outcome = outcomes.get(training.name)
            learners = ("cnn", "vit") if case.student == "both" else (case.student,)
            for student in learners:
                record = {"part": case.part, "name": case.name, "student": student, "source": case.source, "seed": seed}
                if isinstance(outcome, Result):
                    confusion = outcome.evaluations[student].confusion
                    record["miou"] = mean_iou(confusion)
                    record["permuted_miou"] = mean_iou(np.roll(confusion, 1, axis=0))  # truth called by the next name
                elif outcome is not None:
                    record["ended"] = str(outcome)
                if case.tap:
                    record["probe"] = self.probe(training.learner.students[student], case.tap)
                yield record

    def of_case(self, name: str, case: Case, work: Path, seed: int, teacher: Teacher | None) -> Training:
        both = case.online or case.student == "both"
        names = ("cnn", "vit") if both else (case.student,)
        students = {
            key: {**recipe, "optimizer": {**recipe["optimizer"], "lr": recipe["optimizer"]["lr"] * factor}}
            for key in names
            for recipe, factor in [(self.recipes[key], case.changes.get(key, 1.0))]
        }
        peer = "vit" if case.student == "cnn" else "cnn"
        if case.online and case.source and case.held:
            students[peer] = {**students[peer], "optimizer": HELD}
        methods = [self.fitting(case.method)] if case.method else []
        own = teacher if case.method and not case.online else None
        training = self.training(
            name, students, methods, work, seed=seed, teacher=own, supervised=case.supervised
        )  # fmt: skip
        if case.online and case.source in ("good", "permuted"):
            network = training.learner.students[peer]
            network.load_state_dict(self.good[peer].state_dict())
            if case.source == "permuted":
                roll_classes(network)
        return training

    def fitting(self, method: Mapping[str, Any]) -> dict[str, Any]:
        """A method without what the small networks lack: attention and MLP of a first stage."""
        lacking = method["name"] == "hfd_bsd" and self.given.networks == "small"
        return {**method, "hfd": "direct"} if lacking else dict(method)

    def gradients(self, seed: int) -> Iterator[dict[str, Any]]:
        """Each term's gradient on the encoder beside the cross-entropy's, early in the training of two peers."""
        with tempfile.TemporaryDirectory() as work:
            case = Case("gradients", "hfd_bsd", "both", METHODS["hfd_bsd"])
            trainer = Trainer(
                self.of_case("0", case, Path(work), seed, None), self.settings(self.given.iterations), seed=seed,
                processes=Processes(0, 1, self.device),
            )  # fmt: skip
        learner, generator = trainer.learner, np.random.default_rng(seed)
        for iteration in range(max(GRADIENTS_AT) + 1):
            samples = [self.few_labels[index] for index in generator.choice(len(self.few_labels), 8)]
            images = torch.stack([torch.as_tensor(image).permute(2, 0, 1).float() / 255 for image, _ in samples])
            labels = torch.stack([torch.as_tensor(np.asarray(label)).long() for _, label in samples])
            images, labels = images.to(self.device), labels.to(self.device)
            if iteration in GRADIENTS_AT:
                for student, losses in learner(images, labels).items():
                    weights = list(learner.students[student].encoder_parameters())
                    flat = {term: flat_gradient(loss, weights) for term, loss in losses.items()}
                    for term, gradient in flat.items():
                        yield {
                            "part": "gradients", "name": term, "student": student, "source": str(iteration),
                            "seed": seed, "size": float(gradient.norm() / flat["ce"].norm()),
                            "cosine": float(nn.functional.cosine_similarity(gradient, flat["ce"], dim=0)),
                        }  # fmt: skip
            trainer.learn(images, labels, None, None, last=True)
            trainer.step()

    @torch.no_grad()
    def probe(self, network: Segmenter, tap: str) -> float:
        """Validation mIoU of a ridge regression from a feature to the classes."""
        network.eval()
        size = tuple(length // 4 for length in self.given.size)

        def rows(data: Any) -> Iterator[tuple[Tensor, Tensor]]:
            for index in range(len(data)):
                image, label = data[index]
                pixels = torch.as_tensor(image).permute(2, 0, 1)[None].float().to(self.device) / 255
                feature = network(pixels).tap(tap).float()  # type: ignore[arg-type]
                feature = nn.functional.interpolate(feature, size=size, mode="bilinear", align_corners=False)
                wanted = torch.as_tensor(np.asarray(label))[None, None].float().to(self.device)
                wanted = nn.functional.interpolate(wanted, size=size, mode="nearest")
                vectors = feature[0].flatten(1).mT.double()
                yield torch.cat([vectors, torch.ones_like(vectors[:, :1])], 1), wanted.flatten().long()

        gram, moment = 0.0, 0.0
        for vectors, labels in rows(self.few_labels):
            kept = labels < self.classes
            ones = nn.functional.one_hot(labels[kept], self.classes).double()
            gram, moment = gram + vectors[kept].mT @ vectors[kept], moment + vectors[kept].mT @ ones
        eye = torch.eye(len(gram), dtype=torch.double, device=self.device)  # type: ignore[arg-type]
        weights = torch.linalg.solve(gram + 1e-3 * gram.diagonal().mean() * eye, moment)  # type: ignore[attr-defined]
        confusion = np.zeros((self.classes, self.classes), dtype=np.int64)
        for vectors, labels in rows(self.val):
            kept = labels < self.classes
            guess = (vectors[kept] @ weights).argmax(1)
            np.add.at(confusion, (labels[kept].cpu().numpy(), guess.cpu().numpy()), 1)
        return mean_iou(confusion)


def flat_gradient(loss: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The gradient on all weights as one vector; 0 where the loss does not reach."""
    gradients = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def roll_classes(network: Segmenter) -> None:
    """Permutes the last classifier's classes as :class:`Permuted` does."""
    (classifier,) = [
        module for module in network.modules()
        if isinstance(module, nn.Conv2d) and module.out_channels == network.info.num_classes
    ][-1:]  # fmt: skip
    for parameter in classifier.parameters():
        parameter.data = parameter.data.roll(1, dims=0)


# -- tables -----------------------------------------------------------------------------------------------------------


def tables(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table for each part that has records."""
    scores: dict[tuple[str, ...], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for record in records:
        key = (record["part"], record["name"], record["source"], record["student"])
        scores[key][record["seed"]] = record
    makers: dict[str, Callable[..., str]] = {"alone": alone_table, "gradients": gradient_table}
    for part in PARTS:
        rows = {key[1:]: value for key, value in scores.items() if key[0] == part}
        if rows:
            yield f"## {part}\n\n" + makers.get(part, gain_table)(rows)


def gain_table(rows: Mapping[tuple[str, ...], Mapping[int, Mapping[str, Any]]]) -> str:
    """Every row's gain over ``none`` of the same seeds, with a verdict where zero is further than two errors."""
    lines = []
    for (name, source, student), runs in rows.items():
        base = rows.get(("none", "", student), {})
        sound = {seed: run for seed, run in runs.items() if "miou" in run and seed in base}
        if not sound:
            lines.append([name, source, student, str(len(runs)), "-", "-", "-", "ended"])
            continue
        own = 100 * np.array([run["miou"] for run in sound.values()])
        gains = own - 100 * np.array([base[seed]["miou"] for seed in sound])
        error = gains.std(ddof=1) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        is_base = name == "none"
        verdict = "" if is_base else verdict_of(gains)
        spread = "" if is_base else f"{error:.1f}"
        gain = "" if is_base else f"{gains.mean():+.1f}"
        lines.append([name, source, student, str(len(gains)), f"{own.mean():.1f}", gain, spread, verdict])
    return markdown(["", "source", "student", "seeds", "mIoU", "gain", "error", "verdict"], lines)


def gradient_table(rows: Mapping[tuple[str, ...], Mapping[int, Mapping[str, Any]]]) -> str:
    """Norm over the cross-entropy's and cosine with it, by iteration."""
    cells: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for (term, iteration, student), runs in rows.items():
        size, cosine = (np.mean([run[key] for run in runs.values()]) for key in ("size", "cosine"))
        cells[student, term][int(iteration)] = f"{size:.2f} ({cosine:+.2f})"
    lines = [[f"{student} {term}", *values.values()] for (student, term), values in cells.items() if term != "ce"]
    return markdown(["norm (cosine) at iteration", *map(str, GRADIENTS_AT)], lines)


def verdict_of(gains: np.ndarray) -> str:
    """All seeds, two at least, on one side of half a point, or not."""
    if len(gains) < 2:
        return "one seed"
    if (gains > 0.5).all():
        return "gains"
    return "harms" if (gains < -0.5).all() else "unclear"


def alone_table(rows: Mapping[tuple[str, ...], Mapping[int, Mapping[str, Any]]]) -> str:
    """mIoU that a method's gradient alone reaches, and a probe's beside that of random weights."""
    supervised = {student: _mean(rows.get(("none", "", student), {}), "miou") for student in ("cnn", "vit")}
    lines = []
    for (name, _, student), runs in rows.items():
        miou, probe = _mean(runs, "miou"), _mean(runs, "probe")
        tap = TAPS.get(name.partition(": ")[2] or name, TAPS.get(name.partition(":")[0], "last_feature"))
        random = _mean(rows.get((f"random weights, {tap}", "", student), {}), "probe")
        names = ""
        if name != "none" and not name.startswith("random"):
            # Chance is the one class that fills most of the picture: a few points of mIoU.
            names = "names classes" if miou > supervised[student] / 2 else "does not name them"
            names += ", probe " + ("better" if probe > random + 1 else "worse" if probe < random - 1 else "as random")
        lines.append([name, student, str(len(runs)), f"{miou:.1f}", f"{probe:.1f}", names])
    return markdown(["", "student", "seeds", "mIoU", "probe", "verdict"], lines)


def _mean(runs: Mapping[int, Mapping[str, Any]], key: str) -> float:
    values = [run[key] for run in runs.values() if key in run]
    return 100 * float(np.mean(values)) if values else float("nan")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, records: Iterator[dict[str, Any]]) -> None:
    with path.open("a") as lines:
        for record in records:
            lines.write(json.dumps(record) + "\n")
            print(json.dumps(record), file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="JSON lines; data lie in a folder of that name")
    parser.add_argument("--print", action="store_true", help="make the tables of the results, train nothing")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--only", nargs="+", help="cases by name; none is always there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--networks", choices=["small", "real"], default="small", help="small ones of our own, or real")
    parser.add_argument("--size", type=int, nargs=2, default=(48, 64), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--images", type=int, default=320, help="of the good networks; students have a tenth")
    parser.add_argument("--val-images", type=int, default=40)
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--teacher-iterations", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--group", type=int, default=8, help="cases of a cohort: lines are written after each")
    given = parser.parse_args(arguments)
    if given.print:
        print("\n\n".join(tables(read(given.results))))
        return
    torch.set_num_threads(1) if given.device == "cpu" else None
    folder = given.results.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    laboratory = Laboratory(given, folder)
    for seed in given.seeds:
        for part in given.part:
            present = {
                (record["part"], record["name"], record["source"], record["student"])
                for record in read(given.results)
                if record["seed"] == seed
            }
            if part == "gradients":
                if not any(key[0] == part for key in present):
                    append(given.results, laboratory.gradients(seed))
                continue
            waiting = [
                case for case in cases(part)
                if (part, case.name, case.source, "cnn" if case.student == "both" else case.student) not in present
                and (not given.only or case.name in given.only or case.name == "none")
            ]  # fmt: skip
            by_source: dict[str, list[Case]] = defaultdict(list)
            for case in waiting:
                by_source["" if case.online else case.source].append(case)
            for members in by_source.values():
                for start in range(0, len(members), given.group):
                    append(given.results, laboratory.run(members[start : start + given.group], seed))
    print("\n\n".join(tables(read(given.results))))
    print(f"\n{machine(['torch'])}")


if __name__ == "__main__":
    main()
