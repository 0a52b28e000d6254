"""The page of a comparison in a real browser: console, keyboard, widths, paper."""

from pathlib import Path

import pytest
from browser import CUT_WORDS, TOO_WIDE, WIDTHS, Browser
from test_compare import EXPERIMENTS, all_jobs, on_a_second_set

FIRST_CELLS = (
    "[...document.querySelectorAll('table.main')[0].rows].slice(1).map((row) => row.cells[0].textContent.trim())"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    inputs = all_jobs(tmp_path_factory.mktemp("compared"))
    on_a_second_set(inputs, "teacher", *(f"{experiment}-s{seed}" for experiment in EXPERIMENTS for seed in (0, 1)))
    inputs.compare(list(EXPERIMENTS), [0, 1])
    return inputs.report / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window_and_no_word_is_cut(
    browser: Browser, page: Path, width: int, scheme: str
) -> None:
    browser.open(page, width=width, scheme=scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(TOO_WIDE) == []
    assert browser.evaluate(CUT_WORDS) == []


def test_the_page_asks_for_nothing_and_has_nothing_to_complain_of(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280)
    for name in ("pair-teacher", "gain-errors", "view-classes", "view-errors"):
        browser.evaluate(f"document.getElementById('{name}').click()")
    assert browser.complaints == [] and browser.requests == []


def test_the_worst_images_have_their_pictures_and_the_mistakes_a_table_that_can_be_sorted(
    browser: Browser, page: Path
) -> None:
    browser.open(page, width=1280)
    scenes = "[...document.querySelectorAll('.scene')].slice(-4)"  # after the two that were not chosen
    drawn = "(layer) => getComputedStyle(layer).backgroundImage.startsWith('url(')"
    drawn_whole = f"(scene) => [...scene.querySelectorAll('.picture, .layer')].every({drawn})"
    assert browser.evaluate(f"{scenes}.map((scene) => scene.querySelectorAll('figure').length)") == [4] * 4
    assert browser.evaluate(f"{scenes}.every({drawn_whole})")
    heads = "[...document.querySelectorAll('h3')]"
    table = f"{heads}.find((head) => head.textContent.includes('mistakes')).nextElementSibling"
    browser.evaluate(f"{table}.querySelectorAll('th button')[4].click()")
    changes = f"[...{table}.querySelectorAll('tbody tr')].map((row) => Number(row.cells[4].dataset.value))"
    values = browser.evaluate(changes)
    assert len(values) == 10 and values == sorted(values, reverse=True)


def test_a_table_is_sorted_with_the_keyboard_and_the_teacher_stays_on_top(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280)
    order = browser.evaluate(FIRST_CELLS)
    heads = "[...document.querySelectorAll('table.main')[0].tHead.rows[0].cells]"
    browser.evaluate(f"{heads}[1].querySelector('button').focus()")
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.textContent") == "test mIoU, %"
    browser.press("Enter")
    assert browser.evaluate(f"{heads}[2].ariaSort") == "descending"
    assert browser.evaluate(FIRST_CELLS) == ["teacher", "kd", "none_vit", "dml", "dml", "none"]
    browser.press(" ")
    assert browser.evaluate(f"{heads}[2].ariaSort") == "ascending"
    assert browser.evaluate(FIRST_CELLS) == ["teacher", "none", "dml", "dml", "none_vit", "kd"]
    browser.press("Enter")
    assert set(browser.evaluate(f"{heads}.map((head) => head.ariaSort)")) == {"none"}
    assert browser.evaluate(FIRST_CELLS) == order


def test_the_border_between_two_pictures_follows_the_arrow_keys(browser: Browser, page: Path) -> None:
    browser.open(page, width=390)
    shown = "getComputedStyle(document.querySelector('.slider .right.twin')).clipPath"
    browser.evaluate("document.querySelector('.slider input').focus()")
    before = browser.evaluate(shown)
    for _ in range(5):
        browser.press("ArrowRight")
    assert before == "inset(0px 0px 0px 50%)" and browser.evaluate(shown) == "inset(0px 0px 0px 55%)"
    hidden = (
        "[...document.querySelectorAll('.slider .layer.teacher.classes')].map((one) => getComputedStyle(one).display)"
    )
    assert set(browser.evaluate(hidden)) == {"none"}
    browser.evaluate("document.getElementById('pair-teacher').click()")
    assert set(browser.evaluate(hidden)) == {"block"}


def test_it_can_be_printed(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page, width=1280)
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.call("Emulation.setDeviceMetricsOverride", width=718, height=1000, deviceScaleFactor=1, mobile=False)
    assert browser.evaluate(TOO_WIDE) == [] and browser.evaluate(CUT_WORDS) == []
    browser.call("Emulation.setEmulatedMedia", media="")
    browser.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert browser.evaluate("[...document.querySelectorAll('details')].every((part) => part.open)")
