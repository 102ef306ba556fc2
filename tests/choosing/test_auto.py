"""Choosing: deterministic, reversible to its evidence, unchanged for one adapter, refined only where that helps."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from plait.adapters.peft_format import read_adapter, write_adapter
from plait.border.records import to_json
from plait.choosing import factors_only
from plait.choosing.auto import AutoSettings, merge_auto
from plait.choosing.auto_folders import merge_auto_folders
from plait.choosing.candidates import Recipe, Tried, groups_of
from plait.choosing.choose import choose, scaled
from plait.choosing.proxy import best_scale, mean_error, terms
from plait.cli.existing_words import auto_text
from plait.disk.store import read_manifest
from plait.disk.written import Written
from plait.errors import InputError, RunError, UsageError
from plait.fidelity.limit import Limit
from plait.fidelity.score import fidelities
from plait.learning.distil import distil
from plait.learning.losses import loss_of
from plait.learning.repair import LAYERS
from plait.merging import merge
from tests.panels import adapters_of, same, texts_of

pytestmark = pytest.mark.usefixtures("untimed")

FEW = AutoSettings(scales=(0.3, 0.7), refine=6, max_length=24)


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "classification"), ("llama", "causal"), ("t5", "seq2seq")])
def test_the_winner_is_the_best_of_what_was_tried(make_panel, architecture, kind):
    panel = make_panel(architecture, kind, texts=6)
    adapters = adapters_of(panel)
    found = choose(panel, adapters, AutoSettings(scales=(0.3, 0.7), refine=0))
    scores = [s.fidelity.score for s in found.scored]
    assert scores == sorted(scores, reverse=True)
    labels = {s.tried.recipe.label for s in found.scored}
    assert len(found.scored) >= 32 and len(labels) == 16
    assert {"tsv", "tsv + pico", "regmean (own moments)", "least_squares + pico", "iso_c", "knots"} <= labels
    again = fidelities(panel, [(found.adapter, 1.0)])[0]
    assert again.score == pytest.approx(scores[0], abs=1e-4)
    first = found.scored[0]
    assert (found.recipe, found.scale) == (first.tried.recipe, first.scale)


def test_one_adapter_comes_back(make_panel):
    panel = make_panel()
    one = panel.parts[0].adapter
    without = merge_auto([one])
    assert same(without.adapter, one)
    with_texts = merge_auto([one], panel.base, {"one": panel.texts["one"]}, settings=FEW)
    assert same(with_texts.adapter, one)
    assert with_texts.fidelity.worst.agreement == 1.0


def test_without_texts_the_same_factors_give_the_same_choice(make_panel):
    adapters = adapters_of(make_panel())
    a, b = merge_auto(adapters), merge_auto(adapters)
    assert same(a.adapter, b.adapter)
    assert a.record == b.record
    errors = [r.assumed_error for r in a.record.evidence]
    assert errors == sorted(errors)
    assert {r.method for r in a.record.evidence} == {"task_arithmetic", "tsv", "iso_c", "knots"}
    assert a.record.chosen.candidate == "tsv"
    assert a.record.chosen.scale == 0.7  # by its record
    expected = best_scale(terms(merge(adapters, "tsv", scale=1.0).adapter, adapters))
    nearest = min((r for r in a.record.evidence if r.candidate == "tsv"), key=lambda r: r.assumed_error)
    assert nearest.scale == pytest.approx(expected, abs=1e-4)
    other = merge_auto(adapters, settings=AutoSettings(methods=("task_arithmetic", "iso_c")))
    assert other.record.chosen.candidate == other.record.evidence[0].candidate
    turned = merge_auto(adapters[::-1])
    assert turned.record.chosen == a.record.chosen


def test_a_sample_of_modules_stands_for_all_where_the_record_decides(make_panel, monkeypatch):
    adapters = adapters_of(make_panel())
    whole = merge_auto(adapters)
    monkeypatch.setattr(factors_only, "SAMPLED", 1)
    sampled = merge_auto(adapters)
    assert same(sampled.adapter, whole.adapter)
    kinds = {m.rpartition(".")[2] for m in whole.adapter.modules}
    assert {r.modules for r in sampled.record.evidence} == {len(kinds)}
    assert {r.modules for r in whole.record.evidence} == {len(whole.adapter.modules)}
    other = AutoSettings(methods=("task_arithmetic", "iso_c"))  # here the errors decide, and are those of all modules
    assert {r.modules for r in merge_auto(adapters, settings=other).record.evidence} == {len(whole.adapter.modules)}


def test_the_assumed_error_is_that_of_dense_matrices(make_panel):
    adapters = adapters_of(make_panel())
    merged = merge(adapters, "tsv", scale=1.0).adapter
    found = terms(merged, adapters, 0.3)
    for adapter in adapters:
        expected = []
        for m, f in adapter.modules.items():
            own, other = f.delta(torch.float64), 0.8 * merged.modules[m].delta(torch.float64)
            moments = 0.3 * own.T @ own / own.square().sum() + 0.7 * torch.eye(own.shape[1]) / own.shape[1]
            off = other - own
            expected.append(float((off @ moments * off).sum() / (own @ moments * own).sum()))
        assert found[adapter.name].error(0.8) == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    best = best_scale(found)
    assert mean_error(found, best) <= min(mean_error(found, best * x) for x in (0.9, 1.1))


def test_weights_that_are_learnt_come_closer_and_stay_combinations(make_panel):
    panel = make_panel(texts=24)
    adapters = adapters_of(panel)
    tried = choose(panel, adapters, AutoSettings(methods=("task_arithmetic",), scales=(0.3,), refine=0))
    tried = next(s.tried for s in tried.scored if s.tried.recipe.calibrate is None)
    start = scaled(tried.adapter, 0.3)
    done = distil(panel, start, learns="weights", groups=groups_of(tried, adapters), steps=30, rate=0.05)
    before, after = fidelities(panel, [(start, 1.0), (done.adapter, 1.0)])
    assert sum(t.kl / t.kl_base for t in after.tasks) < sum(t.kl / t.kl_base for t in before.tasks)
    assert done.last_loss < done.first_loss
    for m, weights in done.weights.items():
        parts = [0.3 * w * a.modules[m].delta() for w, a in zip(weights, adapters, strict=True)]
        assert torch.allclose(done.adapter.modules[m].delta(), sum(parts), atol=1e-4)
    assert same(start, scaled(tried.adapter, 0.3))
    assert all(p.requires_grad for p in panel.model(panel.parts[0]).parameters())


def test_a_merge_is_cut_before_it_is_repaired(make_panel):
    panel = make_panel(texts=8)
    settings = replace(FEW, refine=0, rank=2)
    cut = merge_auto(adapters_of(panel), panel.base, panel.texts, settings=settings)
    found = merge_auto(adapters_of(panel), panel.base, panel.texts, settings=replace(settings, repair=5))
    loss = loss_of(panel, LAYERS)
    assert same(found.adapter, distil(panel, cut.adapter, learns="factors", steps=5, loss=loss).adapter)
    assert found.record.rank == 2 and found.record.discarded_energy == cut.record.discarded_energy > 0
    assert found.record.repair.steps == 5


def test_folders_to_a_folder_with_the_evidence(make_panel, tmp_path):
    panel = make_panel(texts=40)
    folders = []
    for adapter in adapters_of(panel):
        folder = tmp_path / adapter.name
        folder.mkdir()
        write_adapter(folder, adapter)
        folders.append(str(folder))
    texts = dict(panel.texts)
    settings = replace(FEW, repair=3)
    found = merge_auto_folders(
        folders, tmp_path / "out", base=panel.base, texts=texts, general=texts_of(5, 7), settings=settings
    )
    manifest = read_manifest(tmp_path / "out")
    assert manifest["result"]["chosen"] == json.loads(json.dumps(to_json(found)["chosen"]))
    assert {"task", "kl", "shift", "kept", "followed"} <= set(manifest["result"]["fidelity"]["tasks"][0])
    assert len(manifest["result"]["evidence"]) >= 32
    assert {r["texts"] for r in manifest["result"]["evidence"]} == {16, 32, 40}
    assert manifest["result"]["fidelity"]["general_kl"] > 0
    assert set(manifest["result"]["held_out"]) == {"chosen", "refined", "fitted"}
    written = read_adapter(tmp_path / "out")
    assert set(written.heads) == {"one", "two"}
    assert found.record.verification_error < 1e-5
    score = fidelities(panel, [(written, 1.0)])[0].score
    assert score == pytest.approx(found.record.fidelity.score, abs=1e-3)
    again = merge_auto_folders(
        folders, tmp_path / "out", base=panel.base, texts=texts, general=texts_of(5, 7), settings=settings
    )
    assert again.reused and again.record == found.record
    with pytest.raises(UsageError, match="other settings"):
        merge_auto_folders(folders, tmp_path / "out", base=panel.base, texts=texts, settings=FEW)
    cut = merge_auto_folders(folders, tmp_path / "cut", settings=replace(FEW, rank=2))
    assert cut.record.rank == 2 and 0 < cut.record.discarded_energy < 1


@pytest.mark.parametrize(("architecture", "kind", "read"), [("bert", "classification", 20), ("llama", "causal", 12)])
def test_a_choice_reads_some_texts_and_heads_and_the_measure_all(make_panel, architecture, kind, read):
    """Of text models nothing reads more than the choice, where no repair is asked for."""
    panel = make_panel(architecture, kind, texts=20)
    settings = replace(FEW, texts=12)
    merged = merge_auto(adapters_of(panel), panel.base, panel.texts, settings=settings)
    record = merged.record
    assert max(e.texts for e in record.evidence) == 12
    assert set(record.texts.values()) == {read}
    assert kind == "causal" or {t.n for t in merged.fidelity.tasks} == {20}
    repaired = merge_auto(adapters_of(panel), panel.base, panel.texts, settings=replace(settings, repair=1)).record
    assert set(repaired.texts.values()) == {20}


def test_bad_inputs_are_named(make_panel):
    panel = make_panel()
    adapters = adapters_of(panel)
    with pytest.raises(UsageError, match="texts are read by the base"):
        merge_auto(adapters, None, panel.texts)
    with pytest.raises(UsageError, match="no texts for two"):
        merge_auto(adapters, panel.base, {"one": panel.texts["one"]})
    with pytest.raises(UsageError, match="repair distils on texts"):
        merge_auto(adapters, settings=AutoSettings(repair=5))
    with pytest.raises(InputError, match="is empty"):
        merge_auto(adapters, panel.base, {"one": ((" ",),), "two": panel.texts["two"]})
    with pytest.raises(UsageError, match="need statistics"):
        merge_auto(adapters, settings=AutoSettings(methods=("regmean",)))
    for wrong in ({"scales": ()}, {"scales": (0.0,)}, {"refine": -1}, {"rank": 0}):
        with pytest.raises(UsageError):
            AutoSettings(**wrong)
    with pytest.raises(InputError, match="of different bases"):
        merge_auto([adapters[0], replace(adapters[1], base="another")])


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "classification"), ("gpt2", "causal")])
@pytest.mark.parametrize("late", ["two", "general"])
def test_texts_beyond_the_table_of_positions_are_refused_before_anything_is_computed(
    make_panel, architecture, kind, late
):
    panel = make_panel(architecture, kind, texts=6)
    long = (*texts_of(4, 3), (" ".join(t[0] for t in texts_of(20, 4)),))
    texts = {**panel.texts, "two": long} if late == "two" else panel.texts
    told: list[str] = []
    settings = replace(FEW, max_length=200)
    where = "task two" if late == "two" else "general texts"
    with pytest.raises(InputError, match="tokens, and the base has 64 positions") as raised:
        merge_auto(
            adapters_of(panel), panel.base, texts, general=long if late == "general" else (), settings=settings,
            on_progress=told.append,
        )  # fmt: skip
    assert all(line.startswith("loading the base ") for line in told) and raised.value.where == where


def test_the_grid_grows_until_the_best_scale_lies_within(make_panel, monkeypatch):
    from plait.choosing import asking
    from plait.choosing import tournament as choosing

    panel = make_panel(texts=4)
    tried = [Tried(Recipe("tsv"), merge(adapters_of(panel), "tsv", scale=1.0).adapter)]
    asked: list[float] = []

    def peaked(screen, merges, *_, **__):
        asked.extend(s for _, s in merges)
        return [SimpleNamespace(score=-abs(math.log(s / 5.0))) for _, s in merges]

    monkeypatch.setattr(asking, "fidelities", peaked)
    best = choosing.tournament(panel, tried, (0.5, 1.0, 2.0))[0]
    assert asked[:3] == [0.5, 1.0, 2.0] and max(asked) > 5.0 and best.scale == pytest.approx(2.0 * choosing.STEP**3)
    assert min(asked) == 0.5  # only that edge on which the best lay


@pytest.mark.parametrize(
    ("architecture", "kind", "rounds"),
    [("bert", "classification", [16, 32, 64, 70]), ("llama", "causal", [32, 70])],
)
def test_ever_fewer_merges_read_ever_more_texts(architecture, kind, rounds, make_panel, monkeypatch):
    from plait.choosing import asking
    from plait.choosing import tournament as choosing

    panel = make_panel(architecture, kind, texts=70)
    tried = [Tried(Recipe(f"{i}"), panel.parts[0].adapter) for i in range(10)]
    asked: list[tuple[int, list[float]]] = []

    def better_where_larger(read, merges, *_, **__):
        asked.append((max(map(len, read.texts.values())), [s for _, s in merges]))
        return [SimpleNamespace(score=s, general_kl=None) for _, s in merges]

    monkeypatch.setattr(asking, "fidelities", better_where_larger)
    monkeypatch.setattr(choosing, "_beyond", lambda *_: ())
    scales = tuple(1.0 + 0.1 * i for i in range(7))
    scored = choosing.tournament(panel, tried, scales)
    assert [n for n, _ in asked] == rounds
    counts = [len(merges) for _, merges in asked]
    assert counts == [30, *(choosing.number_going(10, 7, share) for _, share in choosing.rounds_of(panel)[:-1])]
    assert counts == sorted(counts, reverse=True) and [len(x) for x in (asked[-1][1], scored)] == [counts[-1], 30]
    assert [s.n for s in scored] == sorted((s.n for s in scored), reverse=True)  # each says how many it has read
    assert [s.scale for s in scored[: counts[-1]]] == sorted(asked[0][1])[: -counts[-1] - 1 : -1]


def test_a_limit_on_what_general_text_is_moved_by_holds_for_all_that_is_done(make_panel):
    """The choice, its weights, fit, repair and heads; at a limit that the unlimited choice breaks."""
    panel = make_panel(texts=16)
    adapters, general = adapters_of(panel), texts_of(8, 7)
    settings = AutoSettings(methods=("tsv", "task_arithmetic"), scales=(0.1, 0.3, 0.9), refine=3, repair=3)
    free = merge_auto(adapters, panel.base, panel.texts, general=general, settings=settings)
    limit = free.fidelity.general_kl / 3
    held = merge_auto(adapters, panel.base, panel.texts, general=general, settings=replace(settings, max_shift=limit))
    assert 0 < held.fidelity.general_kl <= limit < free.fidelity.general_kl
    assert held.record.evidence[0].score <= free.record.evidence[0].score
    first = held.record.evidence[0]
    assert first.general_kl <= limit and first.candidate == held.record.chosen.candidate
    rest = [e for e in held.record.evidence if e.general_kl <= limit]
    assert first.score == max(e.score for e in rest)
    rows = {(e.candidate, e.scale): (e.score, e.general_kl) for e in held.record.evidence}
    told, over = held.record.limit, {key for key, (_, kl) in rows.items() if kl > limit}
    assert (told.most, told.tried, free.record.limit) == (limit, len(rows), None) and over
    assert {(x.candidate, x.scale): (x.score, x.general_kl) for x in told.left_out} == {key: rows[key] for key in over}
    assert [x.score for x in told.left_out] == sorted((x.score for x in told.left_out), reverse=True)
    (line,) = [x for x in auto_text(Written(held.record, "out")).splitlines() if x.startswith("general text: moved by")]
    assert (
        f"at most {limit:g}; beyond that: {len(over)} of {len(rows)} merges, of which {told.left_out[0].candidate} at scale"
        in line
    )
    assert "general text: moved" not in auto_text(Written(free.record, "out"))
    with pytest.raises(RunError, match="no candidate moves general text by 1e-12"):
        merge_auto(adapters, panel.base, panel.texts, general=general, settings=replace(settings, max_shift=1e-12))
    with pytest.raises(UsageError, match="general"):
        merge_auto(adapters, panel.base, panel.texts, settings=replace(settings, max_shift=1.0))


def test_where_every_fit_is_beyond_the_limit_the_choice_stays_and_is_recorded(make_panel, monkeypatch):
    from plait.learning import fitting

    panel = make_panel(texts=16)
    monkeypatch.setattr(fitting, "general_shift", lambda panel, merges: [9.0] * len(merges))
    settings = AutoSettings(methods=("task_arithmetic",), scales=(0.3,), refine=0, heads=False, max_shift=5.0)
    done = merge_auto(adapters_of(panel), panel.base, panel.texts, general=texts_of(8, 7), settings=settings)
    assert done.record.chosen.fit is None and set(done.record.held_out) == {"chosen"}
    assert done.record.limit == Limit(5.0, len(done.record.evidence), (), ("the fit",))
    assert ", at most 5; beyond that: the fit" in auto_text(Written(done.record, "out"))
    json.dumps(to_json(done.record), allow_nan=False)


def test_a_program_may_name_the_base_and_give_plain_strings(make_panel):
    panel = make_panel(texts=6)
    few = AutoSettings(methods=("tsv",), scales=(0.4,), refine=0, max_length=24)
    plain = {task: [text for (text,) in rows] for task, rows in panel.texts.items()}
    by_name = merge_auto(adapters_of(panel), panel.base.name, plain, settings=few)
    as_rows = merge_auto(adapters_of(panel), panel.base, panel.texts, settings=few)
    assert same(by_name.adapter, as_rows.adapter) and by_name.record == as_rows.record
