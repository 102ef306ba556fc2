"""The page of answers in a real browser: it fits its window whatever stands in it, light and dark, and complains of nothing."""

from __future__ import annotations

import importlib.util

import pytest
from benchmarks.browser import SCHEMES, WIDTHS, chromium, started

from plait.trying.inputs import Missing
from plait.trying.page import render
from plait.trying.records import ALONE, BASE, MERGE, Answer, Asked, Tried

pytestmark = pytest.mark.skipif(
    chromium() is None or importlib.util.find_spec("playwright") is None,
    reason="no chromium (apt-get install chromium), or no playwright (pip install 'plait[test]')",
)
UNBROKEN = "https://example.org/" + "x" * 400
TEXTS = Tried(
    "merged", "/home/anna/base", (BASE, *(f"a-rather-long-adapter-name-{i}" for i in range(6)), MERGE),
    tuple(Asked(p, tuple(Answer(f"{UNBROKEN} {i}" * (i % 3)) for i in range(8))) for p in ("What?", UNBROKEN, "two\nlines")),
    (Missing("gone", "(/home/anna/gone) is gone"),), ("each prompt is a user's turn",),
)  # fmt: skip
CLASSES = Tried(
    "merged", "alice/base", (BASE, ALONE, MERGE),
    tuple(Asked(UNBROKEN, (Answer("sad", 0.51), None, Answer("a_class_with_a_very_long_name" * 6, 0.99)), t) for t in "ab"),
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with started() as running:
        yield running


@pytest.mark.parametrize("tried", [TEXTS, CLASSES], ids=["texts", "classes"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_page_fits_its_window_and_says_nothing_to_the_console(browser, tmp_path, tried, width, scheme):
    file = tmp_path / "answers.html"
    file.write_text(render(tried), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(file.as_uri())
    beyond = (
        "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
    )
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    result = (page.evaluate("document.documentElement.scrollWidth") <= width, page.evaluate(beyond), said)
    text = page.inner_text("body")
    context.close()
    assert result == (True, 0, [])
    assert (sum(colour) < 120) == (scheme == "dark")
    assert "/home/anna" not in text and text.count("\n") > 5
