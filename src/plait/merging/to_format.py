"""Merging LoRA files of kohya and diffusers, or writing a merge in another format than its inputs have."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.adapters.carried import verify_carried
from plait.adapters.peft_format import read_adapter
from plait.disk.overwriting import require_apart
from plait.errors import RunError
from plait.formats.convert import written_error
from plait.formats.keys import PEFT
from plait.formats.reading import format_of
from plait.formats.writing import checked_format, finished, in_format, write_any
from plait.merging.folders import identity_of, places
from plait.merging.plan import Plan
from plait.merging.verify import FAILED


def is_for_files(folders: Sequence[str], format: str | None) -> bool:
    """Whether a merge concerns LoRA files: an input is one, or a format is asked for."""
    return format is not None or any(f.endswith(_SUFFIX) for f in folders)


_SUFFIX = ".safetensors"


def merge_to_format(
    plan: Plan,
    out: Path,
    *,
    format: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    statistics: Mapping[str, Path | str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run a planned merge and write it as a file (kohya, diffusers) or as PEFT folders.

    Args:
        plan: Of adapters of one format.
        out: A .safetensors file, or a folder for PEFT.
        format: By default the inputs'.
        verify: Read the result again before it takes its place, and compare it with the inputs.
        overwrite: Replace what stands at `out`.
        statistics: The files the plan's statistics came from, for the record.
        more: What else the record should say.

    Returns:
        The record of `merge`, and `format`, `output`, `reused`, `seconds_merge`.

    Raises:
        RunError: What was written is not what was asked for; nothing is left at `out`.
    """
    start = time.perf_counter()
    require_apart(out, [*places(plan.adapters), *(statistics or {}).values()])
    target = checked_format(format or format_of(plan.adapters[0]))
    wanted = identity_of(plan, statistics)
    wanted["options"]["format"] = target
    if (found := finished(out, wanted, overwrite=overwrite)) is not None:
        return {**found.get("result", {}), "output": str(out), "reused": True}
    done = plan.run(out.name.removesuffix(_SUFFIX))
    ready = in_format(done.adapter, target)
    result: dict[str, Any] = {**done.record, "format": target, **(more or {})}

    def check(written: Path) -> None:
        if target == PEFT and (done.adapter.extras or done.adapter.copies):
            verify_carried(plan.common.carried, read_adapter(written, name="written"))
        error = max(plan.verification_error(done.adapter.modules), written_error(ready, written, target))
        result["verification_error"] = error
        if not error <= FAILED:
            raise RunError(f"the written adapter differs from the merge by {error:.2g}", where=plan.method.name)

    write_any(out, ready, target, wanted, result, overwrite=overwrite, check=check if verify else None)
    seconds = time.perf_counter() - start
    return {**result, "output": str(out), "reused": False, "seconds_merge": seconds}
