"""Looking at statistics files: what is in one, how two differ, whether one is sound. JSON-able results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from plait.errors import InputError
from plait.statistics.agreement import require_compatible
from plait.statistics.moments import Moments, Statistics

# A float32 sum of PSD terms may have eigenvalues below zero by rounding: d * eps of the largest, with room.
_NEGATIVE = 1e-4


def show_statistics(statistics: Statistics) -> dict[str, Any]:
    """Provenance, sites and a summary of each spectrum.

    Returns:
        ``{"provenance", "sites": {site: {"dim", "count", "form", "rows", "relative_error", "mean_square",
        "effective_rank", "top1", "top8", "readers"}}, "modules"}``. The effective rank is exp(entropy) of the
        normalised eigenvalues; top1 and top8 are the fractions of the trace in the largest eigenvalues.

    Cost: one eigen-decomposition per site.
    """
    readers: dict[str, list[str]] = {}
    for name, info in statistics.modules.items():
        readers.setdefault(info.site, []).append(name)
    sites = {s: {**summary(m), "readers": readers.get(s, [])} for s, m in statistics.sites.items()}
    modules = {n: {"site": i.site, "shape": list(i.shape)} for n, i in statistics.modules.items()}
    return {"provenance": dict(statistics.provenance), "sites": sites, "modules": modules}


def summary(moments: Moments) -> dict[str, Any]:
    """One site in numbers."""
    trace = moments.trace
    values = spectrum(moments)
    shares = values / values.sum() if trace > 0 else values
    entropy = -(shares[shares > 0] * shares[shares > 0].log()).sum()
    return {
        "dim": moments.dim,
        "count": moments.count,
        "form": moments.form,
        "rows": moments.second.shape[0],
        "relative_error": moments.error / trace if trace > 0 else 0.0,
        "mean_square": trace / max(1, moments.count * moments.dim),
        "effective_rank": float(entropy.exp()) if trace > 0 else 0.0,
        "top1": float(shares[:1].sum()),
        "top8": float(shares[:8].sum()),
    }


def spectrum(moments: Moments) -> torch.Tensor:
    """Eigenvalues of S, largest first, clamped at zero."""
    if moments.form == "factor" and moments.residual is None:
        singular: torch.Tensor = torch.linalg.svdvals(moments.second.double())
        return singular.square()
    values: torch.Tensor = torch.linalg.eigvalsh(moments.dense().double())
    return values.flip(0).clamp_min(0)


def diff_statistics(a: Statistics, b: Statistics) -> dict[str, Any]:
    """How two statistics differ.

    Returns:
        ``{"compatible": bool, "reason": str | None, "provenance": {key: [a, b]}, "sites": {site: {"overlap",
        "mean_cosine", "relative_difference"}}}`` for the sites both have with equal width. Overlap is
        tr(m_a m_b) / (|m_a| |m_b|), relative_difference is |m_a - m_b| / |m_a| of the trace-normalised moments.
    """
    reason = None
    try:
        require_compatible(a, b)
    except InputError as e:
        reason = str(e)
    keys = sorted({*a.provenance, *b.provenance})
    changed = {
        k: [a.provenance.get(k), b.provenance.get(k)] for k in keys if a.provenance.get(k) != b.provenance.get(k)
    }
    shared = [s for s in a.sites if s in b.sites and a.sites[s].dim == b.sites[s].dim]
    return {
        "compatible": reason is None,
        "reason": reason,
        "provenance": changed,
        "sites": {s: _compared(a.sites[s], b.sites[s]) for s in shared},
    }


def _compared(a: Moments, b: Moments) -> dict[str, float]:
    if not (a.trace > 0 and b.trace > 0):
        return {"overlap": math.nan, "mean_cosine": math.nan, "relative_difference": math.nan}
    x, y = a.normalised(torch.float64), b.normalised(torch.float64)
    means = a.total.double(), b.total.double()
    cosine = torch.nn.functional.cosine_similarity(*means, dim=0)
    return {
        "overlap": float((x * y).sum() / (x.norm() * y.norm())),
        "mean_cosine": float(cosine),
        "relative_difference": float((x - y).norm() / x.norm()),
    }


def check_statistics(statistics: Statistics) -> dict[str, Any]:
    """Whether statistics can be what they say: finite, symmetric, positive semidefinite, consistent counts.

    Returns:
        ``{"ok": bool, "problems": [str], "warnings": [str]}``. Too few inputs, sketches and a quantised base are
        warnings: legal, and worth knowing.
    """
    problems: list[str] = []
    warnings: list[str] = []
    for site, moments in statistics.sites.items():
        problems += [f"{site}: {p}" for p in _problems(moments)]
        if moments.count < moments.dim:
            warnings.append(f"{site}: {moments.count} inputs for width {moments.dim}: the moments have a null space")
        if moments.sketched:
            warnings.append(
                f"{site}: sketched, error at most {moments.error / max(moments.trace, 1e-300):.2e} of the trace"
            )
    for name, info in statistics.modules.items():
        if info.site not in statistics.sites:
            problems.append(f"{name}: its site {info.site!r} is missing")
        elif statistics.sites[info.site].dim != info.shape[1]:
            problems.append(
                f"{name}: weight of width {info.shape[1]} at a site of width {statistics.sites[info.site].dim}"
            )
        if not math.isfinite(info.output_energy) or info.output_energy < 0:
            problems.append(f"{name}: output energy {info.output_energy}")
    warnings += _record_warnings(statistics.provenance)
    return {"ok": not problems, "problems": problems, "warnings": warnings}


def _problems(moments: Moments) -> list[str]:
    parts = [t for t in (moments.total, moments.second, moments.residual, moments.padded_total) if t is not None]
    if not all(bool(t.isfinite().all()) for t in parts):
        return ["holds NaN or infinity"]
    found = []
    if moments.count < 1 or moments.padded_count < 0:
        found.append(f"counts {moments.count} inputs")
    if moments.residual is not None and bool((moments.residual < -_NEGATIVE * moments.residual.abs().max()).any()):
        found.append("a negative residual")
    if not moments.trace > 0:
        return [*found, "its second moment is zero"]
    values = torch.linalg.eigvalsh(moments.dense().double())
    if float(values[0]) < -_NEGATIVE * float(values[-1]):
        found.append(f"not positive semidefinite: eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}")
    mean = moments.total.double() / max(1, moments.count)
    bound = moments.trace / max(1, moments.count)
    if float(mean @ mean) > bound * 1.001:
        found.append("the mean is longer than the second moment allows")
    return found


def _record_warnings(provenance: Mapping[str, Any]) -> list[str]:
    found = [
        f"the record does not say its {key}" for key in ("base", "pool", "target_modules") if not provenance.get(key)
    ]
    if provenance.get("quantisation"):
        found.append(f"collected on a {provenance['quantisation']} base")
    return found
