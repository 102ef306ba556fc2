"""How a checkpoint on disk keeps a model's parameters where it names or cuts them otherwise than the model does.

transformers renames, joins and turns tensors while it loads some checkpoints: a mixture's experts lie on disk one by one, or
fused, gate and up projection apart, under names of older versions. What it would make of a checkpoint's names is asked of
transformers itself, from the names and a model without weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from plait.errors import InputError
from plait.model.base import BaseModel, load_config

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """Where a checkpoint has one parameter of the model.

    Args:
        parts: Its tensors: one list for each of the matrices that are put below each other along the output; in each, one
            tensor for every expert, or one for all.
        by_expert: Whether experts are tensors of their own.
        is_transposed: Whether an expert's matrix in the model is (in, out), as GPT-OSS has it.
        shape: Shape of the parameter in the model.
        unknown: What transformers does with these tensors, where it is more than this type can say.
    """

    parts: tuple[tuple[str, ...], ...]
    by_expert: bool
    is_transposed: bool
    shape: tuple[int, ...]
    unknown: str | None = None


@dataclass(slots=True)
class _Collected:
    """Names of a parameter's tensors by the pattern they matched; and the converter, where one takes them."""

    names: dict[str, list[str]] = field(default_factory=dict)
    converter: Any = None


def checkpoint_layout(folder: Path, names: Sequence[str]) -> dict[str, StoredParameter]:
    """List the model's parameters by name, and where the checkpoint has them.

    Args:
        folder: Local folder of the base; its config says which model it is.
        names: Names of the checkpoint's tensors.

    Returns:
        Every parameter of which tensors are there; {} for a model that transformers does not know itself.

    Raises:
        InputError: A config that transformers cannot read.
    """
    model = model_without_weights(folder)
    return {} if model is None else layout_in(model, names)


def model_without_weights(folder: Path) -> Any:
    """Make the model that a base's config describes, on the meta device; None for one that transformers does not know itself.

    Raises:
        InputError: A config that transformers cannot read.
    """
    import transformers

    config = load_config(BaseModel(str(folder)))
    cls = getattr(transformers, next(iter(config.architectures or ["?"])), None)
    if cls is None:
        return None
    with torch.device("meta"):
        return cls(config)


def layout_in(model: Any, names: Sequence[str]) -> dict[str, StoredParameter]:
    """As `checkpoint_layout`, for a model that is there: a base's names in a model with a head, or the other way round."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    collections: dict[str, _Collected] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        collected = collections.setdefault(target, _Collected())
        collected.names.setdefault(pattern or "", []).append(name)
        collected.converter = by_pattern.get(pattern or "")
    return {
        p: _stored(c, tuple(state[p].shape), _is_transposed(model, p)) for p, c in collections.items() if p in state
    }


def _is_transposed(model: Any, parameter: str) -> bool:
    """As PEFT asks the module that holds the parameter."""
    return bool(getattr(model.get_submodule(parameter.rpartition(".")[0]), "is_transposed", False))


def _stored(collected: _Collected, shape: tuple[int, ...], is_transposed: bool) -> StoredParameter:
    converter, names = collected.converter, collected.names
    if converter is None:
        only = tuple(name for group in names.values() for name in group)
        return StoredParameter((only,), False, is_transposed, shape, None if len(only) == 1 else "several tensors")
    order = [p for p in converter.source_patterns if p in names]
    parts = tuple(tuple(names[p]) for p in order)
    done = [(type(o).__name__, getattr(o, "dim", None)) for o in converter.operations]
    by_expert = done[:1] == [("MergeModulelist", 0)]
    rest = done[1:] if by_expert else done
    joined = [("Concatenate", 1 if by_expert or len(shape) == 3 else 0)]
    # A transposition that looks at the shapes leaves tensors as they are or turns them: their shapes tell.
    known = rest in ([], joined) or (not by_expert and rest == [("Transpose", None)] and len(parts) == 1)
    whole = order == list(converter.source_patterns) and len(converter.target_patterns) == 1
    said = None if known and whole else " then ".join(name for name, _ in done)
    return StoredParameter(parts, by_expert, is_transposed, shape, said)


def layout_of_names(folder: Path, tensors: Mapping[str, T]) -> dict[str, StoredParameter]:
    """As `checkpoint_layout`; {} too for a model whose config transformers cannot read."""
    try:
        return checkpoint_layout(folder, list(tensors))
    except InputError:
        return {}


def known_names(tensors: Mapping[str, T], layout: Mapping[str, StoredParameter]) -> dict[str, T]:
    """The base's tensors, those that the model calls otherwise under that name as well."""
    return {**{name: tensors[tensor] for name, tensor in renamed(layout).items()}, **tensors}


def renamed(layout: Mapping[str, StoredParameter]) -> dict[str, str]:
    """Parameter -> the one tensor on disk that is it, where only the name differs."""
    return {
        p: s.parts[0][0]
        for p, s in layout.items()
        if s.unknown is None and not s.by_expert and len(s.parts) == 1 and len(s.parts[0]) == 1 and s.parts[0][0] != p
    }
