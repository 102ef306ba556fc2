"""Starts of neighbouring papers: what each promises, beside slow twins written from the papers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plait.adapters.peft_format import read_adapter
from plait.errors import InputError, UsageError
from plait.model.base import BaseModel
from plait.runs.base_weights import base_weights
from plait.runs.run import run
from plait.statistics import read_statistics
from plait.subspaces import compute_subspaces
from plait.subspaces.live import subspace_state_dict
from tests.command import done
from tests.conftest import tiny_rows, write_rows
from tests.reference import subspaces as twins
from tests.subspaces.pools import base_weight, features, pool

TASKS = [f"t{i}" for i in range(4)]


def inputs_of(n: int, dim: int):
    """Task -> its inputs, as `pool` makes them."""
    return {t: features(i, n, dim).numpy() for i, t in enumerate(TASKS)}


def projector(rows):
    rows = np.asarray(rows, dtype=np.float64)
    return rows.T @ np.linalg.pinv(rows.T)


# --- inflora ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.95])
@pytest.mark.parametrize(("n", "dim"), [(400, 32), (6, 32), (900, 300)])
def test_inflora_is_the_papers_space(threshold, n, dim):
    H, statistics = inputs_of(n, dim), pool(n=n, dim=dim)
    found = compute_subspaces("inflora", statistics, rank=4, options={"threshold": threshold})
    for task in TASKS:
        rows, M, energies = twins.inflora(H[task], [H[t] for t in TASKS if t != task], 4, threshold)
        subspace = found[task]["a.q"]
        assert subspace.record["projected"] == round(np.trace(M))
        assert np.abs(projector(subspace.basis) - projector(rows)).max() < 2e-4
        assert np.abs(subspace.basis.double().numpy() @ M).max() < 1e-6  # to float32, also after the iteration
        np.testing.assert_allclose(subspace.energies.numpy(), energies, rtol=1e-5)
        assert (np.diff(subspace.energies.numpy()) <= 0).all()


def test_an_update_reads_no_more_of_the_others_than_is_left_out():
    H, statistics = inputs_of(400, 32), pool()
    A = compute_subspaces("inflora", statistics, rank=4, options={"threshold": 0.9})["t2"]["a.q"].basis.double()
    read = [np.linalg.norm(H[t] @ A.numpy().T) ** 2 / np.linalg.norm(H[t]) ** 2 for t in TASKS if t != "t2"]
    assert 0 < np.mean(read) <= 0.1


def test_nothing_is_left_of_a_full_space():
    with pytest.raises(InputError, match=r"'t0' reach fewer than 4 directions outside the 3\d of the others"):
        compute_subspaces("inflora", pool(), rank=4, options={"threshold": 1.0})
    with pytest.raises(UsageError, match=r"threshold is 1\.5"):
        compute_subspaces("inflora", pool(), rank=4, options={"threshold": 1.5})


# --- corda ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["a.q", "a.v"])
@pytest.mark.parametrize("damp", [0.01, 1.0])
def test_corda_spans_the_papers_last_components(module, damp):
    H, W = inputs_of(400, 32), base_weight(module).double().numpy()
    found = compute_subspaces("corda", pool(), rank=4, options={"damp": damp}, weights=base_weight)
    for task in TASKS:
        (U, S, V), (u, s, v) = twins.corda(W, [H[t] for t in TASKS if t != task], 4, damp)
        np.testing.assert_allclose(U * S @ V + u * s @ v, W, atol=1e-10)  # the decomposition is of the base itself
        subspace = found[task][module]
        assert np.abs(projector(subspace.basis) - projector(v)).max() < 1e-5
        np.testing.assert_allclose(subspace.energies.numpy(), s[::-1], rtol=1e-6)


def test_corda_takes_what_the_base_answers_to_the_others_least_by():
    """The outputs that belong to its rows hold the least of W C that 4 directions of outputs can."""
    others = [h for t, h in inputs_of(400, 32).items() if t != "t0"]
    W = base_weight("a.q").double().numpy()
    C = np.mean([h.T @ h / np.linalg.norm(h) ** 2 for h in others], axis=0) + 0.01 / 32 * np.eye(32)
    subspace = compute_subspaces("corda", pool(), rank=4, weights=base_weight)["t0"]["a.q"]

    def held(rows):  # rows v^T C^-1 are W^T u / s: the outputs u of these rows
        U = np.linalg.qr(np.linalg.solve(W.T, rows.T))[0]
        return np.linalg.norm(U.T @ W @ C)

    mine = held(subspace.basis.double().numpy())
    assert mine == pytest.approx(float(subspace.energies.norm()), rel=1e-3)
    rng = np.random.default_rng(0)
    assert mine < min(held(rng.standard_normal((4, 32))) for _ in range(50))


def test_corda_needs_the_weights_and_room():
    with pytest.raises(UsageError, match="corda needs the base's weights"):
        compute_subspaces("corda", pool(), rank=4)
    with pytest.raises(InputError, match=r"rank 20 of a weight \(16, 32\)"):
        compute_subspaces("corda", pool(), rank=20, weights=base_weight)


def test_corda_by_hand_reads_the_base_of_the_statistics(tiny_base, tmp_path, capsys):
    base, files = tiny_base("gpt2"), {}
    for i, task in enumerate(("one", "two")):
        rows = write_rows(tmp_path / f"{task}.csv", tiny_rows(2, 20, seed=i))
        source = ["--base", base.name, "--task", task, "--train-file", rows, "--text", "text", "--samples", "12"]
        files[task] = tmp_path / f"{task}.stats.safetensors"
        done(capsys, "stats", *source, "--target-modules", "c_attn", "--out", files[task])
    start = ["init", "--own", files["one"], "--others", files["two"], "--rank", "2", "--method", "corda"]
    done(capsys, *start, "--out", tmp_path / "start")
    known = {t: read_statistics(f) for t, f in files.items()}
    from transformers import AutoModel

    model = AutoModel.from_pretrained(base.name)
    mine = compute_subspaces("corda", known, rank=2, weights=lambda m: model.get_submodule(m).weight.detach().T)
    adapter = read_adapter(tmp_path / "start")
    assert len(adapter.modules) == len(mine["one"]) == 2
    for name, f in adapter.modules.items():
        assert torch.equal(f.A, mine["one"][known["one"].relative(name)].A) and not f.B.any()
    state = subspace_state_dict("corda", known["one"], [known["two"]], rank=2, weights=base_weights(base, known["one"]))
    assert all(torch.equal(A, mine["one"][m].A) for m, A in state.items())
    other = BaseModel(tiny_base("bert").name, device="cpu")
    with pytest.raises(InputError, match="whose files are not those of"):
        base_weights(other, known["one"])("h.0.attn.c_attn")


def test_both_are_arms_of_a_run(tiny_recipe, tmp_path):
    frozen = {"name": "inflora", "subspace": "inflora", "training": {"constraint": "frozen"}}
    recipe = tiny_recipe(tasks=["topic", "grade"], arms=[frozen, "corda"], merges=["task_arithmetic"])
    run(recipe, tmp_path / "out", quiet=True)
    for arm in ("inflora", "corda"):
        for task in ("topic", "grade"):
            adapter = read_adapter(tmp_path / "out/adapters" / arm / "seed-0" / task)
            assert all(f.B.any() for f in adapter.modules.values())


def test_a_span_to_stay_in_is_not_read_off_weights(tiny_recipe):
    training = {"steps": 2, "constraint": "projected", "constraint_options": {"method": "corda", "m": 4}}
    with pytest.raises(UsageError, match="taken from statistics alone, and 'corda' reads"):
        tiny_recipe(arms=["corda"], training=training)
    tiny_recipe(arms=["corda"], training={**training, "constraint_options": {"method": "inflora", "m": 4}})
