"""Merging adapter folders: read, merge, write atomically, verify what was written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.adapters.carried import verify_carried
from plait.adapters.hashing import Digest, Hashing
from plait.adapters.lora import Adapter
from plait.adapters.memory import give_back
from plait.adapters.naming import split_name
from plait.adapters.peft_format import begin_adapter, write_adapter
from plait.disk import store
from plait.disk.overwriting import require_apart
from plait.disk.space import require_space
from plait.errors import RunError, UsageError
from plait.formats.keys import PEFT
from plait.formats.reading import begin_any, format_of, with_one_prefix
from plait.merging.driver import plan_merge
from plait.merging.foreseen import foreseen, stream_to
from plait.merging.module_weights import ModuleWeights
from plait.merging.outcome import input_hashes
from plait.merging.plan import Plan
from plait.merging.verify import FAILED
from plait.merging.workers import one_by_one


def read_named(folder: Path | str) -> Adapter:
    """Read ``PATH`` or ``NAME=PATH``, which gives the adapter (and its one head) another name; a folder or a LoRA file."""
    return read_all([folder])[0]


def _begin_named(folder: Path | str, hashing: Hashing) -> Callable[[], Adapter]:
    name, path = split_name(folder)
    return begin_any(path, hashing, name=name)


def read_all(folders: Sequence[Path | str]) -> list[Adapter]:
    """Read several folders, one by one: two readers would mostly wait for Python's lock. Hashes are worked out beside.

    Raises:
        UsageError: Two of one name; names that would do are said.
    """
    with Hashing() as hashing:
        begun = one_by_one(lambda folder: _begin_named(folder, hashing), folders)
        found = [rest() for rest in begun]
    found = with_one_prefix(found)
    names = [a.name for a in found]
    if twice := next((n for n in names if names.count(n) > 1), None):
        paths = [Path(str(a.source.get("path", ""))).resolve() for a in found if a.name == twice]
        if len(set(paths)) < len(paths):
            raise UsageError(f"{twice!r} is given twice", hint="an adapter counts double with --weights")
        said = " ".join(_renamed(a) for a in found if a.name == twice)
        raise UsageError(f"two adapters are called {twice!r}", hint=f"NAME=DIR names them: {said}")
    return found


def _renamed(adapter: Adapter) -> str:
    """``NAME=DIR`` with a name that tells adapters of one name apart: their folder's, or their user's on the hub."""
    path, hub = Path(str(adapter.source.get("path", ""))).resolve(), adapter.source.get("hub")
    return f"{hub.partition('/')[0]}-{adapter.name}={hub}" if hub else f"{path.parent.name}-{adapter.name}={path}"


def places(adapters: Sequence[Adapter]) -> list[str]:
    """Where adapters were read from."""
    return [str(a.source["path"]) for a in adapters if a.source.get("path")]


def merge_folders(
    folders: Sequence[Path | str],
    out: Path,
    *,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    statistics: Mapping[str, Path | str] | None = None,
    rank: int | None = None,
    calibrate: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    verify: bool = True,
    base: str | None = None,
    disjoint: bool = False,
    overwrite: bool = False,
    module_weights: ModuleWeights | None = None,
) -> dict[str, Any]:
    """Merge PEFT folders into one PEFT folder, or LoRA files into one file of their format.

    Args:
        folders: ``PATH`` or ``NAME=PATH`` each.
        out: The folder (or .safetensors file) to write; a finished one of the same identity is kept, another is an error.
        method: A name in `merge_methods()`; None is TSV-M, and the sum for one adapter, for given weights and for LoRA files.
        options: Of the method.
        weights: One per adapter; 1 each by default.
        scale: Multiplies the merged delta; None chooses one without labels (`plait.merging.scales`).
        statistics: Task -> its statistics file.
        rank: Cut every module to this rank at most.
        calibrate: "pico" or None.
        seed: Of random masks and of the randomised SVD.
        device: Where to compute.
        base: Base id of the result where the adapters name one base by different names.
        disjoint: The adapters are meant side by side though they have no module in common.
        verify: Read the result again before it takes its place, and compare it with the inputs.
        overwrite: Replace what stands at `out`.
        module_weights: Adapter -> module pattern -> weight, in place of `weights`; see `module_weights`.

    Returns:
        The record of `merge`, with `seconds_merge` (first file opened to last file closed, verification included),
        `seconds_verify` (which the disk spends flushing) and `output`; `reused` is true where the folder already held this result.

    Raises:
        RunError: What was written is not what was asked for; nothing is left at `out`.
    """
    start = time.perf_counter()
    adapters = read_all(folders)
    require_apart(out, [*places(adapters), *(statistics or {}).values()])
    method, scale = defaults(adapters, method, scale)
    plan = plan_merge(
        adapters,
        method,
        options=options,
        weights=weights,
        scale=scale,
        statistics=read_statistics_files(statistics),
        rank=rank,
        calibrate=calibrate,
        seed=seed,
        device=device,
        base=base,
        disjoint=disjoint,
        module_weights=module_weights,
    )
    if format_of(adapters[0]) != PEFT:
        from plait.merging.to_format import merge_to_format

        return merge_to_format(plan, out, verify=verify, overwrite=overwrite, statistics=statistics)
    wanted = identity_of(plan, statistics)
    if store.is_done(out, wanted, overwrite=overwrite):
        found = store.read_manifest(out) or {}
        return {**found.get("result", {}), "output": str(out), "reused": True}
    require_space(out, sum(a.nbytes for a in adapters))
    result: dict[str, Any] = {}
    verifying: list[float] = []
    check = (lambda stage: verifying.append(_verified(plan, stage, result))) if verify else None
    digests: dict[str, Digest] = {}
    with (
        Hashing() as hashing,
        store.staged_folder(out, wanted, overwrite=overwrite, result=result, check=check, digests=digests) as stage,
    ):
        result |= _written(plan, stage, out.name, hashing, digests)
    seconds = time.perf_counter() - start
    return {**result, "seconds_merge": seconds, "seconds_verify": sum(verifying), "output": str(out), "reused": False}


def _written(plan: Plan, stage: Path, name: str, hashing: Hashing, digests: dict[str, Digest]) -> dict[str, Any]:
    """Merge, write, and let go of what was written: verification reads it from the file."""
    if (shapes := foreseen(plan, name)) is not None:
        found: dict[str, tuple[float, float]] = {}
        digests |= write_adapter(stage, shapes, lambda put: found.update(stream_to(plan, put)), hashing)
        give_back()
        return plan.record(
            shapes.modules, {m: lost for m, (_, lost) in found.items()}, {m: kept for m, (kept, _) in found.items()}
        )
    done = plan.run(name)
    digests |= write_adapter(stage, done.adapter, hashing=hashing)
    record = done.record
    del done
    give_back()
    return record


def _verified(plan: Plan, stage: Path, result: dict[str, Any]) -> float:
    """Read what was written and compare it with the inputs; the seconds that took."""
    start = time.perf_counter()
    written = begin_adapter(stage, None, name="written")()  # it is hashed beside this
    verify_carried(plan.common.carried, written)
    error = result["verification_error"] = plan.verification_error(written.modules)
    if not error <= FAILED:
        raise RunError(
            f"the written adapter differs from the merge of its inputs by {error:.2g}",
            where=plan.method.name,
            hint="nothing was written; please report this",
        )
    return time.perf_counter() - start


def defaults(adapters: Sequence[Adapter], method: str | None, scale: float | None) -> tuple[str | None, float | None]:
    """Method and scale where none was given: LoRA files of image models are added up, since nobody measured them otherwise."""
    if method is None and any(format_of(a) != PEFT for a in adapters):
        return "task_arithmetic", 1.0 if scale is None else scale
    return method, scale


def identity_of(plan: Plan, statistics: Mapping[str, Path | str] | None = None) -> dict[str, Any]:
    """What a merge is: its settings and the hashes of what it reads."""
    inputs = input_hashes(plan.adapters)
    # Hashed while they were read, but where the method does without them.
    read = {a.name: s.sha256 for a, s in zip(plan.adapters, plan.statistics, strict=False)}
    for task, path in (statistics or {}).items():
        inputs[f"statistics:{task}"] = read.get(task) or store.sha256_file(Path(path))
    return store.identity("merge", plan.settings(), inputs, plan.seed)


def read_statistics_files(files: Mapping[str, Path | str] | None) -> dict[str, Any] | None:
    """Task -> moments or Fisher diagonal, whichever its file holds."""
    if files is None:
        return None
    from plait.statistics.files import read_statistics
    from plait.statistics.fisher import is_fisher, read_fisher

    return {
        task: (read_fisher if is_fisher(Path(path)) else read_statistics)(Path(path)) for task, path in files.items()
    }
