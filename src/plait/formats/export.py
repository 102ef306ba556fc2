"""Leaving plait: an adapter as one server or library takes it, nothing of plait's own needed to load it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from plait.adapters.config import CLASSIFICATION_TYPES
from plait.adapters.head_config import chosen_head
from plait.adapters.head_files import HEADS
from plait.adapters.lora import EMBEDDING, EXPERT, LINEAR, Adapter, LoraFactors
from plait.adapters.peft_format import read_adapter, write_adapter
from plait.border.records import keyed, optional, to_json
from plait.disk import store
from plait.disk.hub import cached_folder
from plait.disk.manifest import require_wanted
from plait.disk.overwriting import require_apart
from plait.disk.space import require_space
from plait.disk.written import Written, reused, standing
from plait.errors import InputError, RunError, UsageError
from plait.formats.export_notes import GGUF, PEFT, VLLM, next_steps
from plait.formats.gguf_file import (
    base_config,
    gguf_record,
    gguf_tensors,
    require_gguf_seal,
    require_written,
    write_gguf,
)
from plait.formats.gguf_reading import opened_gguf
from plait.loading import accounts, loader_named, require_loadable
from plait.model.files import base_place
from plait.options import did_you_mean

# --max-lora-rank of vLLM; all factors are padded to one of them.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_HEADS = {"classifier", "score"}
_NAMES = {PEFT: PEFT, VLLM: VLLM, GGUF: GGUF, "llama.cpp": GGUF}


@dataclass(frozen=True, slots=True)
class ExportRecord:
    """Say what was written for a loader.

    Args:
        task: The head that went with it.
        base: Base of the adapter.
        modules, rank: How many modules, and their largest rank.
        loader: The loader.
        merged_from: Names of the adapters it was merged from, of a merge.
        labels: Names of the head's classes, where they are known.
        rounding_error: The largest relative error of a B that took its scaling, 0 where that is exact.
        next: The lines that load it.
        num_labels: How many outputs the head has.
        alpha, architecture: What a GGUF file says of both.
    """

    task: str | None
    base: str
    modules: int
    rank: int
    loader: str = keyed("for")
    merged_from: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None
    rounding_error: float = 0.0
    next: str = ""
    num_labels: int | None = None
    alpha: float | None = optional()
    architecture: str | None = optional()


def export(
    source: Path,
    out: Path,
    *,
    loader: str,
    task: str | None = None,
    base: Path | None = None,
    overwrite: bool = False,
) -> Written[ExportRecord]:
    """Write an adapter for one loader.

    Args:
        source: A PEFT folder, trained or merged.
        out: The folder to write; for "gguf" a file.
        loader: "peft": the update with one task's head inside, an ordinary SEQ_CLS folder (or the head's own type).
            "vllm": one rank of `RANKS` by rows of zeros, scalings multiplied into B, so that alpha is the rank.
            "gguf": a LoRA for llama.cpp, float32.
        task: Which head; may be left out where there is one.
        base: Folder of the base, or its name on the hub, whose config "gguf" needs; by default the one that the adapter names,
            where it is a folder or in the hub's cache.
        overwrite: Replace what stands at `out`.

    Raises:
        UsageError: An unknown loader or task.
        InputError: What this loader does not take, with the reason.
        RunError: What was written is not what was to be written; nothing is left.
    """
    if loader not in _NAMES:
        raise UsageError(f"no export for {loader!r}", hint=did_you_mean(loader, _NAMES))
    kind = _NAMES[loader]
    adapter = read_adapter(source)
    require_apart(out, [source, *([base] if base else [])])
    if kind == GGUF:
        if task is not None:
            raise UsageError("llama.cpp loads no heads", hint="leave --task out")
        return _to_gguf(adapter, out, base, overwrite)
    if base is not None:
        raise UsageError("--base is for gguf", hint="leave it out")
    ready = for_task(adapter, task, str(source))
    head = next(iter(ready.heads), None)
    ready, error = _for_vllm(ready) if kind == VLLM else (ready, 0.0)
    wanted = store.identity("export", {"for": kind, "task": head}, _inputs(adapter, source, head))
    facts = ready.facts_of(head) if head else None
    text, outputs = next_steps(ready, kind, out)
    tasks = (store.read_manifest(source) or {}).get("result", {}).get("tasks")
    record = ExportRecord(
        loader=kind,
        task=head,
        base=ready.base,
        modules=len(ready.modules),
        rank=ready.rank,
        merged_from=None if tasks is None else tuple(tasks),
        labels=tuple(facts.labels) if facts and facts.labels else None,
        rounding_error=error,
        next=text,
        num_labels=outputs,
    )
    if (before := standing(out, wanted, ExportRecord, overwrite=overwrite)) is not None:
        return before

    def check(stage: Path) -> None:
        _require_same(ready, stage)
        require_loadable(stage, meant=[ready.full_name(m) for m in ready.modules])
        for account in accounts(stage, [loader_named(kind)]):
            if fault := next(iter(account.faults), None):
                raise RunError(
                    f"{fault.what} ({account.loader} {account.version})", where=fault.tensor, hint=fault.hint
                )

    require_space(out, ready.nbytes)
    with store.staged_folder(out, wanted, overwrite=overwrite, result=to_json(record), check=check) as stage:
        write_adapter(stage, ready)
    return Written(record, str(out))


def for_task(adapter: Adapter, task: str | None, where: str) -> Adapter:
    """The adapter with one head inside, named as that head's own model names everything; without heads, as it is.

    Raises:
        UsageError: It has several heads and none is chosen, or no such head.
        InputError: A merge of before the backbone's name was recorded, or an update of the head's own layers.
    """
    if not adapter.heads and task is None:
        return adapter
    name = chosen_head(adapter, task, where)
    facts, head = adapter.facts_of(name), adapter.heads[name]
    if facts.task_type is None and not facts.prefix:
        raise InputError(
            f"nobody recorded what the classifier of {name!r} calls its backbone",
            where=where,
            hint="merge its adapters anew (plait merge), which records it",
        )
    tops = {key.partition(".")[0] for key in head}
    if inside := next((m for m in adapter.modules if m.partition(".")[0] in tops), None):
        raise InputError(
            f"{inside!r} is a layer of the head, which PEFT would load whole and without this update", where=where
        )
    return replace(
        adapter,
        name=name,
        task_type=facts.task_type if facts.task_type in CLASSIFICATION_TYPES else "SEQ_CLS",
        prefix=facts.prefix,
        heads={name: head},
        head_facts={name: facts},
        target_modules=None,
    )


def _inputs(adapter: Adapter, source: Path, head: str | None) -> dict[str, str]:
    found = {"adapter": str(adapter.source.get("sha256", ""))}
    file = source / HEADS / f"{head}.safetensors"
    return found | ({"head": store.sha256_file(file)} if head and file.is_file() else {})


def _require_same(ready: Adapter, stage: Path) -> None:
    """Compare every number of what was written with what was to be written."""
    found = read_adapter(stage, name=ready.name)
    same = found.modules.keys() == ready.modules.keys() and all(
        _same(found.modules[m], f) for m, f in ready.modules.items()
    )
    heads = found.heads.keys() == ready.heads.keys() and all(
        torch.equal(found.heads[t][k], tensor) for t, head in ready.heads.items() for k, tensor in head.items()
    )
    if not (same and heads):
        raise RunError("what was written is not the adapter", where=str(stage), hint="please report this")


def _same(found: LoraFactors, wanted: LoraFactors) -> bool:
    """Equal to the bit; where no alpha expresses the scaling and B took it, up to the rounding of its dtype."""
    if not torch.equal(found.A, wanted.A):
        return False
    if found.scaling == wanted.scaling:
        return torch.equal(found.B, wanted.B)
    right, left = wanted.B.double() * wanted.scaling, found.B.double() * found.scaling
    return bool(((left - right).abs() <= 2 * torch.finfo(found.B.dtype).eps * right.abs()).all())


# --- vLLM -------------------------------------------------------------------------------------------------------------


def _for_vllm(adapter: Adapter) -> tuple[Adapter, float]:
    """Every module at one allowed rank with a scaling of 1, and the largest relative error of a B by its scaling."""
    if refused := sorted({key.rpartition(".")[0] for head in adapter.heads.values() for key in head} - _VLLM_HEADS):
        raise InputError(
            f"vLLM takes heads of one layer, {' or '.join(sorted(_VLLM_HEADS))}; this one has {', '.join(refused)}",
            where=adapter.name,
            hint="bake it into its base and serve the whole model",
        )
    if adapter.extras:
        raise InputError(f"{next(iter(adapter.extras))!r} was trained whole, which vLLM refuses", where=adapter.name)
    for module, f in adapter.modules.items():
        if f.kind not in (LINEAR, EMBEDDING):
            kind = "a fused expert" if f.kind == EXPERT else f"a {f.kind} module"
            raise InputError(
                f"{module!r} is {kind}, which an adapter for vLLM has not",
                where=adapter.name,
                hint="plait merge --bake BASE writes a whole model, which vLLM serves",
            )
    rank = next((r for r in RANKS if r >= adapter.rank), None)
    if rank is None:
        raise InputError(
            f"rank {adapter.rank} is above vLLM's highest, {RANKS[-1]}", where=adapter.name, hint="plait merge --rank"
        )
    done = {m: _padded(f, rank) for m, f in adapter.modules.items()}
    modules = {m: f for m, (f, _) in done.items()}
    return replace(adapter, modules=modules), max(error for _, error in done.values())


def _padded(f: LoraFactors, rank: int) -> tuple[LoraFactors, float]:
    """A module's factors at another rank, scaling in B: in its own dtype where that is exact, else in float32."""
    exact = f.B.double() * f.scaling
    dtype = next((d for d in (f.B.dtype, torch.float32) if torch.equal(exact.to(d).double(), exact)), None)
    B = exact.to(dtype or (f.B.dtype if f.B.dtype == torch.float64 else torch.float32))
    size = float(exact.norm())
    error = float((B.double() - exact).norm()) / size if size else 0.0
    more = rank - f.rank
    A = torch.cat([f.A.to(B.dtype), torch.zeros(more, f.A.shape[1], dtype=B.dtype)])
    return LoraFactors(A, torch.cat([B, torch.zeros(B.shape[0], more, dtype=B.dtype)], dim=1), 1.0, f.kind), error


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def _to_gguf(adapter: Adapter, out: Path, base: Path | None, overwrite: bool) -> Written[ExportRecord]:
    if out.suffix != ".gguf":
        raise UsageError("a GGUF adapter is one file", where=str(out), hint=f"--out {out}.gguf")
    named = adapter.base or "unknown"
    place = base_place(base, weights=False) if base else cached_folder(named, adapter.revision) or Path(named)
    config = base_config(place)
    tensors, alpha, layout = gguf_tensors(adapter, config, str(place))
    inputs = {"adapter": str(adapter.source.get("sha256", "")), "config": store.sha256_json(dict(config))}
    wanted = store.identity("export", {"for": GGUF, "task": None}, inputs)
    record = ExportRecord(
        loader=GGUF,
        task=None,
        base=adapter.base,
        modules=len(adapter.modules),
        rank=adapter.rank,
        next=next_steps(adapter, GGUF, out)[0],
        alpha=alpha,
        architecture=layout.architecture.name,
    )
    if out.is_file() and not overwrite and (before := gguf_record(out)) is not None:
        require_gguf_seal(opened_gguf(out), out)
        require_wanted(out, before, wanted)
        return reused(out, before, ExportRecord)
    require_space(out, sum(t.nbytes for t in tensors.values()))
    with store.staged_file(out, overwrite=overwrite, ours=lambda p: gguf_record(p) is not None) as stage:
        write_gguf(stage, tensors, alpha, layout.architecture.name, adapter.name, {**wanted, "result": to_json(record)})
        require_written(stage, tensors, alpha, layout.architecture.name)
        require_loadable(stage)
    return Written(record, str(out))
