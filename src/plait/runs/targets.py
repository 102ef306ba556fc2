"""Which modules are adapted where nobody says it."""

from __future__ import annotations

from plait.disk.hub import split_revision
from plait.errors import UsageError
from plait.model.base import BaseModel, load_config


def default_targets(base: str) -> list[str]:
    """PEFT's own default target modules for the base's architecture.

    Raises:
        UsageError: PEFT has none for it.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = load_config(BaseModel(*split_revision(base))).model_type
    if kind not in KNOWN:
        raise UsageError(
            f"PEFT has no default target modules for {kind!r}", hint="--target-modules query --target-modules value"
        )
    return sorted(KNOWN[kind])
