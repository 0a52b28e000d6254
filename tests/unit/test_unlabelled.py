"""Images without labels, from the layout to the batch."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from _folders import make_folder, prepare, save
from test_cli import project, refused  # noqa: F401
from test_engine import settings
from test_layouts import make_camvid
from test_validate import validate

from segdistill.config import read_yaml
from segdistill.data.importing import import_dataset
from segdistill.data.labelled import labelling_order
from segdistill.data.layouts import WITHOUT_MASKS, open_layout
from segdistill.data.loader import Share, training_batches
from segdistill.data.shards import ShardDataset, read_dataset_info
from segdistill.losses.masks import UNLABELLED
from segdistill.stages._training import unlabelled_set

LABELLED = ["train", "val", "test"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight labelled images to train on, and three without masks."""
    folder = make_folder(tmp_path / "data", {"train": 8, "val": 2, "test": 2, WITHOUT_MASKS: 3})
    shutil.rmtree(folder / "masks" / WITHOUT_MASKS)
    return folder


def test_a_folder_of_images_without_masks_is_a_split_if_it_is_there(data: Path, tmp_path: Path) -> None:
    layout = open_layout("folder", data)
    assert [*layout.splits] == [*LABELLED, WITHOUT_MASKS]
    assert [(sample.id, sample.mask) for sample in layout.samples(WITHOUT_MASKS)] == [
        (name, None) for name in ("0000", "0001", "0002")
    ]
    assert [*open_layout("folder", make_folder(tmp_path / "other")).splits] == LABELLED


def test_camvid_has_a_list_of_images_without_masks_if_it_is_there(tmp_path: Path) -> None:
    root = make_camvid(tmp_path)
    assert [*open_layout("camvid", root).splits] == LABELLED
    (root / "unlabelled.txt").write_text("/SegNet/CamVid/frames/a 1.png\n")
    (sample,) = open_layout("camvid", root).samples(WITHOUT_MASKS)
    assert (sample.id, sample.image, sample.mask) == ("a 1", tmp_path / "frames/a 1.png", None)


def test_validation_asks_of_images_without_masks_only_that_they_can_be_read(data: Path, tmp_path: Path) -> None:
    summary = validate(data, tmp_path / "report")
    assert summary["success"] and summary["samples"] == {"train": 8, "val": 2, "test": 2, WITHOUT_MASKS: 3}
    assert summary["ignore_fraction"][WITHOUT_MASKS] is None and not summary["warnings"]
    assert f"| {WITHOUT_MASKS} | 3 |  |" in (tmp_path / "report/summary.md").read_text()
    (data / "images" / WITHOUT_MASKS / "0001.png").write_bytes(b"no image")
    with pytest.raises(Exception, match=r"unlabelled/0001\.png: not a JPEG or PNG file"):
        validate(data, tmp_path / "report")


def test_a_mask_of_an_image_that_is_to_have_none_is_warned_of(data: Path, tmp_path: Path) -> None:
    save(data / "masks" / WITHOUT_MASKS / "0001.png", np.zeros((8, 12), dtype=np.uint8))
    (finding,) = validate(data, tmp_path / "report")["warnings"]
    assert "0001.png (a mask in the split without masks)" in finding["sentences"][0]


def test_images_without_masks_are_imported_without_masks(data: Path, tmp_path: Path) -> None:
    counts = import_dataset("folder", data, tmp_path / "out", workers=1).samples
    assert counts == {"train": 8, "val": 2, "test": 2, WITHOUT_MASKS: 3}
    assert [*open_layout("folder", tmp_path / "out").splits] == [*LABELLED, WITHOUT_MASKS]
    assert not (tmp_path / "out/masks" / WITHOUT_MASKS).exists()


def test_a_part_of_the_training_images_keeps_its_labels_and_the_rest_has_none(data: Path, tmp_path: Path) -> None:
    prepared = {part: prepare(data, tmp_path / str(part), labelled=part) for part in (1.0, 0.5, 0.25)}
    splits = [read_dataset_info(folder).splits for folder in prepared.values()]
    assert [(split["train"], split[WITHOUT_MASKS]) for split in splits] == [(8, 3), (4, 7), (2, 9)]
    assert len({read_dataset_info(folder).content_hash for folder in prepared.values()}) == 3
    names = []
    for folder in prepared.values():
        train, unlabelled = ShardDataset(folder, "train"), ShardDataset(folder, WITHOUT_MASKS)
        assert all((unlabelled[index][1] == UNLABELLED).all() for index in range(len(unlabelled)))
        assert all((train[index][1] != UNLABELLED).all() for index in range(len(train)))
        names.append({train.sample_id(index) for index in range(len(train))})
    assert names[2] < names[1] < names[0], "a smaller part is a part of a larger one"


def test_a_finished_shard_of_stripped_images_is_not_taken_for_one_with_labels(data: Path, tmp_path: Path) -> None:
    whole = read_dataset_info(prepare(data, tmp_path / "whole", labelled=0.5)).content_hash
    prepare(data, tmp_path / "again", labelled=1.0)
    assert read_dataset_info(prepare(data, tmp_path / "again", labelled=0.5)).content_hash == whole


def test_any_beginning_of_the_labelling_order_has_each_class_in_about_its_share() -> None:
    random = np.random.default_rng(0)
    shares = np.array([0.9, 0.5, 0.2, 0.03])
    present = random.random((400, 4)) < shares
    present[:7] = False
    empty = set(np.flatnonzero(~present.any(1)).tolist())
    order = labelling_order(present)
    assert sorted(order) == list(range(400)) and set(order[-len(empty) :]) == empty, "images without a class come last"
    assert present[order[:4]].any(0).all(), "every class is there with as many images as classes"
    for count in (20, 50, 100, 200):
        parts = present[order[:count]].sum(0) / present.sum(0)
        assert (abs(parts - count / 400) < 0.25 * count / 400 + 1 / present.sum(0)).all(), (count, parts)


def test_a_batch_is_its_labelled_images_as_ever_and_then_others(data: Path, tmp_path: Path) -> None:
    prepared = prepare(data, tmp_path / "prepared", labelled=0.5)
    train, unlabelled = ShardDataset(prepared, "train"), ShardDataset(prepared, WITHOUT_MASKS)

    def batches(share: Share, start: int = 0, workers: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
        endless = training_batches(
            train, settings(), seed=5, share=share, first_iteration=start, workers=workers,
            beside=unlabelled if share.unlabelled else None,
        )  # fmt: skip
        return [next(endless) for _ in range(6)]

    alone, mixed = batches(Share(4)), batches(Share(4, unlabelled=2))
    for (images, labels), (some, their_labels) in zip(alone, mixed, strict=True):
        assert some.shape[0] == 6 and torch.equal(some[:4], images) and torch.equal(their_labels[:4], labels)
        assert set(their_labels[4:].unique().tolist()) <= {UNLABELLED, 255}
        assert UNLABELLED in their_labels[4:] and UNLABELLED not in labels
    for same in (batches(Share(4, unlabelled=2), workers=2), batches(Share(4, unlabelled=2), start=0)):
        assert all(
            torch.equal(one, other) for pair in zip(mixed, same, strict=True) for one, other in zip(*pair, strict=True)
        )
    later = batches(Share(4, unlabelled=2), start=3)
    assert torch.equal(later[0][0], mixed[3][0])
    halves = [batches(Share(4, rank=rank, world_size=2, unlabelled=2)) for rank in (0, 1)]
    parts = [half[0][0] for half in halves]
    order = [parts[0][:2], parts[1][:2], parts[0][2:], parts[1][2:]]
    assert torch.equal(torch.cat(order), mixed[0][0])


def test_images_without_labels_that_are_asked_for_and_not_there_are_one_sentence(tmp_path: Path) -> None:
    prepared = prepare(make_folder(tmp_path / "data"), tmp_path / "prepared")
    assert unlabelled_set(prepared, 0) is None
    with pytest.raises(
        Exception, match=r"^distill\.train\.unlabelled: 8, but .*dataset\.json has no split 'unlabelled'"
    ):
        unlabelled_set(prepared, 8)


def test_check_finds_that_the_data_have_no_images_without_labels(
    project: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    params = read_yaml(project / "params.yaml")
    params["distill"]["train"]["unlabelled"] = 8
    (project / "params.yaml").write_text(json.dumps(params))
    make_folder(project / "data")
    said = refused(capsys, "check")
    assert "distill.train.unlabelled: 8, but data has no images in the split 'unlabelled'" in said
    params["train_teacher"]["train"]["unlabelled"] = 8
    (project / "params.yaml").write_text(json.dumps(params))
    assert "a teacher learns from labels alone" in refused(capsys, "check")


def test_check_finds_a_weight_of_a_class_that_the_data_have_not(
    project: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    params = read_yaml(project / "params.yaml")
    params["distill"]["train"]["loss"] = {"class_weights": {"name": "given", "weights": {"rood": 2.0}}}
    (project / "params.yaml").write_text(json.dumps(params))
    make_folder(project / "data")
    said = refused(capsys, "check")
    assert "distill.train.loss.class_weights.weights: 'rood' is no class of the data set; did you mean 'road'?" in said
