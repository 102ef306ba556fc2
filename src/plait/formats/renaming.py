"""Naming an adapter's modules as another class or version of its model does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from plait.adapters.lora import Adapter
from plait.errors import UsageError


def renamed(adapter: Adapter, changes: Sequence[str]) -> Adapter:
    """The adapter with other beginnings of its modules' names; numbers stay as they are.

    Args:
        adapter: Named as PEFT has it.
        changes: ``OLD=NEW`` each, as whole words of dotted names; an empty OLD stands before every name. Each name is changed by
            the first that fits it.

    Raises:
        UsageError: No such name, no "=", or two modules of one name afterwards.
    """
    pairs = [tuple(c.split("=")) for c in changes]
    if wrong := next((c for c, pair in zip(changes, pairs, strict=True) if len(pair) != 2), None):
        raise UsageError(f"--rename {wrong!r} is not OLD=NEW", hint="--rename model.layers=model.language_model.layers")
    used: set[str] = set()

    def name(old: str) -> str:
        for before, after in pairs:
            if not before or old == before or old.startswith(f"{before}."):
                used.add(before)
                rest = old if not before else old[len(before) + 1 :]
                return ".".join(part for part in (after, rest) if part)
        return old

    names = {m: name(adapter.full_name(m)) for m in adapter.modules}
    beside = {k: name(k) for k in (*adapter.extras, *adapter.copies)}
    if lost := next((b for b, _ in pairs if b not in used), None):
        raise UsageError(f"--rename: no module's name begins with {lost!r}", hint=f"such as {next(iter(names), '')!r}")
    if len({*names.values()}) < len(names):
        raise UsageError("--rename gives two modules one name", where=adapter.name)
    return replace(
        adapter,
        modules={n: adapter.modules[m] for m, n in sorted(names.items(), key=lambda pair: pair[1])},
        extras={beside[k]: t for k, t in adapter.extras.items()},
        copies={beside[k]: t for k, t in adapter.copies.items()},
        modules_to_save=tuple(sorted({name(s) for s in adapter.modules_to_save})),
        prefix="",
        target_modules=None,
    )
