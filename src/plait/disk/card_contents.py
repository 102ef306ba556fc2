"""What a card tells of a folder's content: a PEFT adapter, an MLX one or a whole model, its base, its heads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.border.head_shapes import output_layer
from plait.disk.hub import is_hub_name
from plait.errors import InputError, printable
from plait.loading.header import Header, read_header, read_object

PEFT, MLX, MODEL = "peft", "mlx", "transformers"  # what the hub calls the library that loads it
_FACTORS = re.compile(r"\.(lora_|base_layer\.|modules_to_save\.lora_)")
_ROOT = "base_model.model."
_NAME_LIMIT = 200


@dataclass(frozen=True, slots=True)
class CardHead:
    """One head as a card shows it.

    Args:
        name: Of its task.
        outputs: How many it has; None where its tensors do not tell.
        labels: Names of its classes, in the order of the outputs; () where nobody recorded them.
        task_type: PEFT's, of the model that it belongs on; "" where nobody recorded it.
    """

    name: str
    outputs: int | None = None
    labels: tuple[str, ...] = ()
    task_type: str = ""


@dataclass(frozen=True, slots=True)
class CardContents:
    """What lies in a folder.

    Args:
        library: `PEFT`, `MLX` or `MODEL`.
        base: Name of the base on the hub; None where it is a folder of somebody's machine, or unknown.
        base_called: What a text calls the base; "" where nothing names it.
        revision: Revision of the base that the adapter names.
        task_type: PEFT's, as the folder says it or, of a merge of classifiers, as its heads do.
        rank: The largest rank of the adapter's modules.
        inline: The head among the adapter's own weights.
        heads: The heads in files of their own.
        architecture: Class of transformers that a whole model is for.
    """

    library: str
    base: str | None = None
    base_called: str = ""
    revision: str | None = None
    task_type: str = ""
    rank: int = 0
    inline: CardHead | None = None
    heads: tuple[CardHead, ...] = ()
    architecture: str = ""


def contents_of(folder: Path) -> CardContents | None:
    """Look into a folder that was just written; None where it holds neither an adapter nor a model at its top.

    Raises:
        InputError: A config or a header in it cannot be read.
    """
    config = folder / "adapter_config.json"
    if config.is_file():
        return _adapter(folder, read_object(config))
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")):
        names = read_object(folder / "config.json").get("architectures")
        first = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
        return CardContents(MODEL, architecture=first, heads=_heads(folder))
    return None


def base_names(named: object) -> tuple[str | None, str]:
    """Give the base's name on the hub, if it has one, and what a text calls it: never a path.

    >>> base_names("/home/somebody/models/bert"), base_names("google/bert")
    ((None, 'bert'), ('google/bert', 'google/bert'))
    """
    text = named.strip() if isinstance(named, str) else ""
    if text and len(text) <= _NAME_LIMIT and is_hub_name(text):
        return text, text
    last = re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return None, re.sub(r"[`|<>]", "", printable(last, _NAME_LIMIT))


def _adapter(folder: Path, config: Mapping[str, Any]) -> CardContents:
    base, called = base_names(config.get("base_model_name_or_path") or config.get("model"))
    if "peft_type" not in config:
        return CardContents(MLX, base, called, task_type="CAUSAL_LM")
    weights = folder / "adapter_model.safetensors"
    header = read_header(weights) if weights.is_file() else Header({}, {})  # in several files: no head among them
    inline, heads = _inline(header), _heads(folder)
    revision, ranks = config.get("revision"), config.get("rank_pattern") or {}
    own = config.get("task_type") or header.metadata.get("task_type", "")
    from_heads = next((h.task_type for h in heads if h.task_type), "SEQ_CLS" if heads else "")
    return CardContents(
        PEFT,
        base,
        called,
        revision if isinstance(revision, str) else None,
        from_heads or str(own or ""),
        max([int(config.get("r", 0)), *map(int, ranks.values())]),
        inline if config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else None,
        heads,
    )


def _inline(header: Header) -> CardHead | None:
    shapes = {k.removeprefix(_ROOT): t.shape for k, t in header.tensors.items() if not _FACTORS.search(k)}
    return _head("", Header({}, header.metadata), shapes) if shapes else None


def _heads(folder: Path) -> tuple[CardHead, ...]:
    found = []
    for file in sorted((folder / "heads").glob("*.safetensors")):
        header = read_header(file)
        found.append(_head(file.stem, header, {k: t.shape for k, t in header.tensors.items()}))
    return tuple(found)


def _head(name: str, header: Header, shapes: Mapping[str, tuple[int, ...]]) -> CardHead:
    facts = _object(header.metadata.get("head"))
    last, labels, kind = output_layer(shapes), facts.get("labels"), facts.get("task_type")
    known = tuple(map(str, labels)) if isinstance(labels, list) else ()
    return CardHead(name, shapes[last][0] if last else None, known, kind if isinstance(kind, str) else "")


def _object(text: str | None) -> Mapping[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except ValueError:
        raise InputError("facts of a head are no JSON", where="head") from None
    return value if isinstance(value, dict) else {}
