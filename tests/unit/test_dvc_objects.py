"""What is believed of a DVC remote's objects before anything is written."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from segdistill.adapters.dvc_version import parse_list
from segdistill.adapters.objects import MissingObject, ObjectFolder
from segdistill.errors import UserError

MD5 = "0" * 32


def refusal(entries: Any) -> str:
    content = json.dumps(entries).encode()
    with pytest.raises(UserError) as caught:
        parse_list(content, f"{hashlib.md5(content).hexdigest()}.dir", "remote/list")
    assert str(caught.value).startswith("remote/list: ")
    return str(caught.value)


@pytest.mark.parametrize("content", [{}, [], None, "x", 3])
def test_an_object_that_lists_nothing_is_no_list(content: Any) -> None:
    assert refusal(content) == "remote/list: not a list of files, as dvc push writes it"


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a//b",
        "a/",
        "./a",
        "a\0b",
        "\ud800",
        "x" * 256,
        "a/" * 600 + "a",
        3,
        None,
        ["a"],
    ],
)
def test_a_path_that_is_no_file_below_the_folder_is_refused_by_name(path: Any) -> None:
    assert "is no path of a file below one folder" in refusal(
        [{"relpath": "a", "md5": MD5}, {"relpath": path, "md5": MD5}]
    )


def test_what_is_no_entry_or_has_no_md5_is_refused() -> None:
    assert "None is no path" in refusal(["a"])
    for md5 in (None, "xyz", MD5 + "0", "../" + MD5[3:], 0):
        assert f"'a' has the md5 {md5!r}" in refusal([{"relpath": "a", "md5": md5}])


def test_paths_that_exclude_each_other_are_refused() -> None:
    assert "names 'a' twice" in refusal([{"relpath": "a", "md5": MD5}, {"relpath": "a", "md5": "1" * 32}])
    assert "'a/b' is a file and a folder" in refusal([{"relpath": name, "md5": MD5} for name in ("a/b", "a/b/c")])


def test_a_list_is_compared_with_its_name_and_json_that_is_none_is_one_sentence() -> None:
    with pytest.raises(UserError, match="the list of files is corrupted: expected md5 0000"):
        parse_list(b"[]", f"{MD5}.dir", "here")
    for content in (b"[" * 100_000, b"\xff", b"[1" + b"0" * 5000 + b"]"):
        with pytest.raises(UserError, match=r"^here: not valid JSON"):
            parse_list(content, f"{hashlib.md5(content).hexdigest()}.dir", "here")


def test_only_a_regular_file_is_an_object(tmp_path: Path) -> None:
    store = ObjectFolder(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "a named pipe"), ("device", "a device"), ("folder", "a folder")):
        for read in (store.read, lambda key: store.download(key, tmp_path / "copy")):
            with pytest.raises(UserError, match=f"{name}: {kind}; expected a regular file"):
                read(name)
    with pytest.raises(MissingObject, match="nothing: no such object"):
        store.read("nothing")
