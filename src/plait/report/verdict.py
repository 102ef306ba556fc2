"""What came out, in a number, a sentence and a few facts: the first thing either page says."""

from __future__ import annotations

import math
from collections.abc import Sequence

from plait.border.counts import plural
from plait.recipes.sections import PLAIN_ARMS
from plait.report.account import Account
from plait.report.best import Best
from plait.report.table import LEARNED, mean
from plait.report.words import NONE, Verdict, percent, signed

__all__ = ["verdict_of"]
_STABLE = 5  # seeds from which on a mean is called one without a remark


def verdict_of(account: Account) -> Verdict:
    """Say what one adapter keeps of all, by which start and merge, what it costs whom, and where it lies."""
    first, tasks = account.best[0], len(account.recipe.tasks)
    facts = [
        ("best start and training", f"`{first.arm}`"),
        ("best merge", _merge(account, first)),
        ("worst task", f"{first.worst}, {signed(first.worst_task)} points against its own adapter"),
        ("mean score", _scores(account, first)),
    ]
    if others := _others(account, first):
        facts.append(("beside it", others))
    if account.best_folder is not None:
        facts.append(("where it lies", _folder(account)))
    notes = [*_remarks(account), *(remark.first for remark in account.remarks)]
    if not math.isfinite(first.mean_recovered):
        text = f"**Not defined here**: recovered, and what is derived from it, stays empty ({NONE})."
        return Verdict(NONE, "not defined", " ".join([text, *account.undefined]), facts, account.loading, notes)
    notes += account.undefined  # of ablations: the study itself has its shares
    interval = account.inference.intervals.get(first.arm)
    sure = f" (95 % interval {percent(interval[0])} to {percent(interval[1])})" if interval else ""
    whose = "plain adapters gain" if account.reference in PLAIN_ARMS else f"the adapters of `{account.reference}` gain"
    one = "One adapter" if tasks > 1 else "The adapter"
    share = percent(first.mean_recovered)
    text = (
        f"{one} in place of {tasks} keeps **{share} %**{sure} of what {whose} alone: the best of"
        f" {plural(len(account.best), 'arm')} is `{first.arm}`, under {_merges(first)}."
    )
    return Verdict(
        f"{share} %",
        f"kept by one adapter in place of {tasks}" if tasks > 1 else "kept by the merged adapter",
        text,
        facts,
        account.loading,
        notes,
    )


def _merges(best: Best) -> str:
    return " / ".join(dict.fromkeys(best.merges.values()))


def _merge(account: Account, first: Best) -> str:
    chosen = account.best_folder or {}
    name = chosen.get("merge") or chosen.get("method")
    same = (chosen.get("arm"), name) == (first.arm, _merges(first))
    return f"{name}, scale {chosen['scale']:.3g}" if same else _merges(first)


def _scores(account: Account, first: Best) -> str:
    plain = mean(first.plain)
    return (
        f"{mean(first.merged):z.1f} merged; {plain:z.1f} with the {plural(len(account.recipe.tasks), 'adapter')} of"
        f" `{account.reference}` apart, {mean(first.floor):z.1f} with none"
    )


def _others(account: Account, first: Best) -> str:
    """The reference arm, and the runner-up, with what they keep."""
    wanted = [b for b in account.best if b.arm == account.reference] + list(account.best[1:2])
    shares = {b.arm: b.mean_recovered for b in wanted if b is not first}
    ranked = sorted(shares.items(), key=lambda share: -share[1])
    return ", ".join(f"`{arm}` keeps {percent(v)} %" for arm, v in ranked if math.isfinite(v))


def _folder(account: Account) -> str:
    """Say what the folder of the best merge holds: chosen on all rows, it need not be what the halves find best."""
    best = account.best_folder or {}
    merge = (
        f"`{best['arm']}` under {best.get('merge') or best['method']} at scale {best['scale']:.3g}, seed {best['seed']}"
    )
    return (
        f"the folder `{account.best_place}`, an adapter for PEFT{' with all heads' if account.heads else ''}: {merge}"
    )


def _remarks(account: Account) -> list[str]:
    """Sentences about what a number may hide."""
    remarks: list[str] = []
    if account.best[0].mean_recovered > 1:
        first = account.best[0]
        remarks.append(
            f"More than 100 %: the adapters of `{account.reference}` that it is a share of reach {mean(first.plain):z.1f} alone,"
            f" those of `{first.arm}` {first.individual:z.1f}. Of its own it keeps {percent(mean(first.recovered_of_own))} %."
        )
    mine = [t for t in account.tasks if t.arm == account.reference]
    if flat := [t.task for t in mine if t.alone - t.floor <= LEARNED]:
        remarks.append(
            f"Nothing was learned on {_listed(flat)}: there the adapter of `{account.reference}` does not beat the bare base"
            f" by {LEARNED:g} point, so that nothing can be kept of it."
        )
    if below := [f"{t.task} ({t.floor:z.1f})" for t in mine if t.floor < 0]:
        remarks.append(f"A floor below 0 is a correlation that points the wrong way: {_listed(below)}.")
    if len(account.recipe.seeds) < _STABLE:
        seeds = plural(len(account.recipe.seeds), "seed")
        remarks.append(f"{seeds[0].upper() + seeds[1:]}: another seed may order the arms otherwise.")
    small = [f"{name} ({m.rows})" for name, m in account.measured.items() if m.rows < 100]
    return remarks + ([f"Scored on few rows: {_listed(small)}."] if small else [])


def _listed(names: Sequence[str]) -> str:
    """Join names as a sentence does.

    >>> _listed(["a", "b", "c"])
    'a, b and c'
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
