"""Weighted sums of adapter folders without torch: header, NumPy, hash, flush, and the result read again.

`linear`, `cat` and `task_arithmetic` only put factors beside each other, which takes less time than importing torch. Everything
around that is shared with merges by torch (reading, alignment, scale, record, writing), and so are the bytes of the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from plait.adapters.arrays import NoArrayError, all_finite, array_of, shape_of, zeros
from plait.adapters.carried import require_exact, verify_carried
from plait.adapters.config import CONFIG
from plait.adapters.file_bytes import Check, Mapped, begin_arrays
from plait.adapters.hashing import Digest, Hashing
from plait.adapters.lora import Adapter, LoraFactors
from plait.adapters.memory import let_go
from plait.adapters.naming import split_name
from plait.adapters.peft_format import begin_adapter, write_adapter
from plait.adapters.weights import WEIGHTS
from plait.border.records import to_json
from plait.disk import store
from plait.disk.hub import adapter_place
from plait.disk.overwriting import require_apart
from plait.disk.space import require_space
from plait.disk.written import Written, standing
from plait.errors import RunError
from plait.merging.align import align, assembled
from plait.merging.combinations import Combination, as_given, normalised
from plait.merging.kinship import with_kin
from plait.merging.light.rounded_sums import rounded_sum
from plait.merging.light.sums import Part, probes_by_width, require_verified, stored_sum, sum_error
from plait.merging.light.threads import cores, in_threads
from plait.merging.record import MergeRecord, input_hashes
from plait.merging.request import MergeRequest
from plait.merging.rounding import Rounding, dtype_for, overflow
from plait.merging.scales import SUMS, default_is_sum
from plait.merging.shared import with_one_root
from plait.merging.terms import Terms, require_multipliers, scale_of, weights_of

T = TypeVar("T")

# Bytes of inputs from which a second thread is worth starting, and the most threads: each holds one module of all inputs.
_LARGE, _MOST = 1 << 26, 4
_METHODS: Mapping[str, Combination] = MappingProxyType(
    {"linear": normalised, "task_arithmetic": as_given, "cat": as_given}
)


@dataclass(frozen=True, slots=True)
class Sum:
    """One of the methods that are sums, where it is not run."""

    name: str
    combination: Combination
    concatenates: bool = True


def sum_of_folders(request: MergeRequest) -> Written[MergeRecord] | None:
    """Answer a request without torch; None where that cannot be done, and nothing was written.

    Raises:
        UsageError, InputError: As merging by torch raises them.
        RunError: What was written is not what was asked for.
    """
    start = time.perf_counter()
    method = sum_of(request) if request.format is None else None
    places = [(name, adapter_place(path)) for name, path in map(split_name, request.folders)] if method else []
    if method is None or request.out is None or not all(_is_plain(path) for _, path in places):
        return None
    try:
        # What is small is read: asking for a mapping and giving it back takes longer.
        mapped = Mapped() if sum((path / WEIGHTS).stat().st_size for _, path in places) > _LARGE else None
        begin = partial(begin_arrays, mapped=mapped)
        with Hashing() as hashing:
            begun = [begin_adapter(path, hashing, name=name, begin=begin) for name, path in places]
            adapters = [rest() for rest in begun]
        if len({a.name for a in adapters}) < len(adapters):
            return None
        require_apart(request.out, [str(path) for _, path in places])
        terms = terms_of(request, method, adapters)
        if terms.is_unchanged():
            return None
        written = _write(terms, request, request.out, mapped)
    except NoArrayError:
        return None
    return written if written.reused else replace(written, seconds_merge=time.perf_counter() - start)


def sum_of(request: MergeRequest) -> Sum | None:
    """Give the method of a request that asks for a sum and nothing else; None of others."""
    spec = request.spec
    summed = default_is_sum(len(request.folders), weighted=spec.is_weighted)  # all other defaults are no sums
    name = spec.method or (SUMS[0] if summed else "")
    other = request.bake_into or request.per_task or request.curve or request.stack or request.statistics
    more = spec.options or spec.rank is not None or spec.calibrate or spec.module_weights is not None
    if name not in _METHODS or other or more or spec.device != "cpu":
        return None
    return Sum(name, _METHODS[name])


def _is_plain(folder: Path) -> bool:
    """Whether it is a folder of PEFT's with weights in one file or in shards, and nothing that reads like mlx-lm's."""
    return folder.is_dir() and (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def terms_of(request: MergeRequest, method: Sum, adapters: Sequence[Adapter]) -> Terms:
    """Give the merge with everything checked, in the order of `plait.merging.planning.plan_merge`."""
    spec, given = request.spec, tuple(a.name for a in adapters)
    weights = weights_of(adapters, spec.weights)
    order = sorted(range(len(adapters)), key=lambda i: given[i])  # `MergeMethod.order_of`
    adapters, weights = with_one_root([adapters[i] for i in order]), tuple(weights[i] for i in order)
    common = align(adapters, spec.base, disjoint=spec.disjoint)
    ruled = scale_of(method.name, spec, weights, by_module=False)
    require_multipliers(adapters, weights, {}, ruled.value, method.combination)
    require_exact(adapters, [c * ruled.value for c in method.combination(weights)], method.name)
    return Terms(spec, method, {}, common, tuple(adapters), weights, ruled.value, ruled.reason, {}, given)


def _write(terms: Terms, request: MergeRequest, out: Path, mapped: Mapped | None) -> Written[MergeRecord]:
    took = rounding_for(request, terms)
    wanted = store.identity("merge", terms.settings(), input_hashes(terms.adapters), terms.seed)
    wanted["options"] |= took.identity
    if (before := standing(out, wanted, MergeRecord, overwrite=request.overwrite)) is not None:
        return before
    require_space(out, sum(a.nbytes for a in terms.adapters))
    result: dict[str, Any] = {}
    verifying: list[float] = []
    verify = (lambda stage: verifying.append(_verified(terms, stage, result, mapped))) if request.verify else None

    def check(stage: Path) -> None:
        if verify:
            verify(stage)
        if mapped:
            mapped.require_unchanged()

    digests: dict[str, Digest] = {}
    shapes = shapes_of(terms, out.name, took.dtype)
    with (
        Hashing() as hashing,
        store.staged_folder(
            out, wanted, overwrite=request.overwrite, result=result, check=check, digests=digests
        ) as stage,
    ):
        digests |= write_adapter(stage, shapes, lambda put: sum_to(terms, put, took, mapped), hashing)
        record = terms.record(shapes.modules, dict.fromkeys(shapes.modules, 0.0))
        record = took.noted(with_kin(record, terms))
        result |= to_json(record)
    record = replace(record, verification_error=result["verification_error"])
    return Written(record, str(out), seconds_verify=sum(verifying))


def rounding_for(request: MergeRequest, terms: Terms) -> Rounding:
    """Give what rounds the sum to the type that was asked for."""
    widths = {w for (_, w), _ in terms.common.modules.values()}
    return Rounding(dtype_for(request.dtype, terms.adapters), widths, terms.seed)


def shapes_of(terms: Terms, name: str, dtype: str) -> Adapter:
    """Give the result with shapes in the place of factors."""
    return assembled(name, terms.common, terms.adapters, {m: _shape(terms, m, dtype) for m in terms.common.modules})


def _shape(terms: Terms, module: str, dtype: str) -> LoraFactors:
    (out, width), kind = terms.common.modules[module]
    rank = max(1, sum(f.rank for _, f in terms.parts(module)))
    return LoraFactors(shape_of((rank, width), dtype), shape_of((out, rank), dtype), 1.0, kind)  # type: ignore[arg-type]


def _parts(terms: Terms, module: str) -> Sequence[Part]:
    """What is added up in a module; a zero of rank 1 where nothing is."""
    if parts := terms.parts(module):
        return parts
    (out, width), kind = terms.common.modules[module]
    return [(1.0, LoraFactors(zeros((1, width)), zeros((out, 1)), 1.0, kind))]  # type: ignore[arg-type]


def sum_to(terms: Terms, put: Callable[[str, LoraFactors], None], took: Rounding, mapped: Mapped | None = None) -> None:
    """Add every module up and hand it on; none is held.

    Args:
        terms: The merge.
        put: Takes (module, factors), from any thread.
        took: Rounds.
        mapped: The files of the inputs, where those lie in the files' own pages.

    Raises:
        RunError: A number that the type does not hold.
    """

    def one(module: str) -> None:
        parts = _parts(terms, module)
        if took.rounds:
            total = rounded_sum(parts, took.dtype, took.probes_of(terms.common.modules[module][0][1]))
            stored, finite = total.factors, total.finite
        else:
            stored = stored_sum(parts, took.dtype)[1]
            finite = all_finite(array_of(stored.B))
        if not finite:
            hint = "a smaller --scale or other weights?"
            raise RunError(f"{terms.method.name} gave NaN or infinity", where=module, hint=hint)
        if took.rounds:
            if not total.fits:
                raise overflow(took.dtype, module)
            took.note_taken(module, total.taken)
        put(module, stored)

    _each(terms, one, mapped)


def _each(terms: Terms, function: Callable[[str], T], mapped: Mapped | None) -> list[T]:
    """The function of every module, in order; side by side where that repays the threads."""

    def one(module: str) -> T:
        result = function(module)
        if mapped:
            factors = [a.modules[module] for a in terms.adapters if module in a.modules]
            mapped.passed(sum(f.A.nbytes + f.B.nbytes for f in factors))
        return result

    names, count = list(terms.common.modules), cores(_MOST)
    if count == 1 or sum(a.nbytes for a in terms.adapters) < _LARGE:
        return [one(m) for m in names]
    return in_threads(one, names, count, _nothing)


def _nothing() -> None:
    """NumPy's threads need no setting."""


def largest_error(terms: Terms, written: Mapping[str, LoraFactors], mapped: Mapped | None = None) -> float:
    """Give the largest relative difference of a written module from the sum of its inputs.

    Args:
        terms: The merge.
        written: The result, in its file's own pages, which are given back as they are passed.
        mapped: See `sum_to`.

    Raises:
        RunError: The result holds other modules.
    """
    if written.keys() != terms.common.modules.keys():
        raise RunError("what was written holds other modules", where=terms.method.name, hint="please report this")
    probes = probes_by_width({f.shape[1] for f in written.values()}, terms.seed)

    def one(module: str) -> float:
        factors = written[module]
        error = sum_error(_parts(terms, module), factors, probes[factors.shape[1]])
        let_go(factors.A, factors.B)
        return error

    return max(_each(terms, one, mapped), default=0.0)


def _verified(terms: Terms, stage: Path, result: dict[str, Any], mapped: Mapped | None) -> float:
    """Read what was written, one module at a time, and compare it with the inputs; the seconds that took."""
    start = time.perf_counter()
    # It is hashed beside this; and whether its numbers are finite, the comparison with finite ones says.
    written = begin_adapter(stage, None, name="written", begin=_whatever_they_are)()
    verify_carried(terms.common.carried, written)
    result["verification_error"] = largest_error(terms, written.modules, mapped)
    require_verified(result["verification_error"], terms.method.name)
    return time.perf_counter() - start


def _whatever_they_are(path: Path, hashing: Hashing | None, *, check: Check | None = None, finite: bool = False) -> Any:
    """Read a file's arrays and do not look whether they are `finite`."""
    return begin_arrays(path, hashing, check=check)
