"""The page in a real browser, narrow and wide, light and dark: what nobody sees in its text."""

from __future__ import annotations

import time

import pytest
from benchmarks.browser import SCHEMES, WIDTHS

from tests.report.conftest import needs_browser

pytestmark = needs_browser
SMALLEST = 9.5  # pixels of the smallest letters
# Texts of a page that lie over each other, or beyond the cell they stand in; whatever is clipped for the eye is left out.
COLLISIONS = """() => {
  const boxes = [], bad = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const node = walk.currentNode, parent = node.parentElement;
    if (!node.data.trim() || parent.closest("caption, .unseen, title, script, style") || !parent.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const r of range.getClientRects()) if (r.width > 1) boxes.push([node, r]);
  }
  boxes.sort((a, b) => a[1].top - b[1].top);
  for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length && boxes[j][1].top < boxes[i][1].bottom; j++) {
    const [[m, a], [n, b]] = [boxes[i], boxes[j]];
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left), down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (m !== n && across > 1 && down > 4) bad.push(m.data.trim() + " | " + n.data.trim());
  }
  for (const cell of document.querySelectorAll("th, td"))
    if (cell.checkVisibility() && cell.scrollWidth > cell.clientWidth + 1) bad.push("beyond its cell: " + cell.textContent);
  return bad;
}"""
SMALL_LETTERS = f"""() => [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !e.closest("caption")
  && [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {{
    const scale = e.ownerSVGElement ? e.ownerSVGElement.getScreenCTM().a : 1;
    return [parseFloat(getComputedStyle(e).fontSize) * scale, e.textContent];
  }}).filter(([size]) => size < {SMALLEST})"""


VIEWS = [("small", w, s) for w in WIDTHS for s in SCHEMES] + [("wide", w, s) for w in WIDTHS for s in SCHEMES]
VIEWS += [("two runs", 400, "dark"), ("two runs", 900, "light")]


@pytest.mark.parametrize(("name", "width", "scheme"), VIEWS)
def test_a_page_fits_its_window_and_says_nothing_to_the_console(opened, name, width, scheme):
    page, said = opened(name, width, scheme)
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = (
        "[...document.querySelectorAll('.scroll')].filter(b => b.scrollWidth > b.clientWidth + 1).map(b => b.ariaLabel)"
    )
    if width >= 900:
        assert page.evaluate(cut) == []
    for box in page.query_selector_all(".scroll[tabindex]"):
        assert box.evaluate("b => b.scrollWidth > b.clientWidth")
    assert page.evaluate(COLLISIONS) == []
    assert page.evaluate(SMALL_LETTERS) == []
    red, green, blue = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (red + green + blue < 120) == (scheme == "dark")


def test_collisions_are_seen(opened):
    page, _ = opened()
    page.evaluate("""() => {
      const [head, link] = ["h2:not(.unseen)", "nav a"].map(name => document.querySelector(name));
      head.style.transform = `translateY(${link.getBoundingClientRect().top - head.getBoundingClientRect().top}px)`;
      for (const cell of document.querySelectorAll("table th, table td")) cell.style.cssText = "max-width: 5px; white-space: nowrap";
    }""")
    seen = page.evaluate(COLLISIONS)
    assert any("Each arm under its best merge | " in s or " | Each arm under its best merge" in s for s in seen)
    assert any(s.startswith("beyond its cell: ") for s in seen)


def test_on_a_narrow_screen_the_first_column_stays_and_keys_scroll(opened):
    page, _ = opened("wide", 400)
    box = page.query_selector("[aria-label^='Every task'][tabindex]")
    left = "b => b.querySelector('tbody th').getBoundingClientRect().left"
    before = box.evaluate(left)
    box.focus()
    page.keyboard.press("ArrowRight")
    deadline = time.monotonic() + 20
    while page.evaluate("document.activeElement.scrollLeft") < 10:
        assert time.monotonic() < deadline
    assert box.evaluate(left) == pytest.approx(before, abs=1)


def column(page, table, index):
    """The first lines of a column's cells, from above."""
    return page.evaluate(
        f"[...document.querySelectorAll('table')[{table}].tBodies[0].rows].map(r => r.cells[{index}].firstChild.textContent.trim())"
    )


def numbers(texts):
    return [float(t) for t in texts if t != "–"]


def test_a_table_sorts_at_a_click_and_by_keys(opened):
    page, _ = opened()
    mean, head = 3, page.locator("table").nth(2).locator("thead th")
    head.nth(mean).locator("button").click()
    assert numbers(column(page, 2, mean)) == sorted(numbers(column(page, 2, mean)), reverse=True)
    assert head.nth(mean).get_attribute("aria-sort") == "descending"
    head.nth(mean).locator("button").focus()
    page.keyboard.press("Enter")
    assert numbers(column(page, 2, mean)) == sorted(numbers(column(page, 2, mean)))
    assert head.nth(mean).get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")  # of own, where rows of adapters alone have nothing: these stay below
    assert [h.get_attribute("aria-sort") for h in head.all()].count(None) == head.count() - 1
    shares = column(page, 2, mean - 1)
    assert numbers(shares) == sorted(numbers(shares), reverse=True) and shares[-1] == "–"
    head.nth(0).locator("button").click()
    arms = column(page, 2, 0)
    assert arms == sorted(arms) and len(set(arms)) == 2


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [("wide", 400, "dark"), ("wide", 1400, "light"), ("wide", 1400, "dark"), ("two runs", 900, "light")],
)
def test_axe_has_nothing_serious_to_say(opened, name, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page, _ = opened(name, width, scheme)
    found = axe.run(page).response["violations"]
    assert [
        f"{v['impact']}: {v['id']}: {v['nodes'][0]['html']}" for v in found if v["impact"] in ("serious", "critical")
    ] == []


def test_without_scripts_everything_is_there(browser, pages):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["small"].as_uri())
    assert page.locator("table").first.is_visible() and page.locator("button").count() == 0
    context.close()
