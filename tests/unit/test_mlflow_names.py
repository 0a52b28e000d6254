"""No two names become one, and MLflow takes every one of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segdistill.adapters.mlflow_names import file_name, metric_name, model_name, shortened

validation = pytest.importorskip("mlflow.utils.validation")
CLASSES = [
    "tree (<1m)", "tree (>1m)", "tree _<1m_", "tree __1m_", "a/b", "a_b", "a//b", "a/./b", "/a", "a/", ".", "..", "",
    "Tree", "tree", "été", "ete", "e\u0301te", "路", "road\n", "road", "road ", "x" * 300, "x" * 301,
    "x" * 250, "a%b", "a'b", 'a"b',
    metric_name("tree (<1m)"),
]  # fmt: skip


@pytest.mark.parametrize("rename", [metric_name, file_name, model_name])
def test_different_names_stay_different(rename) -> None:
    renamed = [rename(name) for name in CLASSES]
    assert len(set(renamed)) == len(CLASSES)
    assert renamed == [rename(name) for name in CLASSES], "the same in every run"
    assert rename("road") == "road"


def test_a_renamed_class_can_still_be_read() -> None:
    assert metric_name("test/iou/tree (<1m)").startswith("test/iou/tree __1m_-")
    assert metric_name("test/iou/traffic light") == "test/iou/traffic light"
    assert metric_name("test/iou/Straße") == "test/iou/Straße"


@settings(deadline=None)
@given(st.text(max_size=300) | st.lists(st.sampled_from(["a", "/", ".", "..", " ", "_", "-", ":"])).map("".join))
def test_mlflow_takes_every_name(name: str) -> None:
    validation._validate_metric_name(metric_name(name))
    validation._validate_metric_name(metric_name(f"test/iou/{name}"))
    validation._validate_param(metric_name(name), "1")
    validation._validate_tag(metric_name(name), "1")
    validation._validate_logged_model_name(model_name(name))
    assert file_name(name).strip(".") and "/" not in file_name(name) and len(file_name(name).encode()) <= 100


def test_long_texts_that_differ_at_their_end_stay_different() -> None:
    one, other = shortened("x" * 7000 + "a", 6000), shortened("x" * 7000 + "b", 6000)
    assert one != other
    assert max(len(one), len(other)) <= 6000
    assert shortened("x" * 6000, 6000) == "x" * 6000
