"""The model card of a folder: README.md as the hub reads it, with how to load what lies there and how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from plait.disk.card_contents import MODEL, PEFT, CardContents, base_names, contents_of
from plait.disk.card_made import is_merge, made, scores
from plait.disk.card_usage import pipeline_tag, usage
from plait.disk.files import text_of
from plait.disk.manifest import CARD
from plait.errors import InputError, UsageError, printable
from plait.version import __version__

_LIMIT = 120
_WRITTEN = "Written by plait {version}; plait.json beside it holds the whole record, and `plait check` compares the files with it."


def card_of(folder: Path, name: str, manifest: Mapping[str, Any], *, base: str | None = None) -> str | None:
    """Write the card of a folder's content; None where there is neither an adapter nor a model at its top.

    The text depends on what lies there and how it was made, never on when, where or on whose machine.

    Args:
        folder: The folder, whole but for its manifest.
        name: What it will be called.
        manifest: What its manifest will say: stage, options, inputs, result; {} where it will have none.
        base: Name of the base on the hub, where the folder itself does not say it.

    Raises:
        InputError: A config or header in it cannot be read.
    """
    contents = contents_of(folder)
    if contents is None:
        return None
    stage, result = str(manifest.get("stage", "")), manifest.get("result", {})
    contents = _completed(contents, manifest)
    contents = replace(contents, base=base, base_called=base) if base else contents
    blocks = [
        _front_matter(contents, merge=is_merge(manifest), license=result.get("license")),
        f"# {printable(name, _LIMIT)}",
        _what(contents, merge=is_merge(manifest)),
        "## Load it",
        usage(contents, name, str(result.get("for", ""))),
        *_heads(contents),
        *_section("## Scores", scores(result)),
        *_section("## How it was made", made(stage, manifest)),
        _WRITTEN.format(version=__version__) if stage else "",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def license_of(folder: Path) -> str | None:
    """Read the licence that a folder's card names, as the hub spells it; None without a card, or where it names none."""
    from plait.border.yaml_text import load_foreign_yaml

    card = folder / CARD
    try:
        text = text_of(card) if card.is_file() else ""
        found = load_foreign_yaml(text.split("---")[1], str(card)) if text.startswith("---") else None
    except (InputError, UsageError):  # a card that cannot be read says nothing of a licence
        return None
    named = found.get("license") if isinstance(found, dict) else None
    return named if isinstance(named, str) and re.fullmatch(r"[\w.+-]{1,60}", named) else None


def _completed(contents: CardContents, manifest: Mapping[str, Any]) -> CardContents:
    """Add what only the record knows: the base of a whole model, the classes of a head whose file names none."""
    result = manifest.get("result", {})
    if contents.library == MODEL:
        hub = str(manifest.get("inputs", {}).get("hub:base", "")).partition("@")[0]
        base, called = base_names(hub or result.get("base"))
        return replace(contents, base=base, base_called=called)
    head, labels = contents.inline, result.get("labels")
    if head is not None and not head.labels and isinstance(labels, list | tuple) and len(labels) == head.outputs:
        return replace(contents, inline=replace(head, labels=tuple(map(str, labels))))
    return contents


def _front_matter(contents: CardContents, *, merge: bool, license: object) -> str:
    """The metadata between two lines of dashes; texts are JSON, which is YAML."""
    tags = [*(["lora"] if contents.library != MODEL else []), "plait", *(["merge"] if merge else [])]
    values: dict[str, Any] = {
        "library_name": contents.library,
        "base_model": contents.base,
        "license": license if isinstance(license, str) else None,
        "pipeline_tag": pipeline_tag(contents),
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _what(contents: CardContents, *, merge: bool) -> str:
    what = (
        "A model with a merge of LoRA adapters in its weights"
        if merge
        else "A model with a LoRA adapter in its weights"
    )
    if contents.library != MODEL:
        kind = "LoRA adapter" if contents.library == PEFT else "LoRA adapter of mlx-lm"
        what = f"A {kind}{', merged from several,' if merge else ''}" + (
            f" of rank {contents.rank}" if contents.rank else ""
        )
    called = contents.base_called
    link = f"[{called}](https://huggingface.co/{called})" if contents.base else f"`{called}`"
    of = "of" if contents.library == MODEL else "for"
    return f"{what}, {of} {link}." if called else f"{what}."


def _heads(contents: CardContents) -> list[str]:
    heads = contents.heads or ((contents.inline,) if contents.inline and contents.inline.labels else ())
    if not heads:
        return []
    lines = []
    for head in heads:
        called = f"{_code(head.name)}: " if head.name else "Classes: "
        named = ", ".join(map(_code, head.labels))
        unnamed = f"{head.outputs} outputs" if head.outputs != 1 else "one output, a number"
        lines.append(f"- {called}{named or unnamed}")
    return ["Heads, with their classes in the order of the outputs:" if contents.heads else "", "\n".join(lines)]


def _code(text: str) -> str:
    """A foreign text as code within a line of Markdown, which it cannot leave."""
    return f"`{printable(text, _LIMIT).replace('`', chr(39))}`"


def _section(title: str, blocks: list[str]) -> list[str]:
    return [title, *blocks] if blocks else []
