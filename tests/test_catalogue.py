"""`plait ls`: every merging method in plain words, by what it needs."""

from __future__ import annotations

from plait.cli.catalogue import catalogue
from plait.cli.plainly import FIRST, MERGES
from tests.command import call, one_object


def test_every_merge_is_told_in_plain_words():
    rows = {r["name"]: r for r in catalogue("merges")["merges"]}
    assert rows.keys() == MERGES.keys() and rows.keys() >= FIRST.keys()
    for row in rows.values():
        assert row["plainly"].endswith(".") and "_" not in row["plainly"] and len(row["plainly"]) <= 100
    assert {r["name"] for r in rows.values() if r["first"]} == FIRST.keys()


def test_merges_stand_in_groups_by_what_they_need(capsys):
    _, out, _ = call(capsys, "ls", "merges")
    blocks = {b.splitlines()[0]: b for b in out.split("\n\n")}
    alone = blocks["needs the adapters alone"]
    assert alone.splitlines()[1].startswith("* tsv") and " ties " in alone and "regmean" not in alone
    statistics = next(b for h, b in blocks.items() if h.startswith("needs statistics"))
    assert statistics.splitlines()[1].startswith("* regmean ")
    assert any(h.startswith("needs two-sided statistics") and " mats " in b for h, b in blocks.items())
    assert any(h.startswith("needs Fisher") and " fisher " in b for h, b in blocks.items())
    assert any(h.startswith("needs the base") and " adamerging " in b for h, b in blocks.items())
    listed = one_object(call(capsys, "ls", "merges", "--json")[1])["merges"]
    assert {r["name"] for r in listed if not r["needs"]} >= {"tsv", "ties"} and "about" in listed[0]
