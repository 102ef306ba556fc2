"""A finished study that all tests of this folder read: two arms, two merges, two seeds, nothing besides."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from benchmarks.browser import chromium, started

from plait.recipes.recipe_file import parse_recipe
from plait.report import write_report
from plait.report.account import account_of
from plait.report.comparison import compare_runs
from plait.report.comparison_page import comparison_document
from plait.report.page import document_of
from plait.report.render import render_html
from plait.runs.layout import Layout
from plait.runs.run import run
from tests.study.conftest import raw_study
from tests.study.conftest import small_study as small_study

LACKING = [
    what
    for what, is_there in {
        "no chromium (apt-get install chromium, or PLAIT_CHROMIUM=...)": chromium() is not None,
        "no playwright (pip install 'plait[test]')": importlib.util.find_spec("playwright") is not None,
    }.items()
    if not is_there
]
needs_browser = pytest.mark.skipif(bool(LACKING), reason="; ".join(LACKING))


def finished(study, out):
    """The layout of a study that is run."""
    layout = Layout(study, out)
    assert run(study, out, layout=layout, quiet=True).finished
    return layout


def small(**changed):
    """Two arms, no references or ablations."""
    return {"arms": ["kaiming", "orthonormal"], "repair": None, "variants": [], "rates": [0.03], **changed}


@pytest.fixture(scope="session")
def study_done(tiny_base, tmp_path_factory):
    """The layout of the finished study; not to be changed."""
    root = tmp_path_factory.mktemp("study")
    raw = raw_study(tiny_base("bert"), root / "data") | small(description="See docs/study/protocol.md.")
    return finished(parse_recipe(raw, "small"), root / "out")


@pytest.fixture(scope="session")
def tables_done(study_done, tmp_path_factory):
    """Where its tables were written, what was written, and the JSON."""
    to = tmp_path_factory.mktemp("tables")
    written = write_report(study_done, to, name="tiny", about={"command": "of a test"})
    return written, json.loads(written.json.read_text("utf-8"))


@pytest.fixture
def study_copy(study_done, tmp_path):
    """A layout of the finished study in a folder of its own, to be changed."""
    out = shutil.copytree(study_done.out, tmp_path / "copy")
    return Layout(study_done.recipe, out)


class Page(HTMLParser):
    """What a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "data") and not (value or "").startswith(("#", "data:")):
                self.fetched.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.fetched.append(f"{tag} {name}")


@pytest.fixture(scope="module")
def browser():
    with started() as running:
        yield running


@pytest.fixture(scope="session")
def pages(study_done, tmp_path_factory):
    """A page of a small study, one of eleven tasks with maps, and one of two runs: name -> file."""
    folder, account = tmp_path_factory.mktemp("pages"), account_of(study_done)
    names = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "snli", "banking77", "clinc_domain"]
    measured, tasks = next(iter(account.measured.values())), account.tasks
    wide = replace(
        account,
        measured=dict.fromkeys(names, measured),
        tasks=[replace(t, task=n) for n in names for t in tasks if t.task == tasks[0].task],
        interference={
            a: {i: {j: 0.1 + 0.2 * (i == j) for j in names} for i in names} for a in ("kaiming", "orthonormal")
        },
    )
    files = {}
    two = comparison_document(compare_runs(study_done.out, study_done.out))
    for name, document in {"small": document_of(account), "wide": document_of(wide), "two runs": two}.items():
        files[name] = folder / f"{name}.html"
        files[name].write_text(render_html(document), encoding="utf-8")
    return files


@pytest.fixture
def opened(browser, pages):
    """opened("wide", 400, "dark") -> the page and what it complained of."""
    contexts = []

    def get(name="small", width=900, scheme="light"):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page, said = contexts[-1].new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None,
        )
        page.goto(pages[name].as_uri())
        return page, said

    yield get
    for context in contexts:
        context.close()
