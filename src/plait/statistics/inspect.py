"""Looking at statistics files: what is in one, how two differ, whether one is sound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from plait.adapters.one_thread import in_one_thread
from plait.border.counts import plural
from plait.errors import InputError
from plait.statistics.agreement import require_compatible
from plait.statistics.moments import Moments, Statistics

# A float32 sum of PSD terms may have eigenvalues below zero by rounding: d * eps of the largest, with room.
NEGATIVE_BY_ROUNDING = 1e-4


@dataclass(frozen=True, slots=True)
class SiteSummary:
    """One site in numbers.

    Args:
        dim: Width.
        count: Inputs that were added up.
        form: "dense" or "factor".
        rows: Rows of the stored second moment.
        relative_error: Bound of a sketch's error, over the trace.
        mean_square: Mean square of an input's entries.
        effective_rank: exp(entropy) of the normalised eigenvalues.
        top1, top8: Fractions of the trace in the largest eigenvalues.
        readers: Modules that read it.
    """

    dim: int
    count: int
    form: str
    rows: int
    relative_error: float
    mean_square: float
    effective_rank: float
    top1: float
    top8: float
    readers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModulePlace:
    """Where a module stands: the site it reads, and its weight's (out, in)."""

    site: str
    shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a statistics file holds.

    Args:
        provenance: Its record.
        sites: Name -> summary.
        modules: Name -> place.
        output_gradients: Module -> summary of the gradients at its output; empty where there are none.
    """

    provenance: Mapping[str, Any]
    sites: Mapping[str, SiteSummary]
    modules: Mapping[str, ModulePlace]
    output_gradients: Mapping[str, SiteSummary]


def show_statistics(statistics: Statistics) -> Contents:
    """Summarise the provenance, the sites, the output gradients and each spectrum.

    Cost: one eigen-decomposition per site, and one per module that has output gradients.
    """
    readers: dict[str, tuple[str, ...]] = {}
    for name, info in statistics.modules.items():
        readers[info.site] = (*readers.get(info.site, ()), name)
    sites = {s: replace(summary(m), readers=readers.get(s, ())) for s, m in statistics.sites.items()}
    modules = {n: ModulePlace(i.site, i.shape) for n, i in statistics.modules.items()}
    gradients = {n: summary(m) for n, m in statistics.output_gradients.items()}
    return Contents(dict(statistics.provenance), sites, modules, gradients)


def summary(moments: Moments) -> SiteSummary:
    """Summarise one site.

    >>> two = Moments(4, torch.zeros(2), torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> summary(two).top1
    0.75
    """
    trace = moments.trace
    values = spectrum(moments)
    shares = values / values.sum() if trace > 0 else values
    entropy = -(shares[shares > 0] * shares[shares > 0].log()).sum()
    return SiteSummary(
        dim=moments.dim,
        count=moments.count,
        form=moments.form,
        rows=moments.second.shape[0],
        relative_error=moments.error / trace if trace > 0 else 0.0,
        mean_square=trace / max(1, moments.count * moments.dim),
        effective_rank=float(entropy.exp()) if trace > 0 else 0.0,
        top1=float(shares[:1].sum()),
        top8=float(shares[:8].sum()),
    )


def spectrum(moments: Moments) -> torch.Tensor:
    """Eigenvalues of S, largest first, clamped at zero."""
    if moments.form == "factor" and moments.residual is None:
        singular: torch.Tensor = in_one_thread(torch.linalg.svdvals, moments.second.double())
        return singular.square()
    values: torch.Tensor = in_one_thread(torch.linalg.eigvalsh, moments.dense().double())
    return values.flip(0).clamp_min(0)


@dataclass(frozen=True, slots=True)
class SiteDifference:
    """How two sites of equal width differ; NaN where one of them is zero.

    Args:
        overlap: tr(m_a m_b) / (|m_a| |m_b|), m the trace-normalised moments.
        mean_cosine: Cosine of the means.
        relative_difference: |m_a - m_b| / |m_a|.
    """

    overlap: float
    mean_cosine: float
    relative_difference: float


@dataclass(frozen=True, slots=True)
class Difference:
    """How two statistics differ.

    Args:
        compatible: Whether they may be added.
        reason: Why not.
        provenance: Key -> its two values, where they differ.
        sites: Site of both -> difference.
        output_gradients: Module whose output gradients both hold -> difference.
        drops_output_gradients: Whether their sum is without output gradients though one of them holds some: they are not of the
            same modules.
    """

    compatible: bool
    reason: str | None
    provenance: Mapping[str, tuple[Any, Any]]
    sites: Mapping[str, SiteDifference]
    output_gradients: Mapping[str, SiteDifference]
    drops_output_gradients: bool = False


def diff_statistics(a: Statistics, b: Statistics) -> Difference:
    """Compare two statistics, site by site where both have one of equal width."""
    reason = None
    try:
        require_compatible(a, b)
    except InputError as e:
        reason = str(e)
    pairs = {k: (a.provenance.get(k), b.provenance.get(k)) for k in sorted({*a.provenance, *b.provenance})}
    return Difference(
        reason is None,
        reason,
        {k: (x, y) for k, (x, y) in pairs.items() if x != y},
        _shared(a.sites, b.sites),
        _shared(a.output_gradients, b.output_gradients),
        set(a.output_gradients) != set(b.output_gradients),
    )


def _shared(a: Mapping[str, Moments], b: Mapping[str, Moments]) -> dict[str, SiteDifference]:
    pairs = ((name, a[name], b[name]) for name in a if name in b)
    return {name: _compared(x, y) for name, x, y in pairs if x.dim == y.dim}


def _compared(a: Moments, b: Moments) -> SiteDifference:
    if not (a.trace > 0 and b.trace > 0):
        return SiteDifference(math.nan, math.nan, math.nan)
    x, y = a.normalised(torch.float64), b.normalised(torch.float64)
    return SiteDifference(
        overlap=float((x * y).sum() / (x.norm() * y.norm())),
        mean_cosine=float(torch.nn.functional.cosine_similarity(a.total.double(), b.total.double(), dim=0)),
        relative_difference=float((x - y).norm() / x.norm()),
    )


@dataclass(frozen=True, slots=True)
class Soundness:
    """Whether statistics can be what they say.

    Args:
        ok: No problems.
        problems: What cannot be.
        warnings: What is legal, and worth knowing: too few inputs, sketches, a quantised base.
    """

    ok: bool
    problems: tuple[str, ...]
    warnings: tuple[str, ...]


def check_statistics(statistics: Statistics) -> Soundness:
    """Check that statistics are finite, symmetric, positive semidefinite and of consistent counts."""
    problems: list[str] = []
    warnings: list[str] = []
    for site, moments in statistics.sites.items():
        problems += [f"{site}: {p}" for p in _problems(moments)]
        if moments.count < moments.dim:
            warnings.append(
                f"{site}: {plural(moments.count, 'input')} for width {moments.dim}: the moments have a null space"
            )
        warnings += _sketch_warnings(site, moments)
    for name, info in statistics.modules.items():
        if info.site not in statistics.sites:
            problems.append(f"{name}: its site {info.site!r} is missing")
        elif statistics.sites[info.site].dim != info.shape[1]:
            problems.append(
                f"{name}: weight of width {info.shape[1]} at a site of width {statistics.sites[info.site].dim}"
            )
        if not math.isfinite(info.output_energy) or info.output_energy < 0:
            problems.append(f"{name}: output energy {info.output_energy}")
    for name, moments in statistics.output_gradients.items():
        if moments.trace == 0:
            warnings.append(f"{name}: its output gradients are zero: nothing that was predicted depends on it")
        else:
            problems += [f"output gradients of {name}: {p}" for p in _problems(moments)]
            warnings += _sketch_warnings(f"output gradients of {name}", moments)
        module = statistics.modules.get(name)
        if module is None or module.shape[0] != moments.dim:
            problems.append(f"output gradients of {name}: {moments.dim} wide, as no module is")
    warnings += _record_warnings(statistics.provenance)
    return Soundness(not problems, tuple(problems), tuple(warnings))


def _sketch_warnings(where: str, moments: Moments) -> list[str]:
    if not moments.sketched:
        return []
    return [f"{where}: sketched, error at most {moments.error / max(moments.trace, 1e-300):.2e} of the trace"]


def _problems(moments: Moments) -> list[str]:
    parts = [t for t in (moments.total, moments.second, moments.residual, moments.padded_total) if t is not None]
    if not all(bool(t.isfinite().all()) for t in parts):
        return ["holds NaN or infinity"]
    problems = []
    if moments.count < 1 or moments.padded_count < 0:
        problems.append(f"counts {plural(moments.count, 'input')}")
    if moments.residual is not None and bool(
        (moments.residual < -NEGATIVE_BY_ROUNDING * moments.residual.abs().max()).any()
    ):
        problems.append("a negative residual")
    if not moments.trace > 0:
        return [*problems, "its second moment is zero"]
    values = in_one_thread(torch.linalg.eigvalsh, moments.dense().double())
    if float(values[0]) < -NEGATIVE_BY_ROUNDING * float(values[-1]):
        problems.append(
            f"not positive semidefinite: eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}"
        )
    mean = moments.total.double() / max(1, moments.count)
    bound = moments.trace / max(1, moments.count)
    if float(mean @ mean) > bound * 1.001:
        problems.append("the mean is longer than the second moment allows")
    return problems


def _record_warnings(provenance: Mapping[str, Any]) -> list[str]:
    warnings = [
        f"the record does not say its {key}" for key in ("base", "pool", "target_modules") if not provenance.get(key)
    ]
    if provenance.get("quantisation"):
        warnings.append(f"collected on a {provenance['quantisation']} base")
    return warnings
