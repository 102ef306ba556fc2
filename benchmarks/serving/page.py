"""The page of the servers: its tables, made of the rows and of nothing else.

python benchmarks/serving/page.py docs/results                                # serving.md anew, from serving.json
python benchmarks/serving/page.py docs/results vllm.json llama.cpp.json       # both anew, from runs of one server each
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]
VLLM, LLAMA = "vllm", "llama.cpp"
# Log-probabilities of float32 against float32; probabilities of float32 weights with a cache in half precision.
LIMITS = {VLLM: 1e-4, LLAMA: 1e-2}
MEASURES = {VLLM: "max_logprob_diff", LLAMA: "max_prob_diff"}


def right(row: Row) -> bool:
    """Whether a server gave what PEFT gives: every probability within the limit, every first token the same."""
    found = row[MEASURES[row["server"]]]
    return found is not None and found <= LIMITS[row["server"]] and row["first_token_equal"] == row["prompts"]


def clear(row: Row) -> bool:
    """Whether the adapter moves more than ten times what a server may differ by: without it the row would not pass."""
    return row["moved"] is None or row["moved"] > 10 * LIMITS[row["server"]]


def agrees(row: Row) -> bool:
    """Whether `plait check --for` said what the server then did: taken rightly, loaded as something else, or refused."""
    done = "refuses it" if row["refused"] else "ok" if right(row) else "loads something else"
    return row["check"] is None or row["check"]["verdict"] == done


def table(rows: list[Row], server: str) -> str:
    """What one server did with each folder."""
    what = "log-probabilities" if server == VLLM else "probabilities"
    if not any(r["server"] == server for r in rows):
        return "Not run yet."
    lines = [
        f"| folder | largest difference of {what} | first tokens equal | what the adapter moves | `plait check --for {server}` |",
        "|---|---|---|---|---|",
    ]
    for r in (r for r in rows if r["server"] == server):
        said = "" if r["check"] is None else r["check"]["verdict"] + ("" if agrees(r) else " (**not what happened**)")
        if r["refused"]:
            lines.append(f"| {r['folder']} | refused | | | {said} |")
            continue
        found, limit = r[MEASURES[server]], LIMITS[server]
        shown = f"{found:.1e}" + ("" if found <= limit else f" (**above {limit:g}**)")
        moved = "" if r["moved"] is None else f"{r['moved']:.2g}"
        lines.append(f"| {r['folder']} | {shown} | {r['first_token_equal']} of {r['prompts']} | {moved} | {said} |")
    return "\n".join(lines)


def said(rows: list[Row]) -> str:
    """What servers and `plait check` say of the folders that are not taken rightly."""
    lines = ["| server | folder | it | `plait check` |", "|---|---|---|---|"]
    for r in rows:
        if r["check"] is not None and (r["refused"] or not right(r)):
            it = _cell(r["refused"]) if r["refused"] else "says nothing"
            lines.append(f"| {r['server']} | {r['folder']} | {it} | {_cell(r['check']['why'])} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """One line, short enough to be read, that cannot end a cell."""
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= 200 else line[:197] + "..."


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    rows, versions = report["rows"], report["versions"]
    served = [r for r in rows if r["check"] is not None]
    good = sum(agrees(r) for r in served)
    return f"""# What servers give

The same {report["prompts"]} prompts, as token numbers, through PEFT in float32, vLLM and llama.cpp: the {report["top"]} most probable next
tokens of each server, held against PEFT's probabilities of the same tokens. The base is {report["base"]}. The adapters were trained for
{report["steps"]} steps each, so that they move probabilities far more than servers differ; nothing is said about their quality.
What an adapter moves is the largest change of any probability (vLLM: of the log-probability of a server's token) against the base.

Versions: {", ".join(f"{k} {v}" for k, v in versions.items())}. Again: `make test-serving`, or `python benchmarks/serving --help`.

What `plait check --for` said beforehand, without base or server, is what the server did in {good} of {len(served)} cases.

## vLLM, CPU, float32

Adapters are loaded into one running server by name. Limit: {LIMITS[VLLM]:g}.

{table(rows, VLLM)}

## llama.cpp, CPU, float32 weights, cache in half precision

"Exported" is a file of `plait export --for gguf`, "converted" one that llama.cpp's own `convert_lora_to_gguf.py` made of the folder.
Limit: {LIMITS[LLAMA]:g}.

{table(rows, LLAMA)}

## What was not taken as it was meant

{said(rows)}
"""


def joined(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one server each as one."""
    versions = {name: version for r in reports for name, version in r["versions"].items()}
    return {**reports[0], "versions": versions, "rows": [row for r in reports for row in r["rows"]]}


if __name__ == "__main__":
    folder, *runs = map(Path, sys.argv[1:])
    if runs:
        whole = joined([json.loads(r.read_text()) for r in runs])
        (folder / "serving.json").write_text(json.dumps(whole, indent=1) + "\n")
    (folder / "serving.md").write_text(page(json.loads((folder / "serving.json").read_text())))
