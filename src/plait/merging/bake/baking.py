"""Baking: writing an adapter, or a merge that is no adapter, into a copy of the base model's weights."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from plait.adapters.beside import no_matrix
from plait.adapters.lineage import of_another_base
from plait.adapters.lora import Adapter
from plait.adapters.tensor_file import write_tensors
from plait.adapters.unread import unread_lines
from plait.border.records import to_json
from plait.disk import store
from plait.disk.card import license_of
from plait.disk.hub import hub_facts
from plait.disk.links import require_inside
from plait.disk.manifest import CARD
from plait.disk.overwriting import require_apart
from plait.disk.space import require_space
from plait.disk.written import Written, standing
from plait.errors import InputError
from plait.merging.bake.expert_parts import known_names, layout_for
from plait.merging.bake.sites import Site, deltas_of, moves_ends, sites_of
from plait.merging.bake.writing import Added, add_to_files, copied
from plait.merging.kinship import kin_lines
from plait.merging.outcomes import BakeRecord
from plait.merging.plan import Plan
from plait.merging.record import as_given, input_hashes, labels_of
from plait.merging.workers import side_by_side
from plait.model.files import INDEX, SINGLE, weight_files
from plait.model.stored import StoredTensor, base_tensors, require_unquantised, tensors_in
from plait.model.stored_names import compared_copies
from plait.model.ties import Ties, require_one_output, ties_of

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot"}
_CPU = torch.device("cpu")
# Where the output layer goes when it is untied, and what a base of one file is then called: with an index, files may
# have any name but the one that loaders look for first.
_OUTPUT_SHARD, _FIRST_SHARD = "model-output.safetensors", "model-base.safetensors"


def bake(
    source: Adapter | Plan, base: Path, out: Path, *, verify: bool = True, overwrite: bool = False
) -> Written[BakeRecord]:
    """Write base + delta as a full model, shard by shard.

    Shards are copied as files and the rows of adapted weights are overwritten in the copies, so that no more than a block
    of rows is in memory (one whole tensor where the weight is stored transposed). Tokenizer, generation config and the
    index come along. Where the base ties its output to its embedding and the adapter changes one of them, they are
    untied: both are written, and the config says so.

    Args:
        source: An adapter; or a planned merge, whose dense result is then baked without a cut to rank.
        base: Local folder of the base in safetensors, not quantised.
        out: The folder to write.
        verify: Whether the written weights are read again and W' x compared with W x + D x, x random.
        overwrite: Whether what stands at `out` is replaced.

    Raises:
        InputError: A quantised base, one of other shapes or module names.
        RunError: What was written is not base + delta.
    """
    begun = time.perf_counter()
    config = require_unquantised(base)
    read = source.adapters if isinstance(source, Plan) else [source]
    require_apart(out, [base, *(str(a.source["path"]) for a in read if a.source.get("path"))])
    require_low_rank(read, base)
    adapter, deltas = deltas_of(source)
    tensors = base_tensors(base)
    layout = layout_for(base, adapter, tensors)
    copies = source.common.carried.copies if isinstance(source, Plan) else source.copies
    ties = ties_of(base, config, tensors) if copies or moves_ends(adapter) else Ties()
    sites = sites_of(adapter, deltas, known_names(tensors, layout), config, layout, ties)
    if any(s.tensor == ties.embedding and not s.is_output for s in sites):
        require_one_output(ties, adapter.name)
    beside = [*compared_copies(copies, adapter, tensors, ties.is_one), *of_another_base(adapter.base, base)]
    beside += kin_lines(source.adapters, source.weights) if isinstance(source, Plan) else []
    beside += [*_still_tied(sites, ties), *unread_lines(read)]
    inputs = {"adapter": str(adapter.source.get("sha256", "")) or store.sha256_json(list(adapter.modules))}
    if stands := out.exists() or out.is_symlink():  # else the base is hashed while it is copied
        inputs["base"] = store.sha256_json({str(inside): store.sha256_file(base / inside) for inside in _copied(base)})
    if from_hub := hub_facts(base):
        inputs["hub:base"] = from_hub["hub"]
    if isinstance(source, Plan):
        inputs |= input_hashes(source.adapters)
    options = source.settings() if isinstance(source, Plan) else {}
    wanted = store.identity("bake", options, inputs, source.seed if isinstance(source, Plan) else None)
    if (before := standing(out, wanted, BakeRecord, overwrite=overwrite)) is not None:
        return replace(before, record=_of_merge(before.record, source))
    untied = {s.tensor: s.stored for s in sites if s.unties}.values()
    size = sum((base / inside).stat().st_size for inside in _copied(base))
    require_space(out, size + sum(math.prod(t.shape) * t.torch_dtype.itemsize for t in untied))
    result: dict[str, Any] = {}
    with store.staged_folder(out, wanted, overwrite=overwrite, result=result) as stage:
        hashes, was_untied = _copy(base, stage, sites, config, ties)
        if not stands:
            wanted["inputs"]["base"] = store.sha256_json(hashes)
        added = _add(sites, stage, ties.output or "", verify=verify)
        changed = sum(a.size for a in added)
        record = BakeRecord(
            modules=len(deltas),
            dtype=tuple(sorted({s.stored.dtype for s in sites})),
            beside=tuple(beside),
            untied=was_untied,
            rounding_error=(sum(a.error for a in added) / changed) ** 0.5 if changed > 0 else 0.0,
            verification_error=max((a.off for a in added), default=0.0) if verify else None,
            labels=labels_of([adapter]) or None,
            base=adapter.base,
            license=license_of(base),
        )
        _write_heads(stage, adapter)
        result |= to_json(record)
    return Written(_of_merge(record, source), str(out), seconds_merge=time.perf_counter() - begun)


def require_low_rank(adapters: Sequence[Adapter], base: Path) -> None:
    """Refuse weights that were trained whole, with the command that makes them part of the update.

    Raises:
        InputError: There is one.
    """
    if adapter := next((a for a in adapters if a.extras), None):
        if key := no_matrix(adapter.extras):
            raise InputError(
                f"{key!r} was trained whole, beside the LoRA factors, and is no matrix, which no low-rank update holds",
                where=adapter.name,
                hint="PEFT's merge_and_unload puts it into a model",
            )
        place = shlex.quote(str(adapter.source.get("path", adapter.name)))
        raise InputError(
            f"{next(iter(adapter.extras))!r} was trained whole, beside the LoRA factors",
            where=adapter.name,
            hint=f"plait convert {place} --base {shlex.quote(str(base))} --rank R --out DIR makes it part of the update, and says what "
            "rank R leaves out; then bake DIR",
        )


def _of_merge(record: BakeRecord, source: Adapter | Plan) -> BakeRecord:
    """Add how the adapters were merged, where it is a merge that was baked."""
    if not isinstance(source, Plan):
        return record
    inputs = as_given(source.adapters, source.weights, source.given)
    return replace(
        record,
        method=source.method.name,
        weights=tuple(w for _, w in inputs),
        scale=source.scale,
        scale_reason=source.scale_reason,
        tasks=tuple(a.name for a, _ in inputs),
    )


def _add(sites: Sequence[Site], stage: Path, output: str, *, verify: bool) -> list[Added]:
    """Add every delta to the copy, side by side; in the order of the sites."""
    pairs = [(site, _target(site, stage, output)) for site in sites]
    return add_to_files(pairs, lambda function, items: side_by_side(function, items, _CPU), verify=verify)


def _copy(
    base: Path, stage: Path, sites: list[Site], config: Mapping[str, Any], ties: Ties
) -> tuple[dict[str, str], bool]:
    """Copy the base's files, side by side; where weights are untied, add what they were in a shard of its own and say so.

    Returns:
        File of the base -> its hash; and whether anything was untied.
    """
    unties = [s for s in sites if s.unties]
    apart = bool(ties.apart) and any(s.tensor in (ties.embedding, ties.apart) for s in sites)
    # With others the places need the tie, and transformers leaves out of it what the files hold.
    says_so = bool(unties or apart) and not ties.others
    tensors = base_tensors(base)
    added = {name: tensors[tensor] for name, tensor in ties.along.items()} if says_so else {}
    if unties and ties.output is not None:
        added[ties.output] = unties[0].stored

    def one(inside: Path) -> str:
        path = base / inside
        target = stage / (_shard_name(path, bool(added)) if path.suffix == ".safetensors" else inside)
        target.parent.mkdir(parents=True, exist_ok=True)
        return copied(path, target, sorted(s.stored.span for s in sites if s.stored.file == path and not s.is_output))

    files = _copied(base)
    hashes = {str(inside): digest for inside, digest in zip(files, side_by_side(one, files, _CPU), strict=True)}
    if says_so:
        text = json.dumps(_untied(config), indent=2, sort_keys=True) + "\n"
        (stage / "config.json").write_text(text, encoding="utf-8")
    if added:
        write_tensors(stage / _OUTPUT_SHARD, {name: t.read(0, t.shape[0]) for name, t in added.items()})
        homes = {n: _shard_name(t.file, True) for n, t in tensors.items()} | dict.fromkeys(added, _OUTPUT_SHARD)
        size = sum(p.stat().st_size for p in stage.glob("*.safetensors"))
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(homes.items()))}
        (stage / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return hashes, bool(unties or apart)


def _still_tied(sites: Sequence[Site], ties: Ties) -> list[str]:
    """Say who goes on tying an output layer that has a weight of its own now, where the config cannot say that it has."""
    if not ties.others or ties.output is None or not any(s.unties or s.tensor == ties.apart for s in sites):
        return []
    output = ties.output.removesuffix(".weight")
    return [
        f"{output} has a weight of its own now, and config.json goes on tying the embeddings, which encoder and decoder need: transformers "
        f"5 keeps it and warns that it does; transformers 4 ties {output} again, and its update is lost"
    ]


def _untied(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config that ties no output layer to its embedding, nor inside it."""
    text = config.get("text_config")
    inner = {"text_config": {**text, "tie_word_embeddings": False}} if isinstance(text, Mapping) else {}
    return {**config, **inner, "tie_word_embeddings": False}


def _shard_name(path: Path, untied: bool) -> str:
    return _FIRST_SHARD if untied and path.name == SINGLE else path.name


def _copied(base: Path) -> list[Path]:
    """The files of a base that its baked copy has: all but weights that are not loaded, its card, and what is hidden; inside it.

    Raises:
        InputError: One, no weights, is a link to a file outside the base.
    """
    shards = set(weight_files(base))
    found = []
    for path in sorted(p for p in base.rglob("*") if p.is_file()):
        inside = path.relative_to(base)
        hidden = path.name in (store.MANIFEST, CARD) or any(part.startswith(".") for part in inside.parts)
        if not hidden and (path.suffix not in _WEIGHTS or path in shards):
            if path not in shards:  # whose bytes were looked at
                require_inside(path, base, "would be copied into the result")
            found.append(inside)
    return found


def _target(site: Site, stage: Path, output: str) -> StoredTensor:
    """The tensor of the copy that takes the delta; `output` names the output layer's weight, where it was untied."""
    if site.is_output:
        return tensors_in(stage / _OUTPUT_SHARD)[output]
    renamed = stage / _FIRST_SHARD
    file = renamed if renamed.exists() else stage / site.stored.file.name
    return StoredTensor(file, site.stored.shape, site.stored.dtype, site.stored.start)


def _write_heads(stage: Path, adapter: Adapter) -> None:
    if adapter.heads:
        (stage / "heads").mkdir(exist_ok=True)
        for task, head in adapter.heads.items():
            write_tensors(stage / "heads" / f"{task}.safetensors", head)
