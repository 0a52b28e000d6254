"""The benchmarks run, at sizes that mean nothing, and compare what is equal."""

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]


def benchmark(name: str) -> ModuleType:
    """A benchmark as a module; its neighbours are found as they are when it is run as a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module(name)


losses, step, loading, coverage, memory = (
    benchmark(name) for name in ("losses", "step", "loading", "coverage", "memory")
)
dense, cost = benchmark("_dense"), benchmark("_cost")
CPU = torch.device("cpu")


def tables(printed: str) -> list[list[list[str]]]:
    """The cells of each Markdown table, without the line under its header."""
    found: list[list[list[str]]] = [[]]
    for line in printed.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [[table[0], *table[2:]] for table in found if table]


@pytest.mark.parametrize("name", ["apd", "c2vkd", "cirkd", "dist", "dkd", "ifvd", "skd"])
def test_straightforward_code_has_the_value_and_gradient_of_the_method(name: str) -> None:
    for one in dense.DENSE[name]:
        losses.agree(name, one, CPU)


def test_another_formula_is_not_timed_as_if_it_were_the_same() -> None:
    other = dense.Dense(("kl",), lambda method, student, teacher, target: F.mse_loss(student.logits, teacher.logits))
    with pytest.raises(AssertionError, match="kd, kl: "):
        losses.agree("kd", other, CPU)


def test_the_cost_of_methods_is_printed_for_each_setting(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--size", "32", "64", "--repeats", "1", "--device", "cpu"]
    losses.main([*common, "--settings", "cityscapes/8", "ade20k/4", "--methods", "kd", "dist", "skd", "dml"])
    printed = capsys.readouterr().out
    assert "batch 2, fp32, cpu" in printed and "crop 32x64, 150 classes, logits and last feature 8x16" in printed
    first, second = tables(printed)
    for table in (first, second):
        assert table[0] == losses.HEADER
        assert [row[0] for row in table[1:]] == ["kd", "dist", "skd", "skd: pairwise, stride2", "dml"]
        assert table[1][2] == "1.00" and table[1][-1] == "-" and float(table[2][-1]) > 0
        assert all(float(row[1]) > 0 and float(row[3]) >= 0 for row in table[1:])


def test_memory_of_a_quadratic_map_follows_its_block_rows(capsys: pytest.CaptureFixture[str]) -> None:
    losses.main(["--blocks", "--methods", "skd", "--size", "384", "384", "--repeats", "1", "--device", "cpu"])
    (table,) = tables(capsys.readouterr().out)
    assert [row[1] for row in table[1:]] == ["128", "512", "2048", "all", "straightforward"]
    peaks = [float(row[3]) for row in table[1:]]
    assert peaks[0] < peaks[1] < peaks[4]  # of 576 nodes


def test_peak_memory_counts_what_is_alive_at_one_time() -> None:
    given = torch.zeros(2**18)  # 1 MiB, there before

    def action() -> None:
        first = given + 1
        second = first * 2
        del first
        third = second + given
        del second, third

    assert cost.peak_bytes(action, CPU) == pytest.approx(2 * 2**20, abs=64)  # and the numbers 1 and 2
    assert cost.peak_bytes(lambda: given.add_(1), CPU) < 64


def test_a_loss_at_label_size_holds_no_map_of_all_images_in_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    losses.main(["--maps", "--batch", "8", "--smaller", "32"])
    (table,) = tables(capsys.readouterr().out)
    held = {row[0]: [float(cell) for cell in row[1:5]] for row in table[1:]}
    for label in ("cross-entropy", "apd: global", "c2vkd: pdd", "hfd_bsd: region, pixel", "kd, upsample"):
        whole_held, held_in_blocks, whole_peak, peak_in_blocks = held[label]
        assert held_in_blocks < whole_held and peak_in_blocks < whole_peak / 2, label


def test_memory_over_time_is_that_of_a_process_and_its_children_by_quarters() -> None:
    readings = [(0.0, 10.0), (1.0, 20.0), (3.0, 50.0), (4.0, 30.0)]
    assert memory.row("prepare", readings) == ["prepare", "4", "20", "20", "50", "50", "50"]
    if not Path("/proc/self/status").exists():
        pytest.skip("/proc is Linux's")
    before = memory.own_memory(os.getpid())
    blob = bytearray(os.urandom(2**26))
    assert memory.own_memory(os.getpid()) > before + 60 and len(blob) == 2**26
    assert memory.own_memory(2**22 + 1) == 0.0  # above the largest number of a process


def test_what_would_take_too_long_is_projected_from_smaller_crops() -> None:
    def part(times: int) -> Callable[[], Tensor]:
        pixels = (64 // times) ** 2
        return lambda: torch.zeros(pixels, pixels)  # a map of pixels by pixels, in float32

    found = cost.Clock(CPU, limit=0).projected(part, blocked=False)
    assert found.projected and found.peak == 4 * (64 * 64) ** 2 and found.mebibytes == "~64.0"
    assert cost.Clock(CPU, limit=600).projected(part, blocked=False) is None


def test_a_step_is_measured_for_methods_and_for_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--params", str(ROOT / "params.yaml"), "--steps", "1", "--size", "32", "32", "--batch", "2"]
    step.main([*common, "--device", "cpu", "--methods", "kd", "dml"])
    step.main([*common, "--device", "cpu", "--experiments", "none", "--precision", "bf16"])
    methods, experiments = tables(capsys.readouterr().out)
    assert [row[0] for row in methods] == ["method", "kd", "dml"]
    assert [row[0] for row in experiments] == ["experiment", "none"]
    assert all(float(row[3]) > 0 for row in (*methods[1:], *experiments[1:]))


@pytest.mark.parametrize("file", ["params.yaml", "benchmarks/full_size.yaml"])
def test_every_method_has_a_place_between_the_networks_of_params(file: str) -> None:
    params = step.read_yaml(ROOT / file)
    experiments = step.of_methods(params, ["kd", "c2vkd", "dml"])
    assert [list(one["students"]) for one in experiments.values()] == [["cnn"], ["vit"], ["cnn", "vit"]]
    assert experiments["c2vkd"]["methods"] == [{"name": "c2vkd"}]


def test_the_cost_of_samples_is_measured_by_step_and_end_to_end(
    tiny_prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = ["--params", str(ROOT / "params.yaml"), "--prepared", str(tiny_prepared), "--data", str(tmp_path / "none")]
    small = ["--crop", "32", "32", "--batch", "2", "--reads", "2", "--steps", "1", "--rounds", "1", "--device", "cpu"]
    loading.main([*paths, *small, "--experiments", "none", "--cache", "0", "--workers", "1"])
    printed = capsys.readouterr().out
    steps, experiments = tables(printed)
    assert [row[0] for row in steps[-3:]] == ["whole, before", "whole, nothing kept", "whole"]
    assert "1 workers, 0 GiB of samples kept" in printed and experiments[1][0] == "none"
    assert all(float(cell) > 0 for cell in experiments[1][1:])


def test_each_form_of_the_data_is_timed_against_the_files(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # for its worker processes
    small = ["--streets", "64", "96", "--samples", "2", "--crop", "32", "32", "--scale", "0.5", "2", "--batch", "2"]
    forms = ["--forms", "jpeg", "decoded", "--worker-counts", "0", "1", "--reads", "2", "--rounds", "1"]
    loading.main([*small, *forms, "--device", "cpu"])
    steps, rates = tables(capsys.readouterr().out)
    ways = ["files, DataLoader and torchvision", "files, our augmentation", "shards, jpeg", "shards, decoded"]
    assert [row[0] for row in rates[1:]] == ways
    assert steps[3][0] == "shards, decoded: read and decode"
    assert all(float(cell.split()[0]) > 0 for row in rates[1:] for cell in row[1:])


@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_hold_and_equal_methods_seldom_differ(seeds: int) -> None:
    for world in ("alike", "unlike"):
        measured = coverage.measure(coverage.WORLDS[world], "comparison", trials=100, rows=4, seeds=seeds, images=40)
        assert measured.coverage > 0.92  # of 400, promised 0.95
        assert measured.false_alarms < 0.12  # promised 0.05; three standard errors are 0.065


def test_what_the_comparison_does_not_do_is_shown_to_be_too_narrow() -> None:
    world, sizes = coverage.WORLDS["alike"], {"trials": 30, "rows": 4, "seeds": 3, "images": 40}
    alarms = {name: coverage.measure(world, name, **sizes).false_alarms for name in coverage.INTERVALS}
    assert alarms["bootstrap of images"] > alarms["bootstrap of images and seeds"] > alarms["comparison"] + 0.1


def test_the_coverage_is_printed_for_each_world(capsys: pytest.CaptureFixture[str]) -> None:
    coverage.main(["--trials", "2", "--seeds", "3", "--rows", "2", "--images", "40"])
    (table,) = tables(capsys.readouterr().out)
    assert {row[0] for row in table[1:]} == {f"3: {world}" for world in coverage.WORLDS}
    assert len(table) == 1 + 2 + 2 * len(coverage.WORLDS)
