"""Where PEFT and a folder's own config part: factors that it leaves out, and fields that PEFT does not know."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from plait.border.counts import plural
from plait.errors import printable
from plait.loading.settings import CONFIG, KNOWN_FIELDS, Settings, read_settings


def untargeted_notes(name: str, folder: Path, modules: Iterable[str]) -> list[str]:
    """Say which factors of an adapter PEFT does not load by the adapter's own config, and what it does not know of the config.

    Args:
        name: What the adapter is called.
        folder: Its folder; one without adapter_config.json says nothing.
        modules: Names of the modules that its file has factors of, as the task's model has them.
    """
    if not (folder / CONFIG).is_file():
        return []
    settings = read_settings(folder)
    if settings.raw.get("peft_type") != "LORA":
        return []
    return [*_of_unknown_fields(name, settings), *_of_left_out(name, settings, modules)]


def _of_unknown_fields(name: str, settings: Settings) -> list[str]:
    """A field of a later PEFT, or of a trainer, may change what the factors mean; PEFT drops it with a warning."""
    unknown = sorted(printable(k, 80) for k, v in settings.raw.items() if k not in KNOWN_FIELDS and v)
    if not unknown:
        return []
    what = f"{', '.join(unknown[:3])}{f' and {len(unknown) - 3} more' if len(unknown) > 3 else ''}"
    return [
        f"{name}: {CONFIG} sets {what}, unknown to PEFT up to 0.21: the factors are read as plain LoRA, as PEFT reads them"
    ]


def _of_left_out(name: str, settings: Settings, modules: Iterable[str]) -> list[str]:
    if not settings.raw.get("target_modules"):
        return []
    left_out = sorted(m for m in modules if not _is_loaded(m, settings))
    if not left_out:
        return []
    more = f" and {plural(len(left_out) - 1, 'module')} more" if len(left_out) > 1 else ""
    return [
        f"{name}: {CONFIG} leaves out {left_out[0]}{more}, whose factors its file holds: PEFT passes over them in silence, and here they "
        "count (was the config edited, or is it another run's?)"
    ]


def _is_loaded(module: str, settings: Settings) -> bool:
    """Whether PEFT gives a module factors; what lies inside a multi-head attention is adapted with it."""
    attention = module.partition(".base_layer.")[0]
    owner = attention.partition("[")[0]  # one expert of a fused weight: a parameter of the module before the last dot
    known = (attention, attention.replace(".base_layer", ""))
    return any(settings.is_target(n) for n in known) or bool(
        settings.parameters_in(attention) or settings.parameters_in(owner.rpartition(".")[0])
    )
