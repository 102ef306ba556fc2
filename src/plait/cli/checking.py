"""The check command: whether a folder is what was written, and what other programs would load from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.options import Json
from plait.cli.output import emit, table
from plait.errors import printable
from plait.loading.account import Account, Effect

if TYPE_CHECKING:
    from plait.checking.check import Checked

Target = Annotated[Path, typer.Argument(metavar="PATH", help="A folder or file: of plait's, or from anywhere.")]
For = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="LOADER",
        help="peft, transformers, vllm, llama.cpp (or gguf), diffusers, mlx-lm, trl, axolotl, llama-factory or unsloth; "
        "by default all that open it.",
    ),
]
Base = Annotated[
    str | None, typer.Option("--base", metavar="DIR", help="Let PEFT load the folder on this base, and compare logits.")
]
_EFFECTS: tuple[Effect, ...] = ("loaded", "replaces", "overwrites", "dropped", "refused", "beside")
_SHOWN = 12  # faults and notes of one account that are printed; --json holds all


def register(app: typer.Typer) -> None:
    """Add this command to the application."""
    app.command()(check)


def check(path: Target, loader: For = None, base: Base = None, as_json: Json = False) -> None:
    """Hold a result against its manifest and its loaders.

    NaN and infinity are looked for. Every tensor is accounted for by name and kind: which parameter it becomes, what is
    dropped, what overwrites a weight of the base, what needs a flag. Faults of the format's own loader, or of the one that
    --for names, end with exit code 3.
    """
    from plait.checking.check import check_path

    found = check_path(path, loader, base)
    failed = [c for c in found if c.failed]
    text = "\n\n".join(check_text(c, short=len(found) > 1) for c in found)
    results = [c.record() for c in found]
    emit(results[0] if len(results) == 1 else {"ok": not failed, "results": results}, as_json, text)
    if failed:
        others = f" ({len(failed) - 1} more of {len(found)} results)" if len(failed) > 1 else ""
        typer.echo(f"error: {printable(failed[0].path)}: {printable(failed[0].why)}{others}", err=True)
        raise typer.Exit(3)


def check_text(checked: Checked, *, short: bool = False) -> str:
    """Print files, then a line for each loader, then what is wrong and what to know; `short`: only the first and the faults."""
    lines = [f"{checked.path}: {_listed(checked) if not checked.changed else 'changed since it was written'}"]
    lines += [f"changed: {c}" for c in checked.changed]
    lines += [f"damaged: {d}" for d in checked.damaged[:_SHOWN]]
    verdicts = [(a, checked.verdict_of(a)) for a in checked.accounts]
    rows = [[_name(a), a.version, *(str(v.effects.get(e, "")) for e in _EFFECTS), v.verdict] for a, v in verdicts]
    if rows and not short:
        lines += ["", table(["loader", "version", *_EFFECTS, "verdict"], rows, text_columns=2)]
    for a, verdict in verdicts:
        shown = a.faults if verdict.counts or not short else ()
        lines += [f"{_name(a)}: {f.tensor} {f.what} ({f.hint})" for f in shown[:_SHOWN]]
        if len(shown) > _SHOWN:
            lines.append(f"{_name(a)}: and {len(shown) - _SHOWN} more (--json lists all)")
        lines += [] if short else [f"{_name(a)}, note: {n}" for n in a.notes[:_SHOWN]]
    if base := checked.base:
        said = (
            f"{base.model} with PEFT: the adapter moves outputs by {base.effect:.2g}, the base with scaling * B A added "
            f"agrees to {base.error:.1g}, and with the adapter switched off the base is itself to {base.restored:.1g}"
        )
        lines += ["", said, *(f"--base: {f}" for f in base.faults)]
    return "\n".join(lines)


def _listed(checked: Checked) -> str:
    if checked.path.is_file():
        return "every byte is what was written" if checked.listed else "no digest of plait's: the file as it is"
    return "every file is what the manifest says" if checked.listed else "no manifest of plait's: files as they are"


def _name(account: Account) -> str:
    return " ".join(filter(None, (account.loader, account.inside)))
