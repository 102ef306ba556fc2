r"""What `merge auto` makes of a language model's adapters, step by step, where every adapter writes its own texts; no labels.

    python benchmarks/text_auto.py --study recipes/studies/text-qwen15.yaml --set base.model=MODEL --set data.root=TASKS --out RUN \
        --general DATA/glue/mrpc/train.parquet:sentence1 --seed 1

RUN holds the arm's adapters (benchmarks/text_arms.py, `train:SEED:ARM`). Of each task --texts prompts are taken from the training rows;
the task's own adapter writes an answer to each, and merges are compared with that adapter at the tokens of the answer (`--positions all`:
at those of prompt and answer, as the first run did). Steps: no text (TSV-M at its default scale); chosen by fidelity; weights per adapter
and module learnt; fitted front to back; repaired, on --all-texts prompts of each task; fitted on all of these. Each is scored on the rows
of `fixed` of text_arms.py, beside the adapters alone and the bare base, and its KL to the base is taken on the general texts.
`--candidates N` scores all merges that were looked at, each at its best scale and at the one furthest from it, on N rows of each half: how
fidelity ranks them where answers are written.
RUN/records/auto_written-SEED-ARM.json (`auto_all-...`) is written anew after every step: what is there is not lost when time is up.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from text_arms import Merger, Run, begin, general_shift, say, scored

from plait.adapters.lora import Adapter
from plait.border.records import to_json
from plait.choosing.auto_settings import AutoSettings
from plait.choosing.choose import choose, refined_weights
from plait.choosing.tournament import Scored
from plait.evaluation.text import prompts_of
from plait.evaluation.writing import Writers, endings, write_many
from plait.fidelity.panel import WRITTEN, Panel, parts_of
from plait.fidelity.score import fidelities
from plait.fidelity.texts import Texts, first_of
from plait.learning.distil import RATES
from plait.learning.fitting import best_fit, fitted
from plait.learning.repair import repaired
from plait.merging import merge
from plait.model.stacked import stacked_factors
from plait.runs.stages import splits
from plait.tasks import encode

METHODS = ("task_arithmetic", "tsv", "regmean", "least_squares")


def written(run: Run, adapters: dict[str, Adapter], seed: int, texts: int, tokens: int) -> dict[str, Texts]:
    """Prompts of each task, each with what the task's adapter answers."""
    session, found = run.layout.session, {}
    evaluator = session.evaluator
    for name, adapter in adapters.items():
        model, task = evaluator.task_model(name), evaluator.tasks[name]
        rows = session.training(name, seed)
        rows = rows.take(list(range(min(texts, len(rows)))))
        encoded = encode(evaluator.tokenizer, task, rows, session.recipe.data.max_length)
        updates = stacked_factors(model, [(adapter, 1.0)])
        ends = endings(model, evaluator.tokenizer, task.stop, evaluator.base.torch_device)
        writers = Writers(model, evaluator.tokenizer, ends, tokens, updates)
        [answers] = write_many(writers, prompts_of(task, encoded))
        cut = [a.split(task.stop)[0] if task.stop else a for a in answers]
        found[name] = tuple((f"{p[0]} {a}",) for p, a in zip(rows.texts, cut, strict=True))
        say(f"  {name}: {len(cut)} answers, such as {cut[0][:80]!r}")
    return found


def patiently(function: Callable[[], Any], tries: int = 12) -> Any:
    """Call it again where others at work on the device leave too little memory."""
    for _ in range(tries - 1):
        try:
            return function()
        except torch.OutOfMemoryError:
            say("no memory: again in 10 s")
        torch.cuda.empty_cache()
        time.sleep(10)
    return function()


class Record:
    """Scores of the steps, written after each.

    Args:
        run: The run.
        merger: The arm's adapters.
        panel: What fidelity is taken on.
        name: POSITIONS-SEED-ARM.
    """

    def __init__(self, run: Run, merger: Merger, panel: Panel, name: str) -> None:
        self.run, self.merger, self.panel, self.name = run, merger, panel, name
        self.rows = {t: {h: r[: run.rows] for h, r in s.halves.items()} for t, s in splits(run.layout).items()}
        self.found: dict[str, Any] = {"tasks": list(merger.adapters), "steps": {}, "positions": panel.positions}
        self.started = time.time()

    def ends(self) -> None:
        """Score every adapter alone on its task, and the bare base."""
        adapters = self.merger.adapters
        table = scored(self.run, lambda t: [(adapters[t], 1.0), (None, 0.0)], self.rows, f"auto_{self.name}-ends")
        self.found |= {"alone": table[0].round(3).tolist(), "floor": table[1].round(3).tolist()}
        self._write()

    def step(self, name: str, merge: Adapter, **more: Any) -> None:
        """Score a merge, its scale folded in, and write what there is."""
        seconds = time.time() - self.started
        table = scored(self.run, lambda _: [(merge, 1.0)], self.rows, f"auto_{self.name}-{name.replace(' ', '_')}")
        fidelity = fidelities(self.panel, [(merge, 1.0)])[0]
        shift = general_shift(self.run, self.merger.adapters, [(merge, 1.0)])[0]
        self.found["steps"][name] = {
            "scores": table[0].round(3).tolist(), "general_kl": shift, "fidelity": fidelity.score,
            "seconds_until": round(seconds, 1), **more,
        }  # fmt: skip
        self._write()
        say(f"{name}: mean {table[0].mean():.2f}, fidelity {fidelity.score:.3f}, KL elsewhere {shift:.3f}")

    def candidates(self, scored_by: Sequence[Scored], rows: int) -> None:
        """Score merges that were looked at: each at its best scale, and at the one furthest from that."""
        merges: dict[str, list[Scored]] = {}
        for one in scored_by:
            merges.setdefault(one.tried.recipe.label, []).append(one)
        picked = [
            s for ones in merges.values() for s in (ones[0], max(ones[1:], key=lambda o: abs(math.log(o.scale / ones[0].scale))))
        ]  # fmt: skip
        worn = [(s.tried.adapter, s.scale) for s in picked]
        few = {t: {h: r[:rows] for h, r in halves.items()} for t, halves in self.rows.items()}
        table = scored(self.run, lambda _: worn, few, f"auto_{self.name}-candidates")
        seen = [
            {
                "fidelity": f.score, "closeness": f.kept, "agreement": f.beyond_chance,
                "verbatim": float(np.mean([t.verbatim or 0.0 for t in f.tasks])),
            }
            for f in fidelities(self.panel, worn)
        ]  # fmt: skip
        means = table.mean((1, 2))
        by = {k: float(spearmanr([one[k] for one in seen], means).statistic) for k in seen[0]}
        self.found["candidates"] = {
            "rank_correlation": by["fidelity"], "rank_correlations": by, "rows": rows,
            "merges": [
                {"recipe": s.tried.recipe.label, "scale": s.scale, **one, "scores": t.round(3).tolist()}
                for s, one, t in zip(picked, seen, table, strict=True)
            ],
        }  # fmt: skip
        self._write()
        say(f"{len(picked)} candidates: rank correlation {self.found['candidates']['rank_correlation']:.3f}")

    def _write(self) -> None:
        file = self.run.out / "records" / f"auto_{self.name}.json"
        file.with_suffix(".part").write_text(json.dumps(self.found) + "\n")
        file.with_suffix(".part").rename(file)


def steps(run: Run, seed: int, arm: str, a: argparse.Namespace) -> None:
    """Every step of one arm."""
    merger, session = Merger(run, seed, arm), run.layout.session
    adapters = list(merger.adapters.values())
    own = {
        "_own": session.evaluator,
        "new_tokens": a.new_tokens,
        "positions": WRITTEN if a.positions == WRITTEN else "all",
    }
    if a.positions == WRITTEN:
        texts = {n: session.training(n, seed).texts[: max(a.texts, a.all_texts)] for n in merger.adapters}
    else:
        texts = written(run, merger.adapters, seed, max(a.texts, a.all_texts), a.new_tokens)
    whole = Panel(session.base, parts_of(adapters), texts, (), a.batch, session.recipe.data.max_length, **own)
    panel = whole.with_texts(first_of(texts, a.texts))
    record = Record(run, merger, panel, f"{a.positions}-{seed}-{arm}")
    patiently(record.ends)
    without = merge(adapters, "tsv", device=run.device, verify=False)
    record.step("no text", without.adapter, recipe="tsv")
    settings = AutoSettings(methods=METHODS, scales=a.scales, refine=0, fit=False)
    choice = patiently(lambda: choose(panel, adapters, settings, on_progress=say))
    record.step("chosen", choice.adapter, recipe=choice.recipe.label, scale=choice.scale)
    say("weights per adapter and module")
    refined, _, held = patiently(lambda: refined_weights(panel, adapters, choice.scored[0], a.steps, 0))
    best = refined if held["refined"] > held["chosen"] else choice.adapter
    record.step("weights learnt", refined, held_out=held)
    fit, score = patiently(lambda: best_fit(panel, adapters, choice.adapter, on_progress=say))
    front_to_back = patiently(lambda: fitted(panel, adapters, choice.adapter, fit))
    record.step("fitted", front_to_back, fit=[fit.pull, fit.reach, fit.scale], held_out=score)
    best = front_to_back if score > max(held.values()) else best
    if a.candidates:
        patiently(lambda: record.candidates(choice.scored, a.candidates))
    say(f"repair: {len(next(iter(whole.texts.values())))} texts of each task, at most {a.repairs or a.steps} steps")
    of, most = _name_of(best, front_to_back, refined), a.repairs or a.steps
    for rate in a.rates:
        done, repair = patiently(lambda r=rate: repaired(whole, best, most, rate=r, on_progress=say))
        name = "repaired" if rate == a.rates[0] else f"repaired at {rate:g}"
        record.step(name, done, repair=to_json(repair), held_out=dict(repair.held_out), of=of, rate=rate)
    if a.all_texts > a.texts:
        record.step("fitted on all", patiently(lambda: fitted(whole, adapters, choice.adapter, fit)))


def _name_of(best: Adapter, front_to_back: Adapter, refined: Adapter) -> str:
    """What a repair began at."""
    return "fitted" if best is front_to_back else "weights learnt" if best is refined else "chosen"


def main() -> None:
    """Read the arguments and run."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--study", required=True, type=Path)
    p.add_argument("--set", action="append", default=[], help="KEY=VALUE of the study")
    p.add_argument("--out", required=True, type=Path)
    p.add_argument("--condition", choices=["told", "bare"], default="told")
    p.add_argument("--seed", type=int, required=True)
    p.add_argument("--arm", default="kaiming")
    p.add_argument("--texts", type=int, default=100)
    p.add_argument("--positions", choices=[WRITTEN, "all"], default=WRITTEN)
    p.add_argument("--new-tokens", type=int, default=128, help="tokens an adapter writes after a prompt at most")
    p.add_argument("--steps", type=int, default=100, help="of weights and of the repair")
    p.add_argument(
        "--all-texts", type=int, default=0, help="prompts of each task that a repair reads; --texts by default"
    )
    p.add_argument(
        "--rates", type=lambda t: tuple(map(float, t.split(","))), default=(RATES["factors"],), help="of repairs"
    )
    p.add_argument("--repairs", type=int, default=0, help="steps of a repair at most; --steps by default")
    p.add_argument("--scales", type=lambda t: tuple(map(float, t.split(","))), default=(0.4, 0.6, 0.9, 1.3))
    p.add_argument(
        "--candidates", type=int, default=0, help="rows of each half by which all merges looked at are scored"
    )
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--rows", type=int, default=120)
    p.add_argument("--general", required=True, help="FILE:COLUMN")
    p.add_argument("--general-rows", type=int, default=200)
    p.add_argument("--tokens", type=int, default=350_000, help="keys and values held at once on a GPU")
    p.add_argument("--memory", type=float, default=1.0, help="share of the GPU's memory that may be taken")
    a = p.parse_args()
    run = begin(a)
    run.layout.session.load()
    steps(run, a.seed, a.arm, a)


if __name__ == "__main__":
    main()
