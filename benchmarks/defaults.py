"""What plait does by default, beside what was measured: shares kept at scales that no label chose, by base, start and merge, in one table.

    python benchmarks/defaults.py --results docs/results --to docs/study

Reads RESULTS/second-protocol.json (the older studies), RESULTS/text-qwen15.json (the seeds that tested it), RESULTS/text-qwen15-16.json,
RESULTS/text-qwen15-wide.json and RESULTS/text-qwen05.json; writes TO/defaults.md and RESULTS/defaults.json (`rows` of {base, tasks,
setting, seeds, arm, method, share}). Of each study one table of arms: where a later one has more seeds, that one. A merge stands at the
scale that second moments say where they were measured, else at that of the rule.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

# Study -> how the page names it: kind of base, base, what was merged.
STUDIES = {
    "text3-smollm2-finalists": ("decoder", "SmolLM2-135M", "3 tasks, own endings"),
    "text3-smollm2-one-template": ("decoder", "SmolLM2-135M", "3 tasks, one ending"),
    "text3-smollm2-rank32": ("decoder", "SmolLM2-135M", "3 tasks, rank 32"),
    "told": ("decoder", "Qwen2.5-Coder-1.5B", "9 written tasks, told"),
    "bare": ("decoder", "Qwen2.5-Coder-1.5B", "9 written tasks, bare"),
    "sixteen": ("decoder", "Qwen2.5-Coder-1.5B", "16 written tasks, told"),
    "wide": ("decoder", "Qwen2.5-Coder-1.5B", "9 written tasks, told, rank 64, six modules"),
    "smaller": ("decoder", "Qwen2.5-Coder-0.5B", "9 written tasks, told"),
    "glue8-mpnet-finalists": ("encoder", "MPNet", "8 tasks"),
    "tasks11-mpnet": ("encoder", "MPNet", "11 tasks"),
    "glue8-minilm": ("encoder", "MiniLM", "8 tasks"),
    "glue8-minilm-rank32": ("encoder", "MiniLM", "8 tasks, rank 32"),
}
ARMS = {
    "kaiming": "PEFT's",
    "kaiming_penalised": "PEFT's, penalty",
    "contrastive": "`contrastive`",
    "contrastive_penalised": "`contrastive`, penalty",
}
MERGES = {
    "tsv": "TSV-M",
    "iso_c": "Iso-C",
    "task_arithmetic": "sum",
    "task_arithmetic + pico": "sum, pico",
    "regmean": "RegMean",
}
TESTED = (1, 2)
_BY_RULE = ("tsv", "iso_c")  # what needs no statistics is shown as it is without

HEAD = """# The default by evidence

`python benchmarks/defaults.py --results docs/results --to docs/study` makes this page. What one merge keeps of each arm's *own* adapters,
percent, mean over tasks ([second protocol](protocol.md)); no label chose a scale. *PEFT's*: PEFT's default start, which is what adapters
that exist mostly have. *Penalty*: trained with `constraint: penalised`. TSV-M and Iso-C stand at the scale of their rule, which needs the
adapters alone; sums and RegMean at the one that second moments say where that was measured (Qwen, MPNet with PEFT's start and
with `contrastive` and penalty; [what it is worth](../results/scales.md)), else at the rule's. **Bold**: the best of a row.

"""
TAIL = """
## What follows

| you have | start and training | merge | why |
|---|---|---|---|
| eight plain adapters of a language model or more, alone | | Iso-C | written: 65 beside TSV-M's 51, bare 35, -6; sixteen 57, 55 |
| adapters alone that the penalty trained | | TSV-M | SmolLM2's rows: 62 beside Iso-C's 53, 81 beside 75, rank 32 55 beside 18 |
| other adapters alone | | TSV-M | MPNet 66 beside Iso-C's 68, MiniLM 57 beside 47 |
| adapters of a language model, and statistics of each | | RegMean | the last column of the decoder's rows |
| adapters of an encoder, and statistics of each | | TSV-M, its scale by them | the encoder's rows; RegMean only with eleven tasks |
| texts of each, no labels | | `plait merge auto` | [encoders](../results/existing-fitted.md), [a decoder](../results/text-qwen15.md) |
| data to train with, a decoder of 0.5 or 1.5 B | `contrastive`, penalty (rank 16, q, v) | the sum with pico | 98, 94, 95; 97 of sixteen |
| the same, wide adapters | `contrastive`, penalty | TSV-M | 86, the sum 53; one seed |
| the same, of 135 M | `contrastive`, penalty | RegMean | the last row of its blocks; the sums stand at the rule's scale |
| data to train with, an encoder | `contrastive`, penalty | TSV-M | the last row of its blocks; RegMean with eleven tasks |

The first five rows are what `plait merge` does when no method is named (`plait.merging.scales`), start and penalty what `plait init` and
`plait train` do with statistics. At the scale that statistics say TSV-M keeps 65 of PEFT's eight and 50 of eleven on MPNet, 80 and 76
with start and penalty ([rows](../results/second-protocol.md)). [Sixteen written tasks](../results/text-qwen15-16.md) and [wide
adapters](../results/text-qwen15-wide.md) have one seed, Iso-C of the [base of 0.5 B](../results/text-qwen05.md) two of the three (51;
TSV-M has 37 on these). Where answers are chosen by likelihood (135 M) Iso-C of plain adapters has 29 beside TSV-M's 26, 13 beside 15 with
one ending, and 17 beside 21 at rank 32; of wide adapters that write it was not measured, nor of two to eight that do. Of two adapters
of MPNet it is behind (76 beside 89), so that fewer than eight take TSV-M. Of wide adapters RegMean is ahead of TSV-M by thirty points
where they were trained plainly, as the fourth row of this table says, and behind it by ten where start and penalty are plait's: there
TSV-M is the better default, and the sum loses half.

Start and penalty were chosen on SmolLM2, MPNet and MiniLM, and confirmed on tasks and seeds kept back, on Qwen alone. That RegMean is the
default for language models with statistics, and the advice for what plait trained, were read off these tables afterwards: nothing kept
back has tested them. Iso-C for plain adapters that write was seen at 1.5 B, where it had not been named, and then expected at 0.5 B,
where it had not run: there it is ahead on both seeds (50 and 52, TSV-M 40 and 34). Until then the prompt took TSV-M; pages that call it
the default, *no text* or the default at the prompt, measured TSV-M.

What an adapter's folder tells decides: its task type, as PEFT writes it, and the record of a training by `plait train` or `plait run`. A
folder that another trainer saved, by the Python that `plait init` prints too, does not say that a penalty was in its training, nor does
one that was converted, and Iso-C is then taken where TSV-M would keep more: name `--method tsv`. From `contrastive` without the penalty
only SmolLM2's rows have both (TSV-M 64, 28, 40; Iso-C 58, 32, 38); no folder tells its start. A cut to a rank and a calibration take
TSV-M: Iso-C makes all directions equally strong, so that a cut would take any, and has no rule for its scale with a calibration. So do
adapters that change different modules, of which nothing was measured.
"""


def rows_of(
    older: Sequence[Mapping[str, Any]],
    written: Sequence[Mapping[str, Any]],
    **others: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """One row for each study, arm and merge of the table."""
    cells: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    seeds: dict[tuple[str, str, str], int] = {}
    for row in older:
        key = (row["study"], row["arm"], row["method"])
        moments = None if row["method"] in _BY_RULE else row.get("by_moments")
        share = row.get("label_free") if moments is None else moments
        if share is not None:  # a merge without a rule has only its scale by labels
            cells[key].append(share)
            seeds[key] = row["seeds"]
    nine = [(row["condition"], row) for row in written if row["seed"] in TESTED]
    for study, row in [*nine, *((study, row) for study, rows in others.items() for row in rows)]:
        key = (study, row["arm"], row["method"])
        cells[key].append(row["recovered"])
        seeds[key] = len(cells[key])
    return [
        {"study": study, "arm": arm, "method": method, "seeds": seeds[study, arm, method], "share": round(mean(shares), 4)}
        for (study, arm, method), shares in cells.items()
        if study in STUDIES and arm in ARMS and method in MERGES
    ]  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, a line for each study and arm."""
    shares = {(r["study"], r["arm"], r["method"]): r["share"] for r in rows}
    lines = [f"| base | merged | seeds | start | {' | '.join(MERGES.values())} |", "|---" * (4 + len(MERGES)) + "|"]
    for study, (kind, base, what) in STUDIES.items():
        arms = [a for a in ARMS if any((study, a, m) in shares for m in MERGES)]
        for arm in arms:
            of_arm = {m: shares.get((study, arm, m)) for m in MERGES}
            best = max(v for v in of_arm.values() if v is not None)
            words = [
                "" if v is None else f"**{100 * v:.0f}**" if v == best else f"{100 * v:.0f}" for v in of_arm.values()
            ]
            seeds = next(r["seeds"] for r in rows if (r["study"], r["arm"]) == (study, arm))
            first = (f"{kind}, {base}", what) if arm == arms[0] else ("", "")
            lines.append(f"| {' | '.join(first)} | {seeds} | {ARMS[arm]} | {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", required=True, type=Path)
    p.add_argument("--to", required=True, type=Path)
    a = p.parse_args()

    def read(name: str) -> Any:
        return json.loads((a.results / f"{name}.json").read_text())["rows"]

    others = {"sixteen": "text-qwen15-16", "wide": "text-qwen15-wide", "smaller": "text-qwen05"}
    rows = rows_of(read("second-protocol"), read("text-qwen15"), **{k: read(n) for k, n in others.items()})
    (a.results / "defaults.json").write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    (a.to / "defaults.md").write_text(HEAD + table(rows) + TAIL)
    print(table(rows))


if __name__ == "__main__":
    main()
