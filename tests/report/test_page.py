"""The page: self-contained, the same bytes for the same run, and no markup from outside."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from plait.report import plots
from plait.report.page import headline, render
from plait.report.summary import Estimate, Line, Summary
from plait.runs import pipeline
from plait.runs.jobs import Plan, plan
from plait.runs.session import Session

HOSTILE = "<script>alert('x')</script>\"&$\\frac{$"


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


def summary(name: str) -> Summary:
    one = Estimate(50.0, 1.0)
    lines = [
        Line(arm, name, one, one, one, Estimate(0.5, 0.1), None, (name, -3.0), (1.0,), False) for arm in (name, "b")
    ]
    tables = {arm: {name: {"floor": 1.0, "alone": 2.0, name: 3.0}} for arm in (name, "b")}
    curves = {arm: {name: [(0.5, 40.0), (1.0, 50.0)]} for arm in (name, "b")}
    heat = {arm: {name: {name: 0.1}} for arm in (name, "b")}
    return Summary(lines, tables, curves, heat, [f"a note about {name}"])


@pytest.fixture
def small_plan(tiny_recipe, tmp_path) -> Plan:
    recipe = tiny_recipe(tasks=["topic"], arms=["kaiming"], merges=["task_arithmetic"])
    return plan(Session(recipe), tmp_path / "out")


def test_names_from_outside_are_text(small_plan):
    merges = [m.model_copy(update={"name": HOSTILE}) for m in small_plan.recipe.merge_specs]
    recipe = small_plan.recipe.model_copy(update={"name": HOSTILE, "description": HOSTILE, "merges": merges})
    text = render(summary(HOSTILE), replace(small_plan, recipe=recipe))
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text and page.fetched == []
    assert text.count("&lt;script&gt;") > 5


def test_a_real_report_needs_nothing_else_and_is_the_same_twice(tiny_recipe, tmp_path):
    recipe = tiny_recipe(tasks=["topic", "grade"], arms=["kaiming"], merges=["task_arithmetic"])
    out = tmp_path / "out"
    found = pipeline.run(recipe, out, quiet=True)
    folder = out / "report"
    first = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert set(first) == {"report.html", "report.json", "scores.parquet", "plait.json"}
    text = first["report.html"].decode()
    assert Page(text).fetched == [] and text.count("<svg") == 3
    assert "default-src 'none'" in text and not re.search(r"url\((?!#)", text)
    again = pipeline.report(out)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == first
    assert again["merged"] == found["merged"]
    data = json.loads(first["report.json"])
    assert data["schema"] == 1 and data["headline"]["merged"] == found["merged"] and len(data["table"]) == 1


def test_what_was_not_learned_has_no_share(small_plan):
    shown = summary("x")
    shown.lines[0] = replace(shown.lines[0], recovered=None, against_plain=None, merged=Estimate(float("nan")))
    found = headline(shown)
    assert found["recovered"]["x"]["x"] is None and found["merged_standard_error"]["x"]["x"] is None
    merges = [m.model_copy(update={"name": "x"}) for m in small_plan.recipe.merge_specs]
    recipe = small_plan.recipe.model_copy(update={"merges": merges})
    assert "–" in render(shown, replace(small_plan, recipe=recipe))


@pytest.mark.parametrize(("arms", "tasks"), [(1, 1), (1, 2), (8, 1), (2, 8)])
@pytest.mark.parametrize("length", [1, 100])
def test_heat_maps_of_any_size_have_room(arms, tasks, length):
    names = [f"{i}".rjust(length, "n") for i in range(tasks)]
    tables = {f"{a}".rjust(length, "n"): {i: dict.fromkeys(names, 0.1 * (a + 1)) for i in names} for a in range(arms)}
    assert plots.heat_maps(tables).startswith("<svg")  # warnings are errors here
