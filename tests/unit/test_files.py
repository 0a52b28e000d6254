import hashlib
import json
import os
import subprocess
import sys

import pytest

from segdistill.errors import UserError
from segdistill.files import (
    lock,
    new_folder,
    parse_json,
    read_bytes,
    read_json,
    read_sealed,
    read_text,
    require_regular,
    seal,
)


def test_a_pipe_and_a_device_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name, kind in (("pipe", "a named pipe"), ("endless", "a device")):
        for read in (read_bytes, require_regular):
            with pytest.raises(UserError, match=f"{name}: {kind}; expected a regular file"):
                read(tmp_path / name)
    with pytest.raises(UserError, match="a folder"):
        read_bytes(tmp_path)


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"sparse: 1048576\.0 MiB; at most 64 MiB are read"):
        read_bytes(tmp_path / "sparse")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa b")
    assert read_text(tmp_path / "list.txt") == "a b"
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 text"):
        read_text(tmp_path / "latin.txt")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' twice"),
        ('{"a": NaN}', "NaN is no number"),
        ("1e999", "too large"),
        ("9" * 5000, "an integer of more than 4300 digits"),
        ("[" * 100000, "nested too deeply"),
        ("{", "Expecting property name"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_what_is_no_sane_json_is_one_sentence(text, reason):
    with pytest.raises(UserError, match=reason):
        parse_json(text, "file.json")


def test_a_message_about_json_ends_with_how_to_mend_it(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.json: not valid JSON: .*; run the stage 'x' again$"):
        read_json(tmp_path / "a.json", mend="run the stage 'x' again")


def test_a_sealed_file_is_read_only_as_it_was_sealed(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a").write_bytes(b"content")
    (tmp_path / "big").mkdir()
    (tmp_path / "big/shard").write_bytes(b"has a check of its own")
    seal(tmp_path, leave=["big"])
    assert json.loads((tmp_path / "checksums.json").read_text()) == {"sub/a": hashlib.sha256(b"content").hexdigest()}
    assert read_sealed(tmp_path, "sub/a", mend="x") == b"content"
    (tmp_path / "sub/a").write_bytes(b"contenu")
    with pytest.raises(UserError, match=r"sub/a: damaged: .*; run 'x' again"):
        read_sealed(tmp_path, "sub/a", mend="run 'x' again")
    (tmp_path / "new").write_bytes(b"")
    with pytest.raises(UserError, match="new: damaged"):
        read_sealed(tmp_path, "new", mend="x")


def test_the_second_process_in_a_folder_hears_who_has_it(tmp_path):
    script = (
        "import sys; from pathlib import Path; from segdistill.files import lock\n"
        f"with lock(Path({str(tmp_path / 'out')!r}), 'prepare'):\n    print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with (
            pytest.raises(UserError, match=f"out: in use by prepare .process {holder.pid} on "),
            lock(tmp_path / "out", "x"),
        ):
            pass
        holder.kill()
        holder.wait()
        with lock(tmp_path / "out", "x"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_a_folder_stays_and_what_it_leads_to_is_replaced(tmp_path):
    for name in ("there", "not yet"):
        (tmp_path / "disk").mkdir(exist_ok=True)
        if name == "there":
            (tmp_path / "disk" / name).mkdir()
            (tmp_path / "disk" / name / "old").touch()
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        with new_folder(tmp_path / name) as partial:
            (partial / "new").touch()
        assert (
            (tmp_path / name).is_symlink()
            and (tmp_path / name / "new").is_file()
            and not (tmp_path / name / "old").exists()
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "not yet", "there"]


def test_where_no_folder_can_be_is_said_before_anything_is_made(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in {
        "file": "file: exists and is no folder",
        "file/below/it": "file: exists and is no folder",
        "loop": "loop: exists and is no folder",
        "/proc/folder": "/proc/folder: cannot be made: No such file or directory",
        "n" * 300: "File name too long",
    }.items():
        with pytest.raises(UserError, match=reason), new_folder(tmp_path / name):
            pytest.fail("nothing may be made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]
