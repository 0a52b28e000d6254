"""What only a GPU can show of the loop: mixed precision, random streams, compilation, and that a step never waits."""

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import tiny

from segdistill.config import parse
from segdistill.data.loader import Share, training_batches
from segdistill.data.settings import AugmentationConfig
from segdistill.engine.distributed import Processes
from segdistill.engine.evaluate import evaluate
from segdistill.engine.inference import Views
from segdistill.engine.learner import Learner
from segdistill.errors import Interrupted
from segdistill.losses import fused
from segdistill.methods import build_offline, build_online, parse_method
from segdistill.methods.cirkd import relations
from segdistill.models.config import ModelConfig
from segdistill.models.outputs import Outputs
from segdistill.models.segmenter import build_segmenter
from segdistill.models.teacher import Teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CPU, GPU = Processes(0, 1, torch.device("cpu")), Processes(0, 1, torch.device("cuda", 0))
CNN = {
    "architecture": "DeepLabV3Plus",
    "encoder": "mobilenetv3_small_050",
    "encoder_weights": "none",
    "output_stride": 16,
}
VIT = {"architecture": "Segformer", "encoder": "mit_b0", "encoder_weights": "none", "output_stride": 32}
# Their defaults are too large for networks this small.
SETTINGS: dict[str, dict[str, Any]] = {"skd": {"holistic_weight": 0.1}}


def losses(trainer: Any) -> list[float]:
    return [point["train/loss/total"] for point in trainer.progress.curves["cnn"] if "train/loss/total" in point]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_training_learns_the_same_in_every_precision(tmp_path: Path, precision: str, channels_last: bool) -> None:
    budget = {"iterations": 60, "log_every": 20, "validate_every": 100}
    trained = []
    for here, how in ((CPU, "fp32"), (GPU, precision)):
        work = tmp_path / here.device.type
        trainer = tiny.make_trainer(work, here, method="kd", precision=how, channels_last=channels_last, **budget)
        trainer.run()
        trained.append(losses(trainer))
    expected, found = trained
    assert found[-1] < 0.97 * found[0]
    tolerance = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 3e-2}[precision]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("method", ["mgd", "dml"])  # one draws masks, one has two peers
def test_stopped_and_resumed_equals_never_stopped(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    options: dict[str, Any] = {"method": method, "dropout": 0.3, "iterations": 11, "precision": "bf16"}
    whole = tiny.make_trainer(tmp_path / "whole", GPU, **options)
    whole.run()
    stopped = tiny.make_trainer(tmp_path / "work", GPU, **options)
    step = stopped.step

    def step_and_be_told() -> None:
        step()
        if stopped.progress.iteration == 4:
            signal.raise_signal(signal.SIGTERM)

    stopped.step = step_and_be_told
    with pytest.raises(Interrupted):
        stopped.run()
    torch.rand(7, device="cuda")  # another process's stream stands elsewhere
    resumed = tiny.make_trainer(tmp_path / "work", GPU, **options)
    resumed.run()
    for name, value in tiny.weights(whole).items():
        torch.testing.assert_close(tiny.weights(resumed)[name], value, rtol=1e-5, atol=1e-6)


def test_counts_of_an_evaluation_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    network, data = tiny.TinySegmenter(), tiny.Blobs(7)
    expected = evaluate(network, data, Views(tiny.INFERENCE), num_classes=tiny.CLASSES, processes=CPU)  # type: ignore[arg-type]
    found = evaluate(network.cuda(), data, Views(tiny.INFERENCE), num_classes=tiny.CLASSES, processes=GPU)  # type: ignore[arg-type]
    assert abs(found.confusion - expected.confusion).sum() <= 4  # a pixel on the border of two classes may fall over
    assert found.ids == expected.ids


Teach = Callable[[torch.Tensor], Outputs | None]


def learner(method: str | None) -> tuple[Learner, Teach]:
    """The networks of the default run at the size of its images, a method in its default config, and what teaches."""
    torch.manual_seed(0)
    one = build_segmenter(parse(ModelConfig, CNN, "model"), 5)
    if method is None:
        return Learner({"cnn": one}).cuda(), lambda images: None
    kind, config = parse_method({"name": method, **SETTINGS.get(method, {})}, "methods")
    if kind.kind == "online":  # type: ignore[attr-defined]
        students = {"cnn": one, "vit": build_segmenter(parse(ModelConfig, VIT, "model"), 5)}
        methods = build_online([config], {name: net.info for name, net in students.items()})
        return Learner(students, methods).cuda(), lambda images: None
    student = build_segmenter(parse(ModelConfig, VIT, "model"), 5) if method == "c2vkd" else one
    teacher = Teacher(build_segmenter(parse(ModelConfig, CNN, "model"), 5))
    methods = build_offline([config], student.info, teacher.info)
    return Learner({"student": student}, methods).cuda(), teacher.cuda()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 96, 128, generator=generator)
    target = torch.randint(0, 5, (4, 12, 16), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    target[:, :10] = 255
    return images.cuda(), target.cuda()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", [None, "kd", "apd", "c2vkd", "cirkd", "dml", "hfd_bsd"])
def test_a_step_never_waits_for_the_device(method: str | None, precision: str) -> None:
    networks, teach = learner(method)
    images, target = batch()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            terms = networks(images, target, None, teach(images))
        networks.total(terms).backward()

    step()  # libraries load on first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(value).all() for value in networks.state_dict().values() if value.is_floating_point())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_cohort_never_waits_for_the_device_between_two_log_entries(tmp_path: Path, precision: str) -> None:
    trainings = [tiny.make_training(name, tmp_path / name, method=name) for name in ("none", "kd", "mgd", "dml")]
    together = tiny.make_cohort(trainings, GPU, precision=precision, iterations=20, log_every=100)
    target = torch.randint(tiny.CLASSES, (8, *tiny.SIZE)).cuda()
    batches = iter([(torch.rand(8, 3, *tiny.SIZE).cuda(), target) for _ in range(3)])
    members = list(together.members.values())
    together._step(batches, members)  # libraries load on first use
    torch.cuda.set_sync_debug_mode("error")
    try:
        together._step(batches, members)
        together._step(batches, members)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(member.progress.iteration == 3 for member in members)


@pytest.mark.parametrize("method", [None, "kd", "dml"])
def test_a_compiled_step_has_the_values_of_the_plain_one_and_is_compiled_once(method: str | None) -> None:
    from torch._dynamo.utils import counters

    images, target = batch()
    (plain, teach), (compiled, _) = learner(method), learner(method)
    plain.eval(), compiled.eval()  # no dropout; batch statistics of one compiled kernel differ by their order
    with torch.autocast("cuda", torch.bfloat16):
        expected = plain(images, target, None, teach(images))
    torch._dynamo.reset()
    counters.clear()
    compiled.compile()
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            found = compiled(images, target, None, teach(images))
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-3)
    assert not counters["recompile_limit"], dict(counters["recompile_limit"])
    assert counters["stats"]["unique_graphs"] <= 4, dict(counters["graph_break"])


@pytest.mark.parametrize("method", ["apd", "c2vkd", "hfd_bsd", "mgd"])
def test_losses_of_large_maps_are_compiled_to_the_same_values_and_gradients(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fused.compiles()
    images, target = batch()
    (networks, teach), found = learner(method), []
    networks.eval()  # no dropout
    for large in (2**60, 0):
        monkeypatch.setattr(fused, "LARGE", large)
        networks.zero_grad()
        torch.manual_seed(0)
        terms = networks(images, target, None, teach(images))
        networks.total(terms).backward()
        gradients = [p.grad.flatten() for p in networks.parameters() if p.grad is not None]
        found.append((terms, torch.cat(gradients)))
    (plain, slopes), (compiled, compiled_slopes) = found
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
    assert torch.linalg.vector_norm(compiled_slopes - slopes) < 1e-3 * torch.linalg.vector_norm(slopes)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("memory", [False, True])
def test_the_kernel_of_relations_gives_what_plain_operations_do(
    memory: bool, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that do not count, columns that do not exist, and widths that are no power of two."""
    assert relations.kernels() is not None
    generator = torch.Generator().manual_seed(0)
    student, teacher, kept = (
        torch.nn.functional.normalize(torch.randn(rows, 24, generator=generator), dim=1).cuda()
        for rows in (210, 210, 77)
    )
    counted = torch.rand(210, generator=generator).cuda() < 0.8 if memory else None
    absent = torch.rand(77, generator=generator).cuda() < 0.3 if memory else None
    found = []
    for kernels in (lambda: None, relations.kernels):
        monkeypatch.setattr(relations, "kernels", kernels)
        rows = student.clone().requires_grad_()
        total = relations.relation_kl(
            rows, kept if memory else rows, teacher, kept if memory else teacher, groups=1 if memory else 3,
            counted=counted, absent=absent, temperature=0.1, block_rows=64, half=half,
        )  # fmt: skip
        total.backward()
        found.append((total.detach(), rows.grad))
    torch.testing.assert_close(found[1], found[0], rtol=1e-2 if half else 1e-4, atol=1e-2 if half else 1e-5)


def test_batches_are_those_of_a_cpu_within_a_byte_and_nobody_waits_for_them() -> None:
    config = {"crop_size": (24, 40), "scale": (0.5, 2.0), "flip": 0.5, "color_jitter": 0.3}
    augmentation = parse(AugmentationConfig, config, "augmentation")

    def batches(here: Processes, workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return training_batches(
            tiny.Blobs(), augmentation, seed=0, share=Share(8), first_iteration=0, workers=workers, device=here.device
        )

    on_the_gpu = batches(GPU, workers=2)
    found = [next(on_the_gpu)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found += [next(on_the_gpu) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (images, labels), (expected, expected_labels) in zip(found, batches(CPU, workers=0), strict=False):
        # A CPU rounds to bytes after each side, and the jitter may widen that.
        torch.testing.assert_close(images.cpu(), expected, rtol=0, atol=1.4**3 * 1.01 / 255)
        assert (labels.cpu() == expected_labels).float().mean() > 0.999
