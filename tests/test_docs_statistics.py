"""The commands of docs/statistics.md, run in order, on tiny files under the names the page uses."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from plait.adapters.peft_format import read_adapter
from plait.cli import main
from plait.statistics import open_statistics
from tests.conftest import tiny_rows, write_rows

PAGE = Path(__file__).parents[1] / "docs" / "statistics.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language):
    return [text for kind, text in BLOCK.findall(PAGE.read_text("utf-8")) if kind == language]


def test_every_command_of_the_page_runs(tiny_base, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base("bert").name, "base")
    for i, task in enumerate(("support", "billing", "refunds", "public")):
        write_rows(Path("rows") / f"{task}.csv", tiny_rows(2, 40, seed=i))
    commands = [line for text in blocks("bash") for line in text.splitlines() if line]
    assert len(commands) >= 12 and all(c.startswith("plait ") for c in commands)
    said = ""
    for command in commands:
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(command)[1:])
        assert ended.value.code == 0, command
        said += "".join(capsys.readouterr())
    assert "memory: exact" in said
    facts = [line for line in said.splitlines() if line.startswith(("base  ", "base_weights_sha256 ", "task_type "))]
    assert (
        len({len(line) - len(line.split(None, 1)[1]) for line in facts}) == 1
    )  # `show` writes values below each other
    assert "refunds: trained (penalised)" in said
    starts = {p.name: read_adapter(p) for p in sorted(Path("start").iterdir())}
    assert set(starts) == {"support", "refunds", "refunds-merged", "refunds-mixed", "refunds-alone"}
    first = next(iter(starts["refunds"].modules))
    assert not torch.allclose(starts["refunds-mixed"].modules[first].A, starts["refunds-alone"].modules[first].A)
    small, whole = (open_statistics(f"{d}/support.stats.safetensors") for d in ("small", "pool"))
    site = next(iter(whole.sites))
    assert small.sites[site].sketched and not whole.sites[site].sketched


def test_the_python_of_the_page_runs(tiny_base, tmp_path, monkeypatch):
    import transformers as hf
    from peft import LoraConfig, get_peft_model

    from plait.statistics import collect_statistics, write_statistics

    torch.manual_seed(0)
    model = hf.AutoModelForSequenceClassification.from_pretrained(tiny_base("bert").name).eval()
    batches = [{"input_ids": torch.randint(5, 60, (8, 12)), "attention_mask": torch.ones(8, 12, dtype=torch.long)}]
    pool = [tmp_path / "one", tmp_path / "two"]
    for path in pool:
        others = [{**batches[0], "input_ids": torch.randint(5, 60, (8, 12))}]
        write_statistics(path, collect_statistics(model, others, ["query", "value"]))
    peft_model = get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"], task_type="SEQ_CLS"))
    before = peft_model(**batches[0]).logits
    names = {"model": model, "batches": batches, "pool": pool, "peft_model": peft_model}
    for text in blocks("python"):
        exec(compile(text, str(PAGE), "exec"), names)
    A = peft_model.base_model.model.bert.encoder.layer[0].attention.self.query.lora_A["default"].weight
    norms = A.norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(8))
    torch.testing.assert_close(peft_model(**batches[0]).logits, before)
