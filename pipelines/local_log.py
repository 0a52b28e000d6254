"""What a local run says: KFP's account of it as a line a task, and what the tasks themselves say."""

import io
import re
import time
from collections.abc import Callable
from typing import TextIO

_ACCOUNT = re.compile(r"\d\d:\d\d:\d\d\.\d{3} - (\w+) - (.*)")  # a line of KFP's own logger
_TASK = re.compile(r"(Executing task|Task) '([^']+)'(?: finished with status (\w+))?")
_COLORS = re.compile(r"\x1b\[\d+m")
_EXECUTOR = re.compile(r"(\S+ \| |\s*)\[KFP Executor [^]]*\]: (.*)")
_RULE = re.compile(r"-{20,}$")


class LocalLog(io.TextIOBase):
    """A stream to print to while a pipeline runs, in place of standard output.

    KFP lists all outputs of a task, and its executor each task's inputs as JSON; the folder of the run has both. What
    goes wrong is kept.

    Args:
        out: gets the lines that are left.
        clock: seconds.
    """

    def __init__(self, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.out, self.clock = out, clock
        self._line = ""
        self._began: dict[str, float] = {}
        self._until: Callable[[str], bool] | None = None  # the last line of what is left out

    def write(self, text: str) -> int:
        """Takes text of any length; a line is judged when it is complete."""
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if (kept := self._kept(line)) is not None:
                self.out.write(f"{kept}\n")
        if lines:
            self.out.flush()
        return len(text)

    def close(self) -> None:
        """Lets the last line go, too."""
        if self._line:
            self.write("\n")
        super().close()

    def _kept(self, line: str) -> str | None:
        if self._until is not None:
            if not self._until(line):
                return None
            self._until = None
            if not _ACCOUNT.match(line):
                return None
        if account := _ACCOUNT.match(line):
            return self._told(*account.groups())
        if executor := _EXECUTOR.match(line):
            prefix, text = executor.groups()
            if text.startswith("Got executor_input"):
                self._until = lambda later: later.removeprefix(prefix).strip("\n") == "}" or bool(_ACCOUNT.match(later))
            return None if "ERROR" not in line.partition("]")[0] else line
        return line if line.strip() and not _RULE.match(line) else None

    def _told(self, level: str, text: str) -> str | None:
        text = _COLORS.sub("", text)
        task = _TASK.match(text)
        if task and task[1] == "Executing task":
            self._began[task[2]] = self.clock()
            return f"{task[2]} ..."
        if task and task[3]:
            ended = "done" if task[3] == "SUCCESS" else task[3]
            return f"{task[2]}: {ended} in {self.clock() - self._began.pop(task[2], 0.0):.0f} s"
        if level == "INFO":  # the outputs, to the next line of the account or the rule below them
            if text.endswith("outputs:"):
                self._until = lambda later: bool(_RULE.match(later) or _ACCOUNT.match(later))
            return None
        return text
