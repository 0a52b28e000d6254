"""Schedules, optimiser groups, checkpoints, data order and inference: the parts below the loop."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segdistill.config import parse
from segdistill.data.loader import Share, training_batches
from segdistill.data.settings import AugmentationConfig
from segdistill.data.shards import ShardDataset
from segdistill.data.transforms import Augmentation, cut
from segdistill.engine import checkpoint
from segdistill.engine import evaluate as evaluate_module
from segdistill.engine import inference as inference_module
from segdistill.engine.distributed import Processes
from segdistill.engine.evaluate import evaluate
from segdistill.engine.inference import Views, class_scores, predict
from segdistill.engine.optim import build_optimizer, factor, set_learning_rates
from segdistill.engine.settings import AdamWConfig, InferenceConfig, OptimizerConfig, PolySchedule, SGDConfig
from segdistill.errors import UserError
from segdistill.metrics.boundary import boundary_counts
from segdistill.metrics.calibration_error import calibration_gaps, expected_calibration_error
from segdistill.metrics.confusion import iou_counts
from segdistill.models.outputs import ModelInfo

ALONE = Processes(0, 1, torch.device("cpu"))


def test_poly_schedule_by_hand() -> None:
    schedule = PolySchedule(power=2.0, warmup_fraction=0.1, warmup_ratio=0.0, floor_ratio=0.2)
    assert factor(schedule, 0.0) == 0.0
    assert factor(schedule, 0.05) == pytest.approx((0.2 + 0.8 * 0.95**2) * 0.5)
    assert factor(schedule, 0.5) == pytest.approx(0.2 + 0.8 * 0.25)
    assert factor(schedule, 1.0) == pytest.approx(0.2)
    assert factor(schedule, 1.7) == pytest.approx(0.2)


def test_groups_have_their_multiplier_and_adamw_spares_vectors() -> None:
    encoder, decoder = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
    groups = [(encoder.parameters(), 1.0), (decoder.parameters(), 10.0)]
    adamw = build_optimizer(AdamWConfig(lr=0.1, weight_decay=0.5), groups)
    seen = {id(p): (g["lr"], g["weight_decay"]) for g in adamw.param_groups for p in g["params"]}
    assert seen == {
        id(encoder.weight): (0.1, 0.5), id(encoder.bias): (0.1, 0.0),
        id(decoder.weight): (1.0, 0.5), id(decoder.bias): (1.0, 0.0),
    }  # fmt: skip
    sgd = build_optimizer(
        SGDConfig(lr=0.1, weight_decay=0.5), [(encoder.parameters(), 1.0), (decoder.parameters(), 10.0)]
    )
    assert all(group["weight_decay"] == 0.5 for group in sgd.param_groups)
    set_learning_rates(sgd, PolySchedule(power=1.0), 0.75)
    assert [group["lr"] for group in sgd.param_groups] == pytest.approx([0.025, 0.25])


def test_optimizer_kinds_are_told_apart_by_name() -> None:
    config: Any = parse(OptimizerConfig, {"name": "adam", "lr": 1e-5, "betas": [0.9, 0.99]}, "optimizer")
    optimizer = build_optimizer(config, [([nn.Parameter(torch.zeros(2))], 1.0)])
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["betas"] == (0.9, 0.99)


def test_a_checkpoint_gives_back_the_same_tree(tmp_path: Path) -> None:
    state = {
        "a": torch.arange(3), "nested": {"list": [1, 2.5, None, torch.ones(2)], "tuple": (1, "x")},
        "integers as keys": {0: {"momentum": torch.zeros(1)}, 1: "y"}, "bytes": torch.tensor([1, 2], dtype=torch.uint8),
        "empty": {},
    }  # fmt: skip
    checkpoint.save(tmp_path / "deep" / "c.safetensors", state)
    loaded = checkpoint.load(tmp_path / "deep" / "c.safetensors")
    assert loaded is not None
    torch.testing.assert_close(loaded["nested"]["list"][3], torch.ones(2))
    assert loaded["nested"]["tuple"] == (1, "x") and list(loaded["integers as keys"]) == [0, 1]
    assert torch.equal(loaded["a"], state["a"]) and loaded["bytes"].dtype == torch.uint8
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["c.safetensors"]


def test_an_absent_checkpoint_is_none_and_a_truncated_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    assert checkpoint.load(path) is None
    checkpoint.save(path, {"a": torch.arange(100)})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"c\.safetensors: not a readable checkpoint"):
        checkpoint.load(path)


def settings(**changes: Any) -> AugmentationConfig:
    base = {"crop_size": (32, 40), "scale": (0.7, 1.4), "flip": 0.5, "color_jitter": 0.3}
    return parse(AugmentationConfig, base | changes, "augmentation")


def first(prepared: Path, count: int, *, share: Share, workers: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    source = ShardDataset(prepared, "train")
    batches = training_batches(source, settings(), seed=5, share=share, first_iteration=start, workers=workers)
    return [next(batches) for _ in range(count)]


def test_data_order_depends_on_the_seed_alone(tiny_prepared: Path) -> None:
    alone = first(tiny_prepared, 5, share=Share(4))
    with_workers = first(tiny_prepared, 5, share=Share(4), workers=2)
    resumed = first(tiny_prepared, 2, share=Share(4), start=3)
    halves = [first(tiny_prepared, 5, share=Share(4, rank=rank, world_size=2)) for rank in (0, 1)]
    for index, (images, labels) in enumerate(alone):
        assert images.shape == (4, 3, 32, 40) and images.dtype == torch.float32 and labels.shape == (4, 32, 40)
        assert torch.equal(images, with_workers[index][0]) and torch.equal(labels, with_workers[index][1])
        assert torch.equal(images, torch.cat([half[index][0] for half in halves]))
    assert torch.equal(resumed[0][0], alone[3][0]) and torch.equal(resumed[1][1], alone[4][1])
    assert not torch.equal(alone[0][0], alone[3][0]), "another epoch is drawn anew"


def test_building_a_loader_leaves_the_global_random_stream_alone(tiny_prepared: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first(tiny_prepared, 2, share=Share(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_image_and_mask_move_together_and_padding_is_void() -> None:
    label = np.random.default_rng(0).integers(0, 2, (6, 5), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
    image = np.repeat(label[..., None] * 255, 3, axis=2).astype(np.uint8)
    augmentation = Augmentation(settings(color_jitter=0.0, crop_size=(80, 80), scale=(0.9, 1.1)))
    for seed in range(8):
        crop = augmentation.draw(label.shape, seed)
        (scaled,), (mask,) = augmentation([(cut(image, label, crop.window, pinned=False), crop)], torch.device("cpu"))
        valid = mask != 255
        agreement = ((scaled[0] > 0.5) == mask.bool())[valid].float().mean()
        assert agreement > 0.93, seed  # bilinear against nearest: they differ at block borders only
        assert (~valid).any() and (scaled[:, ~valid] == 0).all()


class Bright(nn.Module):
    """Class by brightness, a cell a pixel: equivariant to flips and crops."""

    info = ModelInfo(2, (3,) * 4, (1,) * 4, 3, 1, 1, "cnn")

    def logits(self, images: Tensor) -> Tensor:
        level = images.mean(1, keepdim=True)
        return torch.cat([0.5 - level, level - 0.5], dim=1) * 10


def inference(**changes: Any) -> InferenceConfig:
    base = {"batch_size": 3, "input_scale": 1.0, "window": None, "window_stride": 0.5}
    return parse(InferenceConfig, base | changes, "inference")


@pytest.mark.parametrize("window", [(16, 16), (17, 19), (20, 30), (64, 64)])
def test_sliding_windows_cover_every_pixel_and_agree_with_the_whole_image(window: tuple[int, int]) -> None:
    images = torch.rand(2, 3, 20, 30)
    network: Any = Bright()
    (whole,) = class_scores(network, images, (20, 30), Views(inference()))
    (slid,) = class_scores(network, images, (20, 30), Views(inference(window=window)))
    torch.testing.assert_close(slid, whole)


def test_flip_averaging_of_an_equivariant_network_changes_nothing() -> None:
    images = torch.rand(2, 3, 20, 30)
    network: Any = Bright()
    (plain,) = class_scores(network, images, (20, 30), Views(inference()))
    (flipped,) = class_scores(network, images, (20, 30), Views(inference(), flip=True))
    torch.testing.assert_close(flipped, plain.softmax(1))


class Coarse(nn.Module):
    """Six classes by chance, a cell a block of pixels."""

    def __init__(self, stride: int, layout: torch.memory_format) -> None:
        super().__init__()
        self.info = ModelInfo(6, (3,) * 4, (stride,) * 4, 3, stride, stride, "cnn")
        self.layout = layout
        self.convolution = nn.Conv2d(3, 6, 3, stride, padding=1)

    def logits(self, images: Tensor) -> Tensor:
        return (20 * self.convolution(images)).contiguous(memory_format=self.layout)


@pytest.mark.parametrize("size", [(224, 272), (201, 257), (112, 136)], ids=str)
@pytest.mark.parametrize(
    ("stride", "layout"), [(4, torch.contiguous_format), (4, torch.channels_last), (32, torch.channels_last)], ids=str
)
@pytest.mark.parametrize(
    ("shown", "views"),
    [({}, {}), ({"window": (90, 136)}, {}), ({"input_scale": 0.5}, {}),
     ({"window": (160, 272), "input_scale": 2.0}, {}), ({}, {"flip": True}),
     ({}, {"flip": True, "scales": (0.5, 1.0, 2.0)})],
    ids=["whole", "windows", "half", "windows over twice the size", "flip", "scales"],
)  # fmt: skip
@torch.inference_mode()
def test_bands_of_rows_give_the_bits_of_the_whole(
    size: tuple[int, int], layout: torch.memory_format, stride: int, shown: dict[str, Any], views: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    network: Any = Coarse(stride, layout)
    arguments = (network, torch.rand(2, 3, 224, 272), size, Views(inference(**shown), **views))
    monkeypatch.setattr(inference_module, "BAND", 2**20)
    (scores,) = class_scores(*arguments)
    whole = predict(*arguments, probability=True)
    monkeypatch.setattr(inference_module, "BAND", 1)
    bands = list(class_scores(*arguments))
    in_bands = predict(*arguments, probability=True)
    assert len(bands) > 1 or size == (201, 257)
    assert torch.equal(torch.cat(bands, 2), scores)
    assert torch.equal(in_bands.classes, whole.classes) and torch.equal(in_bands.probability, whole.probability)
    assert torch.equal(whole.classes, scores.argmax(1))


def test_counts_do_not_depend_on_the_batch_or_on_readers_and_sum_to_the_labelled_pixels(
    tiny_prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ShardDataset(tiny_prepared, "test")

    class Guess(Bright):
        info = ModelInfo(11, (3,) * 4, (1,) * 4, 3, 1, 1, "cnn")

        def logits(self, images: Tensor) -> Tensor:
            return torch.cat([images, images.flip(1), images * 0.5, images[:, :2] * 0.7], dim=1)

    network: Any = Guess().train()
    views = [Views(inference(batch_size=size)) for size in (1, 3, 8)]
    found = [evaluate(network, data, view, num_classes=11, processes=ALONE) for view in views]
    monkeypatch.setattr(evaluate_module, "MANY", 1)
    found.append(evaluate(network, data, Views(inference()), num_classes=11, processes=ALONE))
    for other in found[1:]:
        assert np.array_equal(other.confusion, found[0].confusion)
        assert np.array_equal(other.counts, found[0].counts)
    labelled = sum(int((data[index][1] != 255).sum()) for index in range(len(data)))
    assert found[0].confusion.dtype == np.int64 and found[0].confusion.sum() == labelled
    assert np.array_equal(found[0].counts.sum(0), iou_counts(found[0].confusion))
    assert found[0].ids == [data.sample_id(index) for index in range(len(data))]
    assert network.training, "the mode is restored"


def test_shares_of_two_processes_sum_to_the_whole(tiny_prepared: Path) -> None:
    data = ShardDataset(tiny_prepared, "test")
    network: Any = Bright()
    network.info = ModelInfo(11, (3,) * 4, (1,) * 4, 3, 1, 1, "cnn")

    class Half(Processes):
        def sum(self, values: Tensor) -> Tensor:
            return values

    halves = [
        evaluate(network, data, Views(inference()), num_classes=11, processes=Half(rank, 2, torch.device("cpu")))
        for rank in (0, 1)
    ]
    whole = evaluate(network, data, Views(inference()), num_classes=11, processes=ALONE)
    assert np.array_equal(halves[0].confusion + halves[1].confusion, whole.confusion)
    assert np.array_equal(halves[0].counts + halves[1].counts, whole.counts)
    seen = [half.counts.any((1, 2)) for half in halves]
    assert not (seen[0] & seen[1]).any() and (seen[0] | seen[1]).all(), "an image is one process's"


def test_boundary_iou_is_of_all_images_and_is_not_computed_unasked(tiny_prepared: Path) -> None:
    data = ShardDataset(tiny_prepared, "test")
    network: Any = Bright()
    plain = evaluate(network, data, Views(inference()), num_classes=11, processes=ALONE)
    asked = evaluate(network, data, Views(inference()), num_classes=11, processes=ALONE, boundary=True)
    expected = torch.zeros(3, 11, dtype=torch.int64)
    for image, label in (data[index] for index in range(len(data))):
        guess = network.logits(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255).argmax(1)
        expected += boundary_counts(guess, torch.from_numpy(label)[None], 11)
    assert plain.boundary is plain.boundary_miou is None and np.array_equal(asked.confusion, plain.confusion)
    assert np.array_equal(asked.boundary, expected) and 0 < asked.boundary_miou < 1


@pytest.mark.parametrize("flip", [False, True])
def test_calibration_error_is_of_the_softmax_whatever_the_batch_and_is_not_computed_unasked(
    flip: bool, tiny_prepared: Path
) -> None:
    data = ShardDataset(tiny_prepared, "test")

    class Guess(Bright):
        info = ModelInfo(11, (3,) * 4, (1,) * 4, 3, 1, 1, "cnn")

        def logits(self, images: Tensor) -> Tensor:
            return 5 * torch.cat([images, images.flip(1), images * 0.5, images[:, :2] * 0.7], dim=1)

    network: Any = Guess()

    def evaluated(size: int, **asked: bool) -> Any:
        views = Views(inference(batch_size=size), flip)
        return evaluate(network, data, views, num_classes=11, processes=ALONE, **asked)

    probability, right, labelled = [], [], []
    for image, label in (data[index] for index in range(len(data))):
        scores = network.logits(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)[0].softmax(0)
        confidence, prediction = scores.max(0)
        truth = torch.from_numpy(label)
        probability.append(confidence.flatten())
        right.append((prediction == truth).flatten())
        labelled.append((truth != 255).flatten())
    gaps = calibration_gaps(torch.cat(probability), torch.cat(right), torch.cat(labelled)).numpy()
    expected = expected_calibration_error(gaps, int(torch.cat(labelled).sum()))
    one, three = evaluated(1, calibration=True), evaluated(3, calibration=True)
    assert one.ece == pytest.approx(expected, abs=1e-6)
    assert one.ece == pytest.approx(three.ece, abs=1e-6)
    assert evaluated(3).ece is None
