"""A finished study that all tests of this folder read: two arms, two merges, two seeds, nothing besides."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser

import pytest

from plait.recipes.recipe_file import parse_recipe
from plait.report import write_report
from plait.runs.layout import Layout
from plait.runs.run import run
from tests.study.conftest import raw_study
from tests.study.conftest import small_study as small_study


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
