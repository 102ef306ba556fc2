"""Pages of merges that already exist, and of scales: what they quote follows from the records beside them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.mark.parametrize("name", ["existing", "existing-penalised", "existing-eleven", "existing-eleven-penalised"])
def test_existing_says_what_its_seeds_say(script, name):
    report = json.loads((RESULTS / f"{name}.json").read_text())
    made = script("existing").summary(report["seeds"])
    assert {k: v for k, v in made.items() if k in report["intervals"]} == pytest.approx(
        {k: report[k] for k in made if k in report["intervals"]}
    )
    earlier = report.get("earlier", {})
    for key, span in made["intervals"].items():
        now = key not in earlier
        assert span == pytest.approx(report["intervals"][key] if now else earlier[key]["interval"])
    assert all(made[k] == pytest.approx(v["value"]) for k, v in earlier.items())
    today = script("existing_again").today(RESULTS, f"{name}.json")
    assert {k: report["elsewhere"][k] for k in earlier} == {k: today[k] for k in earlier}
    assert all(report[k] == report["elsewhere"][k]["value"] for k in earlier)
    missing = [k for k in script("existing").KEYS if made[k] is None]
    assert all(report[k] == report["elsewhere"].get(k, {}).get("value") for k in missing)
    assert (RESULTS / f"{name}.md").read_text() == script("existing_page").page(report, f"{name}.json")


def test_scales_are_the_rows_and_count_once(script):
    report = json.loads((RESULTS / "scales.json").read_text())
    rows = report["rows"]
    assert (RESULTS / "scales.md").read_text() == script("scales_page").page(rows, report["by_length"])
    of_what = [tuple(v for k, v in r.items() if k not in ("source", "also")) for r in rows]
    assert len(set(of_what)) == len(rows)


@pytest.mark.parametrize("name", ["existing-texts", "existing-texts-eleven", "existing-texts-penalised"])
def test_what_more_texts_give_is_the_seeds(script, name):
    report = json.loads((RESULTS / f"{name}.json").read_text())
    assert (RESULTS / f"{name}.md").read_text() == script("more_texts").page(report)
    for seed in report["seeds"].values():
        alone, floor = seed["alone"], seed["floor"]
        for row in seed["rows"].values():
            assert row["recovered"] == pytest.approx(
                (np.mean(list(row["tasks"].values())) - floor) / (alone - floor), abs=1e-3
            )
        for step, r in seed["repairs"].items():
            before, after = r["held_out_with_heads"]
            closer = r["by_the_divergence"] and all(after[k] > before[k] for k in ("kept", "beyond_chance"))
            assert r["kept"] == closer  # as it was said beforehand
            kept_or_not = seed["rows"][f"{step}, kept or not"]
            assert not r["kept"] or seed["rows"][step] == kept_or_not


@pytest.mark.parametrize(
    "name", ["existing-fitted", *(f"existing-fitted-{n}" for n in ("again", "eleven", "penalised"))]
)
def test_what_a_fit_adds_is_the_seeds(script, name):
    report = json.loads((RESULTS / f"{name}.json").read_text())
    text = (RESULTS / f"{name}.md").read_text()
    assert text == script("fitted").page(report)
    assert "What each step adds" in text
    for labels in (s["labels"] for s in report["seeds"].values() if "labels" in s):
        fidelity, *halves = zip(*(c[2:] for c in labels["candidates"]), strict=True)
        assert labels["rank_correlation"] == pytest.approx(spearmanr(fidelity, np.mean(halves, 0)).statistic, abs=2e-3)
        assert labels["share_of_oracle"] == pytest.approx(labels["choice"] / labels["oracle"])


def test_four_bits_are_what_the_seeds_say(script):
    whole = json.loads((RESULTS / "nf4-mpnet.json").read_text())
    assert script("nf4").summary(whole["seeds"]) == whole["rows"]
    page = (RESULTS / "nf4.md").read_text()
    for row in whole["rows"]:
        cells = [f"{row[w][k]:.3f}" for w in ("merged", "alone") for k in ("followed", "agreement")]
        line = next(x for x in page.split("## ", 1)[1].splitlines() if x.startswith(f"| {row['way']} |"))
        assert all(c in line for c in cells)
