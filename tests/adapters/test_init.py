"""Adapters that start in subspaces: PEFT loads them bit for bit, and nothing changes until training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from plait.adapters.peft_format import read_adapter, write_adapter
from plait.errors import InputError, UsageError
from plait.evaluation.interference import predicted_shift
from plait.statistics import collect_statistics, merge_statistics, read_statistics, write_statistics
from plait.subspaces import compute_subspaces
from plait.subspaces.live import initialize_lora_weights, subspace_state_dict
from plait.subspaces.start import initial_adapter
from tests.statistics.models import batches, build
from tests.statistics.test_collect import relative_difference
from tests.subspaces.pools import pool

TARGETS = {
    "roberta": ["query", "value"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
    "mpnet": ["attn.q", "attn.v"],
}
PREFIX = {"roberta": "roberta", "llama": "model", "gpt2": "transformer", "t5": "transformer", "mpnet": "mpnet"}


def pool_of(architecture: str, model) -> dict:
    return {
        t: collect_statistics(
            model, batches(architecture, i, examples=16), TARGETS[architecture], provenance={"task": t, "base": "tiny"}
        )
        for i, t in enumerate("abc")
    }


@pytest.mark.parametrize("architecture", TARGETS)
def test_a_folder_is_a_no_op_and_holds_the_subspace_to_the_bit(architecture, tmp_path):
    from peft import PeftModel

    model = build(architecture)
    given = batches(architecture, 9)[0]
    statistics = pool_of(architecture, model)
    subspaces = compute_subspaces("contrastive", statistics, rank=2)["b"]
    with torch.no_grad():
        before = model(**given).logits
    kind = "CAUSAL_LM" if architecture in ("llama", "gpt2") else "SEQ_CLS"
    options = {"alpha": 4, "task_type": kind, "prefix": PREFIX[architecture], "target_modules": TARGETS[architecture]}
    adapter = initial_adapter("b", "tiny", subspaces, statistics["b"].modules, **options)
    assert adapter.fan_in_fan_out == (architecture == "gpt2")
    folder = tmp_path / "b"
    folder.mkdir()
    write_adapter(folder, adapter)
    again = read_adapter(folder)
    stored = {m.removeprefix(f"{PREFIX[architecture]}."): f for m, f in again.modules.items()}
    assert all(torch.equal(stored[m].A, s.A) for m, s in subspaces.items()) and len(stored) == len(subspaces)
    tuned = PeftModel.from_pretrained(model, folder, is_trainable=True)
    with torch.no_grad():
        assert torch.equal(tuned(**given).logits, before)
    layers = {n.removeprefix("base_model.model."): m for n, m in tuned.named_modules() if hasattr(m, "lora_A")}
    assert set(layers) == {f"{PREFIX[architecture]}.{m}" for m in subspaces}
    for module, subspace in subspaces.items():
        layer = layers[f"{PREFIX[architecture]}.{module}"]
        assert torch.equal(layer.lora_A["default"].weight, subspace.A) and layer.scaling["default"] == 2.0
        assert layer.lora_A["default"].weight.requires_grad


def test_three_lines_for_a_peft_script(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = build("roberta")
    others = [s for t, s in pool_of("roberta", model).items() if t != "a"]
    peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS"))
    given = batches("roberta", 0, examples=16)
    with torch.no_grad():
        before = peft_model(**given[0]).logits

    own = collect_statistics(peft_model, given)
    state = subspace_state_dict("contrastive", own, others, rank=2)
    initialize_lora_weights(peft_model, state)

    with torch.no_grad():
        assert torch.equal(peft_model(**given[0]).logits, before)
    layers = {
        n.removeprefix("base_model.model.roberta."): m for n, m in peft_model.named_modules() if hasattr(m, "lora_A")
    }
    assert set(layers) == set(state) and all(
        torch.equal(layers[n].lora_A["default"].weight, A) for n, A in state.items()
    )
    with pytest.raises(InputError, match="use one rank"):
        initialize_lora_weights(peft_model, subspace_state_dict("osrm", own, others, rank=3))
    with pytest.raises(InputError, match="no subspace"):
        initialize_lora_weights(peft_model, dict(list(state.items())[1:]))
    with pytest.raises(UsageError, match="no LoRA layers"):
        initialize_lora_weights(build("roberta"), state)


def test_teams_that_start_from_one_pool_draw_each_their_own(tmp_path):
    known = {t: replace(s, provenance={**s.provenance, "task": t}) for t, s in pool(3).items()}
    together = compute_subspaces("orthonormal_disjoint", known, rank=4)
    for task, own in known.items():
        others = [s for t, s in known.items() if t != task]
        by_name = {t: s for t, s in known.items() if t != task}
        for given in (others, others[::-1], by_name):
            state = subspace_state_dict("orthonormal_disjoint", own, given, rank=4)
            assert all(torch.equal(A, together[task][m].A) for m, A in state.items())
    wrong = compute_subspaces("contrastive_permuted", known, rank=4)["t2"]
    state = subspace_state_dict("contrastive_permuted", known["t2"], [known["t0"], known["t1"]], rank=4)
    assert all(torch.equal(A, wrong[m].A) for m, A in state.items())
    drawn = [subspace_state_dict("kaiming", s, rank=4)["a.q"] for s in known.values()]
    assert not torch.equal(drawn[0], drawn[1])
    nameless = list(pool(3).values())
    state = subspace_state_dict("contrastive", nameless[0], nameless[1:], rank=4)  # which asks for no names
    expected = compute_subspaces("contrastive", pool(3), rank=4)["t0"]
    torch.testing.assert_close(state["a.q"], expected["a.q"].A, rtol=1e-4, atol=1e-4)


def test_a_task_is_not_kept_away_from_itself():
    known = {t: replace(s, provenance={**s.provenance, "task": t}) for t, s in pool(3).items()}
    own, everybody = known["t0"], list(known.values())
    with pytest.raises(UsageError, match="statistics of 't0' among the others"):
        subspace_state_dict("contrastive", own, everybody, rank=2)
    whole = merge_statistics(*everybody)
    for given in ({"others": [whole]}, {"others": [known["t1"]], "background": [whole]}):
        with pytest.raises(UsageError, match="hold those of 't0' too"):
            subspace_state_dict("contrastive", own, **given, rank=2)
    with pytest.raises(UsageError, match="the statistics of 'all' hold those of 't0' too"):
        compute_subspaces("osrm", {"t0": own, "all": whole}, tasks=["t0"], rank=2)
    apart = merge_statistics(known["t1"], known["t2"])
    assert subspace_state_dict("contrastive", own, [apart], rank=2)
    assert subspace_state_dict("kaiming", own, [whole], rank=2)  # which looks at nobody


def test_a_published_pool_needs_no_data(tmp_path):
    """A new task starts from the others' files alone: model and data of the pool are gone."""
    model = build("roberta")
    data = {t: batches("roberta", i, examples=16) for i, t in enumerate("abc")}
    for task, given in data.items():
        found = collect_statistics(model, given, ["query", "value"], provenance={"task": task})
        write_statistics(tmp_path / f"{task}.stats.safetensors", found)
    wanted = compute_subspaces("osrm", {t: read_statistics(p) for t, p in files(tmp_path).items()}, rank=2)["c"]
    del data, model

    pool = {t: read_statistics(p) for t, p in files(tmp_path).items()}
    own = pool.pop("c")
    subspaces = compute_subspaces("osrm", {"c": own, **pool}, tasks=["c"], rank=2)["c"]
    adapter = initial_adapter(
        "c", "tiny", subspaces, own.modules, alpha=4, task_type="SEQ_CLS", prefix=own.provenance["backbone_prefix"]
    )
    folder = tmp_path / "c"
    folder.mkdir()
    write_adapter(folder, adapter)
    found = read_adapter(folder)
    assert all(torch.equal(found.modules[m].A, s.A) for m, s in wanted.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"{t}.stats.safetensors" for t in "ab"),
        "c",
        "c.stats.safetensors",
    ]


def files(folder: Path) -> dict[str, Path]:
    return {p.name.partition(".")[0]: p for p in sorted(folder.glob("*.stats.safetensors"))}


def test_predicted_shift_is_the_measured_one(tmp_path):
    """tr(D M D^T) / tr(W0 M W0^T) from the file equals the relative energy the adapter adds to the module's outputs."""
    model = build("roberta")
    statistics = pool_of("roberta", model)
    subspaces = compute_subspaces("contrastive", statistics, rank=2)["a"]
    adapter = initial_adapter("a", "tiny", subspaces, statistics["a"].modules, alpha=4, prefix="roberta")
    for factors in adapter.modules.values():
        factors.B.normal_(generator=torch.Generator().manual_seed(0))
    write_statistics(tmp_path / "b", statistics["b"])
    shift = predicted_shift(adapter, read_statistics(tmp_path / "b"))
    assert set(shift) == set(adapter.modules)
    for module, value in shift.items():
        S = statistics["b"].moments_for(module).dense().double()
        D = adapter.modules[module].delta().double()
        W = model.get_submodule(f"roberta.{module}").weight.detach().double()
        assert value == pytest.approx(float(torch.trace(D @ S @ D.T) / torch.trace(W @ S @ W.T)), rel=1e-4)
    own = predicted_shift(adapter, statistics["a"])
    assert sum(own.values()) > sum(shift.values())
    assert relative_difference(statistics["b"], read_statistics(tmp_path / "b")) < 1e-6


def test_bad_calls():
    model = build("roberta")
    statistics = pool_of("roberta", model)
    subspaces = compute_subspaces("osrm", statistics, rank=2)["a"]
    with pytest.raises(UsageError, match="alpha"):
        initial_adapter("a", "b", subspaces, statistics["a"].modules, alpha=float("nan"))
    with pytest.raises(InputError, match="no subspaces"):
        initial_adapter("a", "b", {}, {}, alpha=1)
    with pytest.raises(InputError, match="width 32"):
        initial_adapter("a", "b", subspaces, {}, alpha=1)
    other = initial_adapter("a", "b", subspaces, statistics["a"].modules, alpha=1, prefix="elsewhere")
    assert predicted_shift(other, statistics["a"])
    renamed = collect_statistics(build("llama"), batches("llama", 0), ["q_proj"])
    with pytest.raises(InputError, match="no module in common"):
        predicted_shift(other, renamed)
