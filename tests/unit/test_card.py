"""The model card says what a stranger must know, and plainly whether the student was distilled."""

from segdistill.report import card
from segdistill.report.results import Comparison, Gain, Protocol, Row, SeedResult, Spread

CONTRACT = {"classes": [{"name": "road", "color": [0, 0, 0]}, {"name": "sky", "color": [9, 9, 9]}]}
MODEL = {"architecture": "Segformer", "encoder": "mit_b0", "encoder_weights": "none"}


def row(experiment: str, *, distilled: bool, gain: Gain | None = None) -> Row:
    seed = SeedResult(0, 0.41, 0.9, 0.4, 80, 1.0, None, None, "abc")
    return Row(
        experiment=experiment, student="vit", methods=("kd",) if distilled else (), distilled=distilled,
        reference="none" if distilled else None, equal_time_reference=None, seeds=(seed,), diverged=(),
        test_miou=Spread(0.41, None), val_miou=None, test_pixel_accuracy=None,
        per_class_iou={"road": 0.8, "sky": 0.02}, views={}, params=3_700_000, macs=10**9, latency_ms=12.0,
        images_per_second=None, training_seconds=None, step_seconds=None, gain=gain, equal_time_gain=None,
    )  # fmt: skip


def written(network: Row, others: tuple[Row, ...] = (), data_licence: str | None = None) -> str:
    splits = {"train": 5, "test": 3}
    protocol = Protocol((0,), (80,), ("road", "sky"), splits, (96, 128), None, 0.95, 1, "d" * 64, "t" * 64)
    teacher = row("teacher", distilled=False)
    results = Comparison(teacher, (network, *others), ("kd", "vit"), protocol, ("few images",), True)
    found, seed = card.find(results, network.experiment, "vit", 0)
    return card.model_card(
        results, found, seed, contract=CONTRACT, model=MODEL, data_md5="m5", name="student",
        data_licence=data_licence,
        files={"onnx/model.onnx": "for onnxruntime"},
    )  # fmt: skip


def test_a_card_says_task_data_score_gain_classes_limits_and_how_to_load() -> None:
    gain = Gain(0.013, 0.004, 0.022, 0.01, 2.0, (0,), (0.013,), per_class={})
    text = written(row("kd", distilled=True, gain=gain), (row("none", distilled=False),))
    for words in (
        "Distilled by kd.", "| task | semantic segmentation", "Segformer over mit_b0", "version m5", "5 train, 3 test",
        "+1.30 [+0.40, +2.20] points of 'none' (41.0 %)", "95 % interval", "| road | 80.0 |",
        "Poor at (IoU below 30 %): sky",
        "* few images", "models:/student@champion", "`onnx/model.onnx`: for onnxruntime",
        "| licence of the data | not stated", "| licence of the teacher's weights | not stated",
    ):  # fmt: skip
        assert words in text, words


def test_a_card_has_the_licence_of_the_data_in_the_words_of_params() -> None:
    text = written(row("none", distilled=False), data_licence="CC BY 4.0")
    assert "| licence of the data | CC BY 4.0; it binds the use of this network |" in text


def test_a_champion_that_was_not_distilled_says_so_first() -> None:
    text = card.decided(written(row("none", distilled=False)), "champion", "there was no champion")
    lines = [line for line in text.splitlines() if line]
    assert lines[1] == "**Champion**: there was no champion."
    assert lines[2].startswith("**This student was not distilled**")


def test_a_card_that_is_too_long_for_the_database_says_where_the_rest_is() -> None:
    text = card.description("line\n" * 2000, "card/card.md")
    assert len(text) <= 5000 and text.endswith("The rest stands in card/card.md.\n")
    assert card.description("short", "card/card.md") == "short"
