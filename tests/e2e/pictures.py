"""The pictures of the default run's pages in docs/results/, as Chromium shows them, where ``make repro`` was run:

PYTHONPATH=.:tests python tests/e2e/pictures.py
"""

import io
import tempfile
from pathlib import Path

from browser import WIDTHS, Browser
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TO = ROOT / "docs/results"
COMPARISON, VALIDATION = ROOT / "reports/comparison/report.html", ROOT / "reports/validation/summary.html"
GAP = 12  # pixels between two pages


def main() -> None:
    """Writes one picture for the README, and one a page at all widths in both schemes."""
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile))
        try:
            browser.start()
            _small(_top(browser, COMPARISON, 1140, 1560)).save(TO / "default.png", optimize=True)
            for page, name in ((COMPARISON, "comparison"), (VALIDATION, "validation")):
                _small(_all_widths(browser, page)).save(TO / f"pages-{name}.png", optimize=True)
        finally:
            browser.stop()


def _top(browser: Browser, page: Path, width: int, height: int, scheme: str = "light") -> Image.Image:
    browser.open(page, width=width, scheme=scheme)
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        browser.screenshot(Path(file.name), bottom=height)
        return Image.open(io.BytesIO(Path(file.name).read_bytes())).convert("RGB")


def _all_widths(browser: Browser, page: Path) -> Image.Image:
    """The tops of a page at three fifths of their size: widths side by side, light above dark."""
    rows = []
    for scheme in ("light", "dark"):
        pages = [_top(browser, page, width, 1500, scheme) for width in reversed(WIDTHS)]
        pages = [each.resize((each.width * 3 // 5, each.height * 3 // 5)) for each in pages]
        row = Image.new(
            "RGB", (sum(each.width + GAP for each in pages) - GAP, max(each.height for each in pages)), "white"
        )
        for number, each in enumerate(pages):
            row.paste(each, (sum(before.width + GAP for before in pages[:number]), 0))
        rows.append(row)
    whole = Image.new("RGB", (rows[0].width, sum(row.height + GAP for row in rows) - GAP), "white")
    for number, row in enumerate(rows):
        whole.paste(row, (0, number * (rows[0].height + GAP)))
    return whole


def _small(picture: Image.Image) -> Image.Image:
    return picture.quantize(256, dither=Image.Dither.NONE)


if __name__ == "__main__":
    main()
