"""The pages: self-contained, the same bytes for the same run, no markup from outside, and what they agree on."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from plait.report import write_report
from plait.report.account import account_of
from plait.report.figures import figures_of, heat_maps
from plait.report.page import linked, render_html, render_markdown
from plait.report.table import LEARNED, rows_of
from tests.report.conftest import Page, finished, small

HOSTILE = "<script>alert('x')</script>\"&$\\frac{$"


@pytest.fixture(scope="module")
def account(study_done):
    return account_of(study_done)


@pytest.fixture(scope="module")
def report(study_done, tmp_path_factory):
    """The folder of a report, and its JSON."""
    written = write_report(study_done, tmp_path_factory.mktemp("report"))
    return written.html.parent, json.loads(written.json.read_text("utf-8"))


def test_a_report_needs_nothing_else_and_runs_no_script_but_its_own(report):
    folder, _ = report
    text = (folder / "report.html").read_text("utf-8")
    page = Page(text)
    assert page.fetched == [] and page.tags.count("script") == 1
    assert "default-src 'none'" in text and not re.search(r"url\((?!#)", text)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in text
    assert text.count("<svg") == 4  # arms, scales, the sweep, predicted shifts


def test_a_report_is_the_same_twice(report, study_done, tmp_path):
    folder, _ = report
    write_report(study_done, tmp_path)
    names = sorted(p.name for p in folder.iterdir())
    assert {"report.html", "report.json", "report.md", "scores.parquet"} < set(names)
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_names_from_outside_are_text(account):
    rows = [replace(r, arm=HOSTILE, method=HOSTILE, worst=HOSTILE) for r in account.rows]
    best = [replace(b, arm=HOSTILE, merges=dict.fromkeys("AB", HOSTILE), worst=HOSTILE) for b in account.best]
    recipe = account.recipe.model_copy(update={"name": HOSTILE, "description": HOSTILE})
    hostile = replace(account, recipe=recipe, rows=rows, best=best, about={"command": HOSTILE}, notes=[HOSTILE])
    text = render_html(hostile, {})
    page = Page(text)
    assert page.tags.count("script") == 1 and page.fetched == []
    assert "alert('x')" not in text and text.count("&lt;script&gt;") > 5


def test_a_cell_of_markdown_stays_one_cell(account, tmp_path):
    rows = [replace(r, arm="a|b") for r in account.rows]
    text = render_markdown(replace(account, rows=rows), {}, tmp_path)
    assert "| `a\\|b` |" in text


def test_figures_lie_beside_the_markdown_and_are_drawn_the_same_again(tables_done, account):
    written, tables = tables_done
    page = written.markdown.read_text("utf-8")
    assert [p.name for p in written.figures] == [
        f"tiny-{n}.svg" for n in ("recovered", "scales", "sweep", "interference")
    ]
    for path in written.figures:
        assert f"]({path.name})" in page and ET.parse(path).getroot().tag.endswith("svg")
    assert figures_of(tables, "kaiming") == figures_of(tables, "kaiming")
    text = written.figures[0].read_text("utf-8")
    assert ">orthonormal<" in text and ">recovered, %<" in text


def test_both_pages_say_the_same(tables_done, account):
    """The verdict, where it was run, and every arm's figures."""
    written, tables = tables_done
    html, markdown = (p.read_text("utf-8") for p in (written.html, written.markdown))
    assert f"{os.cpu_count()} CPU cores" in tables["about"]["hardware"] and "- command: `of a test`" in markdown
    assert "<code>of a test</code>" in html and tables["about"]["executor"] == "InProcess (1 training, 1 scoring)"
    first = account.best[0]
    share = f"{100 * np.mean(first.recovered):.0f}"
    assert f"adapters of `{first.arm}` keep **{share} %**" in markdown
    assert f"adapters of <code>{first.arm}</code> keep <b>{share} %</b>" in html
    for b in tables["best"]:
        low, high = b["interval"]
        for text in (html, markdown):
            assert f"{100 * low:.0f} to {100 * high:.0f}" in text and f"{b['individual']:.1f}" in text


def test_the_page_has_every_number_that_is_asked_for(report, account):
    """Of each arm and merge, and of each task, with intervals."""
    folder, tables = report
    text = (folder / "report.html").read_text("utf-8")
    cells = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    top = tables["headline"]
    for arm in top["merged"]:
        for merge, value in top["merged"][arm].items():
            (row,) = [c for c in cells if len(c) == 8 and c[:2] == [f"<code>{arm}</code>", merge]]
            assert row[2] == f"{top['individual'][arm]:.1f}" and row[3].startswith(f"{value:.1f} ± ")
            assert row[5] == f"{100 * top['recovered_of_own'][arm][merge]:.0f}"
    for line in tables["tasks"]:
        low, high = line["intervals"]["regmean"]
        assert low <= line["merged"]["regmean"] <= high
        assert f"{line['merged']['regmean']:.1f} ({low:.1f} to {high:.1f})" in text


def test_where_nothing_was_learned_recovered_is_null_and_why_is_said(small_study, tmp_path):
    from plait.report.inference import NOTHING_LEARNED

    written = write_report(finished(small_study(**small(rates=[1e-9], seeds=[0])), tmp_path / "out"), tmp_path)
    tables, page = json.loads(written.json.read_text("utf-8")), written.markdown.read_text("utf-8")
    assert all(r["recovered"] is None and r["recovered_of_own"] is None and r["merged"] > 0 for r in tables["rows"])
    assert all(r["plain"] - r["floor"] <= LEARNED for r in tables["rows"])
    assert tables["undefined"][0].startswith("Seed 0: adapters alone reach")
    assert tables["undefined"][0] in page and NOTHING_LEARNED in page and "nan" not in page
    for c in tables["comparisons"]:
        assert c["undefined"] == NOTHING_LEARNED and c["difference"] is c["p"] is c["equivalent"] is None
    assert all(b["interval"] is None for b in tables["best"])
    assert all(r["recovered"] is None and r["score"] > 0 for r in tables["references"])
    top = tables["headline"]
    assert all(v is None for by in top["recovered"].values() for v in by.values()) and written.headline.floor > 0
    assert ">merged, mean score, %<" in written.figures[0].read_text("utf-8")


def test_sections_without_content_are_left_out(account):
    bare = replace(
        account,
        sweep=[],
        matched=[],
        predictors=[],
        scales=[],
        curves=[],
        interference={},
        references=[],
        best_folder=None,
    )
    text = render_html(bare, {})
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == ["Each arm under its best merge", "Every arm and merge", "Task by task", "Comparisons"]
    assert "tuning seed" not in text


def test_the_long_table_holds_what_the_rows_are_means_of(report, study_done):
    from pyarrow import parquet

    lines = parquet.read_table(report[0] / "scores.parquet").to_pylist()
    for row in rows_of(study_done):
        mine = [
            x
            for x in lines
            if (x["arm"], x["seed"], x["metric"]) == (row.arm, row.seed, "score") and len(x["split"]) == 1
        ]
        merged = [x for x in mine if (x["adapter"], x["method"]) == ("merged", row.method)]
        alone = [x["value"] for x in mine if x["adapter"] == "alone"]
        assert np.mean([x["value"] for x in merged]) == pytest.approx(row.merged)
        assert np.mean(alone) == pytest.approx(row.individual)
        assert {x["split"]: x["scale"] for x in merged} == dict(zip("AB", row.scales, strict=True))
    grids = [x for x in lines if x["split"] == "grid A"]
    assert grids and {x["metric"] for x in grids} == {"score"}


def test_pages_that_are_near_become_links_and_others_stay_words(tables_done, tmp_path):
    written, _ = tables_done
    assert "See docs/study/protocol.md." in written.markdown.read_text("utf-8")
    (tmp_path / "docs" / "study").mkdir(parents=True)
    (tmp_path / "docs" / "study" / "protocol.md").touch()
    text = linked("See docs/study/protocol.md.", tmp_path / "docs" / "results")
    assert text == "See [docs/study/protocol.md](../study/protocol.md)."


@pytest.mark.parametrize(("arms", "tasks"), [(1, 1), (1, 2), (8, 1), (2, 8)])
@pytest.mark.parametrize("length", [1, 100])
def test_heat_maps_of_any_size_have_room(arms, tasks, length):
    names = [f"{i}".rjust(length, "n") for i in range(tasks)]
    tables = {f"{a}".rjust(length, "n"): {i: dict.fromkeys(names, 0.1 * (a + 1)) for i in names} for a in range(arms)}
    assert heat_maps(tables).startswith("<svg")  # warnings are errors here


def test_heat_maps_show_what_is_not_known_as_a_gap():
    assert heat_maps({"a": {"t": {"t": None, "u": 0.1}, "u": {"t": 0.2, "u": None}}}).startswith("<svg")


def test_a_published_page_names_no_folder_of_whoever_ran_it(report, tables_done, study_done):
    for path in [*report[0].iterdir(), *tables_done[0].markdown.parent.iterdir()]:
        assert str(Path(study_done.recipe.base.model).parent).encode() not in path.read_bytes(), path.name
