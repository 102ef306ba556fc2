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
from plait.report.figures import figures_of
from plait.report.grid import grid_table, heat_tables
from plait.report.page import document_of
from plait.report.remarks import Remark
from plait.report.render import linked, render_html, render_markdown
from plait.report.table import LEARNED, rows_of
from plait.report.words import Cell
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
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert 'aria-hidden="true"' in svg or re.search('role="img" aria-label="[^"]+"><title>[^<]+</title>', svg)
    assert text.count('class="strip') == 2 and text.count('class="panels"') == 2  # arms; scales, the sweep


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
    hostile = replace(
        account, recipe=recipe, rows=rows, best=best, about={"command": HOSTILE},
        remarks=[Remark(HOSTILE, [HOSTILE, HOSTILE])], loading=HOSTILE,
        tasks=[replace(t, arm=HOSTILE) for t in account.tasks], curves=[replace(c, arm=HOSTILE) for c in account.curves],
        scales=[replace(c, arm=HOSTILE, merge=HOSTILE) for c in account.scales], reference=HOSTILE,
        references=[replace(r, arm=HOSTILE) for r in account.references], sweep=[{**r, "arm": HOSTILE} for r in account.sweep],
    )  # fmt: skip
    text = render_html(document_of(hostile))
    page = Page(text)
    assert page.tags.count("script") == 1 and page.fetched == []
    assert "alert('x')" not in text and text.count("&lt;script&gt;") > 5


def test_a_cell_of_markdown_stays_one_cell(account, tmp_path):
    rows = [replace(r, arm="a|b") for r in account.rows]
    best, tasks = ([replace(x, arm="a|b") for x in xs] for xs in (account.best[:1], account.tasks[:2]))
    text = render_markdown(document_of(replace(account, rows=rows, best=best, tasks=tasks)), {}, tmp_path)
    assert "| `a\\|b` |" in text


def test_figures_lie_beside_the_markdown_and_are_drawn_the_same_again(tables_done, account):
    written, tables = tables_done
    page = written.markdown.read_text("utf-8")
    assert [p.name for p in written.figures] == [f"tiny-{n}.svg" for n in ("recovered", "scales", "sweep")]
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
    assert f"One adapter in place of 2 keeps **{share} %**" in markdown
    assert f"One adapter in place of 2 keeps <b>{share} %</b>" in html and f'<p class="number">{share} %</p>' in html
    for b in tables["best"]:
        low, high = b["interval"]
        for text in (html, markdown):
            assert f"{100 * low:.0f} to {100 * high:.0f}" in text and f"{b['individual']:.1f}" in text


def test_the_page_has_every_number_that_is_asked_for(report, account):
    """Of each arm and merge, and of each task, with intervals."""
    folder, tables = report
    text = re.sub("<wbr>", "", (folder / "report.html").read_text("utf-8"))
    lines = {}
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", text):
        head, *cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)
        lines[head] = cells
    top, tasks = tables["headline"], list(tables["measured"])
    for arm in top["merged"]:
        for merge, value in top["merged"][arm].items():
            cells = lines[f"<code>{arm}</code> <small>{merge}</small>"]
            assert cells[1] == f"{100 * top['recovered_of_own'][arm][merge]:.0f}"
            assert cells[2].startswith(f"{value:.1f} <small>± ")
        assert lines[f"<code>{arm}</code> <small>alone</small>"][2] == f"{top['individual'][arm]:.1f}"
    for line in tables["tasks"]:
        low, high = line["intervals"]["regmean"]
        assert low <= line["merged"]["regmean"] <= high
        cell = lines[f"<code>{line['arm']}</code> <small>regmean</small>"][3 + tasks.index(line["task"])]
        assert cell == f"{line['merged']['regmean']:.1f} <small>{low:.1f}–{high:.1f}</small>"
    for task, measured in tables["measured"].items():
        assert f"{task} <small>{' + '.join(measured['metrics'])}, {measured['rows']} rows</small>" in text


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
    text = render_html(document_of(bare))
    titles = re.findall(r'<h2 id="s\d">(.*?)</h2>', text)
    assert titles == [
        "Each arm under its best merge",
        "Every task under every arm and merge",
        "Comparisons",
        "What the words mean",
    ]
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


def test_maps_share_one_scale_of_colours_and_show_what_is_not_known_as_a_gap():
    nan = float("nan")
    first, second = heat_tables({"a": {"t": {"t": nan, "u": 0.1}, "u": {"t": 0.2, "u": nan}}, "b": {"t": {"t": 1.0}}})
    assert [[c.text for c in row] for row in first.rows] == [["t", "–", "0.10"], ["u", "0.20", "–"]]
    assert [c.tint for row in first.rows for c in row[1:]] == [None, 0.0, pytest.approx(np.log10(2)), None]
    assert second.rows[0][1].tint == 1.0 and first.caption == "`a`: other tasks 0.15"
    small = heat_tables({"a": {"t": {"t": 0.03, "u": 0.004}, "u": {"t": 0.004, "u": 0.03}}})[0]
    assert small.caption == "`a`: own task 0.03, other tasks 0.004", (
        "a small mean is rounded as the numbers below it, not to 0.00"
    )


def test_a_published_page_names_no_folder_of_whoever_ran_it(report, tables_done, study_done):
    recipe = study_done.recipe
    for path in [*report[0].iterdir(), *tables_done[0].markdown.parent.iterdir()]:
        for place in (str(Path(recipe.base.model).parent), str(recipe.data.root)):
            assert place.encode() not in path.read_bytes(), path.name


def test_the_colour_of_a_score_says_what_was_lost_or_won_against_the_arms_own_adapter(account):
    of = {(t.arm, t.task): t for t in account.tasks}
    rows = [r for r in grid_table(account).rows if r[0].note not in ("alone", "floor")]
    seen = 0
    for row in rows:
        for task, cell in zip(account.measured, row[4:], strict=False):
            if isinstance(cell, Cell) and cell.tint is not None:
                lost = cell.key - of[row[0].text.strip("`"), task].alone
                assert cell.tint == pytest.approx(max(-1.0, min(1.0, lost / 20)))
                seen += 1
    assert seen >= len(rows)
