"""data.dvc records the very bytes that the generator writes."""

import hashlib
import json
from pathlib import Path

import yaml

from segdistill import streets

ROOT = Path(__file__).resolve().parents[2]


def test_the_committed_version_is_what_the_generator_writes(tmp_path: Path) -> None:
    streets.write(tmp_path / "data", workers=1)
    files = sorted(path for path in (tmp_path / "data").rglob("*") if path.is_file())
    entries = [
        {"md5": hashlib.md5(path.read_bytes()).hexdigest(), "relpath": path.relative_to(tmp_path / "data").as_posix()}
        for path in files
    ]
    entries.sort(key=lambda entry: entry["relpath"])
    # DVC's name of a folder is the md5 of this list.
    name = hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"
    (recorded,) = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"]
    assert len(files) == recorded["nfiles"]
    assert name == recorded["md5"]
