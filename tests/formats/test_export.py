"""What is exported, loaded by the libraries it is for: PEFT's automatic classes, pipelines, the reader of GGUF."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version

from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.peft_format import CONFIG, read_adapter, write_adapter
from plait.disk.store import identity, staged_folder
from plait.errors import InputError, UsageError
from plait.formats.export import RANKS, export
from plait.formats.gguf_names import reordered, restored
from plait.merging import merge_folders
from tests.classifiers import expected_logits, quiet, saved_base, saved_classifier
from tests.tiny import WORDS

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
LABELS = {"two": ["negative", "positive"], "four": ["a", "b", "c", "d"], "grade": None}
OUTPUTS = {"two": 2, "four": 4, "grade": 1}
TEXT = " ".join(WORDS[:6])


def needs_heads_of_pipelines() -> None:
    """Skip where `pipeline` on a folder does not load its head."""
    import transformers

    if Version(transformers.__version__) < Version("5.18"):
        pytest.skip("this transformers loads an adapter folder with a random head: not compared with a pipeline")


@pytest.fixture(scope="module", params=["bert", "roberta", "mpnet", "distilbert"])
def merged(request, tmp_path_factory) -> tuple[Path, list[Path], Path]:
    """(base, classifiers with named classes, their merge)."""
    root = tmp_path_factory.mktemp(request.param)
    base = saved_base(root / "base", request.param)
    folders = []
    for i, (name, outputs) in enumerate(OUTPUTS.items()):
        made = read_adapter(saved_classifier(root / f"{name}-raw", base, request.param, outputs, seed=i))
        record = {"task": name, "labels": LABELS[name], "kind": "classification" if LABELS[name] else "regression"}
        with staged_folder(root / name, identity("train", {}), result=record) as stage:
            write_adapter(stage, replace(made, name=name, heads={name: made.heads[made.name]}, head_facts={}))
        folders.append(root / name)
    merge_folders(folders, root / "merged", method="task_arithmetic", scale=1.0)
    return base, folders, root / "merged"


def loading(text: str) -> dict:
    """The names that the printed lines make, with the heads' values."""
    lines = text[: text.index("model = ")]
    names: dict = {}
    exec(compile(lines, "next", "exec"), names)
    return names["head"]


@pytest.mark.parametrize("task", list(OUTPUTS))
def test_a_task_of_a_merge_as_peft_and_pipelines_load_it(merged, task, tmp_path):
    import peft
    import transformers as hf

    base, folders, folder = merged
    done = export(folder, tmp_path / "out", loader="peft", task=task)
    values = loading(done.record.next)
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    inputs = dict(tokenizer(TEXT, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    wanted = expected_logits(base, folders, next(f for f in folders if f.name == task), OUTPUTS[task], inputs)
    with quiet(), torch.no_grad():
        model = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", **values).eval()
        torch.testing.assert_close(model(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
        names = dict(enumerate(LABELS[task] or ["LABEL_0"]))
        assert model.config.id2label == names and model.config.num_labels == OUTPUTS[task]
        assert done.record.num_labels == OUTPUTS[task] and list(done.record.labels or ()) == (LABELS[task] or [])
        needs_heads_of_pipelines()
        classify = hf.pipeline(
            "text-classification", model=str(tmp_path / "out"), tokenizer=str(base), model_kwargs=values
        )
        found = classify(TEXT, top_k=None, function_to_apply="none")
    order = [next(row["score"] for row in found if row["label"] == name) for name in names.values()]
    torch.testing.assert_close(torch.tensor(order), wanted[0], atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["task_type"] == "SEQ_CLS" and set(config["modules_to_save"]) == {
        k.partition(".")[0] for k in read_adapter(folder).heads[task]
    }
    card = (tmp_path / "out/README.md").read_text()
    assert str(tmp_path) not in card and str(base) not in card and all(f"`{n}`" in card for n in LABELS[task] or [])


def test_predictions_are_those_of_plait_eval(tiny_base, tmp_path):
    """Row by row: the merge scored by plait, and the exported folder in a pipeline."""
    import transformers as hf

    needs_heads_of_pipelines()
    from plait.evaluation.evaluate import Evaluator
    from plait.tasks.task import Examples
    from tests.panels import random_adapter, texts_of
    from tests.tiny import make_task

    base = tiny_base("bert")
    tasks = {"one": make_task("one", "classification", 3), "two": make_task("two", "regression")}
    for i, (name, task) in enumerate(tasks.items()):
        adapter = random_adapter(base, "bert", name, task.kind, i, classes=3)
        with staged_folder(tmp_path / name, identity("train", {})) as stage:
            write_adapter(stage, adapter)
    merge_folders([tmp_path / name for name in tasks], tmp_path / "merged", method="task_arithmetic", scale=1.0)
    merged, texts = read_adapter(tmp_path / "merged"), texts_of(12)
    examples = {name: Examples(texts, np.zeros(12, np.int64)) for name in tasks}
    examples["two"] = Examples(texts, np.zeros(12, np.float32))
    evaluator = Evaluator(base, tasks, examples)
    for name, outputs in (("one", 3), ("two", 1)):
        scored = evaluator.predict(name, merged.heads[name], merged)
        done = export(tmp_path / "merged", tmp_path / f"out-{name}", loader="peft", task=name)
        values = loading(done.record.next)
        with quiet():
            classify = hf.pipeline("text-classification", model=done.output, tokenizer=base.name, model_kwargs=values)
            found = classify([t for (t,) in texts], top_k=None, function_to_apply="none", batch_size=1)
        rows = [
            [next(r["score"] for r in row if r["label"] == values["id2label"][i]) for i in range(outputs)]
            for row in found
        ]
        np.testing.assert_allclose(np.asarray(rows), scored, atol=2e-5, rtol=1e-4)
        assert (np.argmax(rows, 1) == np.argmax(scored, 1)).all() and scored.std() > 0.05


def test_over_another_class_it_raises(merged, tmp_path):
    import peft
    import transformers as hf

    base, _, folder = merged
    export(folder, tmp_path / "out", loader="peft", task="two")
    with quiet(), pytest.raises(ValueError, match="not found in the base model"):
        peft.PeftModel.from_pretrained(hf.AutoModel.from_pretrained(base), tmp_path / "out")


def test_an_export_is_an_adapter_like_others(merged, tmp_path):
    """The whole update, one head: it is read, merged and exported again; the same export is kept."""
    _, _, folder = merged
    first = export(folder, tmp_path / "out", loader="peft", task="two")
    assert not first.reused and export(folder, tmp_path / "out", loader="peft", task="two").reused
    with pytest.raises(UsageError, match="exists with other settings"):
        export(folder, tmp_path / "out", loader="peft", task="four")
    whole, one = read_adapter(folder), read_adapter(tmp_path / "out")
    assert one.name == "two" or list(one.heads) == [one.name]
    for module, f in whole.modules.items():
        assert torch.equal(one.modules[module].A, f.A) and torch.equal(one.modules[module].B, f.B)
    assert one.facts_of(one.name).labels == ("negative", "positive")
    again = export(tmp_path / "out", tmp_path / "again", loader="peft")
    assert again.record.labels == ("negative", "positive")


def test_a_trained_classifier_alone(tmp_path):
    base = saved_base(tmp_path / "base", "bert")
    folder = saved_classifier(tmp_path / "three", base, "bert", 3)
    assert export(folder, tmp_path / "out", loader="peft").record.num_labels == 3


def test_tokens_keep_their_class(tmp_path):
    import peft

    base = saved_base(tmp_path / "base", "bert")
    tags = saved_classifier(tmp_path / "tags", base, "bert", 5, task_type="TOKEN_CLS")
    merge_folders(
        [tags, saved_classifier(tmp_path / "two", base, "bert", 2, seed=1)],
        tmp_path / "merged",
        method="task_arithmetic",
        scale=1.0,
    )
    done = export(tmp_path / "merged", tmp_path / "out", loader="peft", task="tags")
    with quiet():
        model = peft.AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "out", **loading(done.record.next))
        with torch.no_grad():
            assert model(input_ids=torch.tensor([[0, 7, 2]])).logits.shape == (1, 3, 5)


def test_each_head_in_its_own_classes_names(tmp_path):
    base = saved_base(tmp_path / "base", "bert")
    one = read_adapter(saved_classifier(tmp_path / "one", base, "bert", 2))
    other = replace(
        one, name="other", prefix="encoder_model", heads={"other": one.heads["one"]}, source={}, head_facts={}
    )
    (tmp_path / "other").mkdir()
    write_adapter(tmp_path / "other", other)
    merge_folders([tmp_path / "one", tmp_path / "other"], tmp_path / "merged", method="task_arithmetic", scale=1.0)
    for task, prefix in (("one", "bert"), ("other", "encoder_model")):
        export(tmp_path / "merged", tmp_path / f"out-{task}", loader="peft", task=task)
        targets = json.loads((tmp_path / f"out-{task}" / CONFIG).read_text())["target_modules"]
        assert all(t.startswith(f"{prefix}.") for t in targets)


# --- refusals ---------------------------------------------------------------------------------------------------------


def text_adapter(layers: int = 1, **scalings: float) -> Adapter:
    """An adapter of a decoder: q, v and down, of different ranks."""
    generator = torch.Generator().manual_seed(0)

    def factors(out: int, width: int, rank: int, scaling: float) -> LoraFactors:
        A, B = (torch.randn(shape, generator=generator) for shape in ((rank, width), (out, rank)))
        return LoraFactors(A, B, scaling)

    modules = {}
    for i in range(layers):
        root = f"model.layers.{i}"
        modules[f"{root}.self_attn.q_proj"] = factors(32, 32, 3, scalings.get("q", 2.0))
        modules[f"{root}.self_attn.k_proj"] = factors(16, 32, 3, scalings.get("k", 2.0))
        modules[f"{root}.mlp.down_proj"] = factors(32, 48, 9, scalings.get("down", 2.0))
    return Adapter("text", "some/base", dict(sorted(modules.items())), "CAUSAL_LM")


def saved(folder: Path, adapter: Adapter) -> Path:
    with staged_folder(folder, identity("train", {})) as stage:
        write_adapter(stage, adapter)
    return folder


def llama(folder: Path, **changes) -> Path:
    folder.mkdir()
    config = {
        "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "hidden_size": 32, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_what_is_asked_for_must_be_there(tmp_path):
    base = saved_base(tmp_path / "base", "bert")
    folders = [saved_classifier(tmp_path / n, base, "bert", 2, seed=i) for i, n in enumerate(("a", "b"))]
    merge_folders(folders, tmp_path / "merged", method="task_arithmetic", scale=1.0)
    text = saved(tmp_path / "text", text_adapter())
    for source, options, message in (
        (tmp_path / "merged", {"loader": "peft"}, "which of its heads"),
        (tmp_path / "merged", {"loader": "peft", "task": "c"}, "no head 'c'"),
        (tmp_path / "merged", {"loader": "pfet", "task": "a"}, "no export for 'pfet'"),
        (tmp_path / "merged", {"loader": "gguf", "task": "a"}, "loads no heads"),
        (text, {"loader": "peft", "task": "a"}, "it has no heads"),
        (text, {"loader": "vllm", "base": base}, "--base is for gguf"),
        (text, {"loader": "gguf", "base": base}, "one file"),
    ):
        with pytest.raises(UsageError, match=message):
            export(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_merge_that_knows_no_backbone_is_refused(tmp_path):
    base = saved_base(tmp_path / "base", "bert")
    one = read_adapter(saved_classifier(tmp_path / "one", base, "bert", 2))
    (tmp_path / "old").mkdir()
    unknown = replace(one, name="old", prefix="", task_type="FEATURE_EXTRACTION", head_facts={}, source={})
    write_adapter(tmp_path / "old", unknown)
    with pytest.raises(InputError, match="calls its backbone"):
        export(tmp_path / "old", tmp_path / "out", loader="peft")


# --- vLLM -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "scaling", "kept"), [
    (torch.float32, 2.0, torch.float32), (torch.bfloat16, 0.5, torch.bfloat16), (torch.bfloat16, 5 / 3, torch.float32),
    (torch.float16, 2.0, torch.float16), (torch.float32, 5 / 3, torch.float32),
])  # fmt: skip
def test_vllm_gets_one_rank_and_no_patterns(tmp_path, dtype, scaling, kept):
    adapter = text_adapter(q=scaling, k=scaling, down=scaling)
    typed = {m: LoraFactors(f.A.to(dtype), f.B.to(dtype), f.scaling) for m, f in adapter.modules.items()}
    folder = saved(tmp_path / "text", replace(adapter, modules=typed))
    done = export(folder, tmp_path / "out", loader="vllm")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (
        (config["r"], config["lora_alpha"]) == (16, 16) and not config["rank_pattern"] and not config["alpha_pattern"]
    )
    found, source = read_adapter(tmp_path / "out").modules, read_adapter(folder).modules
    for module, f in source.items():
        g = found[module]
        assert g.A.shape[0] == 16 and g.A.dtype == g.B.dtype == kept and g.scaling == 1.0
        assert not g.A[f.rank :].any() and not g.B[:, f.rank :].any()
        exact = f.B.double() * f.scaling
        assert float((g.B[:, : f.rank].double() - exact.to(kept).double()).abs().max()) == 0.0
    assert (done.record.rounding_error == 0.0) == (scaling != 5 / 3) and done.record.rounding_error < 1e-7


def test_every_rank_finds_its_place(tmp_path):
    for rank in (1, 2, 8, 33, 257, 320, 321, 512):
        one = {"model.layers.0.self_attn.q_proj": LoraFactors(torch.ones(rank, 8), torch.ones(4, rank), 1.0)}
        done = export(
            saved(tmp_path / f"r{rank}", Adapter("r", "b", one, "CAUSAL_LM")), tmp_path / f"o{rank}", loader="vllm"
        )
        assert done.record.rank == min(r for r in RANKS if r >= rank)
    one = {"model.layers.0.self_attn.q_proj": LoraFactors(torch.ones(513, 8), torch.ones(4, 513), 1.0)}
    with pytest.raises(InputError, match="above vLLM's highest"):
        export(saved(tmp_path / "r513", Adapter("r", "b", one, "CAUSAL_LM")), tmp_path / "o513", loader="vllm")


def test_the_lines_of_an_export_are_words_of_a_shell(tmp_path):
    """They are there to be copied, and the base's name is whatever the adapter's author wrote."""
    one = {"model.layers.0.self_attn.q_proj": LoraFactors(torch.ones(8, 4), torch.ones(4, 8), 1.0)}
    folder = saved(tmp_path / "a", Adapter("a", "/x/$(touch pwned)", one, "CAUSAL_LM"))
    done = export(folder, tmp_path / "o $(x)", loader="vllm")
    words = shlex.split(done.record.next)
    assert words[:3] == ["vllm", "serve", "/x/$(touch pwned)"]
    assert words[-1] == f"o $(x)={tmp_path / 'o $(x)'}"


def test_vllm_gets_no_weight_that_was_trained_whole(tmp_path):
    one = {"model.layers.0.q_proj": LoraFactors(torch.ones(4, 6), torch.ones(5, 4), 2.0)}
    whole = {"model.embed_tokens.weight": torch.ones(9, 6)}
    told = {"extras": whole, "modules_to_save": ("embed_tokens",)}
    folder = saved(tmp_path / "a", Adapter("a", "base", one, "CAUSAL_LM", **told))
    with pytest.raises(InputError, match=r"'model.embed_tokens.weight' was trained whole, which vLLM refuses"):
        export(folder, tmp_path / "out", loader="vllm")
    assert not (tmp_path / "out").exists()


def test_vllm_takes_heads_of_one_layer(tmp_path):
    for architecture, layer in (("distilbert", "pre_classifier"), ("roberta", r"classifier\.dense")):
        base = saved_base(tmp_path / architecture, architecture)
        folder = saved_classifier(tmp_path / f"{architecture}-two", base, architecture, 2)
        with pytest.raises(InputError, match=layer):
            export(folder, tmp_path / "out", loader="vllm")
    bert = saved_base(tmp_path / "bert", "bert")
    assert (
        export(saved_classifier(tmp_path / "b", bert, "bert", 2), tmp_path / "ok", loader="vllm").record.num_labels == 2
    )


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def read_gguf(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    import gguf

    reader = gguf.GGUFReader(str(path))
    facts = {k: reader.get_field(k).contents() for k in reader.fields if not k.startswith("GGUF.")}
    return facts, {t.name: torch.from_numpy(np.array(t.data)) for t in reader.tensors}


def test_a_gguf_adapter_holds_the_update(tmp_path):
    """A x and B in llama.cpp's order; alpha / rank of each module is its scaling, with one alpha for all."""
    folder = saved(tmp_path / "text", text_adapter(2, q=2.0, k=1.3, down=0.5))
    base = llama(tmp_path / "base")
    done = export(folder, tmp_path / "x.gguf", loader="gguf", base=base)
    facts, tensors = read_gguf(tmp_path / "x.gguf")
    assert facts["general.type"] == "adapter" and facts["adapter.type"] == "lora"
    assert facts["general.architecture"] == done.record.architecture == "llama"
    names = {"self_attn.q_proj": ("attn_q", 4), "self_attn.k_proj": ("attn_k", 2), "mlp.down_proj": ("ffn_down", 0)}
    assert len(tensors) == 2 * 3 * 2
    for module, f in read_adapter(folder).modules.items():
        _, _, layer, inner = module.split(".", 3)
        name, heads = names[inner]
        A, B = (tensors[f"blk.{layer}.{name}.weight.lora_{half}"] for half in "ab")
        B = restored(B, heads) if heads else B
        found = facts["adapter.lora.alpha"] / f.rank * (B.double() @ A.double())
        torch.testing.assert_close(found, f.scaling * f.B.double() @ f.A.double(), atol=1e-5, rtol=1e-6)
    assert export(folder, tmp_path / "x.gguf", loader="gguf", base=base).reused
    with pytest.raises(UsageError, match="exists with other settings"):
        export(saved(tmp_path / "other", text_adapter(1)), tmp_path / "x.gguf", loader="gguf", base=base)


def test_the_order_of_rows_is_what_rotations_of_pairs_need():
    """Halves rotated against each other (transformers), then reordered, is neighbours rotated (llama.cpp)."""
    heads, size = 3, 8
    x = torch.randn(heads * size, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angles = torch.linspace(0.1, 0.9, size // 2, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.reshape(heads, 2, size // 2).unbind(1)
    halves = torch.stack([first * cos - second * sin, second * cos + first * sin], 1).reshape(-1, 1)
    even, odd = reordered(x, heads).reshape(heads, size // 2, 2).unbind(2)
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], 2).reshape(-1, 1)
    torch.testing.assert_close(reordered(halves, heads), pairs)
    assert torch.equal(restored(reordered(x, heads), heads), x)


def test_an_architecture_that_keeps_its_rows(tmp_path):
    folder = saved(tmp_path / "text", text_adapter())
    base = llama(tmp_path / "base", model_type="qwen2")
    assert export(folder, tmp_path / "x.gguf", loader="gguf", base=base).record.architecture == "qwen2"
    _, tensors = read_gguf(tmp_path / "x.gguf")
    q = read_adapter(folder).modules["model.layers.0.self_attn.q_proj"]
    scale = q.scaling * q.rank / read_gguf(tmp_path / "x.gguf")[0]["adapter.lora.alpha"]
    torch.testing.assert_close(tensors["blk.0.attn_q.weight.lora_b"], q.B * scale, atol=1e-6, rtol=1e-6)


def test_what_llama_cpp_does_not_take(tmp_path):
    text = saved(tmp_path / "text", text_adapter())
    bert = saved_base(tmp_path / "bert", "bert")
    head = saved_classifier(tmp_path / "head", bert, "bert", 2)
    experts = text_adapter().modules["model.layers.0.mlp.down_proj"]
    named = replace(text_adapter(), modules={"model.layers.0.mlp.adapter": experts})
    lm_head = {"lm_head": LoraFactors(torch.ones(2, 32), torch.ones(60, 2), 1.0)}
    for i, (source, base, message) in enumerate((
        (text, bert, "model type 'bert'"),
        (text, tmp_path, "no config.json"),
        (head, llama(tmp_path / "b0"), "carries heads"),
        (text, llama(tmp_path / "b1", num_attention_heads=5), "no 5 heads"),
        (text, llama(tmp_path / "b2", num_hidden_layers="2"), "num_hidden_layers"),
        (saved(tmp_path / "named", named), llama(tmp_path / "b3"), "knows no tensor for"),
        (saved(tmp_path / "out", Adapter("o", "b", lm_head, "CAUSAL_LM")), llama(tmp_path / "b4", tie_word_embeddings=True), "tied"),
    )):  # fmt: skip
        with pytest.raises(InputError, match=message):
            export(source, tmp_path / f"{i}.gguf", loader="gguf", base=base)
        assert not (tmp_path / f"{i}.gguf").exists()
