"""Where a LoRA file's scaling stands: beside the factors, in its header, in a config beside the file; or what its format says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from plait.adapters.arrays import array_of, floats
from plait.adapters.config import CONFIG, LARGEST_CONFIG, AdapterConfig, checked_config
from plait.adapters.weights import WEIGHTS
from plait.border.checked import Record, parsed_json
from plait.border.counts import agreed, plural
from plait.border.module_names import named_by
from plait.disk.store import read_json
from plait.errors import InputError
from plait.formats.keys import DIFFUSERS, KOHYA, Parsed
from plait.formats.names import COMPONENTS

if TYPE_CHECKING:
    from torch import Tensor

_JSON = "lora_adapter_metadata"  # diffusers' metadata key: each component's LoRA config, or one config under plain keys
_ALPHA_KEYS = ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")
_RANK_KEYS = ("r", "lora_rank", "rank", "network_dim", "ss_network_dim")
_PARTS = {*COMPONENTS.values()}
_SAME = 1e-6  # relative difference of two scalings that are one, written with few digits


@dataclass(frozen=True, slots=True)
class Scalings:
    """Module -> scaling, and what is to be said of it.

    Args:
        of: One finite number above 0 per module.
        places: Where they stand, other than beside the factors ("the header's transformer.lora_alpha").
        by_format: How many modules have none anywhere, so that their format's rule holds: alpha = rank.
    """

    of: dict[str, float]
    places: tuple[str, ...]
    by_format: int


@dataclass(frozen=True, slots=True)
class _Said:
    """A config that some place states: of one component, or of everything ("")."""

    place: str
    component: str
    config: AdapterConfig
    knows_rank: bool


def scalings_of(
    found: Parsed, ranks: Mapping[str, int], metadata: Mapping[str, str], path: Path, *, written_here: bool
) -> Scalings:
    """The scaling of every module.

    An alpha beside the factors comes first, as every loader has it. Without one the header is asked (a config of its
    component, of all, or the only one there), then a config beside the file. Where all are silent, kohya's rule and that
    of diffusers' and ComfyUI's loaders is alpha = rank; names of no such loader have no rule.

    Args:
        found: The file's factors and alphas.
        ranks: Rank of each module.
        metadata: The file's header.
        path: The file.
        written_here: Whether plait wrote the file, whose silence then means a scaling of 1.

    Raises:
        InputError: Two places that contradict each other or the factors; a config of other modules; an alpha that is
            nowhere, in a file of no format that says what this means.
    """
    of, places, silent = {}, dict[str, None](), []
    for module, rank in ranks.items():
        if module in found.alphas:
            of[module] = _alpha(found.alphas[module], f"{path}: {module}") / rank
        else:
            silent.append(module)
    said = _stated(metadata, path, found.format) if silent else []
    claims, by_format = _claims(said, silent, ranks, path), 0
    for module in silent:
        if claims[module]:
            of[module] = _one(claims[module], module, path)
            places |= dict.fromkeys(s.place for s, _ in claims[module])
        else:
            by_format += not written_here
            of[module] = _rule(module, found.format, said, path, written_here)
    if found.format == KOHYA and len(silent) == len(ranks):
        _require_kohyas_rule(metadata, ranks, path)
    return Scalings(of, tuple(places), by_format)


def alpha_notes(source: Mapping[str, Any]) -> list[str]:
    """What is to be said of an adapter's scalings, a sentence each, from its `source`."""
    found = []
    if places := source.get("alpha_from"):
        found.append(f"alpha comes from {' and '.join(places)}")
    if count := source.get("without_alpha"):
        found.append(
            f"{plural(count, 'module')} came without an alpha: taken as equal to the rank, as {agreed(count, 'its', 'their')} loaders do"
        )
    return found


def _alpha(tensor: Tensor, where: str) -> float:
    value = float(floats(array_of(tensor), np.float64).reshape(-1)[0]) if tensor.numel() == 1 else math.nan
    if not 0 < value < math.inf:
        shown = value if tensor.numel() == 1 else f"a tensor {tuple(tensor.shape)}"
        raise InputError(f"alpha is {shown}, expected one finite number above 0", where=where)
    return value


def _one(hits: list[tuple[_Said, float]], module: str, path: Path) -> float:
    (first, scaling), *others = hits
    for other, value in others:
        if not math.isclose(value, scaling, rel_tol=_SAME):
            raise InputError(
                f"the scaling of {module!r} is {scaling:g} by {first.place} and {value:g} by {other.place}",
                where=str(path),
                hint="one of them is wrong: take it out",
            )
    return scaling


def _rule(module: str, format: str, said: list[_Said], path: Path, written_here: bool) -> float:
    """Scaling 1 where the file's format says that silence means alpha = rank."""
    root = module.partition(".")[0]
    if said and root not in _PARTS and format != KOHYA:
        raise InputError(
            f"{said[0].place} states the scaling of {said[0].component!r}, and the modules are called {module!r}",
            where=str(path),
            hint="rename one of them, or state it in a config beside the file: " + _BESIDE,
        )
    if format == DIFFUSERS and root not in _PARTS and not written_here:
        raise InputError(
            f"alpha is unknown: no tensor, no header and no {CONFIG} beside the file says it, and names such as "
            f"{module!r} are of no format in which that means alpha = rank",
            where=str(path),
            hint=_BESIDE,
        )
    return 1.0


_BESIDE = f'{{"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}} as {CONFIG} beside the file says it'


def _require_kohyas_rule(metadata: Mapping[str, str], ranks: Mapping[str, int], path: Path) -> None:
    """Kohya's loader takes a missing alpha as the rank; a header that tells of another contradicts it."""
    raw = next((metadata[k] for k in _ALPHA_KEYS if k in metadata), None)
    alpha = _number(raw) if raw not in (None, "", "None") else None
    if alpha is not None and all(abs(alpha - rank) > _SAME * rank for rank in ranks.values()):
        raise InputError(
            f"its header tells of alpha {alpha:g} and no module has one, which kohya's loader takes for alpha = rank",
            where=str(path),
            hint="the alphas were lost on the way: convert it again from the original",
        )


# --- what header and config say ---------------------------------------------------------------------------------------


def _claims(
    said: list[_Said], modules: list[str], ranks: Mapping[str, int], path: Path
) -> dict[str, list[tuple[_Said, float]]]:
    """Module -> what speaks of it, and the scaling it states."""
    found: dict[str, list[tuple[_Said, float]]] = {m: [] for m in modules}
    roots = {m.partition(".")[0] for m in ranks}
    # A trainer's header names its own component where ComfyUI's names stand in the file: the only config, the only root.
    alone = len({s.component for s in said} - {""}) == 1 and len(roots) == 1 and not roots & _PARTS
    for s in said:
        called = {m: m for m in modules}
        if s.component and not alone:
            called = {m: m.partition(".")[2] for m in modules if m.partition(".")[0] == s.component}
        elif s.component in roots:
            called = {m: m.partition(".")[2] for m in modules}
        promised = s.config.promised(list(called.values()))
        for module, name in called.items():
            (rank, alpha), own = promised[name], ranks[module]
            if s.knows_rank and rank != own:
                raise InputError(
                    f"{s.place} promises rank {rank} for {module!r}, whose factors have {own}",
                    where=str(path),
                    hint="it is the config of another adapter, or the file was resized",
                )
            if not _targeted(s.config, name):
                raise InputError(f"{s.place} is a config of other modules than {module!r}", where=str(path))
            found[module].append((s, s.config.scaling(alpha, own)))
    return found


def _targeted(config: AdapterConfig, module: str) -> bool:
    targets = config.target_modules
    if not isinstance(targets, tuple) or not targets:
        return True  # a regex is matched against names of the whole model, which a file may have cut
    return any(named_by(module, t) or named_by(t, module) for t in targets)


def _stated(metadata: Mapping[str, str], path: Path, format: str) -> list[_Said]:
    if format == KOHYA:
        return []
    return [*_from_json(metadata, path), *_from_plain_keys(metadata, path), *_beside(path)]


def _from_json(metadata: Mapping[str, str], path: Path) -> list[_Said]:
    if _JSON not in metadata:
        return []
    what = f"its metadata's {_JSON}"
    raw = parsed_json(metadata[_JSON], str(path), what, LARGEST_CONFIG)
    parts: dict[str, dict[str, Any]] = {}
    for key, value in Record.of(raw, str(path), inside=what).values.items():
        component, _, field = key.rpartition(".")
        parts.setdefault(component, {})[field] = value
    found = []
    for component, config in parts.items():
        checked = checked_config({"peft_type": "LORA", **config}, path)
        if config.get("lora_alpha") is not None:
            place = f"the header's {component + '.' if component else ''}lora_alpha"
            found.append(_Said(place, component, checked, "r" in config))
    return found


def _from_plain_keys(metadata: Mapping[str, str], path: Path) -> list[_Said]:
    """``lora_alpha`` and ``r`` as header keys of their own, plain or as ``transformer.lora_alpha``."""
    components = {k.rpartition(".")[0] for k in metadata if k.rpartition(".")[2] in _ALPHA_KEYS}
    found = []
    for component in sorted(components):
        start = f"{component}." if component else ""
        key = next(start + k for k in _ALPHA_KEYS if start + k in metadata)
        if metadata[key] in ("", "None"):
            continue
        alpha, rank = (
            _number(metadata[key]),
            next((metadata[start + k] for k in _RANK_KEYS if start + k in metadata), None),
        )
        if alpha is None:
            raise InputError(f"its header's {key} is {metadata[key]!r}, expected a number", where=str(path))
        config: dict[str, Any] = {"peft_type": "LORA", "lora_alpha": alpha}
        if rank is not None and rank.isdecimal() and len(rank) < 9:
            config["r"] = int(rank)
        slope = metadata.get(f"{start}use_rslora", "false").lower()
        config["use_rslora"] = slope == "true"
        found.append(_Said(f"the header's {key}", component, checked_config(config, path), "r" in config))
    return found


def _beside(path: Path) -> list[_Said]:
    """PEFT's config in the same folder, where the folder has no weights of its own that it is the config of."""
    config = path.parent / CONFIG
    if not config.is_file() or (path.name != WEIGHTS and (path.parent / WEIGHTS).exists()):
        return []
    raw = read_json(config, limit=LARGEST_CONFIG)
    if not isinstance(raw, dict) or raw.get("peft_type") is None or raw.get("lora_alpha") is None:
        return []
    return [_Said(str(config), "", checked_config(raw, config), raw.get("r") is not None)]


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None and len(text) < 40 else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
