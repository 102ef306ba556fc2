"""docs/results/existing.md, written from existing.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def page(report: Mapping[str, Any], file: str = "existing.json") -> str:
    """The whole page, of the report in a file of that name."""
    settings, seeds = report["settings"], report["seeds"]
    parts = [
        "# Merging adapters that already exist: what was measured",
        f"Written from `{file}`, which this command made ({report['device']}, torch "
        f"{report['versions'].get('torch')}); a figure of another file or of other seeds names them:",
        _command(settings),
        _protocol(settings, seeds),
        *([report["note"]] if report.get("note") else []),
        "## In one line each",
        _headline(report),
        "## Recovered",
        '(merged - floor) / (alone - floor), of means over the tasks. The first rows chose without labels; "best scale by labels" '
        "are single methods whose scale was chosen on one half of the validation rows and reported on the other, halves swapped "
        "and averaged; so is what is chosen by labels.",
        _recovered(report),
        "## Does fidelity follow the true score?",
        _ranks(report),
        "## Per task",
        _tasks(seeds),
        "## What was chosen",
        _chosen(seeds),
    ]
    if "causal" in report:
        parts += ["## A small language model", _causal(report["causal"])]
    return "\n\n".join(parts) + "\n"


def _command(settings: Mapping[str, Any]) -> str:
    tasks = "" if settings["tasks"].count(",") == 7 else f" --tasks {settings['tasks']}"
    scales = "" if max(settings["scales"]) == 2.0 else f" --scales {','.join(f'{s:g}' for s in settings['scales'])}"
    return (
        f"    python benchmarks/existing.py --base MPNET --data DATA --adapters RUN/adapters/{_arm(settings)}{tasks} \\\n"
        f"        --dtype {settings['dtype']} --grid-rows {settings['grid_rows']} --rows {settings['rows']}{scales} --out OUT"
    )


def _arm(settings: Mapping[str, Any]) -> str:
    return str(settings.get("arm", "kaiming"))


def _protocol(settings: Mapping[str, Any], seeds: Mapping[str, Any]) -> str:
    rows = settings["rows"] or "all"
    return (
        f"{len(seeds)} seeds ({', '.join(seeds)}) of {'plain ' if _arm(settings) == 'kaiming' else ''}{_arm(settings)} adapters on "
        f"{settings['base']}, trained apart on {settings['tasks']}. "
        f"Label-free choices see {settings['texts']} training texts of each task without their labels, and no validation row. "
        f"All candidates are scored by labels on up to {settings['grid_rows']} rows of each half of each validation set; what is "
        f"chosen is reported on {rows} rows of the other half. "
        + (
            "Chosen by labels (`oracle` in the file) is the better of the best candidate and of weights per adapter and module learnt "
            f"from up to {settings['label_rows']} labelled rows of each task, from two starts"
            + (", or of what was made without labels" if later(seeds) else "")
            + "; which is better, the labelled rows "
            "of the half that chooses say, so that it is no upper bound: a choice without labels may come out above it."
            if settings["label_steps"]
            else "Labels choose scales and nothing else."
        )
    )


def _headline(report: Mapping[str, Any]) -> str:
    keys = (
        "default_at_prompt", "recovered_no_text", "recovered_100_texts", "recovered_500_texts", "recovered_repaired_100_texts",
        "recovered_repaired", "recovered_oracle", "recovered_joint", "share_of_oracle", "rank_correlation",
    )  # fmt: skip
    intervals, others = report.get("intervals", {}), report.get("elsewhere", {})
    lines = ["| figure | value | 95 % interval over seeds | of |", "|---|---|---|---|"]
    for key in (k for k in keys if k in report):
        span = intervals.get(key) or others.get(key, {}).get("interval")
        where = others.get(key, {}).get("of", "these seeds")
        value = _number(report[key])
        cells = (
            key,
            value,
            f"{span[0]:.2f} to {span[1]:.2f}" if span else "",
            where if report[key] is not None else "",
        )
        lines.append("| " + " | ".join(cells) + " |")
    told = [
        "",
        "`default_at_prompt` is `plait merge` without any option, on all seeds that it was measured on; since it is TSV-M at 0.7, what is "
        "made without texts is the same merge. `recovered_joint` is one adapter trained on all tasks together, on other seeds.",
    ]
    if "recovered_500_texts" in report:
        told.append(
            "`recovered_100_texts` is `merge auto` with 100 texts a task, `recovered_500_texts` with 500, of which the choice and the fit "
            "read 100 and the heads all; `recovered_repaired` is `--repair auto` with 500, and `recovered_repaired_100_texts` a repair of "
            "100 texts, kept where it is closer by the divergence (which plait no longer trusts: [existing-texts](existing-texts.md))."
        )
    if earlier := report.get("earlier"):
        was = ", ".join(
            f"`{k}` {v['value']:.3f}"
            + (f" ({v['interval'][0]:.2f} to {v['interval'][1]:.2f})" if v["interval"] else "")
            for k, v in earlier.items()
        )
        told.append(
            f"What `merge auto` gave on these seeds before it fitted what it chose and let heads follow: {was}. `share_of_oracle` and "
            "`rank_correlation` were then of merges over a grid of all scales. Now they are of what the choice looks at: merges around "
            "their best scales, learnt weights, fits, of which many are about as good; heads are the adapters' own in both."
        )
    elif not later(report["seeds"]):
        told.append(
            "`recovered_100_texts` is here what `merge auto` was when this was measured, a choice with weights learnt; fits and heads that "
            "follow came later, and what they add is in [existing-fitted.md](existing-fitted.md)."
        )
    return "\n".join([*lines, *told])


def later(seeds: Mapping[str, Any]) -> bool:
    """Whether these seeds were measured since `merge auto` fits what it chose, and lets heads follow."""
    return all("100 texts, fitted" in s["rows"] for s in seeds.values())


def _number(value: float | None, digits: int = 3) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def _recovered(report: Mapping[str, Any]) -> str:
    seeds = report["seeds"]
    lines = ["| merge | recovered | " + " | ".join(seeds) + " | mean score |", "|---|" + "---|" * (len(seeds) + 2)]
    for name, value in sorted(report["recovered"].items(), key=lambda kv: -kv[1]):
        each = [f"{s['rows'][name]['recovered']:.3f}" for s in seeds.values()]
        mean = sum(s["rows"][name]["mean"] for s in seeds.values()) / len(seeds)
        lines.append(f"| {name} | {value:.3f} | {' | '.join(each)} | {mean:.1f} |")
    for name in ("alone", "floor"):
        mean = sum(s[name]["mean"] for s in seeds.values()) / len(seeds)
        lines.append(f"| {name} | {float(name == 'alone'):.0f} | {' | '.join('' for _ in seeds)} | {mean:.1f} |")
    return "\n".join(lines)


def _ranks(report: Mapping[str, Any]) -> str:
    n = len(next(iter(report["seeds"].values()))["candidates"])
    lines = [
        f"Spearman's rank correlation between fidelity and the mean true score over {n} candidates, mean over seeds, by how the "
        "adapters' fidelities are put together"
        + (
            ". `score` chose the merges below; `mean probability beyond chance` chooses since, and is `rank_correlation` above:"
            if "mean probability beyond chance" in report["rank_correlations"]
            else " (`score` is what chose):"
        ),
        "",
        "| aggregate | rank correlation |",
        "|---|---|",
    ]
    lines += [f"| {k} | {_number(v)} |" for k, v in report["rank_correlations"].items()]
    seeds = report["seeds"].values()
    first = next(iter(seeds))
    lines += ["", "Mean score, on the rows that all candidates saw, of what each would have chosen:", ""]
    lines += ["| chosen by | mean score |", "|---|---|"]
    for kind in first["by_aggregate"]:
        lines.append(f"| {kind} | {sum(s['by_aggregate'][kind]['score'] for s in seeds) / len(seeds):.2f} |")
    for share in first["by_assumption"]:
        mean = sum(s["by_assumption"][share]["score"] for s in seeds) / len(seeds)
        lines.append(f"| factors alone, own share {share} | {mean:.2f} |")
    return "\n".join(lines)


def _tasks(seeds: Mapping[str, Any]) -> str:
    names = list(next(iter(seeds.values()))["alone"]["tasks"])
    lines = ["| merge | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    keys = (
        "default at the prompt",
        "no text",
        "100 texts",
        "100 texts, repaired",
        "chosen by labels",
        "joint training",
    )
    for key in ("alone", "floor", *keys):
        if not all(key in s or key in s["rows"] for s in seeds.values()):
            continue
        found = [s[key] if key in ("alone", "floor") else s["rows"][key] for s in seeds.values()]
        means = [sum(f["tasks"][n] for f in found) / len(found) for n in names]
        lines.append(f"| {key} | " + " | ".join(f"{m:.1f}" for m in means) + " |")
    return "\n".join(lines)


def _chosen(seeds: Mapping[str, Any]) -> str:
    lines = [
        "| seed | no text | 100 texts | held out: chosen, weights learnt | chosen by labels, by half |",
        "|---|---|---|---|---|",
    ]
    for name, s in seeds.items():
        a, b = (f"{c['candidate']} at {c['scale']:g}" for c in (s["chosen_no_text"], s["chosen_100_texts"]))
        held = s["chosen_100_texts"]["held_out"]
        shown = f"{held['chosen']:.3f}, {held['refined']:.3f}"
        lines.append(f"| {name} | {a} | {b} | {shown} | {'; '.join(s['chosen_by_labels'])} |")
    return "\n".join(lines)


def _causal(found: Mapping[str, Any]) -> str:
    chosen = [
        f"at {where} positions {c['candidate']} at {c['scale']:g}{', weights learnt' if c['learnt'] else ''}"
        for where, c in found["chosen"].items()
    ]
    command = (
        "    python benchmarks/existing_causal.py --recipe text3-smollm2 --run RUN --general FILE:COLUMN --out OUT"
    )
    lines = [
        command,
        "",
        f"{found['text']} Chosen: {'; '.join(chosen)}.",
        "",
        "| merge | " + " | ".join(found["tasks"]) + " | KL to the base on general text |",
    ]
    lines.append("|---|" + "---|" * (len(found["tasks"]) + 1))
    for row in found["rows"]:
        kl = "" if row["general_kl"] is None else f"{row['general_kl']:.4f}"
        lines.append(
            f"| {row['name']} | " + " | ".join(f"{row['scores'][t]:.1f}" for t in found["tasks"]) + f" | {kl} |"
        )
    return "\n".join(lines)
