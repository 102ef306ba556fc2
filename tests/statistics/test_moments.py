"""The arithmetic of moments: a commutative monoid, forms that agree, sketches within their bounds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.entry import SAME_PRODUCTS
from plait.errors import InputError, UsageError
from plait.statistics import collect_statistics
from plait.statistics.accumulate import WIDE_BLOCK, SiteSums, add_gram, mirror
from plait.statistics.agreement import merge_statistics
from plait.statistics.masks import Positions
from plait.statistics.moments import FACTOR, ModuleInfo, Moments, Statistics, rotated
from plait.statistics.sketch import FrequentDirections, compress
from tests.statistics.models import build, inputs_by_hand, padded, text

D = 12


def moments_of(H: torch.Tensor, *, factor: bool | None = None) -> Moments:
    few = len(H) < H.shape[1] if factor is None else factor
    second, form = (rotated(H), FACTOR) if few else (H.T @ H, "dense")
    return Moments(len(H), H.sum(0), second, form, padded_count=len(H), padded_total=H.sum(0))


def rows(n: int, seed: int, dim: int = D) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a: Moments, b: Moments) -> None:
    assert (a.count, a.padded_count) == (b.count, b.padded_count)
    for x, y in ((a.total, b.total), (a.dense(), b.dense()), (a.padded_total, b.padded_total)):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    assert a.error == pytest.approx(b.error)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2 * D), min_size=3, max_size=3), st.integers(0, 10**6))
def test_merge_is_a_commutative_monoid(sizes, seed):
    a, b, c = (moments_of(rows(n, seed + i)) for i, n in enumerate(sizes))
    same(a.merge(b), b.merge(a))
    same(a.merge(b).merge(c), a.merge(b.merge(c)))
    same(a.merge(Moments.zero(D, torch.float64)), a)
    whole = torch.cat([rows(n, seed + i) for i, n in enumerate(sizes)])
    same(a.merge(b).merge(c), moments_of(whole))


def test_forms_agree():
    H, X = rows(7, 0), rows(3, 1)
    factor, dense = moments_of(H, factor=True), moments_of(H, factor=False)
    assert factor.trace == pytest.approx(dense.trace)
    torch.testing.assert_close(factor.project(X), dense.project(X))
    torch.testing.assert_close(factor.project(X), X @ H.T @ H @ X.T)
    torch.testing.assert_close(factor.normalised(), dense.normalised())
    assert float(torch.trace(factor.normalised())) == pytest.approx(1.0)


def test_a_rotated_factor_is_a_function_of_the_second_moment_alone():
    H = rows(7, 0)
    turned = torch.linalg.qr(rows(7, 3, 7)).Q @ H
    torch.testing.assert_close(rotated(H), rotated(turned))
    for row in rotated(H):
        cosines = (H @ row) / (H.norm(dim=1) * row.norm())
        assert float(cosines[1:].abs().max()) < 1 - 1e-6 or float(row.norm()) == pytest.approx(float(H[0].norm()))


def test_zero_moments_cannot_be_normalised():
    with pytest.raises(InputError, match="is zero"):
        Moments.zero(4).normalised()
    with pytest.raises(InputError, match="width 4 and 5"):
        Moments.zero(4).merge(Moments.zero(5))


def statistics(task: str, n: int, number: int, **provenance) -> Statistics:
    record = {"base": "b", "pool": "token", "task": task, "samples": n, "tokens": n, **provenance}
    return Statistics({"s": moments_of(rows(n, number))}, {"m": ModuleInfo("s", (5, D), float(n))}, record)


def test_merged_statistics_add_and_keep_what_agrees():
    merged = merge_statistics(statistics("a", 5, 0, seed=1), statistics("b", 20, 1, seed=2))
    assert merged.provenance == {"base": "b", "pool": "token", "samples": 25, "tokens": 25, "tasks": ["a", "b"]}
    assert merged.modules["m"].output_energy == 25 and merged.sites["s"].count == 25
    torch.testing.assert_close(merged.sites["s"].dense(), rows(5, 0).T @ rows(5, 0) + rows(20, 1).T @ rows(20, 1))


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({}, {}, r"task a was taken with 'b' \(files 1234\), task b with 'b' \(files 5678\), which are other weights"),
        ({"base": "old"}, {"base": "new"}, "task a was taken with 'old', task b with 'new', which are other weights"),
        ({"base": None}, {"base": None}, r"a base \(files 1234\)"),
    ],
)
def test_statistics_of_other_weights_say_whose_are_whose(one, other, said):
    parts = [
        statistics(task, 5, i, base_sha256=f"files:{sha}", **names)
        for i, (task, sha, names) in enumerate((("a", "1234", one), ("b", "5678", other)))
    ]
    with pytest.raises(InputError, match=said):
        merge_statistics(*parts)


@pytest.mark.parametrize("key", ["base", "pool", "tokenizer_sha256"])
def test_statistics_of_different_bases_or_pools_do_not_mix(key):
    with pytest.raises(InputError, match=f"task b: statistics differ in {key}"):
        merge_statistics(statistics("a", 5, 0, **{key: "x"}), statistics("b", 5, 1, **{key: "y"}))


def test_statistics_of_different_modules_do_not_mix():
    a = statistics("a", 5, 0)
    other = Statistics(a.sites, {"n": a.modules["m"]}, a.provenance)
    with pytest.raises(InputError, match="module 'm' is in only one"):
        merge_statistics(a, other)
    wide = Statistics(a.sites, {"m": ModuleInfo("s", (6, D), 1.0)}, a.provenance)
    with pytest.raises(InputError, match="module 'm' is"):
        merge_statistics(a, wide)
    with pytest.raises(InputError, match="no statistics"):
        merge_statistics()


def test_moments_are_found_with_and_without_the_prefix():
    a = statistics("a", 5, 0, backbone_prefix="roberta")
    assert a.moments_for("roberta.m") is a.moments_for("m") is a.sites["s"]
    assert a.moments_for("elsewhere.m") is None


def correlated(n: int, dim: int) -> torch.Tensor:
    scales = torch.logspace(0, -2, dim, dtype=torch.float64)
    mix = rows(dim, 7, dim) / dim**0.5
    return rows(n, 8, dim) * scales @ mix


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("rank", [0, 4, 16])
def test_a_sketch_keeps_trace_and_diagonal_and_its_bound(rank, tail):
    exact = moments_of(correlated(400, 48))
    small = compress(exact, rank, tail=tail)
    assert small.sketched and small.trace == pytest.approx(exact.trace)
    torch.testing.assert_close(small.dense().diagonal(), exact.dense().diagonal())
    lost = float(torch.linalg.matrix_norm(small.dense() - exact.dense(), 2))
    assert lost <= small.error * (1 + 1e-9) and small.error <= 1.01 * lost
    assert float(torch.linalg.eigvalsh(small.dense())[0]) > -1e-9 * exact.trace
    if tail:
        assert small.error < 0.2 * compress(exact, rank, tail=False).error
    again = small.merge(small)
    torch.testing.assert_close(again.dense(), 2 * small.dense())
    assert again.error == pytest.approx(2 * small.error)


def test_nothing_is_compressed_that_is_small_already():
    few = moments_of(rows(3, 0))
    assert compress(few, 3) is few and compress(moments_of(rows(30, 0)), D).form == "dense"
    with pytest.raises(UsageError):
        compress(few, -1)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 8), st.integers(1, 9), st.integers(0, 1000))
def test_frequent_directions_keep_their_bound(rank, pieces, seed):
    H = correlated(160, 24) * (1 + seed % 3)
    sketch = FrequentDirections(rank, 24, torch.float64, torch.device("cpu"))
    for part in H.tensor_split(pieces):
        sketch.add(part)
    factor, residual, error = sketch.finish()
    S = H.T @ H
    found = factor.T @ factor + torch.diag(residual)
    assert factor.shape[0] <= rank
    assert float(torch.linalg.matrix_norm(S - found, 2)) <= error * (1 + 1e-9) + 1e-9
    torch.testing.assert_close(found.diagonal(), S.diagonal())


@pytest.mark.parametrize("form", [{}, {"sketch": 16}, {"sketch": 40}, {"sketch": 4}])
@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("examples", [1, 8])
def test_no_row_that_is_kept_is_an_input(form, pool, examples):
    model, batch = build("llama"), padded(text(0, examples))
    read = inputs_by_hand(model, model.model.layers[0].self_attn.q_proj, [batch])[0][0]
    mask = batch["attention_mask"].bool()
    inputs = read[mask] if pool == "token" else torch.stack([h[m].mean(0) for h, m in zip(read, mask, strict=True)])
    found = collect_statistics(model, [batch], ["q_proj"], pool=pool, **form).moments_for("layers.0.self_attn.q_proj")
    if len(inputs) > 1:  # of one, whatever is kept tells it
        assert float((found.second[:, None] - inputs).abs().amax(-1).min()) > 1e-3
    if form.get("sketch", 16) >= len(inputs):
        torch.testing.assert_close(found.dense(), inputs.T @ inputs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dim", [70, 400, 768, 900, 1100])
def test_sums_of_wide_inputs_are_whole(dim, dtype):
    """Wide ones are summed from the diagonal on and filled in at the end."""
    rows = torch.randn(2, 600, dim, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = SiteSums(dim, dtype, torch.device("cpu"), pool="token", sketch=None)
    every = Positions.of(torch.ones(1, 600, dtype=torch.bool), torch.device("cpu"))
    for part in rows:
        sums.add(part[None], every)
    found = sums.finish()
    H = rows.reshape(-1, dim).double()
    assert found.form == "dense" and found.second.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.second.double(), H.T @ H, rtol=1e-5, atol=1e-3)
    assert (found.second - found.second.T).abs().max() <= 1e-6 * found.second.abs().max()


@pytest.mark.parametrize("dim", [383, 384, 500, 1024])
def test_blocks_agree_with_the_whole(dim):
    rows = torch.randn(300, dim, generator=torch.Generator().manual_seed(0))
    S, whole = torch.zeros(dim, dim), torch.zeros(dim, dim).addmm_(rows.T, rows)
    add_gram(S, rows)
    left_out = float(S.tril(-WIDE_BLOCK).abs().sum())
    mirror(S)
    assert (left_out == 0.0) == (dim >= 384)  # below three blocks nothing is left out
    torch.testing.assert_close(S, whole, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="what the command tells MKL")
def test_sums_are_the_same_bytes_with_any_number_of_threads():
    code = """
import torch
from plait.statistics.accumulate import add_gram, mirror
for rows in (130, 700):
    for dim in (384, 1100):
        H, sums = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            sums.append(torch.zeros(dim, dim))
            add_gram(sums[-1], H)
            mirror(sums[-1])
        assert torch.equal(*sums), (rows, dim)
"""
    told = os.environ | dict([SAME_PRODUCTS])
    subprocess.run([sys.executable, "-c", code], env=told, check=True, timeout=120)


def test_a_list_of_statistics_is_told_how_to_be_given():
    with pytest.raises(UsageError, match=r"one by one \(merge_statistics\(\*statistics\)\)"):
        merge_statistics([Statistics({}, {}), Statistics({}, {})])
