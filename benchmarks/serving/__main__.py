"""Adapters and merges through real servers: PEFT, vLLM and llama.cpp beside each other, and what `plait check` says of each.

python benchmarks/serving --base BASE --work DIR --json OUT.json [--servers vllm,llama.cpp]

`make test-serving` installs what it needs below .serving and runs it for each server; page.py makes the page of what it
left. Exit code 1 where a server gave something else than PEFT and `plait check` did not say so, or where an adapter moves
so little that its absence would pass.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import page
import torch
from by_peft import log_probabilities, tokens
from folders import STEPS, Served, folders, plait
from llama_cpp import LlamaCpp
from torch import Tensor
from vllm_server import TOP, running

Answers = list[dict[int, float]] | str


def parsed() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True, type=Path, help="folder of a small language model (SmolLM2-135M)")
    p.add_argument(
        "--base-name", default="SmolLM2-135M-Instruct, de-quantised from 4 bits", help="what the page calls it"
    )
    p.add_argument("--work", required=True, type=Path, help="where adapters and merges are kept")
    p.add_argument("--environments", type=Path, default=Path(".serving"), help="with vllm/ and llama.cpp/")
    p.add_argument("--servers", default="vllm,llama.cpp", help="which of them")
    p.add_argument("--json", required=True, type=Path, help="where the rows go")
    return p.parse_args()


def main() -> int:
    a = parsed()
    started = time.perf_counter()

    def tell(what: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {what}", file=sys.stderr, flush=True)

    torch.set_num_threads(1)
    tell("adapters, merges and exports")
    for_vllm, for_llama = folders(a.base, a.work)
    prompts = tokens(a.base)
    versions, answered = {"peft": _version("peft"), "transformers": _version("transformers")}, []
    for server, served, ask in ((page.VLLM, for_vllm, by_vllm), (page.LLAMA, for_llama, by_llama_cpp)):
        if server in a.servers.split(","):
            versions[server], found = ask(a, served, prompts, tell)
            answered += [(server, s, f) for s, f in zip(served, found, strict=True)]
    tell("PEFT")
    like = [s.like for _, s, answers in answered if s.like is not None and not isinstance(answers, str)]
    expected = log_probabilities(a.base, prompts, like)
    rows = [row(server, versions, s, answers, expected) for server, s, answers in answered]
    report = {
        "base": a.base_name,
        "prompts": len(prompts),
        "top": TOP,
        "steps": STEPS,
        "versions": versions,
        "rows": rows,
    }
    a.json.write_text(json.dumps(report, indent=1) + "\n")
    wrong = [
        f"{r['server']}: {r['folder']}"
        for r in rows
        if not page.agrees(r) or (r["check"] is None and not page.right(r))
    ]
    weak = [f"{r['server']}: {r['folder']} moves {r['moved']:.1e}" for r in rows if not page.clear(r)]
    tell(f"{len(rows)} rows; not as expected: {wrong or 'none'}; of too little effect: {weak or 'none'}")
    return 1 if wrong or weak else 0


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def by_vllm(
    a: argparse.Namespace, served: list[Served], prompts: list[list[int]], tell: Any
) -> tuple[str, list[Answers]]:
    """Version of vLLM, and what it answered or why it refused, folder by folder."""
    tell("vLLM starts")
    found: list[Answers] = []
    with running(a.environments / "vllm/bin/python", a.base, a.work / "vllm.log") as server:
        for s in served:
            tell(f"vLLM: {s.name}")
            if s.path is None:
                found.append(server.top("base", prompts))
                continue
            model = s.path.name
            refused = server.load(model, s.path.absolute())
            found.append(refused or server.top(model, prompts))
            if refused is None:
                server.unload(model)
        return server.version(), found


def by_llama_cpp(
    a: argparse.Namespace, served: list[Served], prompts: list[list[int]], tell: Any
) -> tuple[str, list[Answers]]:
    """Version of llama.cpp, and what it answered or why its converter or loader refused, folder by folder."""
    program = LlamaCpp((a.environments / "llama.cpp").absolute())
    tell("llama.cpp: the base is converted")
    model = (a.work / "base.gguf").absolute()
    program.convert_base(a.base, model)
    files = [s.path for s in served]
    folder = [i for i, s in enumerate(served) if s.path is not None and s.path.is_dir()]
    pairs = [(s.path, a.work / f"{s.path.name}-converted.gguf") for s in map(served.__getitem__, folder) if s.path]
    tell(f"llama.cpp: {len(pairs)} folders are converted")
    why = dict(zip(folder, program.convert_adapters(a.base, pairs), strict=True))
    files = [dict(zip(folder, (p[1] for p in pairs), strict=True)).get(i, f) for i, f in enumerate(files)]
    taken = [f.absolute() if f else None for i, f in enumerate(files) if not why.get(i)]
    tell(f"llama.cpp answers for {len(taken)} of them")
    version, answers = program.probabilities(model, taken, prompts)
    rest = iter(answers)
    return version, [why.get(i) or next(rest) for i in range(len(served))]


def row(
    server: str, versions: dict[str, str], s: Served, answers: Answers, expected: dict[Path | None, Tensor]
) -> dict[str, Any]:
    """One folder on one server: the largest difference from PEFT, what PEFT says that the adapter moves, and what `check` says."""
    refused = answers if isinstance(answers, str) else None
    found: dict[str, Any] = {
        "server": server, "version": versions[server], "folder": s.name,
        page.MEASURES[server]: None, "first_token_equal": None, "prompts": len(next(iter(expected.values()))),
        "moved": None, "refused": refused, "check": checked(server, s.path),
    }  # fmt: skip
    if isinstance(answers, str):
        return found
    wanted, plain = ((t.exp() if server == page.LLAMA else t) for t in (expected[s.like], expected[None]))
    pairs = [(i, token, value) for i, answer in enumerate(answers) for token, value in answer.items()]
    found[page.MEASURES[server]] = max(abs(float(wanted[i, t]) - v) for i, t, v in pairs)
    found["first_token_equal"] = sum(next(iter(a)) == int(wanted[i].argmax()) for i, a in enumerate(answers))
    if s.like is not None:
        found["moved"] = max(abs(float(wanted[i, t] - plain[i, t])) for i, t, _ in pairs)
    return found


def checked(server: str, path: Path | None) -> dict[str, Any] | None:
    """The exit code of `plait check PATH --for SERVER`, its verdict and the first reason."""
    if path is None:
        return None
    code, printed, _ = plait("check", path, "--for", server, "--json")
    (account,) = json.loads(printed)["accounts"]
    faults = account["faults"]
    why = f"{faults[0]['tensor']} {faults[0]['what']}" if faults else ""
    return {"exit": code, "verdict": account["verdict"], "why": why}


if __name__ == "__main__":
    raise SystemExit(main())
