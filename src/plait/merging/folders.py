"""Merging adapter folders and LoRA files: read, merge, write whole or not at all, verify what was written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from plait.adapters.arrays import KEEP
from plait.adapters.carried import verify_carried
from plait.adapters.hashing import Digest, Hashing
from plait.adapters.lora import Adapter
from plait.adapters.memory import give_back
from plait.adapters.naming import split_name
from plait.adapters.peft_format import begin_adapter, read_adapter, write_adapter
from plait.border.records import to_json
from plait.disk import store
from plait.disk.overwriting import require_apart
from plait.disk.space import require_space
from plait.disk.written import Written, reused, standing
from plait.errors import RunError, UsageError
from plait.formats.convert import read_back, written_error
from plait.formats.keys import PEFT
from plait.formats.reading import begin_any, format_of, with_one_prefix
from plait.formats.recognised import of_images
from plait.formats.writing import checked_format, finished, in_format, write_any
from plait.merging.kinship import with_kin
from plait.merging.light.of_files import sum_of_files
from plait.merging.light.sums import FAILED, require_verified
from plait.merging.plan import Plan
from plait.merging.planning import plan_merge
from plait.merging.record import Layer, MergeRecord, input_hashes
from plait.merging.request import MergeRequest
from plait.merging.rounding import Rounding, dtype_for
from plait.merging.shared import with_one_root
from plait.merging.spec import MergeSettings, MergeSpec
from plait.merging.streamed import known_shapes, stream_to
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
        adapters = with_one_root(with_one_prefix([rest() for rest in begun]))
    names = [a.name for a in adapters]
    if twice := next((n for n in names if names.count(n) > 1), None):
        paths = [Path(str(a.source.get("path", ""))).resolve() for a in adapters if a.name == twice]
        if len(set(paths)) < len(paths):
            raise UsageError(
                f"{twice!r} is given twice",
                hint="leave one of them out; in a merge by --method --weights 2,1 counts an adapter double",
            )
        said = " ".join(_renamed(a) for a in adapters if a.name == twice)
        raise UsageError(f"two adapters are called {twice!r}", hint=f"NAME=DIR names them: {said}")
    return adapters


def _renamed(adapter: Adapter) -> str:
    """``NAME=DIR`` with a name that tells adapters of one name apart: their folder's, or their user's on the hub."""
    path, hub = Path(str(adapter.source.get("path", ""))).resolve(), adapter.source.get("hub")
    return f"{hub.partition('/')[0]}-{adapter.name}={hub}" if hub else f"{path.parent.name}-{adapter.name}={path}"


def places(adapters: Sequence[Adapter]) -> list[str]:
    """Where adapters were read from."""
    return [str(a.source["path"]) for a in adapters if a.source.get("path")]


def merge_folders(
    folders: Sequence[Path | str],
    out: Path | str,
    method: str | MergeSpec | None = None,
    *,
    statistics: Mapping[str, Path | str] | None = None,
    format: str | None = None,
    dtype: str = KEEP,
    verify: bool = True,
    overwrite: bool = False,
    **settings: Unpack[MergeSettings],
) -> Written[MergeRecord]:
    """Merge PEFT folders into one PEFT folder, or LoRA files into one file of their format.

    Args:
        folders: ``PATH`` or ``NAME=PATH`` each.
        out: Folder (or .safetensors file) to write; a finished one of the same identity is kept, another is an error.
        method: A name in `merge_methods()`, or a whole `MergeSpec`; None is TSV-M, for eight plain adapters of language models or
            more Iso-C, for any number of these with statistics of every one RegMean, and the sum for one adapter, for given weights
            and for LoRA files.
        statistics: Task -> its statistics file.
        format: "peft", "kohya", "diffusers" or "mlx"; by default the inputs'.
        dtype: "float32", "bfloat16" or "float16"; "keep" is the inputs' own, where they agree on one of 16 bits, else float32.
        verify: Whether the result is read again before it takes its place, and compared with the inputs.
        overwrite: Whether what stands at `out` is replaced.
        settings: What else a `MergeSpec` holds.

    Returns:
        The record of `merge`, where it was written, and how many seconds it took: from the first file opened to the last one
        closed, verification included, which the disk spends flushing.

    Raises:
        RunError: What was written is not what was asked for; nothing is left at `out`.
    """
    start = time.perf_counter()
    out = Path(out)
    spec = MergeSpec.of(method, settings)
    asked = MergeRequest([*map(str, folders)], out, spec, statistics, format, dtype, verify, overwrite)
    if (done := sum_of_files(asked)) is not None:
        return done
    adapters = read_all(folders)
    require_apart(out, [*places(adapters), *(statistics or {}).values()])
    plan = plan_merge(adapters, spec_for(adapters, spec), statistics=read_statistics_files(statistics))
    written = write_merge(
        plan, out, format=format, dtype=dtype, verify=verify, overwrite=overwrite, statistics=statistics
    )
    return written if written.reused else replace(written, seconds_merge=time.perf_counter() - start)


def write_merge(
    plan: Plan,
    out: Path,
    *,
    format: str | None = None,
    dtype: str = KEEP,
    verify: bool = True,
    overwrite: bool = False,
    statistics: Mapping[str, Path | str] | None = None,
    stack: tuple[Layer, ...] = (),
) -> Written[MergeRecord]:
    """Run a planned merge and write it.

    Args:
        plan: A merge of adapters of one format.
        out: A folder for PEFT, a .safetensors file for the formats of files.
        format: Format of the result; by default the inputs'.
        dtype: Type of its factors, see `merge_folders`.
        verify: Whether the result is read again before it takes its place, and compared with the inputs.
        overwrite: Whether what stands at `out` is replaced.
        statistics: The files that the plan's statistics came from, for the record.
        stack: The adapters from the base upwards, where they were composed.

    Raises:
        RunError: What was written is not what was asked for; nothing is left at `out`.
    """
    start = time.perf_counter()
    took = rounding_of(plan, dtype)
    wanted = identity_of(plan, statistics)
    wanted["options"] |= took.identity
    if format is None and format_of(plan.adapters[0]) == PEFT:
        return _write_folder(plan, out, wanted, took, verify=verify, overwrite=overwrite)
    target = checked_format(format or format_of(plan.adapters[0]))
    wanted["options"]["format"] = target
    if (before := finished(out, wanted, overwrite=overwrite)) is not None:
        return reused(out, before, MergeRecord)
    _require_space(out, plan)
    merged = plan.run(out.name.removesuffix(".safetensors"), took)
    ready = in_format(merged.adapter, target)
    record = replace(with_kin(merged.record, plan), format=target, stack=stack)
    result = to_json(record)

    def check(written: Path) -> None:
        if target == PEFT and (merged.adapter.extras or merged.adapter.copies):
            verify_carried(plan.common.carried, read_adapter(written, name="written"))
        begun = time.perf_counter()
        error = result["verification_error"] = _written_error(plan, merged.adapter, ready, written, target)
        verifying.append(time.perf_counter() - begun)
        if not error <= FAILED:
            raise RunError(f"the written adapter differs from the merge by {error:.2g}", where=plan.method.name)

    verifying: list[float] = []
    write_any(out, ready, target, wanted, result, overwrite=overwrite, check=check if verify else None)
    record = replace(record, verification_error=result["verification_error"])
    return Written(
        record, str(out), seconds_merge=time.perf_counter() - start, seconds_verify=sum(verifying) if verify else None
    )


def _written_error(plan: Plan, merged: Adapter, ready: Adapter, written: Path, target: str) -> float:
    """How far what was written is from what was asked for: by its inputs alone, where its modules have their names."""
    found = read_back(written, target)
    if found.keys() == plan.common.modules.keys():
        return plan.verification_error(found)
    return max(plan.verification_error(merged.modules), written_error(ready, written, target))


def rounding_of(plan: Plan, dtype: str) -> Rounding:
    """What rounds the modules of a plan to the type in which they are written."""
    kind = dtype_for(dtype, plan.adapters, unchanged=plan.is_unchanged() and plan.rank is None)
    return Rounding(kind, {width for (_, width), _ in plan.common.modules.values()}, plan.seed)


def _require_space(out: Path, plan: Plan) -> None:
    """Refuse to begin what will not fit; what a cut to a rank leaves is less than the adapters hold, and not known yet."""
    if plan.rank is None:
        require_space(out, sum(a.nbytes for a in plan.adapters))


def _write_folder(
    plan: Plan, out: Path, wanted: Mapping[str, Any], took: Rounding, *, verify: bool, overwrite: bool
) -> Written[MergeRecord]:
    """Write a PEFT folder from PEFT folders, module by module where shapes are known before."""
    if (before := standing(out, wanted, MergeRecord, overwrite=overwrite)) is not None:
        return before
    _require_space(out, plan)
    result: dict[str, Any] = {}
    verifying: list[float] = []
    check = (lambda stage: verifying.append(_verified(plan, stage, result))) if verify else None
    digests: dict[str, Digest] = {}
    with (
        Hashing() as hashing,
        store.staged_folder(out, wanted, overwrite=overwrite, result=result, check=check, digests=digests) as stage,
    ):
        record = _streamed(plan, stage, out.name, took, hashing, digests)
        result |= to_json(record)
    record = replace(record, verification_error=result["verification_error"])
    return Written(record, str(out), seconds_verify=sum(verifying))


def _streamed(
    plan: Plan, stage: Path, name: str, took: Rounding, hashing: Hashing, digests: dict[str, Digest]
) -> MergeRecord:
    """Merge, write, and let go of what was written: verification reads it from the file."""
    shapes = None if took.dtype == KEEP else known_shapes(plan, name, took.dtype)
    if shapes is not None:
        energies: dict[str, tuple[float, float]] = {}
        digests |= write_adapter(stage, shapes, lambda put: energies.update(stream_to(plan, put, took)), hashing)
        give_back()
        lost = {m: lost for m, (_, lost) in energies.items()}
        record = plan.record(shapes.modules, lost, {m: kept for m, (kept, _) in energies.items()})
        return took.noted(with_kin(record, plan))
    merged = plan.run(name, took)
    digests |= write_adapter(stage, merged.adapter, hashing=hashing)
    record = with_kin(merged.record, plan)
    del merged
    give_back()
    return record


def _verified(plan: Plan, stage: Path, result: dict[str, Any]) -> float:
    """Read what was written and compare it with the inputs; the seconds that took."""
    start = time.perf_counter()
    written = begin_adapter(stage, None, name="written")()  # it is hashed beside this
    verify_carried(plan.common.carried, written)
    error = result["verification_error"] = plan.verification_error(written.modules, mapped=True)
    require_verified(error, plan.method.name)
    return time.perf_counter() - start


def spec_for(adapters: Sequence[Adapter], spec: MergeSpec) -> MergeSpec:
    """Give what a spec means for LoRA files of image models, where there are any; see `MergeSpec.for_files`.

    Folders of mlx-lm are adapters of language models, and mean what the same adapters mean as PEFT folders.
    """
    return spec.for_files() if of_images(adapters) else spec


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
