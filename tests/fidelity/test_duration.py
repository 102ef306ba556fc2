"""How long a choice will take is told before: counted in passes over the texts, one of which is timed."""

from __future__ import annotations

from itertools import count

import pytest

from plait.fidelity.auto import AutoSettings, merge_auto
from plait.fidelity.duration import expected_seconds


def test_more_merges_texts_steps_and_fits_take_longer(make_panel):
    panel = make_panel(texts=8)
    few = panel.with_texts({t: rows[:4] for t, rows in panel.texts.items()})
    asked = {"panel": panel, "screen": few, "merges": 100, "going": 12}

    def expected(**changed):
        ticks = count(0.0, 16.0)  # two passes over 4 texts of two adapters take 16 s: one second a text
        return expected_seconds(**{**asked, **changed}, clock=lambda: next(ticks))

    assert expected() == pytest.approx(0.85 * (106 * 8 + 14 * 16))
    assert expected(screen=panel, merges=100) == pytest.approx(0.5 * 0.85 * 106 * 16)  # no second round
    assert expected(refine=10) - expected() == pytest.approx(10 * 8 * 2 * 2.9)
    assert expected(fits=2.5) - expected() == pytest.approx(2.5 * 7.3 * 16)


def test_it_is_told_before_the_first_round(make_panel):
    panel = make_panel(texts=4)
    said: list[str] = []
    settings = AutoSettings(methods=("task_arithmetic",), scales=(0.5,), refine=0, fit=False)
    merge_auto([p.adapter for p in panel.parts], panel.base, panel.texts, settings=settings, on_progress=said.append)
    told = next(i for i, line in enumerate(said) if line.startswith("about "))
    assert told < next(i for i, line in enumerate(said) if "by fidelity" in line)
