# ruff: noqa: E501
"""params.yaml and the presets: every shipped configuration loads, and every slip in one is named."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from _folders import make_folder
from hypothesis import given, settings
from hypothesis import strategies as st

from segdistill.config import flatten, read_yaml
from segdistill.errors import UserError
from segdistill.execution import check_params
from segdistill.plan import ExperimentConfig, Job, cohorts, jobs, parse_methods

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_loads_with_its_methods(path: Path) -> None:
    from segdistill.config import parse

    params = read_yaml(path)
    check_params(params)
    for name, experiment in params["experiments"].items():
        parse_methods(name, parse(ExperimentConfig, experiment, name))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_configuration_has_the_undistilled_student_of_each_experiment(path: Path) -> None:
    params = read_yaml(path)
    alone = [
        entry["students"]
        for name, entry in params["experiments"].items()
        if not entry["methods"] and name in params["run"]
    ]
    for name in params["run"]:
        for student, entry in params["experiments"][name]["students"].items():
            assert {student: entry} in alone, f"{name}: nobody trained its '{student}' without distillation"


def changed(path: str, value: Any, *, rename: str = "") -> dict[str, Any]:
    """params.yaml with one key set, or renamed."""
    params = json.loads(json.dumps(read_yaml(ROOT / "params.yaml")))  # anchors become copies
    *parents, last = path.split(".")
    section: Any = params
    for part in parents:
        section = section[part]
    if rename:
        section[rename] = section.pop(last)
    else:
        section[last] = value
    return params


@pytest.mark.parametrize(
    ("path", "rename", "sentence"),
    [
        ("distill", "destill", "destill: unknown section; did you mean 'distill'?"),
        ("train_teacher.optimizer.lr", "lrr", "train_teacher.optimizer.lrr: unknown key; did you mean 'lr'?"),
        ("train_teacher.train.batch_size", "batchsize", "train_teacher.train.batchsize: unknown key; did you mean 'batch_size'?"),
        ("experiments.kd.students.cnn.model.encoder", "encodr", "experiments.kd.students.cnn.model.encodr: unknown key; did you mean 'encoder'?"),
        ("distill.train.augmentation.flip", "flips", "distill.train.augmentation.flips: unknown key; did you mean 'flip'?"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_named_with_its_neighbour(path: str, rename: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        check_params(changed(path, None, rename=rename))
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("path", "value", "part"),
    [
        ("distill.train.iterations", "many", "distill.train.iterations: input should be a valid integer"),
        ("distill.train.seconds", 5.0, "give the budget either as iterations or as seconds"),
        ("distill.train.precision", "fp8", "distill.train.precision: 'fp8' is not allowed; allowed: 'fp32', 'bf16' or 'fp16'"),
        ("train_teacher.optimizer.name", "adma", "train_teacher.optimizer.name: unknown name 'adma'; did you mean 'adam'?"),
        ("seeds", [1, 0, 1], "seeds: repeats 1; each may stand there once"),
        ("seeds", [], "seeds: empty; name at least one"),
        ("run", ["none", "kdd"], "run: 'kdd' is not defined under experiments; did you mean 'kd'?"),
        ("evaluate.overlays", -1, "evaluate.overlays: input should be greater than or equal to 0"),
        ("seeds", [-1], "seeds.0: input should be greater than or equal to 0, not -1"),
        ("seeds", [2**32], "seeds.0: input should be less than or equal to 4294967295, not 4294967296"),
        ("seeds", [True], "seeds.0: input should be a valid integer, not True"),
        ("seeds", ["1"], "seeds.0: input should be a valid integer, not '1'"),
        ("train_teacher.seed", -1, "train_teacher.seed: input should be greater than or equal to 0"),
        ("compare.block", 2**64, "compare.block: an integer of more than 64 bits"),
        ("run", ["none", "None"], "run: 'none' and 'None' differ in upper and lower case alone"),
        ("run", "none", "run: input should be a valid array, not 'none'"),
        ("run", [{"kd": 1}], "run.0: input should be a valid string"),
        ("register.student", "vitt", "register.student: no experiment under run trains a 'vitt'; did you mean 'vit'?"),
        ("prepare.layout", "foldr", "prepare.layout: unknown layout 'foldr'; did you mean 'folder'?"),
        ("prepare.layout", "camvid", "prepare.layout: 'camvid', but validate.layout is 'folder'; make them equal"),
        ("train_teacher.model.encoder", "resnet81", "train_teacher.model.encoder: unknown encoder 'resnet81'; did you mean"),
        ("experiments.kd.students.cnn.model.architecture", "UNet", "experiments.kd.students.cnn.model.architecture: 'UNet' is not allowed; allowed: "),
        ("experiments.kd.students.cnn.model.output_stride", 32, "experiments.kd.students.cnn.model.output_stride: 32 is not possible"),
        ("experiments.kd.students.cnn.model.decoder", {"chanels": 1}, "experiments.kd.students.cnn.model.decoder.chanels: unknown key"),
        ("experiments.kd.students.cnn.model.decoder", {"decoder_channels": 10**9}, "model.decoder.decoder_channels: 1000000000 is not in 0..8192"),
        ("experiments.kd.methods", [{"name": "kd", "temprature": 2}], "experiments.kd.methods.0.temprature: unknown key; did you mean 'temperature'?"),
        ("experiments.none.supervised", 0, "experiments.none.supervised: 0, and no method has a weight: nothing would train the student"),
        ("experiments.none.pseudo_labels", 0.9, "experiments.none.pseudo_labels: 0.9, and no method that learns from them; use null"),
        ("experiments.none.budget", 0, "experiments.none.budget: input should be greater than or equal to 0.001, not 0"),
        ("prepare.labelled", 0, "prepare.labelled: input should be greater than 0, not 0"),
        ("train_teacher.train.unlabelled", 8, "train.unlabelled: 8, but a teacher learns from labels alone; use 0"),
        ("experiments.hfd_bsd.students", "*cnn", "experiments.hfd_bsd: hfd_bsd"),
        ("distill.train.augmentation.scale", [1.5, 0.5], "distill.train.augmentation: scale [1.5, 0.5]: the first bound is above the second"),
        ("distill.train.batch_size", 1e30, "distill.train.batch_size: input should be a valid integer"),
        ("train_teacher.optimizer.lr", 1e-320, "train_teacher.optimizer.lr: input should be greater than or equal to"),
        ("train_teacher.optimizer.lr", 1e308, "train_teacher.optimizer.lr: input should be less than or equal to 100"),
        ("train_teacher.optimizer.lr", float("nan"), "train_teacher.optimizer.lr: nan is no number"),
        ("experiments.kd.methods", [{"name": "kd", "temperature": 1e308}], "experiments.kd.methods.0.temperature: input should be less than or equal to 1000"),
        ("evaluate.inference.window_stride", 1e-4, "evaluate.inference.window_stride: input should be greater than or equal to 0.1"),
        ("compare.block", 10**9, "compare.block: input should be less than or equal to 1000000"),
        ("compare.resamples", 1000, "compare.resamples: unknown key; allowed: confidence, block, "),
        ("distill.train.iterations", True, "distill.train.iterations: input should be a valid integer, not True"),
        ("distill.train.compile", "yes", "distill.train.compile: input should be a valid boolean, not 'yes'"),
        ("train_teacher.model.output_stride", 12, "train_teacher.model.output_stride: 12 is not allowed; allowed: 8, 16 or 32"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_is_allowed(path: str, value: Any, part: str) -> None:
    params = changed(path, value)
    if value == "*cnn":  # two of what params.yaml calls so
        params = changed(path, dict.fromkeys(("a", "b"), params["experiments"]["none"]["students"]["cnn"]))
    with pytest.raises(UserError) as caught:
        check_params(params)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_batch_of_more_pixels_than_a_forward_pass_takes_is_refused() -> None:
    params = changed("distill.train.batch_size", 8)
    params["distill"]["train"]["augmentation"]["crop_size"] = [16384, 16384]
    with pytest.raises(UserError, match="8 crops of 16384 x 16384 in one forward pass are more than"):
        check_params(params, networks="named")


NO_NAMES = [
    "kd;touch X #",
    "a b",
    "$(touch X)",
    "-x",
    "a.b",
    "../x",
    "a/b",
    "",
    "1",
    "é",
    "a\n",
    "x" * 41,
    "Teacher",
    "metrics",
]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_cannot_be_a_folder_a_shell_word_and_a_key_names_no_experiment_and_no_student(name: str) -> None:
    experiments = read_yaml(ROOT / "params.yaml")["experiments"]
    students = {name: experiments["none"]["students"]["cnn"]}
    for params in (
        changed("experiments", experiments | {name: experiments["kd"]}),
        changed("run", ["none", name]),
        changed("experiments.kd.students", students),
    ):
        with pytest.raises(UserError, match=r"cannot be a name; a name is a letter|is taken"):
            check_params(params, networks="named")
    with pytest.raises(UserError):
        jobs([name], [0])


def test_a_student_has_no_name_that_torch_uses_for_itself() -> None:
    students = {"train": read_yaml(ROOT / "params.yaml")["experiments"]["none"]["students"]["cnn"]}
    with pytest.raises(UserError, match=r"experiments.kd.students.train: the name 'train' is taken"):
        check_params(changed("experiments.kd.students", students), networks="named")


def test_files_that_are_named_must_be_there_where_the_training_is_here(tmp_path: Path) -> None:
    for path, value, sentence in [
        ("train_teacher.model.encoder_weights", "gone.safetensors", "train_teacher.model.encoder_weights: gone.safetensors: no such file"),
        ("train_teacher.import_from", "gone", "train_teacher.import_from: gone: no such folder"),
        ("evaluate.out_of_domain", {"data": "gone", "layout": "folder"}, "evaluate.out_of_domain.data: gone: no such folder"),
        ("experiments.c2vkd_ce.methods", [{"name": "c2vkd", "pool": "clip", "pool_weights": "gone.safetensors"}], "experiments.c2vkd_ce.methods.0: gone.safetensors: no such file"),
    ]:  # fmt: skip
        check_params(changed(path, value))
        with pytest.raises(UserError, match=sentence):
            check_params(changed(path, value), here=True)


def test_classes_of_a_second_test_set_are_checked_where_both_sets_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "data")
    make_folder(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    second = {"data": "elsewhere", "layout": "folder", "classes": {"car": "cars"}}
    with pytest.raises(UserError, match=r"evaluate\.out_of_domain\.classes\.car: no class of ours is 'cars'"):
        check_params(changed("evaluate.out_of_domain", second), here=True)
    check_params(changed("evaluate.out_of_domain", second | {"classes": {"car": "car"}}), here=True)
    check_params(changed("evaluate.out_of_domain", second), networks="named", here=True)  # that it is there is enough


# What a params file may be made of, in junk that looks like one.
JUNK: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=3) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
PATHS = [".".join(path.split(".")) for path in flatten(read_yaml(ROOT / "params.yaml"))]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(path=st.sampled_from(PATHS), depth=st.integers(1, 9), junk=JUNK)
def test_junk_anywhere_in_params_yaml_is_in_order_or_refused_in_one_sentence(path: str, depth: int, junk: Any) -> None:
    params: Any = json.loads(json.dumps(read_yaml(ROOT / "params.yaml")))
    *parents, last = path.split(".")[:depth]
    section = params
    for part in parents:
        section = section[int(part) if isinstance(section, list) else part]
    section[int(last) if isinstance(section, list) else last] = junk
    try:
        check_params(params, networks="named")
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 2000


@settings(max_examples=50, deadline=None, derandomize=True)
@given(junk=JUNK)
def test_junk_for_params_yaml_is_refused_in_one_sentence(junk: Any) -> None:
    with pytest.raises(UserError):
        check_params(junk)


def test_a_missing_section_is_named() -> None:
    params = read_yaml(ROOT / "params.yaml")
    del params["compare"]
    with pytest.raises(UserError, match="compare: missing"):
        check_params(params)


def test_an_unknown_method_and_a_wrong_mix_are_refused() -> None:
    from segdistill.config import parse

    def experiment(name: str, methods: list[dict[str, Any]]) -> ExperimentConfig:
        entry = read_yaml(ROOT / "params.yaml")["experiments"][name] | {"methods": methods}
        return parse(ExperimentConfig, entry, name)

    for name, methods, sentence in [
        ("kd", [{"name": "kdd"}], "experiments.kd.methods.0.name: unknown method 'kdd'; did you mean 'kd'?"),
        ("kd", [{"name": "kd", "temprature": 2}], "experiments.kd.methods.0.temprature: unknown key; did you mean 'temperature'?"),
        ("kd", [{"name": "dml"}], "online methods need two students or more, not 1"),
        ("dml", [{"name": "kd"}], "offline methods teach one student, not 2"),
        ("dml", [{"name": "kd"}, {"name": "dml"}], "offline and online methods do not go together"),
        ("dml", [], "2 students and no method between them"),
    ]:  # fmt: skip
        with pytest.raises(UserError) as caught:
            parse_methods(name, experiment(name, methods))
        assert sentence in str(caught.value)


def test_the_matrix_is_every_experiment_with_every_seed() -> None:
    assert jobs(["a", "b"], [3, 1]) == [Job("a", 3), Job("a", 1), Job("b", 3), Job("b", 1)]


def test_a_cohort_is_all_jobs_of_a_seed_or_a_part_of_them() -> None:
    run, seeds = ["a", "b", "c"], [3, 1]
    assert cohorts(run, seeds) == {f"s{seed}": [Job(name, seed) for name in run] for seed in seeds}
    assert {name: "".join(job.experiment for job in members) for name, members in cohorts(run, seeds, 2).items()} == {
        "s3-0": "ab", "s3-1": "c", "s1-0": "ab", "s1-1": "c",
    }  # fmt: skip
    assert [len(members) for members in cohorts(run, seeds, 1).values()] == [1] * 6


def test_who_needs_no_network_imports_none_for_a_look_at_params_yaml() -> None:
    script = (
        "import sys, pathlib; from segdistill.config import read_yaml; from segdistill.execution import check_params;"
        "check_params(read_yaml(pathlib.Path('params.yaml')), networks='ignored', here=True);"
        "print([name for name in ('timm', 'segmentation_models_pytorch', 'mlflow') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
