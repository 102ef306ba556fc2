"""The notebook is executed as it is published."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook" / "merging.ipynb"


@pytest.mark.slow
@pytest.mark.ci_sample
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_and_its_merges_work(tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(NOTEBOOK.parents[2] / "src"), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # published without answers that could grow old
    check = (
        "best = max(max(c.values()) for c in curves.values())\nassert alone > 60 and best > 0.85 * alone, (alone, best)"
    )
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    assert list((tmp_path / "merged").iterdir())
