"""The page of a validation in a real browser, of sound and of faulty data: console, keyboard, widths, paper."""

from pathlib import Path

import pytest
from _folders import make_folder, truncate
from browser import CUT_WORDS, TOO_WIDE, WIDTHS, Browser
from test_validate import failure, validate


@pytest.fixture(scope="module", params=["sound", "faulty"])
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    data = make_folder(folder / "data")
    if request.param == "sound":
        validate(data, folder / "report")
    else:
        for image in (data / "images/train").iterdir():
            truncate(image)
        failure(data, folder / "report", min_samples={"train": 90, "val": 1, "test": 1}, min_class_share=0.5)
    return folder / "report/summary.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_window_and_no_word_is_cut(
    browser: Browser, page: Path, width: int, scheme: str
) -> None:
    browser.complaints.clear()
    browser.open(page, width=width, scheme=scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(TOO_WIDE) == [] and browser.evaluate(CUT_WORDS) == []
    assert browser.complaints == [] and browser.requests == []


def test_the_keyboard_moves_through_the_page_and_its_pictures_are_there(browser: Browser, page: Path) -> None:
    browser.open(page, width=390, height=300)
    pictures = "[...document.querySelectorAll('.examples img')]"
    assert browser.evaluate(f"{pictures}.every((one) => one.complete && one.naturalWidth > 0 && one.alt)")
    browser.press(" ")
    browser.evaluate("new Promise((done) => setTimeout(done, 500))")
    assert browser.evaluate("scrollY") > 100


def test_it_can_be_printed(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page, width=718)
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate(TOO_WIDE) == []
    browser.call("Emulation.setEmulatedMedia", media="")
    browser.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
