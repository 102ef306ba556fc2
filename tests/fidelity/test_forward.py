"""The methods that run the base, from folders to a folder and from the command line."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from plait.adapters.peft_format import read_adapter
from plait.cli import app
from plait.disk.store import read_manifest
from plait.errors import InputError, UsageError
from plait.fidelity.forward import merge_by_forward
from plait.merging.words import words_of
from tests.panels import random_adapter, texts_of


@pytest.fixture
def pair(tiny_base, tmp_path):
    """A tiny BERT, two classifiers' folders, and texts of both."""
    from plait.adapters.peft_format import write_adapter

    base = tiny_base("bert")
    for name, seed in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        write_adapter(tmp_path / name, random_adapter(base, "bert", name, "classification", seed))
    return base, [str(tmp_path / n) for n in ("one", "two")], {"one": texts_of(12, 1), "two": texts_of(12, 2)}


def test_regmean_pp_of_folders_keeps_heads_and_is_verified(pair, tmp_path):
    base, folders, texts = pair
    done = merge_by_forward(folders, tmp_path / "out", "regmean_pp", base=base, texts=texts, weights=[1.0, 2.0])
    assert done.record.method == "regmean_pp" and done.record.verification_error < 1e-6 and not done.reused
    written = read_adapter(tmp_path / "out")
    assert set(written.heads) == {"one", "two"} and written.rank == 6
    assert read_manifest(tmp_path / "out")["result"]["texts"] == {"one": 12, "two": 12}
    again = merge_by_forward(folders, tmp_path / "out", "regmean_pp", base=base, texts=texts, weights=[1.0, 2.0])
    assert again.reused
    with pytest.raises(UsageError, match="alpha"):
        merge_by_forward(
            folders, tmp_path / "out", "regmean_pp", base=base, texts=texts, weights=[1.0, 2.0], options={"alpha": 0.5}
        )


def test_featcal_of_folders_follows_the_adapters(pair, tmp_path):
    """From the command line's options to a folder; closer to the adapters than the merge it starts from."""
    from plait.fidelity.panel import Panel, parts_of
    from plait.fidelity.score import fidelities
    from plait.merging import merge

    base, folders, texts = pair
    options = {"anchor": "task_arithmetic", "rank": 5, "scale": 1.0}
    done = merge_by_forward(folders, tmp_path / "out", "featcal", base=base, texts=texts, options=options)
    assert done.record.method == "featcal" and done.record.rank == 5 and done.record.scale == 1.0
    assert done.record.options["anchor"] == "task_arithmetic" and 0 < done.record.loss.discarded_energy < 0.5
    written, adapters = read_adapter(tmp_path / "out"), [read_adapter(f) for f in folders]
    panel = Panel(base, parts_of(adapters), texts)
    start = merge(adapters, "task_arithmetic").adapter
    before, after = fidelities(panel, [(start, 1.0), (written, 1.0)])
    assert after.kept > before.kept
    for wrong, message in (({"anchor": "regmean"}, "needs"), ({"own": 1.5}, "own"), ({"pull": 0.0}, "pull")):
        with pytest.raises(UsageError, match=message):
            merge_by_forward(folders, tmp_path / "no", "featcal", base=base, texts=texts, options=wrong)
    assert not (tmp_path / "no").exists()


def test_texts_go_through_the_adapters_own_layers(pair, tmp_path):
    """The first block reads what the base makes of the texts; RegMean on those moments is the same there, and only there."""
    from plait.fidelity.moments import collect_moments
    from plait.fidelity.panel import Panel, parts_of
    from plait.merging import merge

    base, folders, texts = pair
    merge_by_forward(folders, tmp_path / "out", "regmean_pp", base=base, texts=texts)
    written = read_adapter(tmp_path / "out")
    adapters = [read_adapter(f) for f in folders]
    panel = Panel(base, parts_of(adapters), texts)
    plain = merge(adapters, "regmean", statistics=collect_moments(panel)["base"], scale=1.0).adapter
    first = [m for m in plain.modules if "layer.0." in m]
    later = [m for m in plain.modules if m not in first]
    for m in first:
        torch.testing.assert_close(written.modules[m].delta(), plain.modules[m].delta(), atol=1e-4, rtol=1e-3)
    assert later and any(
        not torch.allclose(written.modules[m].delta(), plain.modules[m].delta(), rtol=1e-2) for m in later
    )


def test_adamerging_lowers_the_entropy_of_the_heads_answers(pair, tmp_path):
    base, folders, texts = pair
    options = {"steps": 15, "learning_rate": 0.05}
    done = merge_by_forward(folders, tmp_path / "out", "adamerging", base=base, texts=texts, options=options)
    assert done.record.last_loss < done.record.first_loss and done.record.verification_error < 1e-6
    learnt = done.record.options["weights"]
    written, adapters = read_adapter(tmp_path / "out"), [read_adapter(f) for f in folders]
    for m, f in written.modules.items():
        wanted = sum(learnt[a.name][m] * a.modules[m].delta() for a in adapters)
        torch.testing.assert_close(f.delta(), wanted, atol=1e-5, rtol=1e-4)


def test_what_does_not_fit_is_named(pair, tiny_base, tmp_path):
    base, folders, texts = pair
    for given, message in (
        ({"base": base, "texts": {}}, "reads texts"),
        ({"base": base, "texts": {"one": texts["one"]}}, "no texts for two"),
        ({"base": base, "texts": texts, "options": {"steps": -1}}, "steps"),
        ({"base": base, "texts": texts, "weights": [1.0, 1.0]}, "learns the weights"),
    ):
        with pytest.raises(UsageError, match=message):
            merge_by_forward(folders, tmp_path / "out", "adamerging", **given)
    from plait.adapters.peft_format import write_adapter

    llama = tiny_base("llama")
    (tmp_path / "text").mkdir()
    write_adapter(tmp_path / "text", random_adapter(llama, "llama", "text", "causal", 3))
    with pytest.raises(InputError, match="entropy"):
        merge_by_forward(
            [str(tmp_path / "text")], tmp_path / "o", "adamerging", base=llama, texts={"text": texts["one"]}
        )
    done = merge_by_forward(
        [str(tmp_path / "text")], tmp_path / "o", "regmean_pp", base=llama, texts={"text": texts["one"]}
    )
    one, back = read_adapter(tmp_path / "text"), read_adapter(tmp_path / "o")
    assert done.record.verification_error < 1e-6
    for m, f in one.modules.items():  # one adapter comes back
        torch.testing.assert_close(back.modules[m].delta(), f.delta(), atol=1e-3, rtol=1e-2)


def test_from_the_command_line(pair, tmp_path):
    base, folders, texts = pair
    for task, rows in texts.items():
        (tmp_path / f"{task}.txt").write_text("\n".join(r[0] for r in rows))
    told = [f"--text={t}={tmp_path / t}.txt" for t in texts]
    arguments = [
        "merge",
        base.name,
        *folders,
        "--method",
        "regmean_pp",
        *told,
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["method"] == "regmean_pp"
    refused = CliRunner().invoke(app, [*arguments, "--rank", "4", "--device", "cuda"])
    assert isinstance(refused.exception, UsageError) and "--rank and no --device" in str(refused.exception)


def test_texts_that_are_read_in_part_are_told_before_and_kept(pair, tmp_path):
    """By every method, with the number that the tokenizer alone counts; nothing where all are read whole."""
    base, folders, texts = pair
    long = tuple((f"{text} {text} {text}",) for (text,) in texts["one"][:3])
    texts = {"one": (*long, *texts["one"][3:]), "two": texts["two"]}
    tokenizer = AutoTokenizer.from_pretrained(base.name)
    lengths = {name: [len(tokenizer(t)["input_ids"]) for (t,) in rows] for name, rows in texts.items()}
    limit, longest = max(lengths["two"]), max(lengths["one"])
    cut = sum(n > limit for n in lengths["one"])
    held = -(-longest // 8) * 8
    told = f"texts longer than {limit} tokens are read up to there: {cut} of 12 of one (--max-length {held} would hold all)"
    assert cut
    quick = {"adamerging": {"steps": 1}, "featcal": {"anchor": "task_arithmetic"}, "regmean_pp": {}}
    for method, options in quick.items():
        said: list[str] = []
        done = merge_by_forward(
            folders, tmp_path / method, method, base=base, texts=texts, options=options, max_length=limit, on_progress=said.append
        )  # fmt: skip
        assert said == [told] and done.record.notes == (told,)
        assert read_manifest(tmp_path / method)["result"]["notes"] == [told]
        assert told in words_of(done).splitlines()
    whole = merge_by_forward(folders, tmp_path / "whole", "regmean_pp", base=base, texts=texts, max_length=longest)
    assert whole.record.notes == () and "notes" not in read_manifest(tmp_path / "whole")["result"]
