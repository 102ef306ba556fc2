"""Collection: every architecture against the slow way, and what must not change the result."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from plait.errors import InputError, RunError, UsageError
from plait.statistics import collect_statistics, merge_statistics
from plait.statistics.targets import find_targets
from tests.statistics.models import ATTENTION, batches, build, inputs_by_hand, padded, text

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


def relative_difference(a, b) -> float:
    worst = 0.0
    for site, moments in a.sites.items():
        x, y = moments.dense().double(), b.sites[site].dense().double()
        worst = max(worst, float((x - y).norm() / x.norm()), abs(moments.count - b.sites[site].count))
    for name, info in a.modules.items():
        worst = max(worst, abs(info.output_energy / b.modules[name].output_energy - 1))
    return worst


@pytest.mark.parametrize("architecture", ATTENTION)
def test_every_architecture_against_the_slow_way(architecture):
    model = build(architecture)
    given = batches(architecture, 0)
    found = collect_statistics(model, given, "all-linear")
    targets, prefix = find_targets(model, "all-linear")
    assert set(found.modules) == set(targets) and len(targets) >= 8
    assert not any(name.startswith(("lm_head", "score", "classifier")) for name in targets)
    assert all(not name.startswith(f"{prefix}.") for name in targets) if prefix else True
    for name in list(targets)[:: max(1, len(targets) // 5)]:
        target = targets[name]
        moments = found.moments_for(name)
        rows, outputs = [], []
        for batch, (h, y) in zip(given, inputs_by_hand(model, target.module, given), strict=True):
            mask = batch.get("attention_mask", torch.ones(h.shape[:2])).bool()
            if h.shape[:-1] != mask.shape:  # a pooler, and DeBERTa's relative positions: one input for all
                mask = torch.ones(h.shape[:-1], dtype=torch.bool)
            if (
                architecture == "t5"
                and name.startswith("decoder")
                and "EncDecAttention.k" not in name
                and "EncDecAttention.v" not in name
            ):
                mask = torch.cat([torch.ones_like(mask[:, :1]), mask[:, :-1]], 1)
            rows.append(h[mask])
            outputs.append(y[mask] - (0 if target.module.bias is None else target.module.bias.detach()))
        H, Y = torch.cat(rows), torch.cat(outputs)
        assert moments.count == len(H)
        torch.testing.assert_close(moments.dense(), H.T @ H, **CLOSE)
        torch.testing.assert_close(moments.total, H.sum(0), **CLOSE)
        W = target.module.weight.detach()
        W = W.T if target.fan_in_fan_out else W
        energy = float(torch.trace(W @ (H.T @ H) @ W.T))
        assert found.modules[name].output_energy == pytest.approx(energy, rel=1e-4)
        assert float(Y.square().sum()) == pytest.approx(energy, rel=1e-4)


@pytest.mark.parametrize("architecture", ATTENTION)
def test_projections_of_one_tensor_share_a_site(architecture):
    found = collect_statistics(build(architecture), batches(architecture, 0), "all-linear")
    wanted = ATTENTION[architecture]
    first = [next(n for n in found.modules if n.endswith(suffix)) for suffix in wanted]
    assert len({found.modules[n].site for n in first}) == 1
    gates = [n for n in found.modules if n.endswith("gate_proj")]
    for gate in gates:
        assert found.modules[gate].site == found.modules[gate.replace("gate_proj", "up_proj")].site
    if architecture == "t5":  # every layer's cross-attention reads the same encoder states
        crossed = {i.site for n, i in found.modules.items() if n.endswith(("EncDecAttention.k", "EncDecAttention.v"))}
        assert len(crossed) == 1
    if architecture == "gpt2":
        info = found.modules["h.0.attn.c_attn"]
        assert info.shape == (96, 32) and info.fan_in_fan_out


@pytest.mark.parametrize("architecture", ["roberta", "llama", "t5", "deberta"])
def test_padding_batch_size_and_module_order_change_nothing(architecture):
    model = build(architecture)
    sentences = text(3, 9)
    targets = {
        "roberta": ["query", "value"],
        "llama": ["q_proj", "down_proj"],
        "t5": ["q", "v"],
        "deberta": ["query_proj", "value_proj"],
    }
    names = targets[architecture]
    plain = collect_statistics(model, [padded(sentences)], names)
    sides = ["right", "left"] if architecture == "llama" else ["right"]  # absolute positions move with left pads
    for side in sides:
        for size, extra in ((1, 0), (4, 0), (9, 7)):
            cut = [padded(sentences[i : i + size], side=side, extra=extra) for i in range(0, 9, size)]
            other = collect_statistics(model, cut, list(reversed(names)))
            if architecture == "t5":  # its decoder reads the pads' successor as a token; compare what reads words
                plain_encoder = {s: m for s, m in plain.sites.items() if s.startswith("encoder")}
                for site, moments in plain_encoder.items():
                    torch.testing.assert_close(moments.dense(), other.sites[site].dense(), **CLOSE)
            else:
                assert relative_difference(plain, other) < 2e-5
                assert list(plain.modules) == list(other.modules)


def test_mean_pool_counts_examples():
    model = build("roberta")
    sentences = text(5, 6)
    found = collect_statistics(model, [padded(sentences)], ["query"], pool="mean")
    site = found.sites["encoder.layer.1.attention.self.query"]
    h, _ = inputs_by_hand(model, model.roberta.encoder.layer[1].attention.self.query, [padded(sentences)])[0]
    means = torch.stack([h[i, : len(s)].mean(0) for i, s in enumerate(sentences)])
    assert site.count == 6 and site.form == "factor"
    torch.testing.assert_close(site.dense(), means.T @ means, **CLOSE)
    W = model.roberta.encoder.layer[1].attention.self.query.weight.detach()
    energy = found.modules["encoder.layer.1.attention.self.query"].output_energy
    assert energy == pytest.approx(float(torch.trace(W @ means.T @ means @ W.T)), rel=1e-4)


def test_padded_mean_covers_every_position():
    model = build("bert")
    batch = padded(text(6, 5), extra=3)
    found = collect_statistics(model, [batch], ["query"])
    moments = found.sites["encoder.layer.1.attention.self.query"]
    h, _ = inputs_by_hand(model, model.bert.encoder.layer[1].attention.self.query, [batch])[0]
    assert moments.padded_count == batch["input_ids"].numel() > moments.count
    torch.testing.assert_close(moments.padded_total / moments.padded_count, h.mean((0, 1)), **CLOSE)


def test_gradient_checkpointing_and_training_mode_are_as_before_and_change_nothing():
    model = build("llama")
    given = batches("llama", 0)
    plain = collect_statistics(model, given, "all-linear")
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    model.train()
    assert relative_difference(plain, collect_statistics(model, given, "all-linear")) == 0.0
    assert model.training and model.model.layers[0].training


def test_peft_model_gives_the_base_statistics():
    from peft import LoraConfig, get_peft_model

    model, given = build("roberta"), batches("roberta", 0)
    plain = collect_statistics(model, given, ["query", "value"])
    wrapped = get_peft_model(
        model, LoraConfig(target_modules=["query", "value"], init_lora_weights=False, task_type="SEQ_CLS")
    )
    found = collect_statistics(wrapped, given)
    assert list(found.modules) == list(plain.modules) and found.provenance["backbone_prefix"] == "roberta"
    assert relative_difference(plain, found) == 0.0


class Twice(nn.Module):
    """Calls one linear layer twice and another never."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, 8)
        self.shared = nn.Linear(8, 8)
        self.idle = nn.Linear(8, 8)

    def forward(self, input_ids, attention_mask=None):
        return self.shared(torch.tanh(self.shared(self.embed(input_ids))))


def test_a_module_called_twice_adds_up_and_one_never_called_is_named():
    torch.manual_seed(0)
    model = Twice()
    batch = padded(text(0, 4))
    found = collect_statistics(model, [batch], ["shared"])
    h = model.embed(batch["input_ids"])[batch["attention_mask"].bool()].detach()
    again = torch.tanh(model.shared(h)).detach()
    torch.testing.assert_close(found.sites["shared"].dense(), h.T @ h + again.T @ again, **CLOSE)
    assert found.sites["shared"].count == 2 * len(h)
    with pytest.raises(InputError, match=r"idle: never called"):
        collect_statistics(model, [batch], ["shared", "idle"])


def test_nan_names_module_and_batch():
    model = Twice()
    good, bad = padded(text(0, 4)), padded([[7, 8, 9]])
    with torch.no_grad():
        model.embed.weight[8] = float("inf")
        model.embed.weight[3:8] = 0.1
    good["input_ids"][:] = 4
    with pytest.raises(InputError, match=r"shared: reads NaN or infinity in batch 1"):
        collect_statistics(model, [good, bad], ["shared"])


def test_nan_at_pads_does_not_matter():
    model = Twice()
    with torch.no_grad():
        model.embed.weight[1] = float("nan")
    found = collect_statistics(model, [padded(text(0, 4), extra=2)], ["shared"])
    assert bool(found.sites["shared"].second.isfinite().all()) and found.sites["shared"].padded_total is None


def test_bad_calls():
    model = build("roberta")
    given = batches("roberta", 0)
    with pytest.raises(UsageError, match=r"'quary' matches nothing \(near: query"):
        collect_statistics(model, given, ["quary", "value"])
    with pytest.raises(UsageError, match="not a regular expression"):
        collect_statistics(model, given, "(query")
    with pytest.raises(UsageError, match="Embedding, not a linear layer"):
        collect_statistics(model, given, ["word_embeddings"])
    with pytest.raises(UsageError, match="pool"):
        collect_statistics(model, given, ["query"], pool="max")
    with pytest.raises(InputError, match="no batches"):
        collect_statistics(model, [], ["query"])
    with pytest.raises(InputError, match="none of the model's inputs: sentence"):
        collect_statistics(model, [{"sentence": torch.zeros(2, 3)}], ["query"])
    with pytest.raises(UsageError, match="no LoRA layers"):
        collect_statistics(model, given)


def test_an_endless_regex_is_refused_in_time(monkeypatch):
    monkeypatch.setattr("plait.statistics.targets.MAX_PATTERN_SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(UsageError, match="takes over 1 s"):
        collect_statistics(build("roberta"), batches("roberta", 0), r"(([a-z.]+)+)+\d!")
    assert time.monotonic() - start < 20


def test_targets_are_chosen_as_peft_chooses_them():
    from peft import LoraConfig, get_peft_model

    for options in (
        {"target_modules": ["query", "output.dense"], "exclude_modules": ["layer.0.output.dense"]},
        {"target_modules": ["query", "value"], "layers_to_transform": [1]},
        {"target_modules": r".*layer\.\d+\.attention.*(query|key)"},
        {"target_modules": "all-linear"},
    ):
        model = build("roberta")
        mine = {f"roberta.{n}" for n in find_targets(model, **options)[0]}
        wrapped = get_peft_model(model, LoraConfig(**options, task_type="SEQ_CLS"))
        theirs = {n.removeprefix("base_model.model.") for n, m in wrapped.named_modules() if hasattr(m, "lora_A")}
        assert mine == theirs


def test_layers_are_chosen_alike_in_a_bare_backbone():
    model = build("llama")
    whole, bare = (find_targets(m, ["q_proj"], layers_to_transform=[1])[0] for m in (model, model.model))
    assert list(whole) == list(bare) == ["layers.1.self_attn.q_proj"]


def test_tensor_parallel_shards_are_refused():
    model = Twice()
    batch = padded(text(0, 2))

    def halve(_module, args):
        return (args[0][..., :4],)

    handle = model.shared.register_forward_pre_hook(halve)
    model.shared.weight = nn.Parameter(model.shared.weight[:, :4].detach())
    model.forward = lambda input_ids, attention_mask=None: model.shared(model.embed(input_ids))
    with pytest.raises(RunError, match=r"shared: its input is sharded by tensor parallelism.*4 of 8 features"):
        collect_statistics(model, [batch], ["shared"])
    handle.remove()


def test_a_mask_that_fits_nothing_is_an_error():
    model = Twice()
    model.forward = lambda input_ids, attention_mask=None: model.shared(model.embed(input_ids)[:, :-1])
    with pytest.raises(RunError, match="does not fit"):
        collect_statistics(model, [padded(text(0, 4))], ["shared"])


def test_batches_and_files_add_up():
    model = build("llama")
    given = batches("llama", 0, examples=12)
    whole = collect_statistics(model, given, ["q_proj", "v_proj"], provenance={"task": "a"})
    parts = [collect_statistics(model, [b], ["q_proj", "v_proj"], provenance={"task": "a"}) for b in given]
    summed = merge_statistics(*parts)
    assert relative_difference(whole, summed) < 1e-5
    assert summed.provenance["samples"] == 12 and summed.provenance["tokens"] == whole.provenance["tokens"]


def test_half_precision_bases_accumulate_in_float32():
    model = build("llama")
    given = batches("llama", 0)
    half = collect_statistics(model.to(torch.bfloat16), given, ["q_proj"])
    moments = half.sites["layers.1.self_attn.q_proj"]
    assert moments.second.dtype == torch.float32 and half.provenance["dtype"] == "bfloat16"
    h = [
        x[b["attention_mask"].bool()]
        for b, (x, _) in zip(given, inputs_by_hand(model, model.model.layers[1].self_attn.q_proj, given), strict=True)
    ]
    H = torch.cat(h).double()
    torch.testing.assert_close(moments.dense().double(), H.T @ H, rtol=1e-5, atol=1e-5)


def test_a_quantised_base_is_labelled():
    model = build("llama")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    given = batches("llama", 0)
    found = collect_statistics(model, given, ["q_proj"], provenance={"base_sha256": "a"})
    assert found.provenance["quantisation"] == "bitsandbytes-4bit"
    del model.config.quantization_config
    plain = collect_statistics(model, given, ["q_proj"], provenance={"base_sha256": "b"})
    assert merge_statistics(found, plain).sites.keys() == plain.sites.keys()
    with pytest.raises(InputError, match=r"differ in base: .*\(b\).*\(c\), which are other weights"):
        merge_statistics(plain, collect_statistics(model, given, ["q_proj"], provenance={"base_sha256": "c"}))


def test_a_mask_of_four_dimensions_does_not_tell_pads():
    model, batch = build("llama"), padded(text(0))
    causal = torch.ones(batch["input_ids"].shape[1], batch["input_ids"].shape[1]).tril().bool()
    wide = (batch["attention_mask"][:, None, None].bool() & causal).float().sub(1).mul(1e9)
    with pytest.raises(RunError, match=r"the attention_mask is \(8, 1, .*does not tell which tokens are pads"):
        collect_statistics(model, [{**batch, "attention_mask": wide}], ["q_proj"])
