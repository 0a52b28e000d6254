"""The folders of a stage that runs on several nodes: copied to the volume once, and its outputs brought back."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest

from segdistill.errors import UserError
from segdistill.kubeflow import shared_volume
from segdistill.kubeflow.shared_volume import bring_back, copy_input


def folder(path: Path, **files: str) -> Path:
    for name, content in files.items():
        place = path / name.replace("__", "/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content)
    return path


def content(path: Path) -> dict[str, str]:
    return {str(file.relative_to(path)): file.read_text() for file in path.rglob("*") if file.is_file()}


def share(tmp_path: Path) -> Path:
    return copy_input(tmp_path / "prepared", tmp_path / "volume")


def test_an_input_is_copied_once_for_all_tasks_and_again_when_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "prepared", a="1", b__c="22", **{".completed": '{"stage": "prepare"}'})
    first = share(tmp_path)
    assert content(first) == content(source)
    copies: list[Any] = []
    monkeypatch.setattr(shared_volume.shutil, "copyfile", lambda *paths: copies.append(paths))
    assert share(tmp_path) == first and not copies
    monkeypatch.undo()
    for change in ({".completed": '{"stage": "PREPARE"}'}, {"a": "333"}):
        folder(source, **change)
        fresh = share(tmp_path)
        assert fresh != first and content(fresh) == content(source)
        first = fresh


def test_a_copy_that_was_stopped_is_not_taken_for_whole_and_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder(tmp_path / "prepared", a="1", b="22", c="333")
    real, copied = shared_volume.shutil.copyfile, []

    def copyfile(place: Path, half: Path) -> None:
        copied.append(place.name)
        if copied == ["a", "b"]:
            half.write_text("2")
            raise KeyboardInterrupt
        real(place, half)

    monkeypatch.setattr(shared_volume.shutil, "copyfile", copyfile)
    with pytest.raises(KeyboardInterrupt):
        share(tmp_path)
    assert not [path for path in (tmp_path / "volume/inputs").iterdir() if not path.name.startswith(".")]
    copy_of = share(tmp_path)
    assert content(copy_of) == content(source) and copied == ["a", "b", "b", "c"]
    assert list((tmp_path / "volume/inputs").iterdir()) == [copy_of]


def test_tasks_that_copy_the_same_input_at_the_same_time_end_with_one_copy(tmp_path: Path) -> None:
    source = folder(tmp_path / "prepared", **{f"f{number}": str(number) for number in range(200)})
    found: list[Path] = []
    errors: list[BaseException] = []

    def copy_it() -> None:
        try:
            found.append(share(tmp_path))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=copy_it) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 4 and len(set(found)) == 1
    assert content(found[0]) == content(source)
    assert list((tmp_path / "volume/inputs").iterdir()) == [found[0]]


def test_an_output_comes_back_whole(tmp_path: Path) -> None:
    place = folder(tmp_path / "volume/students", student__weights="w", **{".completed": "{}"})
    folder(tmp_path / "here/students", old="of an earlier attempt")
    bring_back(place, tmp_path / "here/students")
    assert content(tmp_path / "here/students") == {"student/weights": "w", ".completed": "{}"}
    assert not place.exists()


def test_a_full_volume_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copyfile(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder(tmp_path / "prepared", a="1")
    monkeypatch.setattr(shared_volume.shutil, "copyfile", copyfile)
    with pytest.raises(UserError, match="volume: no space left on the disk; what has been copied is kept"):
        share(tmp_path)
