"""What images are built from: a base and a uv of one version, files of known hashes, and names that do not move.

No image is built here; ``make e2e`` does. A script stands for docker, and answers as its command line would.
"""

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.name.split(".")[0]: path.read_text() for path in (ROOT / "dockerfiles").glob("*.Dockerfile")}
DIGEST = {name: f"sha256:{letter * 64}" for name, letter in (("base", "b"), ("data", "d"), ("train", "e"))}

DOCKER = """#!/usr/bin/env bash
# Which images there are, as name and digest, stand in $FAKE/images; a push gives an image the digest in $FAKE/registry.
echo "$*" >> "$FAKE/calls"
last=${!#}
case "$1 $2" in
  "image inspect")
    line=$(grep -F "$last " "$FAKE/images") || exit 1
    [[ $* == *Size* ]] && echo 1000000
    [[ $* == *RepoDigests* ]] && echo "${line#* }"
    exit 0 ;;
  "pull --quiet") grep -F "$last " "$FAKE/registry" >> "$FAKE/images" ;;
  "push --quiet")
    grep -v -F "$last " "$FAKE/images" > "$FAKE/rest"; mv "$FAKE/rest" "$FAKE/images"
    name=${last%:*}; kind=${name##*segdistill-}
    echo "$last $(grep -F "${kind%%-*} " "$FAKE/registry" | sed "s|^[a-z]* |$name@|")" >> "$FAKE/images" ;;
  build*) while (($#)); do [[ $1 == --tag ]] && echo "$2 " >> "$FAKE/images"; shift; done ;;
esac
"""


class Docker:
    """The script, and what it was asked."""

    def __init__(self, folder: Path, images: str = "", registry: str = "") -> None:
        self.folder, self.program = folder, folder / "docker"
        self.program.write_text(DOCKER)
        self.program.chmod(stat.S_IRWXU)
        (folder / "images").write_text(images)
        (folder / "registry").write_text(registry)

    def build(self, **settings: str) -> tuple[dict[str, str], list[str]]:
        """The images' names by variable, and the base that each was built on."""
        own = {name: value for name, value in os.environ.items() if name not in ("BASE_IMAGE", "REGISTRY", "IMAGES")}
        done = subprocess.run(
            [ROOT / "dockerfiles/build"], capture_output=True, text=True, timeout=60,
            env={**own, "DOCKER": str(self.program), "FAKE": str(self.folder), **settings},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = [line.removeprefix("export ").split("  #")[0] for line in done.stdout.splitlines()]
        calls = (self.folder / "calls").read_text().splitlines()
        bases = [found[1] for call in calls if (found := re.search(r"^build .*BASE_IMAGE=(\S+)", call))]
        return dict(line.split("=", 1) for line in lines), bases


def test_all_images_of_a_call_are_built_on_the_digest_of_the_base(tmp_path: Path) -> None:
    default = re.findall(r"^ARG BASE_IMAGE=(\S+)$", FILES["train"], re.MULTILINE)[0]
    assert re.fullmatch(r"python:3\.11-slim-bookworm@sha256:[0-9a-f]{64}", default)
    docker = Docker(tmp_path, registry=f"python:3.11 python@{DIGEST['base']}\n")
    names, bases = docker.build()
    assert bases == [default] * 2
    assert docker.build(BASE_IMAGE="python:3.11")[1][2:] == [f"python@{DIGEST['base']}"] * 2
    assert list(names) == ["SEGDISTILL_IMAGE_DATA", "SEGDISTILL_IMAGE_TRAIN"]
    assert not any("@" in name for name in names.values())  # no registry has them yet


def test_a_base_of_this_machine_alone_and_one_that_is_given_by_digest_are_taken_as_they_are(tmp_path: Path) -> None:
    docker = Docker(tmp_path, images="segdistill-base:bookworm \n")
    assert docker.build(BASE_IMAGE="segdistill-base:bookworm", IMAGES="data")[1] == ["segdistill-base:bookworm"]
    given = f"python@{DIGEST['base']}"
    assert docker.build(BASE_IMAGE=given, IMAGES="data")[1][-1] == given
    assert "pull" not in (tmp_path / "calls").read_text()


def test_images_that_are_pushed_are_named_by_digest_as_the_pipeline_takes_them(tmp_path: Path) -> None:
    from components.images import fixed

    registry = f"data {DIGEST['data']}\ntrain {DIGEST['train']}\n"
    docker = Docker(tmp_path, images="base:1 \n", registry=registry)
    names, _ = docker.build(BASE_IMAGE="base:1", REGISTRY="registry.example:5000/team", PUSH="yes")
    for image in ("data", "train"):
        variable = f"SEGDISTILL_IMAGE_{image.upper()}"
        assert re.fullmatch(
            rf"registry\.example:5000/team/segdistill-{image}-python:\d\.\d\.\d-\w{{12}}@{DIGEST[image]}",
            names[variable],
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(variable, names[variable])
            assert fixed(variable, "") == names[variable]


def test_every_image_has_the_same_base_and_the_uv_of_the_makefile() -> None:
    assert set(FILES) == {"data", "train", "mlflow"}
    (uv,) = re.findall(r"^UV_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len({re.findall(r"^ARG BASE_IMAGE=(\S+)$", text, re.MULTILINE)[0] for text in FILES.values()}) == 1
    for name, text in FILES.items():
        assert f"\nARG UV_VERSION={uv}\n" in text, name
        assert re.findall(r"pip install .*\buv\S*", text) and not re.findall(
            r"pip install .*\buv(?!==\$\{UV_VERSION\})\b", text
        )
        bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
        assert set(bases) <= {"${BASE_IMAGE}", "libraries"}, name
        # An argument is known in the stages that name it.
        for stage in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]:
            for argument in ("UV_VERSION", "BASE_IMAGE"):
                body = stage[stage.index("\n") :]
                assert f"${{{argument}}}" not in body or f"\nARG {argument}\n" in body, f"{name}: {argument}"


def test_the_training_image_can_compile() -> None:
    assert re.search(r"apt-get install .* g\+\+ ", FILES["train"])
    assert "torch.compile(" in FILES["train"].rpartition("USER 1000")[2]  # tried as the user, when it is built


def test_every_package_of_the_lock_has_its_hashes_and_nothing_says_where_it_is_from() -> None:
    text = (ROOT / "requirements.lock").read_text()
    packages = text.replace("\\\n", " ").splitlines()
    assert len(packages) > 200
    for line in packages:
        assert re.fullmatch(r"[\w.-]+==[\w.+-]+( ;[^#]*?)?( +--hash=sha256:[0-9a-f]{64})+", line), line
    assert "://" not in text
