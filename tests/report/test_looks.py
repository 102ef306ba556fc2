"""What a reader sees of a page: contrast, marks, hints, the first screen, paper; in a real browser."""

from __future__ import annotations

import pytest

from tests.report.conftest import needs_browser

pytestmark = needs_browser
# Ratios of contrast, computed from what the browser paints with: of each text with what lies below it, and of what charts draw.
CONTRAST = """() => {
  const canvas = document.createElement("canvas"), paint = canvas.getContext("2d", {willReadFrequently: true});
  canvas.width = canvas.height = 1;
  const rgba = css => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = css; paint.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const ground = e => {
    const layers = [];
    for (let n = e; n; n = n.parentElement) layers.unshift(rgba(getComputedStyle(n).backgroundColor));
    return layers.reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)]; return (Math.max(x, y) + .05) / (Math.min(x, y) + .05); };
  const texts = [], marks = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || !e.checkVisibility() || e.closest("caption, .unseen, title, script")) continue;
    const style = getComputedStyle(e), below = ground(e);
    texts.push([ratio(over(rgba(e.ownerSVGElement ? style.fill : style.color), below), below), walk.currentNode.data.trim()]);
  }
  for (const e of document.querySelectorAll(".dot, .interval, .mark, .line polyline, .line .point")) {
    if (e.closest(".rest")) continue;
    const style = getComputedStyle(e), below = ground(e);
    marks.push([ratio(over(rgba(e.matches(".dot, .point") ? style.fill : style.stroke), below), below), e.outerHTML]);
  }
  return [texts, marks];
}"""


@pytest.mark.parametrize("name", ["small", "wide", "two runs"])
@pytest.mark.parametrize(("scheme", "media"), [("light", "screen"), ("dark", "screen"), ("dark", "print")])
def test_texts_and_marks_stand_out_from_what_they_lie_on(opened, name, scheme, media):
    page, _ = opened(name, 1400, scheme)
    page.emulate_media(media=media, color_scheme=scheme)
    texts, marks = page.evaluate(CONTRAST)
    assert len(texts) > 100 and len(marks) > 3
    assert [t for t in texts if t[0] < 4.5] == [] and [m for m in marks if m[0] < 3] == []


def test_contrast_is_measured(opened):
    page, _ = opened()
    page.evaluate("document.querySelector('h1').style.color = '#8a8a8a'")
    texts, _ = page.evaluate(CONTRAST)
    assert min(texts)[0] == pytest.approx(3.45, abs=0.02) and min(texts)[1] == page.title().removeprefix(
        "plait report: "
    )


@pytest.mark.parametrize("name", ["small", "wide", "two runs"])
@pytest.mark.parametrize("width", [400, 800, 1280])
def test_a_table_that_is_cut_says_so_and_no_other_does(opened, name, width):
    page, _ = opened(name, width)
    for box in page.query_selector_all(".scroll"):
        cut = box.evaluate("b => b.scrollWidth > b.clientWidth + 1")
        before = box.evaluate("b => b.previousElementSibling?.innerText ?? ''")
        assert ("scroll sideways" in before) == cut, box.get_attribute("aria-label")
        shades = box.evaluate("b => getComputedStyle(b).backgroundImage")
        assert shades.count("gradient") == 4, "what shows the edge without scripts"
    if width == 400:
        assert page.locator(".hint").count() >= 1
        page.set_viewport_size({"width": 2400, "height": 900})
        page.wait_for_function("!document.querySelector('.hint')")


@pytest.mark.parametrize("width", [400, 800, 1280])
def test_every_table_that_sorts_shows_it(opened, width):
    """A marker at each column's name, however narrow the window."""
    for name in ("small", "wide"):
        page, _ = opened(name, width)
        shown = page.evaluate("""() => [...document.querySelectorAll("thead button")].map(b => {
          const mark = b.querySelector("span"), style = getComputedStyle(mark, "::before");
          return mark.checkVisibility() && mark.getClientRects().length > 0 && /[\\u2191-\\u2195]/.test(style.content);
        })""")
        assert len(shown) > 20 and all(shown)
        first = page.locator("table").first.locator("thead th")
        first.nth(3).locator("button").click()
        arrow = first.nth(3).evaluate("h => getComputedStyle(h.querySelector('span'), '::before').content")
        assert "\u2193" in arrow and first.nth(3).get_attribute("aria-sort") == "descending"


@pytest.mark.parametrize("width", [400, 800, 1280])
def test_how_to_load_the_merge_stands_on_the_first_screen(opened, width):
    page, _ = opened("small", width)
    box = page.locator("pre").first.bounding_box()
    assert box["y"] + box["height"] <= 900 and "from_pretrained" in page.locator("pre").first.inner_text()


def test_on_paper_everything_is_light_whole_and_unfolded(opened):
    page, _ = opened("wide", 718, "dark")  # an A4 sheet between its margins
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    right = page.evaluate(
        "Math.max(...[...document.querySelectorAll('td, th, pre, svg')].map(e => e.getBoundingClientRect().right))"
    )
    assert right <= 718
    assert page.locator("nav").is_hidden() and page.locator(".hint").first.is_hidden()
    assert set(
        page.evaluate("[...document.querySelectorAll('thead button')].map(b => getComputedStyle(b).display)")
    ) == {"contents"}, "a button would stay behind where a head is repeated on the next sheet"
    tint = "getComputedStyle(document.querySelector('.loss, .gain')).printColorAdjust"
    assert page.evaluate(tint) == "exact"


def test_a_long_table_that_is_folded_away_is_printed_whole(opened):
    page, _ = opened("small")
    page.evaluate("""() => {
      const table = document.querySelector(".scroll"), fold = document.createElement("details");
      table.replaceWith(fold);
      fold.append(table);
    }""")
    assert page.locator("details table").first.is_hidden()
    page.emulate_media(media="print")
    page.wait_for_function("document.querySelector('details table td').checkVisibility()")  # with the next frame


def test_without_scripts_nothing_is_promised_that_scripts_do(browser, pages):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["small"].as_uri())
    assert page.get_by_text("click on a column").is_hidden() and page.locator("pre").is_visible()
    context.close()
