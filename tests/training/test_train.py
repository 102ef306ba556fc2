"""Training one adapter: it learns, what it writes is what PEFT reads, and resuming changes no bit."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from plait.adapters.peft_format import read_adapter
from plait.disk.store import MANIFEST, identity
from plait.errors import InputError, UsageError
from plait.model.base import load_task_model
from plait.training import TrainingSettings, row_order, train_adapter
from plait.training.checkpoints import checkpoint_root, latest_whole
from plait.training.peft_model import attach, detach, for_task, silence_dropout
from tests.tiny import ARCHITECTURES, make_adapter, make_examples, make_task

SETTINGS = TrainingSettings(steps=12, lr=2e-2, batch_size=8, max_length=24)


def train(base, architecture, out, settings=SETTINGS, task=None, seed=0, **options):
    task = task or make_task()
    return train_adapter(
        make_adapter(base, task, architecture), task, make_examples(task), base, settings,
        seed=seed, out=out, identity=identity("train", {"s": dataclasses.asdict(settings)}, seed=seed), **options,
    )  # fmt: skip


def same_bits(a, b):
    assert list(a.modules) == list(b.modules)
    for name in a.modules:
        assert torch.equal(a.modules[name].A, b.modules[name].A), name
        assert torch.equal(a.modules[name].B, b.modules[name].B), name
    for name, tensor in a.heads[a.name].items() if a.heads else ():
        assert torch.equal(tensor, b.heads[b.name][name]), name


def test_row_order_takes_every_row_once_before_any_twice():
    order = row_order(10, 35, seed=3)
    assert len(order) == 35
    for k in range(3):
        assert sorted(order[10 * k : 10 * (k + 1)]) == list(range(10))
    assert not (order[:10] == order[10:20]).all()
    assert (row_order(10, 12, 3) == order[:12]).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_learns_and_writes_what_peft_reads(tiny_base, tmp_path, architecture):
    base, task = tiny_base(architecture), make_task()
    steps = []
    settings = dataclasses.replace(SETTINGS, steps=40)
    adapter = train(base, architecture, tmp_path / "a", settings, progress=lambda *s: steps.append(s))
    result = json.loads((tmp_path / "a" / MANIFEST).read_text())["result"]
    assert result["losses"]["last"] < 0.8 * result["losses"]["first"]
    assert [s[0] for s in steps] == list(range(1, 41))
    assert result["backbone_prefix"] == adapter.prefix and result["labels"] == ["c0", "c1"]
    assert all(f.B.abs().max() > 0 for f in adapter.modules.values())

    from peft import PeftModel

    reloaded = PeftModel.from_pretrained(load_task_model(base, task, seed=99), tmp_path / "a")
    ours = attach(load_task_model(base, task, seed=7), adapter)
    ids = torch.arange(5, 17).view(2, 6)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if architecture == "t5":
        inputs["input_ids"] = torch.cat([ids, torch.full((2, 1), 2)], 1)
        inputs["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(reloaded.eval()(**inputs).logits, ours.eval()(**inputs).logits)


@pytest.mark.parametrize(("kind", "architecture"), [("regression", "mpnet"), ("causal", "llama"), ("seq2seq", "t5")])
def test_other_kinds_of_tasks_learn(tiny_base, tmp_path, kind, architecture):
    adapter = train(
        tiny_base(architecture),
        architecture,
        tmp_path / "a",
        dataclasses.replace(SETTINGS, steps=40),
        make_task(kind=kind),
    )
    losses = json.loads((tmp_path / "a" / MANIFEST).read_text())["result"]["losses"]
    assert losses["last"] < 0.8 * losses["first"]
    assert bool(adapter.heads) == (kind == "regression")


def test_attach_and_detach_are_exact(tiny_base):
    base, task = tiny_base("roberta"), make_task()
    model = load_task_model(base, task, seed=0)
    adapter = for_task(make_adapter(base, task, "roberta"), task, model)
    same_bits(adapter, detach(attach(model, adapter), adapter, {}))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_dropout_training_mode_is_evaluation_mode(tiny_base, architecture):
    kind = "seq2seq" if architecture == "t5" else "classification"
    model = load_task_model(tiny_base(architecture), make_task(kind=kind), seed=0)
    ids = torch.arange(5, 17).view(2, 6)
    extra = {"decoder_input_ids": ids} if architecture == "t5" else {}
    with torch.no_grad():
        expected = model.eval()(input_ids=ids, **extra).logits
        silence_dropout(model)
        assert torch.equal(model.train()(input_ids=ids, **extra).logits, expected)


class Stop(Exception):
    pass


def test_an_interrupted_run_ends_in_the_same_bits(tiny_base, tmp_path):
    base = tiny_base("bert")
    settings = dataclasses.replace(SETTINGS, checkpoint_every=3, dropout=0.1, base_dropout=True)
    straight = train(base, "bert", tmp_path / "straight", settings)

    def stop_at_eight(step, total, loss):
        if step == 8:
            raise Stop

    with pytest.raises(Stop):
        train(base, "bert", tmp_path / "broken", settings, progress=stop_at_eight)
    assert latest_whole(checkpoint_root(tmp_path / "broken")).name == "checkpoint-6"
    steps = []
    resumed = train(base, "bert", tmp_path / "broken", settings, progress=lambda *s: steps.append(s[0]))
    assert steps == list(range(7, 13))
    same_bits(straight, resumed)
    assert not checkpoint_root(tmp_path / "broken").exists()


def test_a_damaged_checkpoint_is_passed_over(tiny_base, tmp_path):
    base, settings = tiny_base("bert"), dataclasses.replace(SETTINGS, checkpoint_every=3)
    straight = train(base, "bert", tmp_path / "straight", settings)

    def stop(step, total, loss):
        if step == 8:
            raise Stop

    with pytest.raises(Stop):
        train(base, "bert", tmp_path / "b", settings, progress=stop)
    root = checkpoint_root(tmp_path / "b")
    victim = root / "checkpoint-6" / "optimizer.pt"
    victim.write_bytes(victim.read_bytes()[:-100])
    (root / "checkpoint-9").mkdir()
    assert latest_whole(root).name == "checkpoint-3"
    same_bits(straight, train(base, "bert", tmp_path / "b", settings))


def test_checkpoints_of_other_settings_are_not_continued_and_lost_only_where_that_is_asked_for(tiny_base, tmp_path):
    base, settings = tiny_base("bert"), dataclasses.replace(SETTINGS, checkpoint_every=3)

    def stop(step, total, loss):
        if step == 8:
            raise Stop

    with pytest.raises(Stop) as stopped:
        train(base, "bert", tmp_path / "b", settings, progress=stop)
    root, steps = checkpoint_root(tmp_path / "b"), []
    assert stopped.value.__notes__[0].startswith(f"what is done so far is kept in {root} (")
    other, seen = dataclasses.replace(settings, lr=1e-3), lambda *s: steps.append(s[0])
    with pytest.raises(
        UsageError, match=r"begun there with other settings and kept at step 6: options.*lr: 0.*-> 0.001"
    ):
        train(base, "bert", tmp_path / "b", other, progress=seen)
    assert latest_whole(root).name == "checkpoint-6" and not steps
    train(base, "bert", tmp_path / "b", other, progress=seen, overwrite=True)
    assert steps[0] == 1


def test_a_finished_run_is_read_not_redone(tiny_base, tmp_path):
    base = tiny_base("bert")
    first = train(base, "bert", tmp_path / "a")
    steps = []
    same_bits(first, train(base, "bert", tmp_path / "a", progress=lambda *s: steps.append(s)))
    assert not steps
    with pytest.raises(UsageError, match="other settings"):
        train(base, "bert", tmp_path / "a", dataclasses.replace(SETTINGS, lr=1.0))


def test_accumulation_and_a_head_rate(tiny_base, tmp_path):
    base = tiny_base("bert")
    whole = train(base, "bert", tmp_path / "w", dataclasses.replace(SETTINGS, head_lr=0.0))
    parts = train(base, "bert", tmp_path / "p", dataclasses.replace(SETTINGS, head_lr=0.0, accumulation=4))
    for name, f in whole.modules.items():
        assert torch.allclose(f.B, parts.modules[name].B, atol=2e-5)
    drawn = for_task(make_adapter(base, make_task(), "bert"), make_task(), load_task_model(base, make_task(), seed=0))
    assert all(torch.equal(whole.heads["topic"][k], v) for k, v in drawn.heads["topic"].items())


def test_seeds_differ_and_repeat(tiny_base, tmp_path):
    base = tiny_base("bert")
    a, b, c = (train(base, "bert", tmp_path / n, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    same_bits(a, b)
    assert any(not torch.equal(a.modules[m].B, c.modules[m].B) for m in a.modules)
    assert read_adapter(tmp_path / "a").heads.keys() == {"topic"}


def test_bad_settings_and_bad_adapters_are_named(tiny_base, tmp_path):
    for bad in ({"steps": 0}, {"lr": -1.0}, {"lr": float("nan")}, {"dropout": 1.0}, {"epochs": 1.0}, {"schedule": "x"}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            dataclasses.replace(SETTINGS, **bad)
    task = make_task()
    wrong = make_adapter(tiny_base("bert"), task, "bert")
    with pytest.raises(InputError, match="no such module"):
        train_adapter(
            wrong, task, make_examples(task), tiny_base("llama"), SETTINGS, seed=0, out=tmp_path / "x", identity={}
        )
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no training rows"):
        train_adapter(
            wrong, task, make_examples(task, 0), tiny_base("bert"), SETTINGS, seed=0, out=tmp_path / "x", identity={}
        )


def test_the_best_moment_is_kept_and_a_stalled_run_stops(tiny_base, tmp_path):
    base, task = tiny_base("bert"), make_task()
    settings = dataclasses.replace(SETTINGS, steps=60, evaluate_every=4, patience=3, checkpoint_every=8)
    options = {"selection": make_examples(task, 40, seed=9)}
    adapter = train(base, "bert", tmp_path / "a", settings, **options)
    result = json.loads((tmp_path / "a" / MANIFEST).read_text())["result"]
    chosen, scored = result["selected"], dict(result["selected"]["scores"])
    assert chosen["score"] == max(scored.values()) == scored[chosen["step"]]
    assert result["steps"] < 60 and sum(step > chosen["step"] for step in scored) == 3
    # The kept adapter is that of the chosen step, and a run of that many steps of the same schedule shows it.
    kept = train(
        base,
        "bert",
        tmp_path / "b",
        dataclasses.replace(settings, patience=None, evaluate_every=None, snapshots=(chosen["step"],)),
    )
    assert kept is not None
    same_bits(adapter, read_adapter(tmp_path / "b" / "steps" / f"{chosen['step']:06d}", name="topic"))

    def stop(step, total, loss):
        if step == min(chosen["step"] + 2, result["steps"] - 1):
            raise Stop

    with pytest.raises(Stop):
        train(base, "bert", tmp_path / "c", settings, progress=stop, **options)
    same_bits(adapter, train(base, "bert", tmp_path / "c", settings, **options))
    assert json.loads((tmp_path / "c" / MANIFEST).read_text())["result"]["selected"] == chosen


def test_a_stalled_run_goes_on_to_its_last_snapshot(tiny_base, tmp_path):
    base, options = tiny_base("bert"), {"selection": make_examples(make_task(), 40, seed=9)}
    settings = dataclasses.replace(SETTINGS, steps=60, evaluate_every=4, patience=1)
    plain = train(base, "bert", tmp_path / "a", settings, **options)
    before = json.loads((tmp_path / "a" / MANIFEST).read_text())["result"]
    late = before["steps"] + 6  # between two evaluations
    adapter = train(base, "bert", tmp_path / "b", dataclasses.replace(settings, snapshots=(late,)), **options)
    result = json.loads((tmp_path / "b" / MANIFEST).read_text())["result"]
    assert (result["steps"], result["selected"]) == (late, before["selected"])
    same_bits(plain, adapter)
    whole = dataclasses.replace(settings, snapshots=(late,), evaluate_every=None, patience=None)
    train(base, "bert", tmp_path / "c", whole)
    same_bits(*(read_adapter(tmp_path / w / "steps" / f"{late:06d}", name="topic") for w in "bc"))


def test_text_tasks_are_chosen_by_perplexity(tiny_base, tmp_path):
    task = make_task(kind="causal")
    settings = dataclasses.replace(SETTINGS, steps=12, evaluate_every=6)
    train(tiny_base("llama"), "llama", tmp_path / "a", settings, task, selection=make_examples(task, 10, seed=9))
    chosen = json.loads((tmp_path / "a" / MANIFEST).read_text())["result"]["selected"]
    assert [step for step, _ in chosen["scores"]] == [6, 12] and chosen["score"] < -1.0
