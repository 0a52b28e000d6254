"""The progress bar of trainings: what it says, and that what is logged comes above it."""

import io
import logging
import re
import sys

import pytest

from segdistill import execution
from segdistill.engine.progress import Advance, TrainingBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def watched(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    for name, value in {"TERM": "xterm", "COLUMNS": "120", "FORCE_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    return screen


def test_a_line_that_is_logged_replaces_the_bar_which_is_drawn_again_below_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = watched(monkeypatch)
    monkeypatch.setattr(logging.getLogger("segdistill"), "handlers", [])
    execution.quiet_libraries()
    with TrainingBar("teacher", [["teacher"]], [1], enabled=True) as bar:
        bar.update(Advance(4, 10, 0.4, 20.0))
        bar.bar.refresh()
        logging.getLogger("segdistill.engine").info("validation mIoU 12 %%")
        bar.bar.refresh()
    text = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert re.search(r"\x1b\[2Kvalidation mIoU 12 %+ *\n[^\n]*teacher: iteration 4 of 10", text), text


def test_the_bar_says_what_trains_which_of_how_many_and_how_much_of_all_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched(monkeypatch)
    bar = TrainingBar("student", [["none"], ["kd"]], [1, 3], before=0.5, share=0.5, enabled=True)
    with bar:
        bar.update(Advance(10, 10, 1.0, 9.0), 0)
        bar.update(Advance(5, 10, 0.5, 9.0), 1)
    assert bar.title() == "kd, student 2 of 2: iteration 5 of 10"
    assert bar.bar.tasks[0].completed == 0.5 + 0.5 * (1 + 3 * 0.5) / 4
    both = TrainingBar("student", [["none", "kd"], ["cwd"]], [2, 1], enabled=True)
    with both:
        both.update(Advance(5, 10, 0.5, 9.0), 0)
        both.update(Advance(4, 10, 0.4, 9.0), 1)
    assert both.title() == "3 of 3 students: none, kd, ...: iteration 4 of 10"


def test_no_bar_is_drawn_where_standard_error_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingBar("teacher", [["teacher"]], [1], enabled=True) as bar:
        bar.update(Advance(4, 10, 0.4, 20.0))
    assert capsys.readouterr().err == ""
