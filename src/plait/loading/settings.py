"""What adapter_config.json tells a loader about which modules get factors, of which rank, and what is saved beside them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.errors import InputError
from plait.loading.header import read_object
from plait.loading.tensor_names import LOOKED_UP

CONFIG = "adapter_config.json"
OUTPUT = "lm_head"  # what most models call the output embedding
# Modules that PEFT saves by itself for a task type.
HEADS_OF = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_FIELDS = """
alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias corda_config
ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode init_lora_weights kasa_config
layer_replication layers_pattern layers_to_transform loftq_config lora_alpha lora_bias lora_dropout lora_ga_config
megatron_config megatron_core modules_to_save monteclora_config peft_type peft_version qalora_group_size r
rank_pattern revision runtime_config target_modules target_parameters task_type trainable_token_indices use_bdlora
use_dora use_qalora use_rslora velora_config
"""
# Fields of peft.LoraConfig up to 0.21; others are dropped with a warning.
KNOWN_FIELDS = frozenset(_FIELDS.split())
_PLAIN = re.compile(r"[\w.-]+")
_STEPS = 10**8  # of a regex that tries every way: about a second


@dataclass(frozen=True, slots=True)
class Settings:
    """A config as it stands, with the rules that read it; nothing is refused but values of a wrong type.

    Args:
        raw: The whole object.
        path: Where it was read.
    """

    raw: Mapping[str, Any]
    path: Path

    def text(self, key: str) -> str | None:
        """A text, or None."""
        return self._of(key, str)  # type: ignore[no-any-return]

    def flag(self, key: str) -> bool:
        """A switch; off where it is absent."""
        return bool(self._of(key, bool))

    def names(self, key: str) -> tuple[str, ...]:
        """A list of names; a single text counts as one."""
        value = self.raw.get(key)
        if isinstance(value, str):
            return (value,)
        found = value or []
        if not isinstance(found, list) or not all(isinstance(v, str) for v in found):
            raise InputError(f"{key} is no list of texts", where=str(self.path))
        return tuple(found)

    def _of(self, key: str, kind: type) -> Any:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, kind):
            raise InputError(f"{key} is {value!r}, expected {kind.__name__}", where=str(self.path))
        return value

    @property
    def task_type(self) -> str | None:
        """The task type, by which PEFT chooses the model's class."""
        return self.text("task_type")

    @property
    def declared(self) -> tuple[str, ...]:
        """`modules_to_save` as it stands in the file."""
        return self.names("modules_to_save")

    @property
    def saved(self) -> tuple[str, ...]:
        """Modules kept whole beside the factors: those declared, those of the task type, and what is tied to them."""
        tied = (OUTPUT,) if self._ties(self.declared) else ()
        return tuple(dict.fromkeys((*self.declared, *HEADS_OF.get(self.task_type or "", ()), *tied)))

    def _ties(self, modules: Iterable[str]) -> bool:
        """Whether the output embedding follows these modules: one is an input embedding, and the config says to tie."""
        return self.flag("ensure_weight_tying") and any(m.rpartition(".")[2] in LOOKED_UP for m in modules)

    def saved_as(self, parameter: str) -> str | None:
        """The module kept whole that a parameter belongs to: PEFT takes every module whose name ends in a declared one."""
        parts = parameter.split(".")
        modules = [".".join(parts[:n]) for n in range(1, len(parts))]
        return next((m for m in modules if m.endswith(self.saved)), None) if self.saved else None

    def number(self, key: str, default: float) -> float:
        """A number."""
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{key} is {value!r}, expected a number", where=str(self.path))
        return value

    def pattern(self, key: str, module: str, default: str, fallback: float) -> float:
        """A module's own rank or alpha: the first key that the module's name ends in, else the default.

        The output layer inside a multi-head attention has what the attention's name has.
        """
        module = module.partition(".base_layer.")[0]
        table = self.raw.get(key) or {}
        if not isinstance(table, dict):
            raise InputError(f"{key} is no object", where=str(self.path))
        for name, value in table.items():
            if _ends_in(module, name):
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise InputError(f"{key}[{name}] is {value!r}, expected a number", where=str(self.path))
                return value
        return self.number(default, fallback)

    def rank_of(self, module: str) -> float:
        """The rank that is allocated for a module."""
        return self.pattern("rank_pattern", module, "r", 8)

    def ranks_of(self, module: str) -> set[float]:
        """Ranks that may be allocated for a module: one, but for several parameters that its name stands for."""
        container = re.sub(r"(\.base_layer)+$", "", module)
        parameters = {f"{container}.{t.rpartition('.')[2]}" for t in self.parameters_in(container)}
        own = {module} if not parameters or self.is_target(module) else set()  # a layer may be a target itself
        return {self.rank_of(name) for name in parameters | own}

    def alpha_of(self, module: str) -> float:
        """A module's alpha."""
        return self.pattern("alpha_pattern", module, "lora_alpha", 8)

    def is_target(self, module: str) -> bool:
        """Whether a module of this name gets factors, by `target_modules`, exclusions and layers; it may, where a base has to tell."""
        excluded = self.raw.get("exclude_modules")
        if isinstance(excluded, str) and matches(rf"(?:{excluded})\Z", module) is not False:
            return False
        if isinstance(excluded, list) and any(is_at(module, str(e)) for e in excluded):
            return False
        if any(matches(rf"(^|.*\.){re.escape(m)}($|\..*)", module) for m in self.saved):
            return False
        wanted = self.raw.get("target_modules")
        if wanted == "all-linear":
            return True
        if isinstance(wanted, str):
            return matches(rf"(?:{wanted})\Z", module) is not False
        targets = self.names("target_modules")
        if is_at(module, OUTPUT) and self._ties(targets):
            return True
        return any(is_at(module, t) for t in targets) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        layers = self.raw.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.names("layers_pattern")
        found = re.match(r".*?\.[^.]*\.(\d+)\.", module) if not patterns else None
        for pattern in patterns:
            found = found or re.match(rf"(?:^|.*?\.){re.escape(pattern)}\.(\d+)\.", module)
        return found is not None and int(found[1]) in (layers if isinstance(layers, list) else [layers])

    def parameters_in(self, container: str) -> list[str]:
        """Names of `target_parameters` that lie in a module, in no order that means anything.

        PEFT nests their factors as the module's class defines the parameters, the first of them innermost, whatever the
        order of the names; so names alone do not tell which factors belong to which of them.
        """
        found = sorted(set(self.names("target_parameters")))
        return [t for t in found if is_at(container, t.rpartition(".")[0]) or "." not in t]


def is_at(module: str, name: str) -> bool:
    """Whether a name in a list of the config means a module: all of its name, or the words that it ends in.

    `plait.border.module_names` says the same to the readers and writers, which this room does not take at their word.
    """
    return module == name or module.endswith(f".{name}")


def _ends_in(module: str, key: str) -> bool:
    """Whether a key of a pattern fits a module: as a regex, from a dot or the start of the name up to its end."""
    if _PLAIN.fullmatch(
        key
    ):  # thousands of modules times thousands of keys: no regex for a name, whose dots fit anything
        end = module[-len(key) :]
        before = module[: -len(key)]
        return (
            len(end) == len(key)
            and before[-1:] in ("", ".")
            and all(k in (c, ".") for k, c in zip(key, end, strict=True))
        )
    return matches(rf"(.*\.)?({key})$", module) is True


def read_settings(folder: Path) -> Settings:
    """The config of an adapter folder."""
    return Settings(read_object(folder / CONFIG), folder / CONFIG)


def matches(pattern: str, text: str) -> bool | None:
    """Whether a foreign regex matches from the start; None where it is none, or where finding out could take forever."""
    try:
        compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return None
    if len(text) ** min(_ways(pattern), 30) > _STEPS or _nested(pattern):
        return None
    return compiled.match(text) is not None


def _ways(pattern: str) -> int:
    """How many repetitions without an end a pattern has."""
    return len(re.findall(r"(?<!\\)(?:[*+]|\{\d*,\})", pattern))


def _nested(pattern: str) -> bool:
    """Whether a group that repeats or offers a choice is itself repeated without an end: ways then multiply with length."""
    return any(
        re.match(r"[*+]|\{\d*,", pattern[end + 1 :]) and re.search(r"[*+?|{]", inside)
        for inside, end in _groups(pattern)
    )


def _groups(pattern: str) -> Iterator[tuple[str, int]]:
    """Every group's inside and the place of its closing bracket."""
    opened: list[int] = []
    escaped = in_set = False
    for i, c in enumerate(pattern):
        if escaped:
            escaped = False
        elif c == "\\":
            escaped = True
        elif in_set or c == "[":
            in_set = c != "]"
        elif c == "(":
            opened.append(i)
        elif c == ")" and opened:
            yield pattern[opened.pop() + 1 : i].removeprefix("?:"), i
