"""docs/lm-eval.md, run: a merge in EleutherAI's lm-evaluation-harness, on a task whose rows lie on this machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plait.merging import merge_folders
from tests.classifiers import quiet
from tests.merging.test_bake import lora
from tests.tiny import WORDS, save_model

PAGE = Path(__file__).parents[1] / "docs" / "lm-eval.md"
ROWS = [
    (" ".join(WORDS[i : i + 4]), [f" {WORDS[i % 3]} {WORDS[7]}", f" {WORDS[(i + 5) % 20]}"], i % 2) for i in range(12)
]


def block(language: str, number: int = 0) -> str:
    """A code block of the page."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[number]


def chosen(base: Path, adapter: Path) -> list[list[float]]:
    """Log-likelihood of every answer after its question, by transformers and PEFT alone."""
    import peft
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    with quiet(), torch.no_grad():
        model = peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        found = []
        for question, answers, _ in ROWS:
            found.append([])
            for answer in answers:
                before = tokenizer(question, add_special_tokens=True)["input_ids"]
                whole = tokenizer(question + answer, add_special_tokens=True)["input_ids"]
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
                found[-1].append(sum(float(logs[i - 1, whole[i]]) for i in range(len(before), len(whole))))
    return found


@pytest.mark.slow
def test_a_merge_is_scored_by_the_real_harness(tmp_path):
    pytest.importorskip("lm_eval", reason="pip install 'plait[lm-eval]'")
    base = save_model(tmp_path / "base", "llama")
    pair = [lora(base, tmp_path / n, ["q_proj", "v_proj"], seed=i) for i, n in enumerate("ab")]
    merge_folders(pair, tmp_path / "merged", method="task_arithmetic", scale=1.0)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text(block("yaml"))
    rows = [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in ROWS]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))
    command = block("bash", 1).replace("\\\n", " ").replace("BASE", "base").split()
    assert command[0] == "lm_eval" and "peft=merged" in " ".join(command)
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", *command, "--device", "cpu"], cwd=tmp_path, env=surroundings, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = tmp_path.glob("scores/**/samples_mine_*.jsonl")
    (results,) = tmp_path.glob("scores/**/results_*.json")
    lines = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    theirs = [[float(answer[0][0]) for answer in row["resps"]] for row in lines]
    mine = chosen(base, tmp_path / "merged")
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(mine), atol=1e-3, rtol=1e-4)
    right = sum(max(range(2), key=row.__getitem__) == a for row, (_, _, a) in zip(mine, ROWS, strict=True)) / len(ROWS)
    assert json.loads(results.read_text())["results"]["mine"]["acc,none"] == pytest.approx(right)
