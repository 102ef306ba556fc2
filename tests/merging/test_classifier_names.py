"""A merge of classifiers as PEFT's users load one: it works or raises, and never passes over the update."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.classifiers import classifier, expected_logits, quiet, saved_base, saved_classifier
from tests.loading.planted import change, configure, save_adapter
from tests.loading.planted import classifier as planted_classifier

import plait
from plait.adapters.peft_format import CONFIG, HEADS, read_adapter, write_adapter
from plait.adapters.weights import WEIGHTS
from plait.disk.store import identity, read_manifest, staged_folder
from plait.errors import InputError, UsageError
from plait.merging import merge_folders

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
PREFIXES = {"bert": "bert", "roberta": "roberta", "mpnet": "mpnet", "distilbert": "distilbert"}
OUTPUTS = {"two": 2, "four": 4, "grade": 1}
INPUTS = {"input_ids": torch.tensor([[0, 7, 9, 11, 2], [0, 20, 30, 40, 2]]), "attention_mask": torch.ones(2, 5).long()}


@pytest.fixture(scope="module", params=list(PREFIXES))
def merged(request, tmp_path_factory) -> tuple[str, Path, list[Path], Path]:
    """(architecture, base, three classifiers' folders, their merge)."""
    root = tmp_path_factory.mktemp(request.param)
    base = saved_base(root / "base", request.param)
    folders = [
        saved_classifier(root / name, base, request.param, outputs, seed=i)
        for i, (name, outputs) in enumerate(OUTPUTS.items())
    ]
    merge_folders(folders, root / "merged", method="task_arithmetic", scale=1.0)
    return request.param, base, folders, root / "merged"


def over(cls: str, base: Path, folder: Path, **options):
    import peft
    import transformers as hf

    with quiet():
        model = getattr(hf, cls).from_pretrained(base, **options).eval()
        return model, lambda: peft.PeftModel.from_pretrained(model, folder).eval()


def test_over_its_own_class_it_is_the_merge(merged):
    architecture, base, folders, folder = merged
    for task, outputs in OUTPUTS.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            model, load = over("AutoModelForSequenceClassification", base, folder, num_labels=outputs)
            model.config.pad_token_id = 1
            wrapped = load()
        facts = plait.load_head(wrapped, folder, task)
        task_folder = next(f for f in folders if f.name == task)
        with torch.no_grad():
            found = wrapped(**INPUTS).logits
        wanted = expected_logits(base, folders, task_folder, outputs, INPUTS)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert facts.prefix == PREFIXES[architecture] and facts.task_type == "SEQ_CLS"


def test_over_another_class_it_raises(merged):
    _, base, _, folder = merged
    with pytest.raises(ValueError, match=r"not found in the base model|No modules"):
        over("AutoModel", base, folder)[1]()


def test_the_automatic_class_raises(merged):
    import peft

    with quiet(), pytest.raises(ValueError, match="Cannot infer the auto class"):
        peft.AutoPeftModelForSequenceClassification.from_pretrained(merged[3])


def test_what_the_folder_says(merged):
    architecture, _, folders, folder = merged
    config = json.loads((folder / CONFIG).read_text())
    root = f"{PREFIXES[architecture]}."
    assert config["task_type"] is None and config["inference_mode"] is True and config["modules_to_save"] is None
    assert all(name.startswith(root) for name in config["target_modules"])
    with safe_open(folder / WEIGHTS, "pt") as file:
        assert all(key.startswith(f"base_model.model.{root}") for key in file.keys())  # noqa: SIM118
    read = read_adapter(folder)
    assert read.prefix == root[:-1] and read.modules.keys() == read_adapter(folders[0]).modules.keys()
    assert read.task_type == "FEATURE_EXTRACTION" and set(read.heads) == set(OUTPUTS)


def test_read_back_it_merges_as_before(merged, tmp_path):
    """A merge is an input like another, beside a classifier and alone, also one without names of the whole model."""
    architecture, _, folders, folder = merged
    old = tmp_path / "old"
    record = (read_manifest(folder) or {})["result"]
    with staged_folder(old, identity("merge", {}), result=record) as stage:
        write_adapter(stage, replace(read_adapter(folder), prefix=""))
    root = f"base_model.model.{PREFIXES[architecture]}."
    assert not any(k.startswith(root) for k in load_file(old / WEIGHTS))
    assert json.loads((old / CONFIG).read_text())["task_type"] == "FEATURE_EXTRACTION"
    for name, source in (("new", folder), ("renewed", old)):
        merge_folders([f"m={source}", folders[0]], tmp_path / f"{name}-again", method="task_arithmetic", scale=1.0)
        merge_folders([f"m={source}"], tmp_path / f"{name}-alone", method="task_arithmetic", scale=1.0)
    for kind in ("again", "alone"):
        a, b = (load_file(tmp_path / f"{name}-{kind}" / WEIGHTS) for name in ("new", "renewed"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert all(k.startswith(root) for k in a)
    assert read_adapter(old).prefix == PREFIXES[architecture]
    assert read_adapter(old).facts_of("grade").prefix == PREFIXES[architecture]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_adapters_of_a_bare_backbone_keep_its_names(tmp_path):
    """Nobody knows what a classifier calls it: as PEFT saved them, for AutoModel."""
    base = saved_base(tmp_path / "base", "bert")
    seq = read_adapter(saved_classifier(tmp_path / "seq", base, "bert", 2))
    for name in ("a", "b"):
        write_adapter(
            _made(tmp_path / name), replace(seq, name=name, heads={}, prefix="", task_type="FEATURE_EXTRACTION")
        )
    merge_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "bare", method="task_arithmetic", scale=1.0)
    assert json.loads((tmp_path / "bare" / CONFIG).read_text())["task_type"] == "FEATURE_EXTRACTION"
    assert over("AutoModel", base, tmp_path / "bare")[1]() is not None
    merge_folders(
        [tmp_path / "a", tmp_path / "seq"], tmp_path / "with", method="task_arithmetic", scale=1.0
    )  # the classifier tells
    assert read_adapter(tmp_path / "with").prefix == "bert"


def test_two_names_of_one_backbone(tmp_path):
    """Each head remembers what its own class calls the backbone; the folder has the first one's names."""
    base = saved_base(tmp_path / "base", "bert")
    one = saved_classifier(tmp_path / "one", base, "bert", 2)
    other = replace(read_adapter(one), name="other", prefix="encoder_model", source={})
    write_adapter(_made(tmp_path / "other"), replace(other, heads={"other": one_head(one)}))
    merge_folders([one, tmp_path / "other"], tmp_path / "merged", method="task_arithmetic", scale=1.0)
    read = read_adapter(tmp_path / "merged")
    assert read.prefix == "bert"
    assert (read.facts_of("one").prefix, read.facts_of("other").prefix) == ("bert", "encoder_model")


def one_head(folder: Path) -> dict[str, torch.Tensor]:
    return dict(next(iter(read_adapter(folder).heads.values())))


def test_tokens_and_sentences_together(tmp_path):
    base = saved_base(tmp_path / "base", "bert")
    tags = saved_classifier(tmp_path / "tags", base, "bert", 5, task_type="TOKEN_CLS")
    merge_folders(
        [tags, saved_classifier(tmp_path / "two", base, "bert", 2, seed=1)],
        tmp_path / "merged",
        method="task_arithmetic",
        scale=1.0,
    )
    assert read_adapter(tmp_path / "merged").facts_of("tags").task_type == "TOKEN_CLS"
    wrapped = over("AutoModelForTokenClassification", base, tmp_path / "merged", num_labels=5)[1]()
    plait.load_head(wrapped, tmp_path / "merged", "tags")
    with torch.no_grad():
        assert wrapped(**INPUTS).logits.shape == (2, 5, 5)


# --- the head's own facts ---------------------------------------------------------------------------------------------


def named(folder: Path, labels: list[str]) -> Path:
    """A folder whose record tells the classes, as a trained one's does."""
    adapter = read_adapter(folder)
    adapter = replace(adapter, source={**adapter.source, "labels": labels})
    out = folder.with_name(f"named-{folder.name}")
    write_adapter(_made(out), replace(adapter, name=adapter.name))
    return out


def test_names_of_classes_stay_with_the_head(tmp_path):
    base = saved_base(tmp_path / "base", "bert")
    two = named(saved_classifier(tmp_path / "two", base, "bert", 2), ["negative", "positive"])
    grade = saved_classifier(tmp_path / "grade", base, "bert", 1, seed=1)
    merge_folders([f"two={two}", grade], tmp_path / "merged", method="task_arithmetic", scale=1.0)
    (tmp_path / "merged/plait.json").unlink()  # the files alone tell
    model = classifier(base, 2)
    plait.load_head(model, tmp_path / "merged", "two")
    assert model.config.id2label == {0: "negative", 1: "positive"} and model.config.label2id["positive"] == 1
    assert torch.equal(model.classifier.weight, one_head(two)["classifier.weight"])
    single = classifier(base, 1)
    plait.load_head(single, tmp_path / "merged", "grade")
    assert (single.config.num_labels, single.config.problem_type) == (1, "regression")


def test_a_head_goes_into_what_peft_runs_where_the_adapter_brought_its_own(tmp_path):
    base = saved_base(tmp_path / "base", "bert")
    folders = [saved_classifier(tmp_path / name, base, "bert", 2, seed=i) for i, name in enumerate(("first", "second"))]
    wrapped = over("AutoModelForSequenceClassification", base, folders[0], num_labels=2)[1]()
    with torch.no_grad():
        own = wrapped(**INPUTS).logits
        plait.load_head(wrapped, folders[0])
        torch.testing.assert_close(wrapped(**INPUTS).logits, own)  # PEFT had put it in
        plait.load_head(wrapped, folders[1])
        swapped = wrapped(**INPUTS).logits
        hidden = wrapped.base_model.model.bert(**INPUTS).pooler_output
    head = one_head(folders[1])
    torch.testing.assert_close(
        swapped, hidden @ head["classifier.weight"].T + head["classifier.bias"], atol=1e-5, rtol=1e-5
    )
    assert not torch.allclose(swapped, own)


def test_heads_that_do_not_fit(tmp_path):
    base = saved_base(tmp_path / "base", "bert")
    folder = saved_classifier(tmp_path / "four", base, "bert", 4)
    with pytest.raises(InputError, match="4 outputs, the model 2") as raised:
        plait.load_head(classifier(base, 2), folder)
    assert "num_labels=4" in str(raised.value.hint)
    with pytest.raises(UsageError, match="no head 'fuor'"):
        plait.load_head(classifier(base, 4), folder, "fuor")


BAD = {
    "no JSON object": "[1]",
    "no JSON object ": "{",
    "expected a list of names": '{"labels": "ab"}',
    "expected a list of names ": '{"labels": [1, 2]}',
    "2 outputs and 3 names": '{"labels": ["a", "b", "c"]}',
    "problem_type of its head": '{"problem_type": "rank"}',
    "expected a string": '{"prefix": 3}',
}


@pytest.mark.parametrize("message", BAD)
def test_bad_facts_are_refused(tmp_path, message):
    head = {"classifier.weight": torch.zeros(2, 4)}
    from plait.adapters.lora import Adapter, LoraFactors

    modules = {"layer.query": LoraFactors(torch.zeros(1, 4), torch.zeros(4, 1))}
    merge = Adapter("m", "base", modules, "FEATURE_EXTRACTION", "bert", {"two": head})
    write_adapter(_made(tmp_path / "m"), merge)
    save_file(head, tmp_path / "m" / HEADS / "two.safetensors", {"head": BAD[message]})
    with pytest.raises(InputError, match=message.strip()) as raised:
        read_adapter(tmp_path / "m")
    assert "two.safetensors" in str(raised.value.where)


def test_a_prefix_that_is_not_there(tmp_path):
    base = saved_base(tmp_path / "base", "bert")
    merge_folders(
        [saved_classifier(tmp_path / "two", base, "bert", 2)], tmp_path / "merged", method="task_arithmetic", scale=1.0
    )
    tensors = load_file(tmp_path / "merged" / WEIGHTS)
    (tmp_path / "merged/plait.json").unlink()
    metadata = {"task_type": "FEATURE_EXTRACTION", "backbone_prefix": "roberta"}
    save_file(tensors, tmp_path / "merged" / WEIGHTS, metadata)
    with pytest.raises(InputError, match="not inside 'roberta'"):
        read_adapter(tmp_path / "merged")


@pytest.mark.parametrize("kind", [None, "FEATURE_EXTRACTION"])
@pytest.mark.parametrize(("method", "options"), [("task_arithmetic", {}), ("svd", {"svd_rank": 4})])
def test_an_adapter_that_names_no_task_has_the_classifiers_names(tmp_path, kind, method, options):
    """Trained on the whole classifier, its modules are called as the others'; they were told apart by the same name twice."""
    from peft import PeftModel

    save_adapter(tmp_path / "named", planted_classifier(), seed=1, task_type="SEQ_CLS", target_modules=["query"])
    folder = save_adapter(tmp_path / "bare", planted_classifier(), seed=2, target_modules=["query"])
    change(folder, configure(task_type=kind))
    both = [tmp_path / "named", tmp_path / "bare"]
    merge_folders(both, tmp_path / "merged", method=method, scale=1.0, options=options)

    def deltas(place):
        layers = PeftModel.from_pretrained(planted_classifier(), place).named_modules()
        return {name: m.get_delta_weight("default") for name, m in layers if name.endswith(".query")}

    one, other, found = (deltas(place) for place in (*both, tmp_path / "merged"))
    assert len(found) == 2
    for name, delta in found.items():
        torch.testing.assert_close(delta, one[name] + other[name], rtol=1e-4, atol=1e-5)
