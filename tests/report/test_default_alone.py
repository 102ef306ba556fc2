"""The method where there are only adapters: that it follows the published tables, and is the same whichever way it is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.lora import CONSTRAINT, EMBEDDING, EXPERT, Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.adapters.weights import WEIGHTS
from plait.choosing.auto import AutoSettings, merge_auto
from plait.cli import main
from plait.disk.store import identity, staged_folder
from plait.errors import UsageError
from plait.merging import MergeRequest, MergeSpec, answer, merge, merge_folders, rank_curve, scales
from plait.merging.light.of_folders import sum_of
from plait.merging.scales import default_method, scale_by_rule
from plait.training.settings import CONSTRAINTS, TrainingSettings, identity_of
from tests.report.test_default_method import MODULES, RESULTS, adapter, pair, shares_on_decoders


@pytest.fixture(autouse=True)
def two_are_enough(request, monkeypatch):
    """Two adapters stand for many, but where their number is what is asked about."""
    if "count" not in request.fixturenames:
        monkeypatch.setattr(scales, "FEWEST_WRITERS", 2)


@pytest.mark.parametrize(("count", "method"), [(2, "tsv"), (7, "tsv"), (8, "iso_c"), (9, "iso_c")])
def test_few_writers_are_merged_as_before(count, method):
    chosen, why = default_method([adapter(str(i), i, "CAUSAL_LM") for i in range(count)], MergeSpec())
    assert chosen == method and (
        method == "iso_c" or why.endswith("(iso_c is for 8 adapters of language models or more)")
    )


PENALISED = TrainingSettings(steps=1, constraint="penalised")


def folder(place: Path, one: Adapter, settings: TrainingSettings | None = None) -> str:
    """An adapter's folder, as training by some settings leaves it."""
    options = {} if settings is None else {"training": identity_of(settings)}
    with staged_folder(place / one.name, identity("adapter", options)) as stage:
        write_adapter(stage, one)
    return str(place / one.name)


def folders(place: Path, kind: str | None = "CAUSAL_LM", settings: TrainingSettings | None = None) -> list[str]:
    return [folder(place, one, settings) for one in pair(kind)]


def test_the_default_of_writers_is_ahead_wherever_answers_were_written_and_not_where_the_penalty_trained():
    shares = {k: by for k, by in shares_on_decoders().items() if {"iso_c", "tsv"} <= by.keys()}
    written = {t: by["iso_c"] - by["tsv"] for (t, arm), by in shares.items() if arm == "kaiming" and "smollm2" not in t}
    assert written.keys() == {"told", "bare", "sixteen", "smaller"} and min(written.values()) > 0.01
    penalised = [by["iso_c"] - by["tsv"] for (_, arm), by in shares.items() if arm.endswith("_penalised")]
    assert len(penalised) > 5 and max(penalised) < 0.0


def test_at_half_a_billion_it_is_ahead_on_the_seeds_that_tested_it():
    rows = json.loads((RESULTS / "text-qwen05.json").read_text())["rows"]
    kept = {(r["seed"], r["method"]): r["recovered"] for r in rows if r["arm"] == "kaiming"}
    assert all(kept[seed, "iso_c"] > kept[seed, "tsv"] + 0.05 for seed in (1, 2))


@pytest.mark.parametrize(
    ("adapters", "settings", "method", "why"),
    [
        (pair(), {}, "iso_c", "language models where there is nothing but them"),
        (pair("SEQ_CLS"), {}, "tsv", "needs the adapters alone"),
        (pair(None), {}, "tsv", "needs the adapters alone"),
        (
            [*pair()[:1], adapter("b", 1, None)],
            {},
            "tsv",
            "(iso_c is for language models, and b does not say that it is of one)",
        ),
        (pair(), {"rank": 3}, "tsv", "(iso_c makes all directions equally strong, and a cut needs weak ones)"),
        (pair(), {"calibrate": "pico"}, "tsv", "(iso_c has no rule for its scale with pico)"),
        (pair(), {"options": {"triplets": 2}}, "tsv", "(iso_c has no options)"),
        (pair(), {"scale": 0.5}, "iso_c", "nothing but them"),
    ],
)
def test_what_is_taken_of_adapters_alone(adapters, settings, method, why):
    record = merge(adapters, **settings).record
    assert record.method == method and record.method_reason.endswith(why)
    if not settings:
        assert record.scale == scale_by_rule(method, None, (1.0, 1.0)).value


def test_modules_that_only_some_change_leave_tsv():
    apart = [replace(a, modules={**a.modules, f"l.{i}.k": a.modules[MODULES[0]]}) for i, a in enumerate(pair())]
    record = merge(apart).record
    assert record.method == "tsv" and "where all adapters change the same modules" in record.method_reason


@pytest.mark.parametrize("kinds", [(EMBEDDING, EXPERT), ("linear", "linear")])
def test_other_kinds_of_modules_and_mixed_and_wide_ranks_merge_by_it(kinds):
    def wide(one: Adapter, rank: int, seed: int) -> Adapter:
        g = torch.Generator().manual_seed(seed)
        shapes = {m: (torch.randn(rank, 10, generator=g), torch.randn(12, rank, generator=g)) for m in MODULES}
        return replace(
            one, modules={m: LoraFactors(A, B, 1.0, k) for (m, (A, B)), k in zip(shapes.items(), kinds, strict=True)}
        )

    done = merge([wide(a, rank, i) for i, (a, rank) in enumerate(zip(pair(), (2, 64), strict=True))])
    assert done.record.method == "iso_c" and done.record.verification_error < 1e-5
    for f in done.adapter.modules.values():
        S = torch.linalg.svdvals(f.delta(torch.float64))
        assert torch.allclose(S, S[:1].expand_as(S), rtol=1e-4)  # all equally strong


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_folders_say_what_they_were_trained_with(tmp_path, constraint):
    found = folders(tmp_path, settings=TrainingSettings(steps=1, constraint=constraint))
    assert read_adapter(found[0]).source[CONSTRAINT] == constraint
    record = merge_folders(found, tmp_path / "m").record
    assert record.method == ("tsv" if constraint == "penalised" else "iso_c")
    if constraint == "penalised":
        assert record.method_reason.endswith("(iso_c keeps less of adapters trained with the penalty, as a was)")
    again = json.loads((tmp_path / "m" / "plait.json").read_text())["result"]
    assert (again["method"], again["method_reason"]) == (record.method, record.method_reason)


def test_one_that_the_penalty_trained_among_plain_ones_leaves_tsv_and_foreign_records_mean_nothing(tmp_path):
    one, other = pair()
    mixed = [folder(tmp_path, one), folder(tmp_path, other, PENALISED)]
    assert merge_folders(mixed, tmp_path / "m").record.method == "tsv"
    for i, options in enumerate(({"training": "penalised"}, {"training": {"constraint": 3}}, {})):
        with staged_folder(tmp_path / f"x{i}", identity("adapter", options)) as stage:
            write_adapter(stage, replace(one, name=f"x{i}"))
        assert CONSTRAINT not in read_adapter(tmp_path / f"x{i}").source


def test_every_way_to_ask_takes_the_same(tmp_path, capsys):
    for kind, settings, method in (
        ("CAUSAL_LM", None, "iso_c"),
        ("CAUSAL_LM", PENALISED, "tsv"),
        ("SEQ_CLS", None, "tsv"),
        (None, None, "tsv"),
    ):
        place = tmp_path / f"{kind}-{settings is not None}"
        given = folders(place, kind, settings)
        adapters = [read_adapter(f) for f in given]
        scale = scale_by_rule(method, None, (1.0, 1.0)).value
        with pytest.raises(SystemExit) as ended:
            main(["merge", *given, "--out", str(place / "cli")])
        said = capsys.readouterr().out
        assert (
            not ended.value.code
            and said.startswith(f"{method} at scale {scale:g} of a, b")
            and f"\n{method}: keeps" in said
        )
        assert sum_of(MergeRequest(given)) is None  # no sum: torch decides, with the adapters read
        assert default_method(adapters, MergeSpec())[0] == merge(adapters).record.method == method
        assert answer(MergeRequest(given, place / "cut", MergeSpec(rank=2))).record.method == "tsv"
        curve = answer(MergeRequest(given, curve=True))
        assert curve.method == "tsv" and list(curve.curve) == rank_curve(adapters, "tsv") == rank_curve(adapters)
        auto = merge_auto(adapters).record
        assert (auto.chosen.candidate, auto.chosen.scale) == (
            method,
            scale,
        ) and f"{method} by its record" in auto.chosen.why
        assert merge_auto(adapters, settings=AutoSettings(rank=2)).record.chosen.candidate == "tsv"
        assert merge_folders(given, place / "weighted", weights=[1.0, 0.5]).record.method == "task_arithmetic"
        assert merge_folders(given[:1], place / "one").record.method == "task_arithmetic"


def test_where_the_default_of_writers_may_not_be_taken_auto_takes_tsv():
    assert merge_auto(pair(), settings=AutoSettings(methods=("tsv", "knots"))).record.chosen.candidate == "tsv"


def test_a_model_that_is_written_whole_is_of_the_same_merge(tmp_path):
    given = folders(tmp_path)
    (tmp_path / "base").mkdir()
    save_file({f"{m}.weight": torch.zeros(12, 10) for m in MODULES}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text("{}")
    baked = answer(MergeRequest(given, tmp_path / "whole", bake_into=tmp_path / "base")).record
    assert (baked.method, baked.scale) == ("iso_c", scale_by_rule("iso_c", None, (1.0, 1.0)).value)


def test_shards_count_as_one_file(tmp_path):
    given = folders(tmp_path)
    sharded = tmp_path / "sharded"
    for path in map(Path, given):
        (sharded / path.name).mkdir(parents=True)
        tensors, parts = load_file(path / WEIGHTS), {}
        for i, (name, tensor) in enumerate(sorted(tensors.items())):
            parts.setdefault(f"adapter_model-{i % 2 + 1:05d}-of-00002.safetensors", {})[name] = tensor
        for file, held in parts.items():
            save_file(held, sharded / path.name / file)
        index = {n: file for file, held in parts.items() for n in held}
        (sharded / path.name / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        (sharded / path.name / "adapter_config.json").write_bytes((path / "adapter_config.json").read_bytes())
    places = [str(sharded / n) for n in "ab"]
    record = answer(MergeRequest(places, tmp_path / "s")).record
    assert record.method == merge_folders(given, tmp_path / "m").record.method == "iso_c"


def test_statistics_that_nothing_would_read_are_refused_without_naming_what_is_not_taken_yet(tmp_path):
    with pytest.raises(UsageError, match=r"^the default method takes no statistics, and the scale is given") as refused:
        answer(MergeRequest(folders(tmp_path), tmp_path / "m", MergeSpec(scale=0.5), statistics={"a": "a.stats"}))
    assert "--method regmean" in refused.value.hint
