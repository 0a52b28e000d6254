"""docs/quickstart.md, word for word, on a folder of one's own photos; README's "Your own data" is its beginning."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from model_server import model_server
from PIL import Image

from segdistill import streets
from segdistill.__main__ import main
from segdistill.config import read_yaml
from segdistill.files import read_json
from segdistill.search import round_trip_yaml

ROOT = Path(__file__).resolve().parents[2]


def commands(name: str, heading: str = "") -> list[str]:
    """The indented lines of a page, or of one of its sections."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if heading:
        text = text.split(f"## {heading}")[1].split("\n## ")[0]
    return re.findall(r"^    (\S.*)$", text, re.MULTILINE)


def test_one_s_own_data_are_three_commands_on_the_front_page_and_in_the_first_hour() -> None:
    given = commands("README.md", "Your own data")
    assert [command.split()[:2] for command in given] == [["segdistill", "init"], ["dvc", "add"], ["dvc", "repro"]]
    first = commands("docs/quickstart.md")[:3]
    assert [re.sub(r"--time \w+", "", command) for command in first] == [
        re.sub(r"--time \w+", "", command) for command in given
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_hour_leads_from_photos_to_a_server_that_answers_with_a_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = {"train": 24, "val": 3, "test": 3}
    streets.write(tmp_path / "made", seed=5, size=(96, 64), samples=samples, workers=1)
    for kind in ("images", "masks"):
        (tmp_path / "streets" / kind).mkdir(parents=True)
        for path in sorted((tmp_path / "made" / kind).rglob("*.*")):
            name = tmp_path / "streets" / kind / path.stem
            picture = Image.open(path)
            picture.convert("RGB").save(f"{name}.jpg") if kind == "images" else picture.save(f"{name}.png")
    clone = tmp_path / "clone"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for file in filter(None, files):
        if (ROOT / file).is_file():
            (clone / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, clone / file)
    bins = Path(sys.executable).parent
    environment = os.environ | {"HOME": str(tmp_path), "PATH": f"{bins}:{os.environ['PATH']}", "PYTHONPATH": str(clone)}
    identity = "-c user.name=A -c user.email=a@example.com"

    def run(command: str) -> str:
        done = subprocess.run(["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def in_this_process(command: str) -> str:
        """A line that starts segdistill, without the seconds in which a process of its own would import torch."""
        program, *words = shlex.split(command)
        assert (
            program == "segdistill"
            and main([str(Path(word).expanduser()) if word[0] == "~" else word for word in words]) == 0
        ), command
        return capsys.readouterr().out

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    run(f"git init --quiet && git add --all && git {identity} commit --quiet --message start")
    monkeypatch.chdir(clone)
    init, add, repro, predict, export, serve, *ask = commands("docs/quickstart.md")
    assert "30 images: train 21" in in_this_process(init)
    params = round_trip_yaml().load((clone / "params.yaml").read_text())
    assert "c2vkd_ce" in params["run"]
    # A budget of seconds instead of minutes, and the student that is written as ONNX in a third of the time.
    params["seeds"], params["run"] = [0], ["none", "kd"]
    for section in ("train_teacher", "distill"):
        params[section]["train"] |= {"iterations": 4, "validate_every": 2, "checkpoint_every": 2, "log_every": 1}
    with (clone / "params.yaml").open("w") as file:
        round_trip_yaml().dump(params, file)
    run(add)
    run(repro)
    assert (clone / "reports/comparison/report.html").is_file()
    assert read_json(clone / "reports/registration/registration.json")["student"] == "cnn"
    assert read_yaml(clone / "data.dvc")["outs"][0]["path"] == "data"

    in_this_process(predict)
    assert len(list((clone / "masks/masks").glob("*.png"))) == 30
    in_this_process(export)
    assert (clone / "student.onnx").is_file()
    with model_server(serve.removesuffix("&"), clone, environment) as port:
        for command in ask:
            run(command.replace("5001", port))
    photo = Image.open(next((tmp_path / "streets/images").glob("train*.jpg")))
    assert Image.open(clone / "mask.png").size == photo.size
