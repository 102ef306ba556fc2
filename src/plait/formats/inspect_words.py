"""What is told of an adapter, as the text a person reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from plait.border.counts import agreed, plural
from plait.formats.inspect import AdapterFacts, Figures, Inspection, Inspections


def inspection_text(inspection: Inspection | Inspections) -> str:
    """Say what an adapter is, a line per fact."""
    if isinstance(inspection, Inspection):
        return _facts_text(inspection.facts, inspection.inside)
    several = inspection.components or inspection.adapters or {}
    shown = [f"{place}\n{_facts_text(facts)}" for place, facts in several.items()]
    none = f"{inspection.path}: no adapter itself, {len(several)} in folders of it"
    return "\n\n".join(shown if inspection.components else [none, *shown])


def _facts_text(facts: AdapterFacts, inside: Sequence[str] = ()) -> str:
    lines = [f"{facts.name}: {facts.variant}, {facts.format or 'unknown format'}"]
    lines.append(f"  base       {facts.base or 'not recorded'}")
    if facts.task_type:
        lines.append(f"  task type  {facts.task_type}")
    lines += _figures(facts.figures) if facts.figures else []
    lines.append(f"  size       {facts.size_mb:.2f} MB, {', '.join(facts.dtypes)}")
    if facts.merged_from:
        lines.append(f"  merge of   {', '.join(facts.merged_from)} ({facts.method})")
    if facts.stacked_on:
        lines.append(f"  on top of  {facts.stacked_on}")
    lines += [f"  inside     {place}: an adapter of its own" for place in inside]
    if facts.problem:
        lines.append(f"  problem    {facts.problem}")
    return "\n".join(
        [
            *lines,
            *(
                f"  can        {c}"
                for c in facts.can or ["nothing here (plait check says what other programs load of it)"]
            ),
        ]
    )


def _figures(figures: Figures) -> list[str]:
    """Write the lines about modules, ranks and what lies beside them."""
    lines = [f"  modules    {figures.modules}: {_counts(figures.targets)}"]
    if list(figures.module_kinds) != ["linear"]:
        lines.append(f"  kinds      {_counts(figures.module_kinds)}")
    lines.append(f"  rank       {_counts(figures.ranks)}")
    lines.append(f"  alpha      {_counts(figures.alphas)}")
    if figures.without_alpha:
        lines.append(
            f"             {plural(figures.without_alpha, 'module')} came without: alpha = rank, as "
            f"{agreed(figures.without_alpha, 'its', 'their')} loaders take it"
        )
    if figures.alpha_from:
        lines.append(f"             from {' and '.join(figures.alpha_from)}")
    zero = f", zero in {plural(figures.zero_modules, 'module')}" if figures.zero_modules else ""
    length = "not read, nor was NaN looked for: --full does" if (n := figures.update_norm) is None else f"{n:.4g}{zero}"
    lines.append(f"  |update|   {length}")
    if figures.heads:
        lines.append(f"  heads      {', '.join(figures.heads)}")
    if figures.extras:
        lines.append(f"  beside     {', '.join(figures.extras)}: trained whole")
    if figures.copies:
        lines.append(f"  copies     {', '.join(figures.copies)}: the base's own, not trained")
    return lines


def _counts(counts: Mapping[str, int]) -> str:
    """One value, or each with how many have it, the commonest first."""
    if len(counts) == 1:
        return next(iter(counts))
    shown = sorted(counts.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{k} ({n})" for k, n in shown[:12]) + (", ..." if len(shown) > 12 else "")
