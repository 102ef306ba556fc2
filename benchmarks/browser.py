"""A headless Chromium for looking at report pages: found on this machine, started without a network."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-extensions"]
WIDTHS = (400, 900, 1400)
SCHEMES = ("light", "dark")


def chromium() -> str | None:
    """Find a browser: PLAIT_CHROMIUM, or the first of its names on the path."""
    return os.environ.get("PLAIT_CHROMIUM") or next((path for n in NAMES if (path := shutil.which(n))), None)


@contextlib.contextmanager
def started() -> Iterator[Browser]:
    """Start the browser with an empty profile, and end it; once more where it dies as it starts, as it may on a busy machine.

    Raises:
        FileNotFoundError: There is none.
    """
    from playwright.sync_api import Error, sync_playwright

    if (path := chromium()) is None:
        raise FileNotFoundError("no chromium: install one, or name it in PLAIT_CHROMIUM")
    with sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        except Error:
            browser = playwright.chromium.launch(executable_path=path, args=OPTIONS)
        try:
            yield browser
        finally:
            browser.close()
