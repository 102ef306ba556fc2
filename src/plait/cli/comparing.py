"""The compare command: adapters beside each other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.merging import named_files
from plait.cli.options import Json
from plait.cli.output import emit, table

if TYPE_CHECKING:
    from plait.advice.comparison import Comparison, Layer

Folders = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER", help="Two or more: PEFT folders, LoRA files or hub names, PATH or NAME=PATH each."),
]  # fmt: skip
Stats = Annotated[
    list[Path] | None,
    typer.Option(
        "--stats", metavar="TASK=FILE", help="A task's statistics: predicts what each adapter does to it; repeatable."
    ),
]
Base = Annotated[str | None, typer.Option("--base", help="Name of the base, where adapters name it differently.")]

_MOST_NORMS = 4  # adapters whose norms have a column each in the table of layers
_WORDS = (
    "cosine: of the updates, 0 for unrelated ones; reads, writes: how much of the smaller span of A's rows, of B's columns lies in\n"
    "the larger (in brackets by chance); opposite: entries of opposite signs, 50 % for unrelated ones; cancelled: what of the\n"
    "entries' size a plain sum loses."
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(compare)


def compare(folders: Folders, stats: Stats = None, base: Base = None, as_json: Json = False) -> None:
    """Put adapters side by side: length, direction, overlap.

    Seconds, from the factors alone. With --stats also how far each is predicted to move every task's outputs. What such
    numbers were worth in the studies stands below the verdict.
    """
    from plait.advice.compare import compare_folders

    comparison = compare_folders(folders, named_files(stats), base_id=base)
    emit(comparison, as_json, comparison_text(comparison))


def comparison_text(comparison: Comparison) -> str:
    """Write the tables, and the verdict below them."""
    adapters = [
        [a.name, f"{a.norm:.4g}", f"{100 * a.share:.0f} %", str(a.modules), str(a.rank)] for a in comparison.adapters
    ]
    pairs = [
        [f"{p.a}, {p.b}", _signed(p.cosine), percent(p.overlap_in, p.chance_in), percent(p.overlap_out),
         percent(p.opposite), percent(p.cancelled), str(p.modules)]
        for p in comparison.pairs
    ]  # fmt: skip
    blocks = [
        f"{len(adapters)} adapters of {comparison.base or 'a base that none of them names'}",
        table(["adapter", "|update|", "of all", "modules", "rank"], adapters),
        table(["pair", "cosine", "reads", "writes", "opposite", "cancelled", "modules"], pairs),
        _layers(comparison),
    ]
    if comparison.shifts:
        tasks = list(next(iter(comparison.shifts.values())))
        rows = [[a, *(f"{100 * row[t]:.2g} %" for t in tasks)] for a, row in comparison.shifts.items()]
        blocks.append(table(["predicted shift of", *(f"on {t}" for t in tasks)], rows))
    verdict = [fill(sentence, 120, initial_indent="- ", subsequent_indent="  ") for sentence in comparison.verdict]
    lines = [_WORDS, "", *verdict, "", *(fill(sentence, 120) for sentence in comparison.record), ""]
    return "\n\n".join([*blocks, "\n".join([*lines, f"What a merge keeps is measured by: {comparison.next}"])])


def _layers(comparison: Comparison) -> str:
    """Write a row a layer: norms, and of all pairs the values that are furthest from nothing in common."""
    names = [a.name for a in comparison.adapters]
    each = len(names) <= _MOST_NORMS
    norms = [f"|{n}|" for n in names] if each else ["mean |update|"]
    rows = [
        [
            layer.layer,
            *(_norms(layer) if each else [f"{sum(layer.norms.values()) / len(names):.3g}"]),
            *_furthest(layer),
        ]
        for layer in comparison.layers
    ]
    header = ["layer", *norms, "cosine", "reads", "writes", "opposite"]
    text = table(header, rows)
    return text + ("\nof all pairs the furthest from 0, the most, and the furthest from 50 %" if len(names) > 2 else "")


def _norms(layer: Layer) -> list[str]:
    return [f"{v:.3g}" if v else "–" for v in layer.norms.values()]


def _furthest(layer: Layer) -> list[str]:
    def most(values: Iterable[float | None], middle: float) -> float | None:
        return max((v for v in values if v is not None), key=lambda v: abs(v - middle), default=None)

    pairs = layer.pairs
    return [
        _signed(most((p.cosine for p in pairs), 0)),
        percent(most((p.overlap_in for p in pairs), 0)),
        percent(most((p.overlap_out for p in pairs), 0)),
        percent(most((p.opposite for p in pairs), 0.5)),
    ]


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}"


def percent(value: float | None, chance: float | None = None) -> str:
    """Print a share in percent, in brackets what chance gives; a dash where there is none."""
    text = "–" if value is None else f"{100 * value:.0f} %"
    if chance is None:
        return text
    return f"{text} ({100 * chance:{'.0f' if chance >= 0.01 else '.1g'}} %)"
