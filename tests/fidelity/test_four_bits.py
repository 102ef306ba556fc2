"""Bases in four bits: the numbers are bitsandbytes' own, however the base came to them, and what serving takes is what it takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.adapters.peft_format import write_adapter
from plait.choosing.auto import AutoSettings, merge_auto
from plait.cli import main
from plait.errors import InputError, UsageError
from plait.fidelity.panel import Panel
from plait.fidelity.score import fidelities, outputs
from plait.fidelity.serving import measure
from plait.merging import merge, merge_folders
from plait.merging.bake.baking import bake
from plait.model.base import BaseModel, load_task_model
from plait.model.four_bits import said_in_four_bits, unpacked_tensors
from plait.model.identity import held_fingerprint
from plait.model.nf4 import BLOCK, OUTER, dynamic_values, in_blocks, normal_values, stored_sizes, through_nf4
from tests.panels import texts_of
from tests.tiny import make_task

GOLDEN = load_file(Path(__file__).parents[1] / "reference" / "nf4.safetensors")
CASES = ("plain", "double", "odd", "fp4")
CONFIG = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FEW = AutoSettings(methods=("tsv", "task_arithmetic"), scales=(0.5, 1.0), refine=2, max_length=24)


def packed(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight as bitsandbytes stores it, quantised twice."""
    blocks = in_blocks(weight.reshape(-1), normal_values(), BLOCK)
    mean = blocks.sizes.mean()
    sizes = in_blocks(blocks.sizes - mean, dynamic_values(), OUTER)
    facts = {
        "quant_type": "nf4", "blocksize": BLOCK, "dtype": str(weight.dtype).removeprefix("torch."), "shape": list(weight.shape),
        "nested_blocksize": OUTER, "nested_dtype": "float32", "nested_offset": float(mean),
    }  # fmt: skip
    state = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    return {
        name: ((blocks.places[::2] << 4) | blocks.places[1::2])[:, None],
        f"{name}.absmax": sizes.places,
        f"{name}.quant_map": normal_values().clone(),
        f"{name}.nested_absmax": sizes.sizes,
        f"{name}.nested_quant_map": dynamic_values().clone(),
        f"{name}.quant_state.bitsandbytes__nf4": state,
    }


def packed_base(base: BaseModel, out: Path) -> BaseModel:
    """A copy of a tiny base whose layers are in four bits."""
    out.mkdir()
    for path in Path(base.name).iterdir():
        if path.suffix != ".safetensors":
            (out / path.name).write_bytes(path.read_bytes())
    tensors = {}
    for name, tensor in load_file(Path(base.name) / "model.safetensors").items():
        layer = name.endswith(("dense.weight", "query.weight", "key.weight", "value.weight", "_proj.weight"))
        tensors |= packed(name, tensor) if layer else {name: tensor}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    return BaseModel(str(out), device="cpu")


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_stored_weights_are_unpacked_as_bitsandbytes_does(case, tmp_path):
    own = {k: v for k, v in GOLDEN.items() if k.startswith(f"{case}.weight")}
    save_file(own, tmp_path / "model.safetensors")
    found = unpacked_tensors(tmp_path)
    assert found.keys() == {f"{case}.weight"}
    assert found[f"{case}.weight"].dtype == GOLDEN[f"{case}.is"].dtype
    assert torch.equal(found[f"{case}.weight"], GOLDEN[f"{case}.is"])


def test_quantising_is_bitsandbytes_own():
    assert torch.equal(through_nf4(GOLDEN["plain.was"], double=False), GOLDEN["plain.is"])
    for case in ("double", "odd"):
        places = in_blocks(GOLDEN[f"{case}.was"].reshape(-1), normal_values(), BLOCK).places
        theirs = GOLDEN[f"{case}.weight"].flatten()
        assert torch.equal(torch.stack([theirs >> 4, theirs & 15], 1).flatten()[: len(places)], places)
    sizes = GOLDEN["sizes.was"]
    again = in_blocks(sizes - sizes.mean(), dynamic_values(), OUTER)
    assert torch.equal(again.places, GOLDEN["sizes.places"]) and torch.equal(again.sizes, GOLDEN["sizes.absmax"])
    off = (stored_sizes(sizes) - sizes).abs().max()
    assert 0 < off < 0.01 * sizes.max()


def test_what_has_been_through_four_bits_stays():
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    once = through_nf4(weight, double=False)
    assert not torch.equal(once, weight) and torch.equal(through_nf4(once, double=False), once)
    assert torch.equal(through_nf4(torch.zeros(4, 64)), torch.zeros(4, 64))


# --- bases ------------------------------------------------------------------------------------------------------------


KINDS = {"bert": "classification", "llama": "causal", "gpt2": "causal", "t5": "seq2seq"}


@pytest.mark.parametrize(("architecture", "kind"), KINDS.items())
def test_quantised_when_loaded(tiny_base, architecture, kind):
    base, task = tiny_base(architecture), make_task(kind=kind)
    plain = dict(load_task_model(base, task, seed=0).named_parameters())
    model = load_task_model(replace(base, four_bits="nf4"), task, seed=0)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, plain[n])}
    matrices = {
        n
        for n, p in plain.items()
        if p.ndim == 2 and "embed" not in n and "shared" not in n and "wte" not in n and "wpe" not in n
    }
    left = {n for n in matrices if any(x in n for x in ("lm_head", "classifier", ".wo.", "relative_attention"))}
    assert moved == matrices - left
    assert said_in_four_bits(model) == "bitsandbytes-4bit"
    if architecture == "gpt2":  # stored (in, out), also where it is square: blocks lie along the inputs
        name = "transformer.h.0.attn.c_proj.weight"
        assert torch.equal(dict(model.named_parameters())[name], through_nf4(plain[name].T).T)


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "classification"), ("llama", "causal")])
def test_a_base_stored_in_four_bits_is_the_one_quantised_when_loaded(tiny_base, tmp_path, architecture, kind):
    base, task = tiny_base(architecture), make_task(kind=kind)
    stored = load_task_model(packed_base(base, tmp_path / "base"), task, seed=0)
    loaded = load_task_model(replace(base, four_bits="nf4"), task, seed=0)
    assert said_in_four_bits(stored) == said_in_four_bits(loaded)
    for (name, a), (_, b) in zip(stored.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_damaged_four_bits_are_told(tiny_base, tmp_path):
    base = packed_base(tiny_base("llama"), tmp_path / "base")
    file = Path(base.name) / "model.safetensors"
    whole = load_file(file)
    layer = next(n for n in whole if n.endswith("q_proj.weight"))
    task = make_task(kind="causal")
    for changed, told in (
        ({f"{layer}.absmax": None}, "absmax is absent"),
        ({f"{layer}.nested_absmax": torch.ones(9)}, "nested_absmax"),
        ({layer: whole[layer][:-1]}, "bytes, expected"),
    ):
        tensors = {k: v for k, v in {**whole, **changed}.items() if v is not None}
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(InputError, match=told):
            load_task_model(base, task, seed=0)
    with pytest.raises(UsageError, match="int3"):
        BaseModel("base", four_bits="int3")


def test_how_a_base_is_held_is_part_of_what_it_is(tiny_base):
    base = tiny_base("bert")
    assert held_fingerprint(replace(base, four_bits="nf4")) == held_fingerprint(base) + "+nf4"


def written(panel: Panel, root: Path, base: str) -> tuple[list[str], list[str]]:
    """A panel's adapters as folders, and its texts as options."""
    texts = []
    for i, part in enumerate(panel.parts):
        (root / part.name).mkdir()
        write_adapter(root / part.name, replace(part.adapter, base=base))
        (root / f"{part.name}.txt").write_text("\n".join(t[0] for t in texts_of(12, i)))
        texts += ["--text", f"{part.name}={root / part.name}.txt"]
    return [str(root / p.name) for p in panel.parts], texts


# --- what serving takes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "kind"), [("bert", "classification"), ("llama", "causal"), ("gpt2", "causal")])  # fmt: skip
def test_ways_of_serving_are_what_they_say(make_panel, tmp_path, architecture, kind):
    panel = make_panel(architecture, kind, texts=6)
    adapters = [p.adapter for p in panel.parts]
    both = replace(merge(adapters, method="task_arithmetic", scale=0.7).adapter, name="both")
    base = replace(panel.base, four_bits="nf4")
    ways = {s.way: s for s in measure(adapters, both, base, panel.texts, max_length=24).ways}
    assert len(ways) == 5
    own = Panel(base, panel.parts, panel.texts, max_length=24)
    beside = fidelities(own, [(both, 1.0)])[0]
    assert ways["beside the 4-bit base"].merged.score == pytest.approx(beside.score, abs=1e-5)
    assert ways["beside the 4-bit base"].alone.tasks[0].fidelity.kl == pytest.approx(0, abs=1e-6)
    full, baked = (ways[n].merged.score for n in ("beside the full-precision base", "baked into it"))
    assert full == pytest.approx(baked, abs=1e-4) and full != pytest.approx(beside.score, abs=1e-5)
    again = ways["baked into it, then NF4"].merged.tasks
    if kind != "classification":
        return
    bake(both, Path(base.name), tmp_path / "baked")  # really written, and really read in four bits
    written = Panel(
        BaseModel(str(tmp_path / "baked"), device="cpu", four_bits="nf4"), panel.parts, panel.texts, max_length=24
    )
    for part in panel.parts:
        a = outputs(own, part, [(part.adapter, 1.0)])[0]
        b = outputs(written, part, [(None, 1.0)])[0]
        found = next(t.fidelity for t in again if t.task == part.name)
        if part.task.kind == "classification":
            assert found.agreement == pytest.approx((a.argmax(-1) == b.argmax(-1)).mean(), abs=1e-9)
        else:
            assert found.kl == pytest.approx(0.5 * ((a - b) ** 2).mean() / a.var(), rel=1e-3)


def test_four_bits_from_folder_to_folder(make_panel, tmp_path, capsys):
    """Adapters and a base stored in four bits go through `merge auto`, and `measure` finds the adapters again."""
    panel = make_panel("bert", "classification", texts=12)
    base = packed_base(panel.base, tmp_path / "base")
    folders, texts = written(panel, tmp_path, base.name)
    merge_folders(folders, tmp_path / "merged", method="tsv")
    with pytest.raises(SystemExit) as ended:
        main(["measure", str(tmp_path / "merged"), *texts, "--base", base.name, "--max-length", "24", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert not ended.value.code
    assert [w["way"] for w in said["ways"]] == ["beside the 4-bit base", "merged into the 4-bit base"]
    given = {p.name: panel.texts[p.name] for p in panel.parts}
    adapters = [p.adapter for p in panel.parts]
    found = merge_auto(adapters, base, given, settings=FEW)
    same = merge_auto(adapters, replace(panel.base, four_bits="nf4"), given, settings=FEW)
    assert found.record.fidelity == same.record.fidelity
    assert found.record.fidelity != merge_auto(adapters, panel.base, given, settings=FEW).record.fidelity


def test_the_option_reaches_the_base(make_panel, tmp_path, capsys):
    panel = make_panel("bert", "classification", texts=12)
    folders, texts = written(panel, tmp_path, panel.base.name)
    settings = ["--refine", "0", "--no-fit", "--no-heads", "--max-length", "24", "--quiet", "--json"]
    scores = []
    for more in ([], ["--base-4bit", "nf4"]):
        out = tmp_path / f"merged{len(more)}"
        with pytest.raises(SystemExit) as ended:
            main(["merge", "auto", panel.base.name, *folders, *texts, "--out", str(out), *settings, *more])
        said = capsys.readouterr()
        assert not ended.value.code, said.err
        scores.append(json.loads(said.out)["fidelity"]["score"])
    assert scores[0] != scores[1]
    with pytest.raises(SystemExit) as ended:
        main(["merge", *folders, "--out", str(tmp_path / "x"), "--base-4bit", "nf4"])
    assert ended.value.code == 2 and "--base-4bit" in capsys.readouterr().err
