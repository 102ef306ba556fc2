"""What a page is made of, parsed: headings, tables, figures, the lines that load the merge; and the colours of its charts."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from plait.report import write_report
from plait.report.account import account_of
from plait.report.colours import DARK, LIGHT
from plait.report.drawing import Line, Panel, panels_of
from plait.report.page import document_of
from plait.report.remarks import ONE_BY_ONE, Remark, remarks_of
from plait.report.render import render_html, render_markdown
from plait.report.sections import sections_of
from plait.report.table import rows_of
from plait.report.words import percent, signed
from plait.tasks.lengths import Cut

VOID = {"meta", "link", "wbr", "br", "circle", "line", "polyline", "polygon", "path"}


class Tree(HTMLParser):
    """Elements in the order of the page: name, attributes, text inside, names of the elements around."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "of": dict(attrs), "text": "", "around": [e["tag"] for e in self.open]}
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "of": dict(attrs), "text": "", "around": [e["tag"] for e in self.open]})

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag, tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, *tags):
        return [e for e in self.elements if e["tag"] in tags]


@pytest.fixture(scope="module")
def account(study_done):
    return account_of(study_done)


@pytest.fixture(scope="module")
def tree(account):
    return Tree(render_html(document_of(account)))


def test_headings_are_an_outline(tree):
    heads = tree.all("h1", "h2", "h3", "h4")
    assert [h["tag"] for h in heads].count("h1") == 1 and heads[0]["tag"] == "h1"
    levels = [int(h["tag"][1]) for h in heads]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels)) and all(h["text"].strip() for h in heads)
    assert heads[1]["text"] == "What came out"
    places = {e["of"]["id"] for e in tree.elements if "id" in e["of"]}
    links = [a["of"]["href"].removeprefix("#") for a in tree.all("a")]
    assert set(links) <= places and len(links) == len(heads) - 2, "each section but what came out can be gone to"


def test_every_table_has_a_caption_and_heads_of_columns_and_rows(tree):
    tables = tree.all("table")
    captions = [c["text"].strip() for c in tree.all("caption")]
    assert len(tables) == len(captions) > 4 and all(captions)
    assert {h["of"].get("scope") for h in tree.all("th")} == {"col", "row"}


def test_every_figure_is_told_in_words(tree):
    drawn = [s for s in tree.all("svg") if s["of"].get("aria-hidden") != "true"]
    assert len(drawn) > 3 and all(s["of"]["role"] == "img" and len(s["of"]["aria-label"]) > 20 for s in drawn)
    axes = [t["text"] for t in tree.all("text")]
    assert "learning rate" in axes and "points against the chosen scale" in axes and "best merge, mean score, %" in axes


def test_the_lines_on_the_page_load_the_best_merge_as_they_stand(study_done, tree, monkeypatch):
    """Run in the folder that holds the run, as they say: the head answers as the whole model that plait loads does."""
    (code,) = tree.all("pre")
    best = study_done.out / "best"
    assert f"'{study_done.out.name}/best'" in code["text"] and str(study_done.out) not in code["text"]
    monkeypatch.chdir(study_done.out.parent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict = {}
    exec(compile(code["text"], "page", "exec"), names)
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    import plait

    model, ids = names["model"].eval(), torch.tensor([[5, 6, 7, 8]])
    base = AutoModelForSequenceClassification.from_pretrained(
        study_done.recipe.base.model, num_labels=model.config.num_labels
    )
    task = next(t for t in study_done.tasks if f"'{t}'" in code["text"])
    own = PeftModel.from_pretrained(base, str(best)).eval()
    with torch.no_grad():
        bare = own(ids).logits
        plait.load_head(own, best, task)
        assert torch.equal(model(ids).logits, own(ids).logits) and not torch.equal(bare, own(ids).logits)


def test_from_where_the_page_is_made_the_lines_name_the_way_to_the_merge(study_done, monkeypatch):
    monkeypatch.chdir(study_done.out.parent.parent)
    account = account_of(study_done)
    assert account.best_place == f"{study_done.out.parent.name}/{study_done.out.name}/best"
    assert f"adapter = '{account.best_place}'  # seen from where this page was made" in account.loading
    monkeypatch.chdir(study_done.out)
    assert account_of(study_done).best_place == "best"


def test_many_remarks_do_not_stand_before_the_first_figure(account, tmp_path):
    cut = [f"{i} of 90 texts of t{i} are cut at 40 tokens." for i in range(1, 9)]
    many = replace(account, remarks=[Remark("Rows of 8 tasks are cut.", cut), Remark("One.", ["Only one."])])
    page = document_of(many)
    tree = Tree(render_html(page))
    first = next(i for i, e in enumerate(tree.elements) if e["tag"] == "figure")
    above = " ".join(e["text"] for e in tree.elements[:first] if e["of"].get("class") == "note")
    assert "Rows of 8 tasks are cut. Each is told under" in above and "Only one." in above
    assert not any(text in above for text in cut)
    notes = [e["text"] for e in tree.elements if e["of"].get("class") == "note"]
    markdown = render_markdown(page, {}, tmp_path)
    for text in cut:
        assert notes.count(text) == 1 and markdown.count(text) == 1
    assert ONE_BY_ONE in {h["text"] for h in tree.all("h2")}
    assert ONE_BY_ONE not in {s.title for s in sections_of(account)}


def test_cut_texts_are_told_in_a_sentence_and_one_by_one(study_done, monkeypatch):
    first, *_ = study_done.tasks
    both = {"train": Cut(200, 3, 40, 90), "validation": Cut(50, 10, 40, 101, total=500)}
    monkeypatch.setitem(vars(study_done), "cuts", {first: both})
    (remark,) = [r for r in remarks_of(study_done, rows_of(study_done)) if "cut" in r.brief]
    share = f"most often those of {first} (10 of 50 validation rows); data.max_length: 104 would hold all that were looked at."
    assert remark.brief == f"Rows of 1 task are cut at 40 tokens, {share}"
    assert len(remark.each) == 2 and remark.first.startswith(remark.brief)
    monkeypatch.setitem(vars(study_done), "cuts", {first: {"train": Cut(200, 3, 40, 90, room=64)}})
    (remark,) = [r for r in remarks_of(study_done, rows_of(study_done)) if "cut" in r.brief]
    assert remark.first == remark.each[0] and "the longest has 90, and the base reads 64" in remark.brief


def test_a_number_that_rounds_to_nothing_has_no_sign():
    assert (signed(-0.04), signed(-0.06), percent(-0.004), percent(-0.0004, "+z.1f")) == ("+0.0", "-0.1", "0", "+0.0")


def test_curves_are_told_apart_without_colours():
    """Every place of the palette has a mark of its own, in the legend as at the points."""
    slots = {f"arm{i}": i for i in range(len(LIGHT))}
    lines = [Line(arm, [(1.0, i), (2.0, i + 1.0)]) for arm, i in slots.items()]
    tree = Tree(f"<body>{panels_of([Panel('p', 'x', 'y', lines)], slots)}</body>")
    keys = [e for e in tree.elements if e["of"].get("class") == "point" and "li" in e["around"]]
    forms = {e["of"].get("points", e["of"].get("r")) for e in keys}
    assert len(keys) == len(forms) == len(LIGHT)
    assert sum(e["of"].get("class") == "point" for e in tree.elements) == 3 * len(LIGHT)


def linear(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def contrast(colour, other):
    low, high = sorted(
        sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear(x), strict=True)) for x in (colour, other)
    )
    return (high + 0.05) / (low + 0.05)


# Machado, Oliveira & Fernandes (2009), severity 1: what is left of linear RGB without long, middle or short cones.
VISION = {
    "all": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def lab(colour, matrix):
    seen = [min(1.0, max(0.0, sum(m * c for m, c in zip(row, linear(colour), strict=True)))) for row in matrix]
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    xyz = [
        sum(m * c for m, c in zip(row, seen, strict=True)) / w
        for row, w in zip(to_xyz, (0.9505, 1, 1.089), strict=True)
    ]
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize(("palette", "paper"), [(LIGHT, "#ffffff"), (DARK, "#14161a")], ids=["light", "dark"])
def test_colours_stand_out_and_are_told_apart_with_any_colour_vision(palette, paper):
    assert len(palette) == len(set(palette)) == 8
    assert [c for c in palette if contrast(c, paper) < 3] == []
    for name, matrix in VISION.items():
        close = [
            (a, b) for a, b in itertools.combinations(palette, 2) if math.dist(lab(a, matrix), lab(b, matrix)) < 15
        ]
        assert close == [], name


def test_a_report_without_a_best_merge_says_nothing_of_loading(study_copy, tmp_path):
    import shutil

    shutil.rmtree(study_copy.out / "best")
    written = write_report(study_copy, tmp_path)
    assert Tree(written.html.read_text("utf-8")).all("pre") == []
