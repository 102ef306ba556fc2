"""Comparing adapters: every number beside a dense float64 twin, the verdict by its cases, the record beside docs/results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import write_adapter
from plait.advice.compare import SAMPLE, compare, compare_folders, layer_of
from plait.advice.track_record import RECORDS, TABLES
from plait.errors import InputError, UsageError
from plait.evaluation.features import features
from plait.statistics import ModuleInfo, Moments, Statistics
from tests.command import call, one_object

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SHAPES = {"layer.0.q": (24, 16), "layer.0.v": (16, 16), "layer.1.q": (24, 16), "layer.10.q": (24, 16)}


def adapter(name: str, seed: int, ranks=(3, 2, 4, 1), modules=tuple(SHAPES), size: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for module, rank in zip(SHAPES, ranks, strict=True):
        out, width = SHAPES[module]
        A, B = torch.randn(rank, width, generator=generator), size * torch.randn(out, rank, generator=generator)
        if module in modules:
            made[module] = LoraFactors(A, B, 0.5)
    return Adapter(name, "base", made)


def span(M: torch.Tensor) -> torch.Tensor:
    U, S, _ = torch.linalg.svd(M.double(), full_matrices=False)
    return U[:, 1e-9 * S[0] < S]


def dense_pair(a: Adapter, b: Adapter) -> dict[str, float]:
    """From whole updates, by SVD: the slow way."""
    shared = [m for m in a.modules if m in b.modules]
    D = {x.name: {m: f.delta(torch.float64) for m, f in x.modules.items()} for x in (a, b)}
    dot = sum(float((D[a.name][m] * D[b.name][m]).sum()) for m in shared)
    norm = {n: sum(float(d.square().sum()) for d in ds.values()) ** 0.5 for n, ds in D.items()}

    def overlap(of) -> float:
        values = []
        for m in shared:
            p, q = span(of(D[a.name][m])), span(of(D[b.name][m]))
            values.append(float((p.T @ q).square().sum()) / min(p.shape[1], q.shape[1]))
        return sum(values) / len(values)

    x, y = (torch.cat([D[n][m].flatten() for m in shared]) for n in (a.name, b.name))
    return {
        "cosine": dot / (norm[a.name] * norm[b.name]),
        "overlap_in": overlap(lambda d: d.T),
        "overlap_out": overlap(lambda d: d),
        "opposite": float((x * y < 0).double().mean()),
        "cancelled": float((x.abs() + y.abs() - (x + y).abs()).sum() / (x.abs() + y.abs()).sum()),
    }


@pytest.mark.parametrize("second", [tuple(SHAPES), ("layer.0.q", "layer.10.q")], ids=["all", "some"])
def test_every_number_is_that_of_the_whole_updates(second):
    a, b = adapter("a", 0), adapter("b", 1, ranks=(3, 3, 2, 2), modules=second)
    b.modules["layer.0.q"].A[0] = a.modules["layer.0.q"].A[1]  # a direction in common
    found, slow = compare([a, b]), dense_pair(a, b)
    pair = found.pairs[0]
    for name in ("cosine", "overlap_in", "overlap_out"):
        assert getattr(pair, name) == pytest.approx(slow[name], abs=1e-6)
    error = 0.5 / SAMPLE**0.5  # of the largest module's share alone
    assert pair.opposite == pytest.approx(slow["opposite"], abs=4 * error)
    assert pair.cancelled == pytest.approx(slow["cancelled"], abs=4 * error)
    assert pair.modules == len(second)
    assert [x.norm for x in found.adapters] == pytest.approx(
        [sum(f.norm_squared() for f in x.modules.values()) ** 0.5 for x in (a, b)]
    )
    assert [layer.layer for layer in found.layers] == ["layer.0", "layer.1", "layer.10"]
    assert sum(n**2 for layer in found.layers for n in layer.norms.values()) == pytest.approx(
        sum(x.norm**2 for x in found.adapters)
    )


def test_a_layer_is_that_of_its_modules_alone():
    a, b = adapter("a", 0), adapter("b", 1)
    one = {"layer.1.q"}
    of_layer = [replace(x, modules={m: f for m, f in x.modules.items() if m in one}) for x in (a, b)]
    assert compare([a, b]).layers[1].pairs == compare(of_layer).pairs


def test_dependent_rows_and_updates_of_zero_are_no_directions():
    a, b, zero = adapter("a", 0), adapter("b", 1), adapter("zero", 2)
    for module, factors in a.modules.items():
        factors.A[-1] = factors.A[0]
        zero.modules[module].B.zero_()
    found = compare([a, b, zero])
    assert found.pairs[0].overlap_in == pytest.approx(dense_pair(a, b)["overlap_in"], abs=1e-6)
    assert [p.cosine for p in found.pairs[1:]] == [None, None] and found.pairs[1].overlap_in is None
    assert any(s.startswith("zero changes nothing") for s in found.verdict)


def test_an_update_that_no_memory_holds_is_compared():
    """60,000 x 60,000 in float64 would take 29 GB."""
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(2, 60_000, generator=generator) for _ in range(4)]
    pair = [Adapter(n, "base", {"m": LoraFactors(a, b.T)}) for n, a, b in zip("ab", wide[:2], wide[2:], strict=True)]
    assert abs(compare(pair).pairs[0].cosine) < 1e-3


def test_the_verdict_names_kin_opposites_and_lengths():
    a = adapter("a", 0)
    kin = replace(adapter("kin", 0), name="kin")
    against = replace(a, name="against", modules={m: replace(f, scaling=-0.5) for m, f in a.modules.items()})
    long = adapter("long", 3, size=7.0)
    assert "a and kin point the same way (cosine 1.00)" in compare([a, kin]).verdict[0]
    assert "a and against point opposite ways (cosine -1.00)" in compare([a, against]).verdict[0]
    related, length = compare([a, long]).verdict
    assert "nothing here speaks against merging" in related
    assert length.startswith("long is ") and "times as long as a" in length
    assert len(compare([a, adapter("b", 1)]).verdict) == 1


def test_predicted_shifts_are_those_of_the_study():
    adapters = {n: adapter(n, i) for i, n in enumerate(("a", "b", "c"))}
    statistics = {}
    for i, name in enumerate(adapters):
        rows = torch.randn(40, 16, generator=torch.Generator().manual_seed(10 + i)) * (i + 1)
        modules = {m: ModuleInfo("s", shape, 50.0 / (i + 1)) for m, shape in SHAPES.items()}
        statistics[name] = Statistics({"s": Moments(40, rows.sum(0), rows.T @ rows)}, modules)
    found, known = compare(list(adapters.values()), statistics), features(adapters, statistics)
    others = {t: sum(row[t] for n, row in found.shifts.items() if n != t) for t in adapters}
    assert others == pytest.approx({t: known[t]["shift"] for t in adapters})
    worst = max(others, key=others.get)
    assert any(s.startswith(f"Most disturbed, as predicted: {worst};") for s in found.verdict)
    assert "shift" in found.record[0] and "shift" not in compare(list(adapters.values())).record[0]


def test_the_track_record_is_that_of_the_results():
    """The numbers that the verdict quotes are those of docs/results, all tables of them."""
    tables = [p for f in sorted(RESULTS.glob("*.json")) if isinstance(p := json.loads(f.read_text()), dict)]
    tables = [t for t in tables if t.get("predictors")]
    assert len(tables) == TABLES
    for name, record in RECORDS.items():
        rows = [
            (t["name"], next(p for p in t["predictors"] if (p["method"], p["feature"]) == ("tsv", name)))
            for t in tables
        ]
        for family, said in ((False, record.encoders), (True, record.decoder)):
            ranks = [p["spearman"] for n, p in rows if ("smollm2" in n) == family]
            assert said == (round(min(ranks), 2), round(max(ranks), 2))
        assert record.explained == round(max(p["r2_arm"] for _, p in rows), 2)
        assert min(p["r2_arm"] for _, p in rows) < 0.005  # "and in others nothing"


@pytest.mark.parametrize(
    ("module", "layer"),
    [("h.0", "h.0"), ("encoder.block.11.layer.0.q", "encoder.block.11"), ("lm_head", "lm_head"), ("a.b2.c", "a.b2.c")],
)
def test_layers_are_named_by_the_first_number(module, layer):
    assert layer_of(module) == layer


def test_the_command(capsys, tmp_path):
    places = [str(tmp_path / n) for n in ("a", "b", "c")]
    for i, place in enumerate(places):
        Path(place).mkdir()
        write_adapter(Path(place), adapter(Path(place).name, i))
    code, out, _ = call(capsys, "compare", *places)
    assert code == 0 and "nothing here speaks against merging" in out and "layer.10" in out
    assert f"plait advise BASE {' '.join(places)}" in out
    assert max(map(len, out.splitlines())) <= 130 or str(tmp_path) in max(out.splitlines(), key=len)
    code, out, _ = call(capsys, "compare", *places, "--json")
    found = one_object(out)
    assert code == 0 and len(found["pairs"]) == 3 and found["layers"][0]["norms"].keys() == {"a", "b", "c"}
    code, _, err = call(capsys, "compare", places[0])
    assert code == 2 and "two adapters or more" in err


def test_adapters_that_no_merge_takes_together_are_refused(tmp_path):
    other = replace(adapter("b", 1), base="another")
    with pytest.raises(InputError, match="base"):
        compare([adapter("a", 0), other])
    with pytest.raises(UsageError, match="two adapters or more"):
        compare_folders([])


def test_a_share_by_chance_is_printed_as_a_number():
    from plait.cli.comparing import percent

    assert [percent(1.0, c) for c in (1.0, 0.125, 0.0042)] == ["100 % (100 %)", "100 % (12 %)", "100 % (0.4 %)"]
    assert (percent(None), percent(0.5)) == ("–", "50 %")
