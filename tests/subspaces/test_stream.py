"""Streaming in layer groups gives what collecting and computing separately gives."""

from __future__ import annotations

import pytest
import torch

from plait.errors import InputError, UsageError
from plait.statistics import collect_statistics
from plait.subspaces import compute_subspaces, stream_subspaces
from tests.statistics.models import ATTENTION, batches, build

TASKS = ("a", "b", "c")


def data(architecture: str) -> dict[str, list[dict[str, torch.Tensor]]]:
    return {t: batches(architecture, i, examples=12, size=6) for i, t in enumerate(TASKS)}


@pytest.mark.parametrize("architecture", ATTENTION)
def test_streamed_equals_collected(architecture):
    model, given = build(architecture), data(architecture)
    statistics = {t: collect_statistics(model, b, "all-linear") for t, b in given.items()}
    wanted = compute_subspaces("contrastive", statistics, rank=2)
    for group in (1, 2):
        found = stream_subspaces("contrastive", model, given, "all-linear", rank=2, group=group)
        for task in TASKS:
            assert list(found.subspaces[task]) == list(statistics[task].modules)
            for name, info in statistics[task].modules.items():
                torch.testing.assert_close(found.subspaces[task][name].A, wanted[task][name].A, rtol=1e-3, atol=5e-4)
                assert found.modules[task][name].output_energy == pytest.approx(info.output_energy, rel=1e-6)
    assert not any("forward" in vars(m) for m in model.modules())


def test_solving_beside_collecting_changes_no_bit(monkeypatch):
    model, given = build("mistral"), data("mistral")
    plain = stream_subspaces("contrastive", model, given, "all-linear", rank=2)
    monkeypatch.setattr("plait.subspaces.stream.DEVICES_WITH_STREAMS", ("cpu",))
    monkeypatch.setattr("plait.subspaces.stream._SMALL_SITE", 40)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    beside = stream_subspaces("contrastive", model, given, "all-linear", rank=2)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    for name, subspace in plain.subspaces["b"].items():
        assert torch.equal(subspace.A, beside.subspaces["b"][name].A)
    few = {**given, "a": [{k: v[:1, :1] for k, v in given["a"][0].items()}]}
    with pytest.raises(InputError, match="span fewer"):
        stream_subspaces("contrastive", model, few, "all-linear", rank=2)


def test_layers_come_and_go():
    """With the model elsewhere than the device, only a group's layers are brought; everything goes back as it was."""
    model, given = build("llama"), data("llama")
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    whole = stream_subspaces("osrm", model, given, ["q_proj", "v_proj"], rank=2, group=2)
    if torch.cuda.is_available():
        found = stream_subspaces("osrm", model, given, ["q_proj", "v_proj"], rank=2, device="cuda")
        for name, subspace in found.subspaces["a"].items():
            A, B = subspace.basis, whole.subspaces["a"][name].basis
            torch.testing.assert_close(A.T @ A, B.T @ B, rtol=1e-2, atol=1e-3)
    assert before == {n: p.data_ptr() for n, p in model.named_parameters()}


def test_layers_that_are_not_targeted_still_run():
    model, given = build("roberta"), data("roberta")
    limits = {"layers_to_transform": [1]}
    statistics = {t: collect_statistics(model, b, ["query"], **limits) for t, b in given.items()}
    wanted = compute_subspaces("sc_lora", statistics, rank=2)
    found = stream_subspaces("sc_lora", model, given, ["query"], rank=2, **limits)
    assert list(found.subspaces["a"]) == ["encoder.layer.1.attention.self.query"]
    for task in TASKS:
        torch.testing.assert_close(
            *(x[task]["encoder.layer.1.attention.self.query"].A for x in (found.subspaces, wanted))
        )


def test_bad_calls():
    model, given = build("llama"), data("llama")
    with pytest.raises(UsageError, match="cannot be streamed"):
        stream_subspaces("kaiming", model, given, ["q_proj"])
    with pytest.raises(UsageError, match="groups of 0"):
        stream_subspaces("osrm", model, given, ["q_proj"], group=0)
    with pytest.raises(InputError, match="at least two tasks"):
        stream_subspaces("osrm", model, {"a": given["a"]}, ["q_proj"])
