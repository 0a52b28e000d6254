"""A params.yaml that fits a folder of photos and masks, and this machine."""

import argparse
import copy
import io
import math
import re
import shutil
import subprocess
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segdistill.commands.catalogue import ROOT
from segdistill.commands.data import say, wishes_of
from segdistill.config import TAKEN, parse_yaml
from segdistill.data.layouts import SPLITS, WITHOUT_MASKS, open_layout, recognised_layout
from segdistill.errors import UserError, nearest
from segdistill.files import disk_errors, folder_place, read_bytes, write_file

if TYPE_CHECKING:
    from segdistill.data.layouts import Layout

TEMPLATE = "own"  # the preset that is fitted
DATA = Path("data")
MOST_LOOKED_AT = 200  # images and masks, evenly spread
STUDENTS = {"small": "mobilenetv3_large_100", "tiny": "mobilenetv3_small_050", "vit": "mit_b0"}
# What an encoder is tried with, the first that can be built; the keywords are the template's.
_CNN = {"architecture": "DeepLabV3Plus", "output_stride": 16, "decoder": {"decoder_channels": 64}}
_PYRAMID = {"architecture": "UPerNet", "output_stride": 32, "decoder": {"decoder_channels": 64}}
_VIT = {"architecture": "Segformer", "output_stride": 32, "decoder": {"decoder_segmentation_channels": 64}}
_PLAIN_VIT = {"architecture": "DPT", "output_stride": 16, "decoder": {}}
TEACHER_PART, STUDENT_PART = 0.3, 0.5  # of the time; the rest is start-up, validation, evaluation and report
LEAST_ITERATIONS = 10  # of a training, however short the time
STEP_MARGIN = 1.3  # a training step beside its forward and backward passes: optimiser, losses, data


@dataclass(frozen=True)
class Machine:
    """Where it will run."""

    device: str
    gibibytes: float
    longest_side: int  # of the image that a network sees
    largest_side: int  # of the image that is stored
    minutes: int  # of a run, where nobody says
    teacher: str


@dataclass(frozen=True)
class Facts:
    """What the data set is like."""

    samples: Mapping[str, int]
    classes: tuple[str, ...]
    height: int  # of the median image, upright
    width: int
    largest: int  # side of any image
    ignored: float  # the largest mean share of a split without a label


@dataclass(frozen=True)
class Network:
    """A student or the teacher, with what a step of it takes."""

    label: str
    kind: str
    model: dict[str, Any]
    seconds: float = 0.0  # of a forward and a backward pass over one batch
    forward: float = 0.0


def command(arguments: argparse.Namespace) -> None:
    """Writes the params file, brings the data to data/ if they lie elsewhere, and says what was chosen."""
    target = arguments.params
    if arguments.preset:
        content = read_preset(arguments.preset)
        require_replaceable(target, force=arguments.force, content=content)
        _write(target, content)
        print(f"{target}: presets/{arguments.preset}.yaml")
        return
    require_replaceable(target, force=arguments.force)
    minutes = None if arguments.time is None else _minutes(arguments.time)
    machine, folder = _machine(), _imported(arguments.teacher)
    networks = _networks(arguments, machine, folder)  # before the data are brought, which may take long
    layout_name = _bring(arguments)
    try:
        facts = _facts(open_layout(layout_name, DATA))
        params, reasons = _fit(facts, machine, arguments, folder, layout_name, minutes or machine.minutes, networks)
        text = _text(params, reasons)
        from segdistill.execution import check_params

        check_params(parse_yaml(text, str(target)), here=True)
        _write(target, text.encode())
    except BaseException:
        if arguments.folder.resolve() != DATA.resolve():  # what was brought would refuse the next try
            shutil.rmtree(DATA, ignore_errors=True)
        raise
    for reason in reasons:
        print(reason)
    again = "dvc repro" if target == Path("params.yaml") else f"cp {target} params.yaml && dvc repro"
    print(f"{target} is written. Next: dvc add {DATA}, then {again}")


def _write(target: Path, content: bytes) -> None:
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(target, content)


def read_preset(name: str) -> bytes:
    """The content of a preset.

    Raises:
        UserError: there is none of that name.
    """
    presets = {path.stem: path for path in sorted((ROOT / "presets").glob("*.yaml"))}
    if name not in presets:
        raise UserError(f"presets/{name}.yaml: no such preset{nearest(name, presets)}")
    return presets[name].read_bytes()


def require_replaceable(path: Path, *, force: bool, content: bytes | None = None) -> None:
    """Raises a UserError where a params file has what git and the presets have not, unless that is what is written."""
    folder_place(path.parent)
    if not path.exists():
        return
    present = read_bytes(path)
    if force:
        return
    presets = [preset.read_bytes() for preset in (ROOT / "presets").glob("*.yaml")]
    if present in (content, *presets):
        return
    place = path.resolve()
    committed = subprocess.run(
        ["git", "show", f"HEAD:./{place.name}"], cwd=place.parent, capture_output=True, check=False
    )
    if committed.returncode or committed.stdout != present:
        raise UserError(
            f"{path}: has changes that are not committed, and is not overwritten; commit them, or write another file by"
            " --params NAME.yaml, or give --force"
        )


def _minutes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(m|min|h|d)", text)
    minutes = float(match[1]) * {"m": 1, "min": 1, "h": 60, "d": 1440}[match[2]] if match else 0
    if not 1 <= minutes <= 60 * 24 * 60:
        raise UserError(f"--time: '{text}' is no time; expected minutes, hours or days, such as 30m, 2h or 1d")
    return round(minutes)


def _machine() -> Machine:
    import torch

    from segdistill.data.memory import GIBIBYTE, free_memory

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GIBIBYTE
        return Machine("cuda", memory, 1024, 2048, 120, "resnet50")
    return Machine("cpu", free_memory() / GIBIBYTE, 256, 1024, 30, "resnet18")


def _bring(arguments: argparse.Namespace) -> str:
    """Imports what lies elsewhere, and names the layout of data/."""
    from segdistill.data.importing import LIST, import_dataset, is_layout

    folder = arguments.folder
    if not folder.exists():
        hint = "; name the folder of your images and masks: segdistill init FOLDER" if folder == DATA else ""
        raise UserError(f"{folder}: no such folder{hint}")
    layout = arguments.layout or (LIST if folder.suffix.lower() == ".csv" else recognised_layout(folder))
    if folder.resolve() == DATA.resolve():
        if not is_layout(layout, folder):
            raise UserError(
                f"{folder}: images and masks without splits or classes.json; move it, and: segdistill init NEW_PLACE"
            )
        return layout
    if DATA.is_dir() and any(DATA.iterdir()):
        raise UserError(
            f"{DATA}: has a data set, and is not overwritten; for that one: segdistill init; for {folder}: first remove"
            f" {DATA} (the streets come back by segdistill data synth --out {DATA})"
        )
    imported = import_dataset(layout, folder, DATA, wishes=wishes_of(arguments))
    say(DATA, imported)
    return imported.layout


def _imported(teacher: str | None) -> Path | None:
    """The folder of a trained teacher, where ``--teacher`` names one and no encoder."""
    from segdistill.models.teachers import names

    if teacher is None or ("/" not in teacher and not Path(teacher).is_dir()):
        return None
    names(Path(teacher))  # one that cannot be read is refused before anything is written
    return Path(teacher)


def _import_teacher(section: Any, folder: Path, classes: Sequence[str]) -> list[str]:
    """Names the teacher and which class of its is which of the data set; returns what is left to say of that."""
    from ruamel.yaml.comments import CommentedMap

    from segdistill.models.teachers import names, table

    labels = table(folder, classes)
    missing = [label for label in classes if label not in labels.values()]
    unused = [name for name in names(folder) if name not in labels]
    section["import_from"] = str(folder)
    if not missing and all(name == label for name, label in labels.items()) and not unused:
        return []
    section["labels"] = CommentedMap(labels)
    lines = ["its class: the data set's"]
    lines += [f"left out, for want of a class of the data set: {', '.join(unused)}"] if unused else []
    lines += [f"TO BE ADDED, of the data set's: {', '.join(missing)}"] if missing else []
    comment = "\n".join(part for line in lines for part in textwrap.wrap(line, 110))
    section.yaml_set_comment_before_after_key("labels", before=comment, indent=2)
    if not missing:
        return []
    return [f"the teacher has no class named {', '.join(missing)}: say in train_teacher.labels which of its are"]


def _facts(layout: "Layout") -> Facts:
    from segdistill.data.checks import inspect

    by_split = {split: list(layout.samples(split)) for split in layout.splits}
    labelled = [sample for split in SPLITS for sample in by_split[split]]
    if not labelled:
        raise layout.without_samples()
    step = -(-len(labelled) // MOST_LOOKED_AT)
    looked_at = list(inspect(layout, labelled[::step], workers=1))
    if problem := next((one for one in looked_at if one.image_problem or one.mask_problem), None):
        what = (
            f"{problem.image}: {problem.image_problem}"
            if problem.image_problem
            else f"{problem.mask}: {problem.mask_problem}"
        )
        raise UserError(f"{layout.root / what}")
    sizes = np.array([one.image_size for one in looked_at])
    width, height = (int(side) for side in np.median(sizes, axis=0))
    shares = [[one.ignore_fraction or 0.0 for one in looked_at if one.split == split] for split in SPLITS]
    ignored = max(float(np.mean(share)) for share in shares if share)
    counts = {split: len(samples) for split, samples in by_split.items()}
    return Facts(counts, tuple(entry.name for entry in layout.classes), height, width, int(sizes.max()), ignored)


def _fit(
    facts: Facts,
    machine: Machine,
    arguments: argparse.Namespace,
    folder: Path | None,
    layout: str,
    minutes: int,
    networks: Sequence[Network],
) -> tuple[Any, list[str]]:
    """The template with what fits, and each choice with its reason."""
    from segdistill.search import round_trip_yaml

    params = round_trip_yaml().load(read_preset(TEMPLATE).decode())
    for section in ("validate", "prepare"):
        params[section]["layout"] = layout
        params[section]["workers"] = 0 if sum(facts.samples.values()) > 1000 else 1
    params["evaluate"]["overlays"] = params["compare"]["overlays"] = min(4, facts.samples["test"])
    crop, batch, reasons = _fit_sizes(params, facts, machine)
    teacher, *students = (_timed(network, len(facts.classes), crop, batch, machine.device) for network in networks)
    _put_model(params["train_teacher"], teacher.model)
    if folder:
        reasons += _import_teacher(params["train_teacher"], folder, facts.classes)
    members, refused = _experiments(params, teacher, _keyed(students))
    source = f"teacher from {folder}" if folder else _described(teacher)
    reasons += [f"{source}; students {', '.join(map(_described, students))}", *refused]
    if arguments.weights == "auto" and any(network.model["encoder_weights"] == "none" for network in networks):
        reasons.append(
            "encoder_weights none: no download of ImageNet weights is possible; scores are far higher with them:"
            " segdistill params train_teacher.model.encoder_weights"
        )
    # Each seed's cohort has one pass of the teacher a step.
    step = teacher.forward + STEP_MARGIN * sum(network.seconds for trained in members.values() for network in trained)
    part = STUDENT_PART + (TEACHER_PART if folder else 0)
    seeds = params["seeds"]
    _set_budget(params["train_teacher"]["train"], TEACHER_PART * minutes * 60 / (STEP_MARGIN * teacher.seconds))
    _set_budget(params["distill"]["train"], part * minutes * 60 / (len(seeds) * step))
    budgets = [params[section]["train"]["iterations"] for section in ("train_teacher", "distill")]
    training = budgets[1] * len(seeds) * step + (0 if folder else budgets[0] * STEP_MARGIN * teacher.seconds)
    needed = math.ceil(training / 60 / (TEACHER_PART + STUDENT_PART))
    longer = ""
    if needed > minutes and LEAST_ITERATIONS in budgets:  # else only the rounding of the iterations
        minutes, longer = needed, f", which {LEAST_ITERATIONS} iterations of each need at least"
    reasons.append(
        f"{', '.join(members)} with seeds {', '.join(map(str, seeds))}; teacher {budgets[0]} and students {budgets[1]}"
        f" iterations: about {minutes} minutes by a step's time measured here{longer}"
    )
    if count := facts.samples.get(WITHOUT_MASKS, 0):
        reasons.append(f"{count} images without masks wait: with distill.train.unlabelled {batch} they teach as well")
    return params, reasons


def _fit_sizes(params: Any, facts: Facts, machine: Machine) -> tuple[list[int], int, list[str]]:
    """What is stored, what a network sees, and how many crops of it are one batch."""
    reasons = []
    longest = max(facts.height, facts.width)
    stored = min(1.0, machine.largest_side / longest)
    scale = max(0.05, round(20 * min(1.0, machine.longest_side / (longest * stored))) / 20)
    crop = [max(32, int(side * stored * scale * 0.75 / 32) * 32) for side in (facts.height, facts.width)]
    bounds = [round(max(0.05, 0.75 * scale), 2), round(1.5 * scale, 2)]
    if facts.largest > machine.largest_side:
        params["prepare"]["max_side"] = machine.largest_side
        reasons.append(f"max_side {machine.largest_side}: images have up to {facts.largest} pixels a side")
    if facts.ignored > 0.4:
        most = params["validate"]["max_ignore_fraction"] = min(1.0, round(facts.ignored + 0.1, 1))
        reasons.append(f"max_ignore_fraction {most}: {facts.ignored:.0%} of the pixels have no label")
    # In powers of two; at least two, for statistics over the batch.
    roomy, on_gpu = machine.gibibytes >= (24 if machine.device == "cuda" else 4), machine.device == "cuda"
    batch = min((8 if roomy else 4) * (2 if on_gpu else 1), 2 ** int(np.log2(max(2, facts.samples["train"]))))
    reasons += [
        f"crop {crop[0]} x {crop[1]} at scale {bounds[0]} to {bounds[1]}, input_scale {scale:g}: the median image is"
        f" {facts.height} x {facts.width}, a network here ({machine.device}) sees sides up to {machine.longest_side}",
        f"batch {batch}: {facts.samples['train']} training images, {machine.gibibytes:.0f} GiB free",
    ]
    for section in ("train_teacher", "distill"):
        settings = {"batch_size": batch, "channels_last": on_gpu, "workers": 4 if on_gpu else 0}
        params[section]["train"].update(settings, precision="bf16" if on_gpu else "fp32")
    augmentation = params["train_teacher"]["train"]["augmentation"]
    augmentation["crop_size"], augmentation["scale"] = _flow(crop), _flow(bounds)
    params["train_teacher"]["inference"].update(input_scale=float(scale), batch_size=batch)
    return crop, batch, reasons


def _weights_rule(wish: str) -> str:
    """Where encoders' weights come from: the hub if it answers."""
    if wish != "auto":
        return wish
    from huggingface_hub import constants

    from segdistill.models.weights import hub_answers

    return "imagenet" if hub_answers(constants.ENDPOINT) else "none"


def _networks(arguments: argparse.Namespace, machine: Machine, folder: Path | None) -> list[Network]:
    """The teacher, an encoder's where ``folder`` does not hold it, and the students."""
    encoder = machine.teacher if folder or arguments.teacher is None else arguments.teacher
    weights = _weights_rule(arguments.weights)
    first = "DeepLabV3Plus" if machine.device == "cuda" else "UPerNet"
    students = dict.fromkeys(arguments.student or ["tiny", "vit"])
    return [
        _network("teacher", encoder, weights, first),
        *(_network(label, STUDENTS.get(label, label), weights) for label in students),
    ]


def _network(label: str, encoder: str, weights: str, first: str = "") -> Network:
    """The first architecture that can be built over the encoder."""
    from segdistill.config import parse
    from segdistill.models.config import ModelConfig
    from segdistill.stages._networks import outline

    local = Path("weights") / f"{encoder.removeprefix('tu-')}.safetensors"
    chosen = str(local) if local.is_file() and weights != "imagenet" else weights
    patterns = sorted((_CNN, _PYRAMID, _VIT, _PLAIN_VIT), key=lambda pattern: pattern["architecture"] != first)
    reason: UserError | None = None
    for pattern in patterns:
        model = {"architecture": pattern["architecture"], "encoder": encoder, "encoder_weights": chosen, **pattern}
        try:
            kind = outline(parse(ModelConfig, {**model, "encoder_weights": "none"}, "model")).info.kind
        except UserError as error:
            reason = reason or error
            continue
        if kind == "vit" and pattern is _PYRAMID:  # a transformer's own decoder comes first
            continue
        return Network(label, kind, model)
    raise UserError(f"--{'teacher' if label == 'teacher' else 'student'} {encoder}: {reason}")


def _timed(network: Network, classes: int, crop: Sequence[int], batch: int, device: str) -> Network:
    """With the seconds that a batch takes here: the faster of two, after one that warms up."""
    import torch

    from segdistill.config import parse
    from segdistill.models.config import ModelConfig
    from segdistill.models.segmenter import Segmenter

    model = Segmenter(parse(ModelConfig, {**network.model, "encoder_weights": "none"}, "model"), classes).to(device)
    images, seconds, forward = torch.rand(batch, 3, *crop, device=device), [], []
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        for _ in range(3):
            started = time.perf_counter()
            loss = model(images).logits.float().mean()
            _wait(device)
            forward.append(time.perf_counter() - started)
            loss.backward()
            _wait(device)
            seconds.append(time.perf_counter() - started)
    return replace(network, seconds=min(seconds[1:]), forward=min(forward[1:]))


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _keyed(students: Sequence[Network]) -> dict[str, Network]:
    """The students by what the experiments call them: their kind, or what was asked for where two are of one kind."""
    kinds = [network.kind for network in students]
    keyed: dict[str, Network] = {}
    for number, network in enumerate(students):
        word = re.sub(r"\W", "_", network.label)[:30]
        own = word if word[:1].isalpha() and word.lower() not in TAKEN else f"student_{number}"
        keyed[network.kind if kinds.count(network.kind) == 1 else own] = network
    return keyed


def _experiments(
    params: Any, teacher: Network, students: Mapping[str, Network]
) -> tuple[dict[str, list[Network]], list[str]]:
    """Puts the experiments that fit the networks in the params; gives the students of each, and what was left out."""
    from ruamel.yaml.comments import CommentedMap

    template, experiments = params["experiments"], CommentedMap()
    members: dict[str, list[Network]] = {}
    nodes = {key: _student(template, key, network) for key, network in students.items()}

    def add(name: str, keys: Sequence[str], like: str, comment: str) -> None:
        networks = CommentedMap({key: nodes[key] for key in keys})
        experiments[name] = CommentedMap(students=networks, methods=copy.deepcopy(template[like]["methods"]))
        experiments.yaml_add_eol_comment(comment, name)
        members[name] = [students[key] for key in keys]

    for number, key in enumerate(students):
        ending = f"_{key}" if number else ""
        add(f"none{ending}", [key], "none", "the undistilled student: what its others are compared with")
        add(f"kd{ending}", [key], "kd", "offline: the teacher's class probabilities")
    cnn, vit = (next((key for key in students if students[key].kind == kind), None) for kind in ("cnn", "vit"))
    add("apd", [cnn or next(iter(students))], "apd", "offline, teacher and student of any kind")
    if vit and teacher.kind == "cnn":
        add("c2vkd_ce", [vit], "c2vkd_ce", "offline: a CNN teaches a ViT (re-implementation, GAP for LFD)")
    if cnn and vit:
        add("hfd_bsd", [cnn, vit], "hfd_bsd", "online: a CNN and a ViT teach each other (re-implementation)")
    params["experiments"] = experiments
    refused = []
    for name in [name for name in members if name in ("apd", "c2vkd_ce", "hfd_bsd")]:
        if reason := _misfit(params, name):
            del experiments[name], members[name]
            refused.append(f"without {name}: {reason}")
    params["run"] = _flow(list(members))
    return members, refused


def _student(template: Any, key: str, network: Network) -> Any:
    node = copy.deepcopy(template["none" if network.kind == "cnn" else "none_vit"]["students"][network.kind])
    _put_model(node, network.model)
    if network.model["encoder_weights"] != "none":
        node["optimizer"]["lr"] = 1.0e-3 if network.kind == "cnn" else 5.0e-4
    node.yaml_set_anchor(key, always_dump=False)
    return node


def _misfit(params: Any, name: str) -> str | None:
    """Why an experiment cannot be trained with these networks."""
    from segdistill.execution import check_params

    plain = parse_yaml(_text(params, []), "params.yaml")
    plain |= {"run": [name], "experiments": {name: plain["experiments"][name]}}
    plain.pop("tune", None)
    try:
        check_params(plain, here=True)
    except UserError as error:
        return str(error)
    return None


def _put_model(section: Any, model: Mapping[str, Any]) -> None:
    section["model"] = _flow({key: _flow(value) if isinstance(value, dict) else value for key, value in model.items()})


def _flow(value: Any) -> Any:
    """A list or mapping that is written on one line."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    node = CommentedMap(value) if isinstance(value, dict) else CommentedSeq(value)
    node.fa.set_flow_style()
    return node


def _set_budget(train: Any, most: float) -> None:
    iterations = max(LEAST_ITERATIONS, min(200_000, int(float(f"{most:.2g}"))))
    train["iterations"] = iterations
    train["log_every"] = max(1, iterations // 20)
    for key in ("validate_every", "checkpoint_every"):
        train[key] = max(1, iterations // 4)


def _described(network: Network) -> str:
    model = network.model
    return f"{network.label} {model['architecture']} over {model['encoder']} (weights {model['encoder_weights']})"


def _text(params: Any, reasons: Sequence[str]) -> str:
    from segdistill.search import round_trip_yaml

    written = io.StringIO()
    round_trip_yaml().dump(params, written)
    body = written.getvalue().partition("\n\n")[2]
    head = ["Fitted by `segdistill init` to the data and to this machine; change what you like.", *reasons]
    head.append("What each key means, and what is allowed: segdistill params KEY")
    return "".join(f"# {line}\n" for line in head) + "\n" + body
