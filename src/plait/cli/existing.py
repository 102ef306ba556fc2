"""What adapters that already exist want: `merge auto` (dispatched from merge) and `advise`."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from plait.cli.existing_words import advice_text, auto_text
from plait.cli.options import Device, FourBits, Json, Quiet, Seed
from plait.cli.output import emit
from plait.errors import UsageError, printable

if TYPE_CHECKING:
    from plait.disk.written import Written
    from plait.fidelity.texts import TextFile
    from plait.merging.record import MergeRecord

Given = Annotated[
    list[str],
    typer.Argument(
        metavar="ADAPTER",
        help="PEFT folders, DIR or NAME=DIR each; before them, if at hand, the base: a folder or a hub name.",
    ),
]
Text = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="TASK=FILE", help="Unlabelled texts, 500 at most: .txt, or a table's FILE:COLUMN[,COLUMN]."),
]  # fmt: skip
General = Annotated[
    str | None, typer.Option("--general", metavar="FILE", help="Texts of no task, for the KL to the base.")
]
Answers = Annotated[
    bool | None,
    typer.Option(
        "--answers/--no-answers", help="Texts are prompts: compare at each adapter's own answers. Default for a prompt or messages column."
    ),
]  # fmt: skip
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="The tokenizer's chat template around prompts; by default as adapters were trained, else where there is one.",
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Tokens of an adapter's own answer.")]
Length = Annotated[int, typer.Option("--max-length", min=8, help="Tokens of a text that are read.")]


# Steps of a repair at most where nobody says how many: it stops by itself where texts held out say that it helps no more.
UNTIL_IT_HELPS_NO_MORE = 400


def register(app: typer.Typer) -> None:
    """Add these commands to the application."""
    app.command()(advise)


def advise(
    given: Given,
    text: Text = None,
    general: General = None,
    tolerate: Annotated[float, typer.Option("--tolerate", min=0, max=1, help="Share of an adapter that may be lost.")] = 0.1,
    repair: Annotated[
        str, typer.Option("--repair", metavar="N|auto", help="Most steps of the repair tried; auto: 100, given 400 texts a classifier.")
    ] = "auto",
    refine: Annotated[int, typer.Option("--refine", min=0, help="Steps of learning the merge's weights.")] = 100,
    base_id: Annotated[str | None, typer.Option("--base", help="Name of the base, where adapters name it differently.")] = None,
    answers: Answers = None, chat: Chat = None, tokens: Tokens = 64, length: Length = 128,
    device: Device = "auto", four_bits: FourBits = None,
    seed: Seed = 0, quiet: Quiet = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Say whether to merge at all, and how.

    Serving separately, merging, the best single adapter and a repair, side by side; measured where the base and --text are
    given.
    """
    report = _reporter(quiet, text)
    from plait.advice.advise import AdviceSettings, advise_folders
    from plait.fidelity.texts import LIMIT_OF_REST, parse_files, read_place

    files = parse_files(text or [], LIMIT_OF_REST)
    settings = AdviceSettings(
        tolerate, refine=refine, max_length=length, seed=seed, answers=answers_wanted(answers, chat, files), chat=chat, new_tokens=tokens
    )  # fmt: skip
    if repair != "auto":
        settings = replace(settings, repair=steps_of(repair), repair_from=0)
    of_no_task = read_place(general, spread=True) if general else ()
    advice = advise_folders(
        given, {t: f.texts for t, f in files.items()}, of_no_task, settings, base_id=base_id, device=device, four_bits=four_bits,
        on_progress=report,
    )  # fmt: skip
    if advice.next:
        texts = [f"--text {shlex.quote(t)}" for t in text or []] + ([f"--base-4bit {four_bits}"] if four_bits else [])
        advice = replace(advice, next=" ".join([advice.next, *texts]))
    emit(advice, as_json, advice_text(advice))


class AutoChoice(NamedTuple):
    """The options of `merge` that `auto` takes."""

    text: list[str] | None
    general: str | None
    refine: int
    fit: bool
    heads: bool
    max_shift: float | None
    repair: str
    on_policy: bool
    answers: bool | None
    chat: bool | None
    tokens: int
    length: int
    rank: int | None
    base_id: str | None
    dtype: str
    device: str
    four_bits: str | None
    learn_heads: bool
    seed: int
    overwrite: bool
    quiet: bool = False


def auto(given: list[str], out: Path | None, chosen: AutoChoice, as_json: bool) -> None:
    """What `plait merge auto BASE ADAPTER...` does."""
    if out is None:
        raise UsageError("where to?", hint="--out DIR")
    report = _reporter(chosen.quiet, chosen.text)
    from plait.choosing.auto_folders import merge_auto_folders
    from plait.choosing.auto_settings import AutoSettings
    from plait.fidelity.arguments import split_base
    from plait.fidelity.texts import LIMIT_OF_REST, parse_files, read_place
    from plait.learning.repair import TEXTS_TO_REPAIR

    repair = steps_of(chosen.repair)
    base, folders = split_base(given, chosen.device, four_bits=chosen.four_bits)
    files = parse_files(chosen.text or [], LIMIT_OF_REST)
    settings = AutoSettings(
        refine=chosen.refine,
        fit=chosen.fit,
        heads=chosen.heads,
        learn_heads=chosen.learn_heads,
        max_shift=chosen.max_shift,
        repair=repair,
        repair_from=TEXTS_TO_REPAIR if chosen.repair == "auto" else 0,
        on_policy=chosen.on_policy,
        answers=answers_wanted(chosen.answers, chosen.chat, files),
        chat=chosen.chat,
        new_tokens=chosen.tokens,
        rank=chosen.rank,
        max_length=chosen.length,
        seed=chosen.seed,
    )
    written = merge_auto_folders(
        folders, out, base=base, texts={t: f.texts for t, f in files.items()},
        general=read_place(chosen.general, spread=True) if chosen.general else (), settings=settings, base_id=chosen.base_id,
        dtype=chosen.dtype, device=chosen.device, four_bits=chosen.four_bits, overwrite=chosen.overwrite,
        on_progress=report,
    )  # fmt: skip
    emit(written, as_json, auto_text(written))


def answers_wanted(given: bool | None, chat: bool | None, files: Mapping[str, TextFile]) -> bool | None:
    """Say whether adapters answer the texts: as asked; else None, "if they can", where every file holds prompts."""
    from plait.fidelity.chat import PROMPT_COLUMNS

    for asked, option in ((given, "--answers"), (chat, "--chat")):
        if asked and not files:
            raise UsageError(
                f"{option} is about prompts, and there are none", hint="--text TASK=FILE for every adapter"
            )
    if given is False and chat:
        raise UsageError("--chat is about answers, and --no-answers asks for none", hint="leave one of them out")
    if given is not None or not files:
        return bool(given)
    return None if all(len(f.columns) == 1 and f.columns[0] in PROMPT_COLUMNS for f in files.values()) else False


def steps_of(given: str) -> int:
    """Read the steps of a repair: a number, or as many as help.

    Raises:
        UsageError: Neither a number of steps nor "auto".
    """
    if given == "auto":
        return UNTIL_IT_HELPS_NO_MORE
    if not (given.isascii() and given.isdigit()):
        raise UsageError(f"--repair {printable(given)!r} is no number of steps", hint="--repair 100, or --repair auto")
    return int(given)


class ForwardChoice(NamedTuple):
    """The options of `merge` that methods with forward passes take beside their own."""

    text: list[str] | None
    length: int
    base_id: str | None
    dtype: str
    four_bits: str | None
    overwrite: bool
    quiet: bool


def by_forward(
    given: list[str], out: Path | None, method: str, options: dict[str, Any], weights: list[float] | None, chosen: ForwardChoice
) -> Written[MergeRecord]:  # fmt: skip
    """What `plait merge BASE ADAPTER... --method regmean_pp` does."""
    if out is None:
        raise UsageError("where to?", hint="--out DIR")
    report = _reporter(chosen.quiet, chosen.text)
    from plait.fidelity.arguments import split_base
    from plait.fidelity.forward import merge_by_forward
    from plait.fidelity.texts import parse_texts

    base, folders = split_base(given, "cpu", four_bits=chosen.four_bits)
    return merge_by_forward(
        folders, out, method, base=base, texts=parse_texts(chosen.text or []), options=options, weights=weights,
        base_id=chosen.base_id, max_length=chosen.length, dtype=chosen.dtype, four_bits=chosen.four_bits,
        overwrite=chosen.overwrite, on_progress=report,
    )  # fmt: skip


def _reporter(quiet: bool, texts: list[str] | None) -> Callable[[str], None]:
    """Says on stderr what is being done, and how many seconds after the start: from the first on, also while libraries are imported."""
    started = time.monotonic()
    if quiet:
        return lambda what: None

    def report(what: str) -> None:
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed stderr must not end a choice
            sys.stderr.write(f"[{time.monotonic() - started:.0f} s] {printable(what)}\n")
            sys.stderr.flush()

    report(f"reading adapters{' and texts' if texts else ''}")
    return report
