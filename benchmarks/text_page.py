"""The page of runs of benchmarks/text_arms.py: what each arm keeps under merges fixed beforehand, the registered tests, the scales.

    python benchmarks/text_page.py told=RUN [bare=RUN] --name text-qwen15 --to docs/results [--tested 1,2]

A RUN for each condition of the prompts holds records/*.json. Writes NAME.md and NAME.json (`rows` of {condition, arm, method, seed,
individual, floor, merged, recovered, share_of_means, of_own, tasks}, `tests` over the seeds `tested`, `expected`, `existing`, `references`,
`singles`; of text_rounds.py `rounds` and `rounds_differences`); where curves were run, scales-NAME.json for benchmarks/scales.py.
`--tested` names the seeds of the comparisons; by default all. The plain arm's record holds the floor: without it there is no share kept,
and `of_own`, merged over alone, is all the page shows.
The numbers are text_account.py's and text_steps.py's, the sections text_sections.py's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from text_account import (
    CONDITIONS,
    JOINT,
    PLAIN,
    expected_of,
    packed,
    read,
    references_of,
    rows_of,
    singles_of,
    tests_of,
)
from text_sections import (
    EXISTING,
    OF_JOINT,
    candidates_sentence,
    curves_section,
    existing_section,
    expected_table,
    fixed_table,
    ladders_section,
    prices_section,
    rounds_section,
    steps_of,
    task_table,
    tests_table,
)
from text_steps import candidates_of, existing_of, ladders_of, prices_of, rounds_differences, rounds_of, summary_of

MAIN, STUDIES = "text-qwen15", Path(__file__).parents[1] / "recipes" / "studies"


def extent_of(study: str) -> str:
    """What a study's recipe says of tasks, adapters and steps."""
    if study == MAIN:
        return "nine tasks, every answer written; rank 16 on q and v, 120\nsteps of 16 rows at 3e-4"
    recipe = yaml.safe_load((STUDIES / f"{study}.yaml").read_text())
    lora, training = recipe["lora"], recipe["training"]
    modules = ", ".join(m.removesuffix("_proj") for m in lora["target_modules"])
    return (
        f"{len(recipe['tasks'])} tasks, every answer written;\nrank {lora['rank']} on {modules}, {training['steps']} steps of "
        f"{training['batch_size']} rows at {training['lr']:g} (where nothing else is said)"
    )


def base_of(study: str) -> str:
    """The name of the model that a study's recipe names."""
    name: str = yaml.safe_load((STUDIES / f"{study}.yaml").read_text())["base"]["model"]
    return name.rpartition("/")[2]


INTRODUCTION = """# {name}

{extent}. A copy of {base}, de-quantised from 4 bits; \
{extent_of_study}. Arms, merges and scales were fixed beforehand ([protocol, second edition](../study/protocol.md)); no label has a
say in any row of the first table. 240 rows a task{curves}.

    {commands}

`{name}-run.tar.gz` holds what was measured of every answer; unpacked, its {conditions} the last command.

{measure} *KL*: base to merge, nats a token on 200 general sentences; *single*: the largest of the arm's own
adapters. Task arithmetic at the scale that second moments say is the primary merge.{regmean}
"""
SHARE = """\
*share kept*: mean over tasks of (merged - floor) / (own adapter alone - floor), mean over seeds (least and most beside it); *of means*: the
share of the mean gain. The floor, the bare base with the same prompts and as many tokens as the longest right answer has (GSM8K:
about 110), scores {floor}.{borrowed}"""
BORROWED = """ It was scored with the adapters of text-qwen15: the same base, prompts and rows; so was which tasks count,
those on which PEFT's default of rank 16 on q and v gains four points. **The plain arm of this study is missing: the time of the GPU ended
before it was scored**, and PEFT's default does not stand beside these arms."""
RATIO = """\
**The plain arm and the bare base are missing: the time of the GPU ended before they were scored.** So there is no floor and no
*share kept*, and PEFT's default does not stand beside these arms. *Of own score*: mean over tasks of merged / own adapter alone,
which counts what the bare base can do by itself as kept; it says less than the share kept."""
REGMEAN_THEN = """ RegMean of seed 0 stands at the scale its rule said then, far too large here: see the curves; plait reads
it off the moments since."""


def page(
    name: str,
    runs: dict[str, dict[str, Any]],
    rows: Sequence[dict[str, Any]],
    tests: Sequence[dict[str, Any]],
    references: Sequence[dict[str, Any]],
    tested: Sequence[int] = (),
    study: str = MAIN,
    borrowed: bool = False,
) -> str:
    """The page.

    Args:
        name: Of its files.
        runs: Condition -> its records.
        rows: Of all conditions.
        tests: Comparisons.
        references: Joint training.
        tested: Seeds of the comparisons; () for all.
        study: The recipe's name.
        borrowed: Whether the floor is another study's.
    """
    conditions = {c: sorted({r["seed"] for r in rows if r["condition"] == c}) for c in runs}
    extent = "; ".join(
        f"**Condition *{c}*** ({CONDITIONS[c]}): seed{'s' * (len(s) > 1)} {', '.join(map(str, s))}"
        for c, s in conditions.items()
    )
    floored, curves = all("floor" in r for r in rows), any(k.startswith("curves-") for r in runs.values() for k in r)
    measure = RATIO
    if floored:
        floors = {(r["condition"], r["seed"]): r["floor"] for r in rows}
        by = (
            f"{np.mean([f for (c, _), f in floors.items() if c == condition]):.1f} ({condition})" for condition in runs
        )
        measure = SHARE.format(floor=", ".join(by), borrowed=BORROWED if borrowed else "")
    folders = " and ".join(f"{c}/" for c in runs) + (" is the RUN" if len(runs) == 1 else " are the RUNs") + " of"
    todo = " ".join(f"train:{s} fixed:{s}" for s in dict.fromkeys(s for seeds in conditions.values() for s in seeds))
    todo += " curves:0" * curves
    rounds = [r for c, records in runs.items() for r in rounds_of(records, c)]
    seeds = f" --tested {','.join(map(str, tested))}" if tested else ""
    commands = "\n    ".join((
        "python benchmarks/text_tasks.py --data DATA --to TASKS",
        f'python benchmarks/text_arms.py --study recipes/studies/{study}.yaml [--condition bare] --do "{todo}" ...',
        *(["python benchmarks/text_auto.py --study recipes/studies/text-qwen15.yaml --seed 1 ..."] if study == MAIN else []),
        *([f"python benchmarks/text_rounds.py --study recipes/studies/{study}.yaml --seed 1 ..."] if rounds else []),
        f"python benchmarks/text_page.py {' '.join(f'{c}=RUN' for c in runs)} --name {name} --to docs/results{seeds}",
    ))  # fmt: skip
    then = REGMEAN_THEN if study == MAIN and 0 in conditions.get("told", []) else ""
    text = [
        INTRODUCTION.format(
            name=name, base=base_of(study), extent_of_study=extent_of(study),
            extent=extent, commands=commands, regmean=then, measure=measure,
            curves=", 100 for the curves" * curves, conditions=folders,
        )
    ]  # fmt: skip
    for condition, records in runs.items():
        mine = [r for r in rows if r["condition"] == condition]
        text += [f"## {condition}: what is kept under merges fixed beforehand", "", fixed_table(mine), ""]
        text += ["### Task by task, primary merge", "", task_table(mine), ""]
        for r in (r for r in references if r["condition"] == condition):
            text += [
                f"One adapter trained on all nine tasks together{steps_of(r['reference'])}, seed {r['seed']}: {r['score']:.1f}, "
                f"{100 * r['recovered']:.0f} % of what `kaiming`'s own adapters gain.{OF_JOINT * (r['reference'] == JOINT)}", "",
            ]  # fmt: skip
        singles = [(v, k) for k, v in singles_of(records).items() if k.startswith("adapter")]
        if singles:
            text += [
                f"One adapter for everything: the best of `kaiming`'s, the {max(singles)[1]}, has {max(singles)[0]:.1f} (100 rows a task).",
                "",
            ]
    if tests:
        which = (
            f"Seeds {' and '.join(map(str, tested))}, on which nothing was chosen; conditions"
            if tested
            else "Conditions"
        )
        text += [
            "## Comparisons under the primary merge",
            "",
            f"{which} and seeds of a task averaged.",
            "",
            tests_table(tests),
            "",
        ]
    if tested:
        text += ["## What was expected, and what came", "", expected_table(expected_of(rows, tested)), ""]
    if existing := [r for c, records in runs.items() for r in existing_of(records, c)]:
        text += ["## Adapters that exist, merged without labels", "", EXISTING, "", existing_section(existing), ""]
        text += [
            line for records in runs.values() for r in candidates_of(records) for line in (candidates_sentence(r), "")
        ]
    if prices := [r for c, records in runs.items() for r in prices_of(records, c)]:
        text += ["## What it costs outside the tasks", "", prices_section(prices), ""]
    if ladders := [r for c, records in runs.items() for r in ladders_of(records, c)]:
        text += ["## Merges that need nothing but the adapters", "", ladders_section(ladders), ""]
    if rounds:
        text += ["## Rounds, and moments refreshed halfway", "", rounds_section(rounds), ""]
    text += ["## Recovered over scales", ""] if curves else []
    text += [
        f"### {c}\n\n{curves_section(records)}\n"
        for c, records in runs.items()
        if any(k.startswith("curves-") for k in records)
    ]
    return "\n".join(text)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="CONDITION=RUN")
    p.add_argument("--name", required=True)
    p.add_argument("--to", required=True, type=Path)
    p.add_argument("--study", default=MAIN, help="the recipe's name")
    p.add_argument("--tested", default="", help="seeds of the comparisons, such as 1,2")
    p.add_argument(
        "--floor",
        help="CONDITION=RUN of a study of the same base, prompts and rows: its floor, where this one has none",
    )
    a = p.parse_args()
    runs = {c: read(Path(folder)) for c, folder in (r.split("=", 1) for r in a.runs)}
    where, _, folder = (a.floor or "").partition("=")
    lent = read(Path(folder)) if a.floor else {}
    plain = next((lent[f"fixed-{s}-{PLAIN}"] for s in range(10) if f"fixed-{s}-{PLAIN}" in lent), None)
    rows = [r for c, records in runs.items() for r in rows_of(records, c, plain if c == where else None)]
    borrowed = plain is not None and not any(k.startswith("fixed-") and k.endswith(f"-{PLAIN}") for k in runs[where])
    references = [r for c, records in runs.items() for r in references_of(records, c)]
    tested = [int(s) for s in a.tested.split(",") if s]
    tests = tests_of(rows, tested, registered_study=a.study == MAIN)
    told = next(iter(runs.values()))
    existing = [r for c, records in runs.items() for r in existing_of(records, c)]
    whole = {
        "rows": rows, "tested": tested, "tests": tests, "expected": expected_of(rows, tested) if tested else [],
        "existing": existing, "existing_summary": summary_of(existing), "candidates": candidates_of(told),
        "references": references, "singles": singles_of(told),
    }  # fmt: skip
    if prices := [r for c, records in runs.items() for r in prices_of(records, c)]:
        whole["prices"] = prices
    if ladders := [r for c, records in runs.items() for r in ladders_of(records, c)]:
        whole["ladders"] = ladders
    if rounds := [r for c, records in runs.items() for r in rounds_of(records, c)]:
        whole |= {"rounds": rounds, "rounds_differences": rounds_differences(rounds)}
    (a.to / f"{a.name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    if curves := packed(told):
        (a.to / f"scales-{a.name}.json").write_text(json.dumps(curves) + "\n")
    text = page(a.name, runs, rows, tests, references, tested, a.study, borrowed)
    (a.to / f"{a.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
