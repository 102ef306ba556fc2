"""Pictures of a report page, as small PNG files.

    python -m benchmarks.screenshots RUN/report/report.html --to docs/images

Writes report-light.png and report-dark.png (1,200 pixels wide) and report-narrow.png (400), each from what came out
on, which is what the page is about.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from benchmarks.browser import started

VIEWS = {
    "report-light": (1200, 1180, "light"),
    "report-dark": (1200, 1180, "dark"),
    "report-narrow": (400, 1180, "light"),
}
COLOURS = 128  # of the palette: a page has few, and the file is a third as large


def main() -> None:
    """Take the pictures of a page."""
    from PIL import Image

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--to", type=Path, default=Path("docs/images"))
    chosen = parser.parse_args()
    chosen.to.mkdir(parents=True, exist_ok=True)
    with started() as browser:
        for name, (width, height, scheme) in VIEWS.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(chosen.page.resolve().as_uri())
            page.evaluate("scrollTo(0, document.querySelector('.verdict').getBoundingClientRect().top - 16)")
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(COLOURS)
            picture.save(chosen.to / f"{name}.png", optimize=True)
            page.close()


if __name__ == "__main__":
    main()
