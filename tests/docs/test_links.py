"""Every link of the documentation leads to a file of the repository, and to a heading of it where it names one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOUND = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
PAGES = sorted(p for p in FOUND if not {"generated", "_build"} & set(p.relative_to(ROOT).parts))
MADE = ROOT / "docs" / "generated"  # by `make docs`
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are called in links."""
    titles = HEADING.findall(re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL))
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in titles)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in plain}


def dead(page: Path, text: str) -> list[str]:
    """Links of a page's text that lead nowhere; a folder is no page of the site."""
    lost = []
    for link in LINK.findall(CODE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, heading = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if target.is_relative_to(MADE):
            continue
        if not target.is_file() or (heading and heading not in anchors(target)):
            lost.append(link)
    return lost


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert dead(page, page.read_text("utf-8")) == []


def test_dead_links_are_seen():
    page = ROOT / "docs" / "existing.md"
    text = "[g](results/) [a](nowhere.md) [b](which.md#no-such-heading) [c](which.md#three-warnings) `[d](code.md)` [e](#no) [f](https://x.org)"
    assert dead(page, text) == ["results/", "nowhere.md", "which.md#no-such-heading", "#no"]


def test_the_page_on_adapters_that_exist_is_read_aloud_in_five_minutes():
    """At 160 words a minute; what was measured has a page of its own."""
    text = re.sub(r"```.*?```", "", (ROOT / "docs" / "existing.md").read_text("utf-8"), flags=re.DOTALL)
    assert len(re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", text).split()) <= 800
    assert not re.search(r"\d\.\d\d|results/", text)
