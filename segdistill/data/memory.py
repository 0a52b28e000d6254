"""How much memory decoded samples may take."""

import re
import threading
from pathlib import Path
from typing import Literal

GIBIBYTE = 2**30
SHARE = 0.5  # of the memory that is free at the start: what "auto" leaves free

MACHINE, CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class Memory:
    """Room for decoded samples, which several data sets share: who comes first is kept until it is full.

    Args:
        gibibytes: how many; "auto" keeps samples while half of what was free at the start still is, so that several
            trainings on one machine, and what they need besides, do not push each other out.
    """

    def __init__(self, gibibytes: float | Literal["auto"]) -> None:
        self._room = None if gibibytes == "auto" else gibibytes * GIBIBYTE
        self._floor = 0.0 if self._room is not None else SHARE * free_memory()
        self._lock = threading.Lock()

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes; if so, they are taken."""
        if self._room is None:
            return free_memory() - size >= self._floor
        with self._lock:
            fits = size <= self._room
            self._room -= size if fits else 0
            return fits


def free_memory() -> int:
    """Bytes that may still be taken on this machine, or in this container if that is less; 0 where no one says."""
    try:
        free = 1024 * _number(MACHINE, "MemAvailable:")
    except OSError:
        return 0
    try:
        limit = (CONTAINER / "memory.max").read_text().strip()
        if limit != "max":  # what is only cached makes room when it has to
            free = min(free, int(limit) - _number(CONTAINER / "memory.stat", "anon"))
    except OSError:  # no container, or one of cgroups' first version
        pass
    return max(0, free)


def _number(path: Path, name: str) -> int:
    """The number that follows a name in a file of lines."""
    match = re.search(rf"^{name}\s+(\d+)", path.read_text(), re.MULTILINE)
    return int(match[1]) if match else 0
