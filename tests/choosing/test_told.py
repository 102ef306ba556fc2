"""What `merge auto` does not do is said or refused, never passed over; so is what its texts cannot tell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from plait.choosing import choose, finishing
from plait.choosing.auto import AutoSettings, merge_auto
from plait.choosing.choose import LEARNT_WEIGHTS, THE_FIT
from plait.cli.existing_words import auto_text, repair_text
from plait.disk.written import Written
from plait.errors import RunError, UsageError
from plait.fidelity.limit import Limit
from plait.fidelity.ready_panel import ready_panel
from plait.fidelity.record import HeadRefit, Repair
from plait.fidelity.score import general_shift
from plait.learning.fitting import Fit
from tests.command import call
from tests.panels import adapters_of, texts_of
from tests.test_hub import write

pytestmark = pytest.mark.usefixtures("untimed")

QUICK = AutoSettings(methods=("task_arithmetic",), scales=(0.3, 0.7), refine=0, fit=False, max_length=24)


@pytest.mark.parametrize("asked", [{"max_shift": 0.5}, {"learn_heads": True}, {"repair": 3}])
def test_what_is_done_on_texts_is_refused_without_any(asked, make_panel):
    with pytest.raises(UsageError, match="there are none"):
        merge_auto(adapters_of(make_panel()), settings=replace(QUICK, **asked))
    with pytest.raises(UsageError, match="there are none"):
        merge_auto(adapters_of(make_panel()), general=texts_of(3))


@pytest.mark.parametrize(
    "option", [["--max-shift", "0.5"], ["--general", "FILE"], ["--no-fit"], ["--refine", "3"], ["--learn-heads"], ["--no-heads"]]
)  # fmt: skip
def test_options_of_texts_are_refused_without_any(option, make_panel, tmp_path, capsys):
    (tmp_path / "general.txt").write_text("one\ntwo\n")
    folders = [write(tmp_path / a.name, a) for a in adapters_of(make_panel())]
    words = [str(tmp_path / "general.txt") if w == "FILE" else w for w in option]
    code, _, err = call(capsys, "merge", "auto", *map(str, folders), "--out", str(tmp_path / "out"), *words)
    assert code == 2
    assert f"takes no {option[0].split('/')[0]}" in err
    assert not (tmp_path / "out").exists()


def test_one_adapter_is_held_to_the_limit_and_is_not_repaired(make_panel):
    panel = make_panel()
    one, texts, general = panel.parts[0].adapter, {"one": panel.texts["one"]}, texts_of(6, 9)
    alone = replace(panel, parts=panel.parts[:1], texts=texts, general=general)
    shift = float(general_shift(alone, [(one, 1.0)])[0])
    within = merge_auto([one], panel.base, texts, general=general, settings=replace(QUICK, max_shift=shift * 1.01))
    assert within.fidelity.general_kl == pytest.approx(shift)
    assert within.record.limit == Limit(shift * 1.01, 1)
    with pytest.raises(RunError, match="one by itself moves general text"):
        merge_auto([one], panel.base, texts, general=general, settings=replace(QUICK, max_shift=shift * 0.99))
    for asked in ({"repair": 3}, {"learn_heads": True}):
        with pytest.raises(UsageError, match="one adapter alone"):
            merge_auto([one], panel.base, texts, settings=replace(QUICK, **asked))


def test_heads_of_text_models_are_not_learnt(make_panel):
    panel = make_panel("llama", "causal", texts=3)
    with pytest.raises(UsageError, match="write text"):
        merge_auto(adapters_of(panel), panel.base, panel.texts, settings=replace(QUICK, learn_heads=True))


def test_too_few_texts_are_told_with_what_they_leave_out(make_panel):
    panel = make_panel(texts=12)
    adapters = adapters_of(panel)
    fewer = {**panel.texts, "two": panel.texts["two"][:11]}
    asked = replace(QUICK, refine=2, fit=True)
    told = merge_auto(adapters, panel.base, fewer, settings=asked).record
    assert any(
        n.startswith("11 texts of two") and n.endswith("so no weights are learnt, nothing is fitted and heads stay as they are")
        for n in told.notes
    )  # fmt: skip
    assert not told.heads and not told.held_out
    enough = merge_auto(adapters, panel.base, panel.texts, settings=asked).record
    assert enough.heads and enough.held_out and not any("to choose by" in n for n in enough.notes)
    nothing_asked = merge_auto(adapters, panel.base, fewer, settings=replace(QUICK, heads=False)).record
    assert not any("to choose by" in n for n in nothing_asked.notes)


def test_texts_on_which_an_adapter_is_the_bare_base_are_told(make_panel):
    panel = make_panel()
    one, two = adapters_of(panel)
    idle = replace(one, modules={m: replace(f, B=torch.full_like(f.B, 1e-9)) for m, f in one.modules.items()})
    told = merge_auto([idle, two], panel.base, panel.texts, settings=QUICK).record.notes
    assert any(n.startswith("not known: how well one is kept") for n in told)
    panel = make_panel("bert", "regression")
    told = merge_auto(adapters_of(panel), panel.base, panel.texts, settings=QUICK).record
    assert all(t.fidelity.agreement_base < 1 for t in told.fidelity.tasks)
    assert not any("not known" in n for n in told.notes)


def test_pico_is_explained_where_it_is_shown(make_panel):
    record = merge_auto(adapters_of(make_panel())).record
    for label, calibrate in (("tsv", None), ("tsv + pico", "pico")):
        rows = tuple(replace(e, candidate=label, calibrate=calibrate) for e in record.evidence)
        text = auto_text(Written(replace(record, evidence=rows), "out"))
        assert ("pico: directions of B" in text) == (calibrate is not None)


def test_a_fit_need_not_be_closer_than_weights_that_are_beyond_the_limit(make_panel, monkeypatch):
    panel = make_panel()
    one, two = adapters_of(panel)
    weighted, front_to_back = replace(one, name="weighted"), replace(two, name="fitted")
    beyond = [weighted]
    monkeypatch.setattr(
        choose, "refined_weights", lambda *_: (weighted, {"m": (1.0,)}, {"chosen": 0.1, "refined": 0.9})
    )
    monkeypatch.setattr(choose, "within", lambda panel, merge, limit: not any(merge is b for b in beyond))
    monkeypatch.setattr(choose, "best_fit", lambda *_, **__: (Fit(0.05, 1.0, 1.0), 0.5))
    monkeypatch.setattr(choose, "fitted", lambda *_, **__: front_to_back)
    asked = replace(QUICK, refine=2, fit=True, heads=False, max_shift=50.0)
    done = merge_auto([one, two], panel.base, panel.texts, general=texts_of(3), settings=asked)
    assert done.record.chosen.fit and done.record.held_out == {"chosen": 0.1, "fitted": 0.5}
    assert [f.A.data_ptr() for f in done.adapter.modules.values()] == [
        f.A.data_ptr() for f in front_to_back.modules.values()
    ]
    assert done.record.limit.steps == (LEARNT_WEIGHTS,)
    assert "0.100 -> 0.500 on held-out texts" in auto_text(Written(done.record, "out"))
    beyond.append(front_to_back)
    done = merge_auto([one, two], panel.base, panel.texts, general=texts_of(3), settings=asked)
    assert done.record.chosen.fit is None and not done.record.chosen.weights
    assert done.record.limit.steps == (LEARNT_WEIGHTS, THE_FIT)


def test_what_was_closer_and_is_beyond_the_limit_is_told_so(make_panel, monkeypatch):
    panel = make_panel()
    kept = HeadRefit("one", 0.5, 0.2, True, 1.0)
    monkeypatch.setattr(finishing, "with_heads", lambda panel, merge: (replace(merge, name="moved"), (kept,)))
    done_repair = Repair(4, {"merge": 0.4, "repaired": 0.6}, True, 1.0, 0.5, most=4)
    monkeypatch.setattr(
        finishing, "repaired", lambda panel, merge, *_, **__: (replace(merge, name="moved"), done_repair)
    )
    monkeypatch.setattr(finishing, "judged_with_heads", lambda panel, merge, better, repair: repair)
    monkeypatch.setattr(finishing, "within", lambda panel, merge, limit: merge.name != "moved")
    done = merge_auto(
        adapters_of(panel),
        panel.base,
        panel.texts,
        general=texts_of(3),
        settings=replace(QUICK, repair=4, max_shift=50.0),
    )
    assert done.adapter.name != "moved" and not done.record.repair.kept and not done.record.heads[0].kept
    assert "closeness 0.400 -> 0.600 on held-out texts, but general text moves beyond --max-shift" in repair_text(
        done.record.repair
    )
    worse = replace(done_repair, held_out={"merge": 0.4, "repaired": 0.3}, kept=False)
    assert repair_text(worse).endswith("closeness 0.400 -> 0.300 on held-out texts, so the merge stays as it was")


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "classification"), ("llama", "causal"), ("t5", "seq2seq")])
def test_texts_that_are_read_in_part_are_told(architecture, kind, make_panel):
    """Counted with the tokenizer alone, one text at a time."""
    panel = make_panel(architecture, kind, texts=5)
    long = tuple((f"{text} {text} {text}",) for (text,) in panel.texts["one"][:2])
    texts = {"one": (*long, *panel.texts["one"]), "two": panel.texts["two"]}
    lengths = {name: [len(panel.tokenizer(t)["input_ids"]) for (t,) in rows] for name, rows in texts.items()}
    longest = max(map(max, lengths.values()))
    limit = max(lengths["two"])
    told, _ = ready_panel(panel.base, adapters_of(panel), texts, max_length=limit, on_progress=(said := []).append)
    cut = sum(n > limit for n in lengths["one"])
    assert cut >= 1 and told.max_length == limit
    assert said == [
        f"texts longer than {limit} tokens are read up to there: {cut} of 7 of one (--max-length {-(-longest // 8) * 8} would hold all)"
    ]
    record = ready_panel(panel.base, adapters_of(panel), texts, max_length=limit)[1]
    assert list(record.notes) == said
    assert ready_panel(panel.base, adapters_of(panel), texts, max_length=longest)[1].notes == ()
