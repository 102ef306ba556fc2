"""The readers under attack: what each is fed, how that is changed, and what must hold of what it accepts."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from plait.adapters.lineage import base_adapter
from plait.adapters.lora import Adapter
from plait.adapters.tensors import all_finite
from plait.cli.output import jsonable
from plait.disk.manifest import CARD, MANIFEST, sealed
from plait.errors import PlaitError
from plait.formats.inspect import inspect
from plait.formats.reading import read_any
from plait.merging.changes import recorded
from plait.merging.mergekit import read_mergekit_config
from plait.recipes.recipe_file import read_recipe, variant_of
from plait.statistics.files import read_identity, read_statistics
from plait.statistics.fisher import is_fisher, read_fisher
from plait.statistics.inspect import check_statistics
from plait.statistics.lazy import open_statistics
from tests.fuzz import mutate, seeds
from tests.fuzz.seeds import Files

Mutation = Callable[[Files, random.Random], Files]


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of file.

    Args:
        what: Its name in reports.
        seeds: Makes valid ones.
        change: Changes one.
        file: What it is called on disk; "" for a folder.
        read: Reads it, raises `PlaitError` or nothing, and asserts what must hold of what was accepted.
        share: Of all inputs.
    """

    what: str
    seeds: Callable[[], list[Files]]
    change: Mutation
    file: str
    read: Callable[[Path], object]
    share: float


class Broken(Exception):
    """Something was accepted that does not hold."""


def held(true: bool, what: str) -> None:
    """What must hold of an accepted input."""
    if not true:
        raise Broken(what)


def _sound(adapter: Adapter) -> None:
    held(bool(adapter.modules), "no modules")
    for name, f in adapter.modules.items():
        held(math.isfinite(f.scaling) and f.scaling > 0, f"scaling of {name}")
        held(f.A.shape[0] == f.B.shape[1] >= 1, f"rank of {name}")
        held(all_finite(f.A) and all_finite(f.B), f"numbers of {name}")


def _as_written(adapter: Adapter, folder: Path) -> None:
    """The scalings worked out once more from the config, strictly and by Python's own regexes."""
    raw = json.loads((folder / "adapter_config.json").read_bytes().decode("utf-8-sig"))
    flags = {k: raw.get(k) for k in ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias")}
    held(all(v is None or isinstance(v, bool) for v in flags.values()), f"flags {flags}")
    for module, f in adapter.modules.items():
        name = adapter.full_name(module)
        keys = (k for k in raw.get("alpha_pattern") or {} if re.match(rf"(.*\.)?({k})$", name))
        alpha = (raw.get("alpha_pattern") or {}).get(next(keys, None), raw.get("lora_alpha", 8))
        rank = math.sqrt(f.A.shape[0]) if raw.get("use_rslora") else f.A.shape[0]
        held(f.scaling == alpha / rank, f"scaling of {module} is {f.scaling}, {alpha} / {rank} was written")


def _read_folder(path: Path) -> None:
    _as_written(_read_file(path), path)
    base_adapter(path)
    with contextlib.suppress(PlaitError):  # that it is no merge
        recorded(path)


def _read_file(path: Path) -> Adapter:
    """Read; every fourth time, by its size, also told about."""
    try:
        adapter = read_any(path)
        _sound(adapter)
        return adapter
    finally:
        if sum(p.stat().st_size for p in [path, *path.glob("*")]) % 4 == 0:
            json.dumps(jsonable(inspect(path)), allow_nan=False)


def _read_statistics(path: Path) -> None:
    read_identity(path)
    whole = read_statistics(path)
    sites = open_statistics(path).sites
    for name, m in whole.sites.items():
        held(m.count >= 0 and m.error >= 0 and math.isfinite(m.error) and all_finite(m.second), f"site {name}")
        held(sites[name].count == m.count, f"site {name}, opened")
    json.dumps(asdict(check_statistics(whole)))


def _read_fisher(path: Path) -> None:
    is_fisher(path)
    found = read_fisher(path)
    held(found.examples >= 1, "examples")
    for name, d in found.modules.items():
        rows = d.rows(0, d.shape[0])
        held(bool((rows >= 0).all()) and all_finite(rows), name)


def _read_recipe(path: Path) -> None:
    found = read_recipe(path)
    for arm in found.arm_specs:
        held(found.training_of(arm).lr > 0, "rate")
    held(all(0 < s < math.inf for m in found.merge_specs for s in found.scales_of(m)), "scales")
    json.dumps(found.model_dump(mode="json"), allow_nan=False)
    for variant in found.variants:
        held(bool(variant_of(found, variant.name).arms), f"arms of {variant.name}")


def _read_mergekit(path: Path) -> None:
    folders, spec = read_mergekit_config(path)
    held(all(math.isfinite(w) for w in [*(spec.weights or ()), spec.scale or 0.0]), "weights")
    held(len(spec.weights or ()) == len(folders) > 0, "folders")


def _change_folder(files: Files, rng: random.Random) -> Files:
    """One file changed, or left out; the manifest sealed again, mostly, so that what is behind it is looked at."""
    files = dict(files)
    name = rng.choice(list(files))
    if rng.random() < 0.02:
        files.pop(name)
    elif name.endswith(".safetensors"):
        files[name] = mutate.safetensors(files[name], rng)
    elif name.endswith(".json"):
        files[name] = mutate.json_file(files[name], rng)
    else:
        files[name] = mutate.raw(files[name], rng)
    if MANIFEST in files and rng.random() < 0.9:
        files[MANIFEST] = _sealed(files)
    return files


def _sealed(files: Files) -> bytes:
    import hashlib

    try:
        record: Any = json.loads(files[MANIFEST])
        listed = {n: (len(d), hashlib.sha256(d).hexdigest()) for n, d in files.items() if n not in (MANIFEST, CARD)}
        return json.dumps(
            sealed({k: v for k, v in record.items() if k not in ("files", "sizes", "manifest_sha256")}, listed)
        ).encode()
    except Exception:  # no manifest any more, or one that cannot be sealed
        return files[MANIFEST]


def _one(change: Callable[[bytes, random.Random], bytes]) -> Mutation:
    return lambda files, rng: {"": change(files[""], rng)}


def _dumped(value: Any) -> str:
    """A tree as YAML: JSON is YAML, but for the names of what is no number."""
    return json.dumps(value).replace("NaN", ".nan").replace("Infinity", ".inf")


def _loaded(data: bytes) -> Any:
    return yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 (both are safe)


_YAML = _one(mutate.yaml_file(_loaded, _dumped))
TARGETS = (
    Target("adapter folders", seeds.adapter_folders, _change_folder, "", _read_folder, 0.05),
    Target(
        "statistics files",
        seeds.statistics_files,
        _one(mutate.safetensors),
        "x.stats.safetensors",
        _read_statistics,
        0.25,
    ),
    Target(
        "LoRA files of kohya and diffusers",
        seeds.lora_files,
        _one(mutate.safetensors),
        "x.safetensors",
        _read_file,
        0.2,
    ),
    Target("Fisher files", seeds.fisher_files, _one(mutate.safetensors), "x.fisher.safetensors", _read_fisher, 0.32),
    Target(
        "recipes and studies",
        lambda: [{"": r} for r in (seeds.RECIPE, seeds.STUDY, seeds.WHOLE)],
        _YAML,
        "x.yaml",
        _read_recipe,
        0.05,
    ),
    Target("mergekit recipes", lambda: [{"": m} for m in seeds.MERGEKITS], _YAML, "x.yaml", _read_mergekit, 0.13),
)


def write(files: Files, place: Path, name: str) -> Path:
    """Put an input where its reader finds it."""
    if name:
        (place / name).write_bytes(files[""])
        return place / name
    shutil.rmtree(place / "x", ignore_errors=True)
    for file, data in files.items():
        path = place / "x" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return place / "x"


def attempt(target: Target, path: Path) -> tuple[bool, BaseException | None]:
    """Whether an input was accepted, and what it made fall that is none of plait's own errors."""
    try:
        target.read(path)
    except PlaitError:
        return False, None
    except Exception as e:  # what nobody foresaw
        return False, e
    return True, None
