"""Background tasks of a recipe lend their statistics alone: rows of text are enough."""

from __future__ import annotations

import pytest
import torch

from plait.errors import InputError, UsageError
from plait.runs.folder import keep, layout_of_folder
from plait.runs.layout import Layout
from plait.runs.stages import do
from plait.runs.units import STATISTICS
from plait.runs.waves import waves
from plait.statistics import open_statistics
from tests.conftest import tiny_rows, write_rows

ARM = {"name": "mixed", "subspace": "contrastive", "background": 0.5}
TEXTS = [{"text": row["text"]} for row in tiny_rows(2, 40, seed=9)]


@pytest.fixture
def lent(tiny_recipe, tmp_path):
    """lent(rows, ...) -> a recipe with a background of those rows."""

    def make(rows, statistics=None, **named):
        write_rows(tmp_path / "data/public.jsonl", rows)
        public = {"name": "public", "train": "public.jsonl", "text": "text", **named}
        return tiny_recipe(
            tasks=["topic", "grade"], arms=[ARM], merges=["task_arithmetic"], background=[public],
            training={"steps": 2, "batch_size": 8}, statistics={"samples": 8, "pool": "token", **(statistics or {})},
        )  # fmt: skip

    return make


def collected(recipe, out):
    """The statistics of a run, and of its background, collected alone; and where it lies."""
    layout = Layout(recipe, out)
    do([unit_of(layout)], layout)
    folder = layout.path(unit_of(layout))
    return (open_statistics(folder / f"{name}.stats.safetensors") for name in ("topic", "background.public"))


def unit_of(layout):
    return next(u for _, wave in waves(layout) for u in wave if u.stage == STATISTICS)


def test_rows_of_text_alone_lend_what_labelled_ones_do(lent, tmp_path, capfd):
    """Output gradients are not taken of them: starts read inputs alone, and texts do not say how many classes a head has."""
    own, alone = collected(lent(TEXTS, {"output_gradients": True}), tmp_path / "alone")
    assert "no column 'label': its texts are read alone" in capfd.readouterr().err
    assert own.output_gradients and not alone.output_gradients
    _, labelled = collected(lent([{**row, "label": i % 2} for i, row in enumerate(TEXTS)]), tmp_path / "labelled")
    assert "read alone" not in capfd.readouterr().err
    assert alone.sites.keys() == labelled.sites.keys() and len(alone.sites)
    for site, moments in alone.sites.items():
        assert moments.count == labelled.sites[site].count > 0
        assert torch.equal(moments.dense(), labelled.sites[site].dense())


@pytest.mark.parametrize(
    ("label", "named"),
    [
        (lambda i: 0, {}),  # one class
        (lambda i: i % 2 if i else None, {}),
        (lambda i: -1, {"label": "y"}),
        (lambda i: i, {"labels": ["0", "1"]}),
        (lambda i: "high", {"kind": "regression"}),
    ],
)
def test_labels_that_cannot_be_read_do_not_keep_texts_from_lending(lent, tmp_path, capfd, label, named):
    _, alone = collected(lent(TEXTS), tmp_path / "alone")
    column = named.get("label", "label")
    rows = [{**row, column: label(i)} for i, row in enumerate(TEXTS)]
    capfd.readouterr()
    _, odd = collected(lent(rows, **named), tmp_path / "odd")
    assert "task public: its texts are read alone, since its labels cannot be: " in capfd.readouterr().err
    for site, moments in alone.sites.items():
        assert torch.equal(moments.dense(), odd.sites[site].dense())


def test_texts_that_cannot_be_read_are_refused_whatever_the_labels_are(lent, tmp_path):
    rows = [{"text": row["text"] if i % 2 else "", "label": 0} for i, row in enumerate(TEXTS)]
    with pytest.raises(InputError, match="column 'text' has an empty cell"):
        collected(lent(rows), tmp_path / "out")


def test_a_label_column_that_is_named_has_to_be_there(lent, tmp_path):
    with pytest.raises(InputError, match="answer"):
        collected(lent(TEXTS, label="answer"), tmp_path / "out")


def test_a_decoder_of_answers_needs_them(lent, tmp_path):
    with pytest.raises(UsageError, match="in a recipe label: COLUMN"):
        collected(lent(TEXTS, kind="seq2seq"), tmp_path / "out")


def test_a_run_is_known_by_its_folder_with_the_rows_and_without(lent, tmp_path):
    """What lies there names every task's label column, and tables are made where the data are not."""
    layout = Layout(lent(TEXTS), tmp_path / "out")
    keep(layout)
    key = layout.key(unit_of(layout))
    again = Layout(layout_of_folder(tmp_path / "out").recipe, tmp_path / "out")
    assert again.key(unit_of(again)) == key
    (tmp_path / "data").rename(tmp_path / "moved")
    alone = layout_of_folder(tmp_path / "out")
    assert alone.key(unit_of(alone)) == key
