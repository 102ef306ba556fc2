"""Other trainers: TRL run as the documentation shows it, the others' configurations against their own option names."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import yaml

from plait.adapters.peft_format import read_adapter, write_adapter
from plait.errors import UsageError
from plait.model.base import load_task_model, load_tokenizer
from plait.statistics import collect_statistics, write_statistics
from plait.tasks import batches, encode
from plait.training.peft_model import for_task
from plait.training.snippets import TRAINERS, snippet
from tests.tiny import TARGETS, make_adapter, make_examples, make_task

PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")
# Names defined in axolotl/utils/schemas (peft, model, training, datasets, config) and in llamafactory/hparams.
AXOLOTL = {
    "base_model", "adapter", "lora_model_dir", "lora_r", "lora_alpha", "lora_target_modules", "lora_dropout", "datasets",
    "learning_rate", "num_epochs", "micro_batch_size", "output_dir",
}  # fmt: skip
LLAMA_FACTORY = {
    "model_name_or_path", "adapter_name_or_path", "create_new_adapter", "stage", "do_train", "finetuning_type", "lora_rank",
    "lora_alpha", "lora_target", "dataset", "template", "learning_rate", "num_train_epochs", "per_device_train_batch_size",
    "output_dir",
}  # fmt: skip


@pytest.fixture
def causal_folder(tiny_base, tmp_path):
    base, task = tiny_base("llama"), make_task(kind="causal")
    adapter = for_task(make_adapter(base, task, "llama"), task, load_task_model(base, task, seed=0))
    (tmp_path / "start").mkdir()
    write_adapter(tmp_path / "start", adapter)
    return base, task, tmp_path / "start"


@pytest.fixture
def statistics_files(causal_folder, tmp_path):
    """Paths of the statistics of "topic", the adapter's own task, and of "other"."""
    base, task, _ = causal_folder
    tokenizer, paths = load_tokenizer(base), []
    for i, name in enumerate(("topic", "other")):
        rows = encode(tokenizer, task, make_examples(task, 40, seed=i), 24)
        model = load_task_model(base, task, seed=0)
        paths.append(tmp_path / f"{name}.stats.safetensors")
        write_statistics(paths[-1], collect_statistics(model, batches(tokenizer, rows, 8), TARGETS["llama"]))
    return paths


def block(language: str, holding: str) -> str:
    return next(b for b in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if holding in b)


def penalty_of(adapter, rules):
    return sum(
        rule.weight * float(torch.trace(f.delta() @ rule.matrix @ f.delta().T))
        for f, rule in ((adapter.modules[m], r) for m, r in rules.items())
    )


@pytest.mark.filterwarnings("ignore")  # TRL's and its imports' own
def test_the_trl_example_of_the_documentation_runs(causal_folder, statistics_files, tmp_path):
    pytest.importorskip("trl", reason="the extra `test` brings trl")
    base, task, folder = causal_folder
    examples, text = make_examples(task), block("python", "SFTTrainer(")
    rows = [{"prompt": t[0], "completion": " " + y} for t, y in zip(examples.texts, examples.labels, strict=True)]
    other = text.replace('constraint="penalised"', 'constraint="projected", constraint_options={"m": 6}')
    free = text.replace("callbacks=[ConstraintCallback(constraint, model)]", "callbacks=[]")
    assert len({text, other, free}) == 3
    start, trained, rules = read_adapter(folder), {}, {}
    for kind, source in (("penalised", text), ("projected", other), ("free", free)):
        own, *others = map(str, statistics_files)
        names = {"BASE": base.name, "FOLDER": str(folder), "OUT": str(tmp_path / kind), "rows": rows}
        names |= {"OWN": own, "OTHERS": others}
        exec(compile(source, "trainers.md", "exec"), names)
        trained[kind], rules[kind] = read_adapter(tmp_path / kind), names["constraint"].rules
        assert list(start.modules) == list(trained[kind].modules) == list(rules[kind])
        for module, f in trained[kind].modules.items():
            assert f.B.norm() > 0 and not torch.equal(f.A, start.modules[module].A)
    for module, rule in rules["projected"].items():
        A, Q = trained["projected"].modules[module].A, rule.matrix
        assert (A - A @ Q.T @ Q).norm() < 1e-5 * A.norm()
    kept, lost = (penalty_of(trained[kind], rules["penalised"]) for kind in ("penalised", "free"))
    assert kept < 0.8 * lost


@pytest.mark.parametrize("trainer", TRAINERS)
def test_snippets_name_the_folder_and_what_is_in_it(causal_folder, statistics_files, trainer):
    base, _, folder = causal_folder
    own, other = statistics_files
    text = snippet(trainer, folder, own=own, others=[own, other])  # as a glob over the pool has it
    assert str(folder) in text
    if trainer in ("trl", "unsloth"):
        tree = ast.parse(text)
        call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "SFTTrainer")
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}[
            "callbacks"
        ] == "[ConstraintCallback(constraint, model)]"
        # From after the model, which is TRL's or Unsloth's, to before the trainer: what plait does.
        place = next(i for i, n in enumerate(tree.body) if "plait" in ast.unparse(n))
        end = next(i for i, n in enumerate(tree.body) if ast.unparse(n).startswith("trainer ="))
        names: dict = {}
        exec(compile(ast.Module(tree.body[place:end], []), "snippet", "exec"), names)
        assert names["constraint"].kind == "penalised" and set(names["statistics"]) == {"topic", "other"}
        assert set(names["constraint"].rules) == set(read_adapter(folder).modules)
        return
    assert text.startswith("# Training is free here")
    config = yaml.safe_load(text)
    assert set(config) <= (AXOLOTL if trainer == "axolotl" else LLAMA_FACTORY)
    assert base.name in config.values() and 4 in config.values() and 8 in config.values()
    targets = config.get("lora_target_modules") or config["lora_target"].split(",")
    assert sorted(targets) == ["q_proj", "v_proj"]


@pytest.mark.parametrize("trainer", ["trl", "unsloth"])
def test_a_snippet_without_statistics_says_that_nothing_is_kept(causal_folder, statistics_files, trainer):
    own = statistics_files[0]
    for given in ({}, {"own": own}, {"own": own, "others": [own]}):
        text = snippet(trainer, causal_folder[2], **given)
        assert "Callback" not in text and "were not given" in text
        ast.parse(text)


@pytest.mark.parametrize(("holding", "names"), [("base_model:", AXOLOTL), ("finetuning_type:", LLAMA_FACTORY)])
def test_the_documented_configurations_use_known_names(holding, names):
    assert set(yaml.safe_load(block("yaml", holding))) == names


def test_what_other_trainers_cannot_continue_is_refused(tiny_base, tmp_path, causal_folder):
    with pytest.raises(UsageError, match="unknown trainer"):
        snippet("nemo", causal_folder[2])
    base, task = tiny_base("bert"), make_task()
    (tmp_path / "head").mkdir()
    write_adapter(
        tmp_path / "head", for_task(make_adapter(base, task, "bert"), task, load_task_model(base, task, seed=0))
    )
    with pytest.raises(UsageError, match="classification head"):
        snippet("trl", tmp_path / "head")
