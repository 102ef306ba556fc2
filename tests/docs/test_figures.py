"""The figures of the theory page are those of the published numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.filterwarnings("ignore")
def test_the_figures_are_drawn_from_the_results_as_they_are(tmp_path):
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    written = figures.write_all(tmp_path)
    assert len(written) == 3
    for path in written:
        assert path.read_bytes() == (DOCS / "images" / path.name).read_bytes(), "python docs/figures.py"
