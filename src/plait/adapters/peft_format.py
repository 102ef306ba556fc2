"""The PEFT folder: reading one that anybody wrote, and writing one that any trainer or server reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plait.adapters.arrays import widened
from plait.adapters.beside import require_filled, sorted_beside
from plait.adapters.config import CLASSIFICATION_TYPES, CONFIG, MERGED_TYPE, AdapterConfig, read_config
from plait.adapters.hashing import Digest, Hashing
from plait.adapters.head_files import HEADS, PREFIX, prefix_of, read_heads
from plait.adapters.heads import head_metadata, read_facts, recorded_facts
from plait.adapters.key_names import kinds_of_names, without_adapter_name
from plait.adapters.lora import CONSTRAINT, Adapter, LoraFactors
from plait.adapters.naming import checked_in_file, checked_name
from plait.adapters.peft_config import peft_config
from plait.adapters.peft_tensors import ROOT, SUFFIXES, all_factors, naming, require_sides
from plait.adapters.tensor_file import Put, fill_tensors, write_tensors
from plait.adapters.weights import WEIGHTS, Begin, begin_weights
from plait.border.checked import Record
from plait.disk.files import nearby, sha256_file, sha256_json
from plait.disk.hub import adapter_place, hub_facts, name_of
from plait.disk.locks import require_readable
from plait.disk.manifest import MANIFEST, read_manifest, require_whole
from plait.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_TASK_TYPE = "task_type"  # metadata of the weights' file
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "module.")
# By which VeLoRA keeps inputs short for the backward pass; the update is that of LoRA.
_OF_TRAINING = ".lora_velora_embed"
PutFactors = Callable[[str, LoraFactors], None]


# --- reading ----------------------------------------------------------------------------------------------------------


def read_adapter(folder: str | Path, *, name: str | None = None) -> Adapter:
    """Read a PEFT LoRA folder into an `Adapter`, checked tensor by tensor.

    Args:
        folder: With adapter_config.json and adapter_model.safetensors (or its shards); or ``user/name`` and
            ``user/name@revision`` on the hub (see `plait.disk.hub.adapter_place`).
        name: What to call it; by default its manifest's task, else the folder's name.

    Raises:
        InputError: Damaged, incomplete, holding NaN, unlike its config or its manifest, or of a refused variant; names
            file and tensor.
    """
    with Hashing() as hashing:
        return begin_adapter(folder, hashing, name=name)()


def begin_adapter(
    folder: str | Path, hashing: Hashing | None, *, name: str | None = None, begin: Begin | None = None
) -> Callable[[], Adapter]:
    """As `read_adapter`, whose errors it raises, but for the hashes: they may be on their way yet, and others be read meanwhile.

    Args:
        folder: See `read_adapter`.
        hashing: Hashes its bytes, to be compared with the manifest's; None does without, and `source` holds no "sha256".
        name: See `read_adapter`.
        begin: Reads a file, by default as torch's tensors; see `plait.adapters.weights`.

    Returns:
        A function that waits for the hashes and gives the adapter.
    """
    folder = adapter_place(folder)
    require_readable(folder)
    if folder.is_file():
        hint = "name the folder that it lies in; plait convert makes a folder of a LoRA file"
        raise InputError("a file, and a PEFT folder is wanted", where=str(folder), hint=hint)
    if not folder.is_dir():
        raise InputError("no such adapter folder", where=str(folder), hint=nearby(folder))
    config = read_config(folder)
    tensors, metadata, digests = begin_weights(
        folder, hashing, lambda shapes: require_sides(shapes, folder, config), begin
    )
    return lambda: adapter_of(
        folder, config, tensors, metadata, {f: d() for f, d in digests.items()}, name=name, begin=begin
    )


def adapter_of(
    folder: Path,
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    digests: Mapping[str, str],
    *,
    name: str | None = None,
    begin: Begin | None = None,
) -> Adapter:
    """An adapter from what was read from a folder; raises as `read_adapter`."""
    require_readable(folder / HEADS)
    manifest = read_manifest(folder)
    if digests:  # without, what is read was only just written, and has no manifest yet
        require_whole(folder, read=True, known=digests)
    require_filled(tensors, str(folder))
    factors, others = _pair({k: widened(t) for k, t in tensors.items()}, config, folder)
    task_type = config.task_type or metadata.get(_TASK_TYPE)
    prefix, cut = prefix_of(factors, task_type, metadata, folder)
    name = checked_name(name, "adapter") if name else _own_name(manifest, folder)
    beside = sorted_beside(others, config, str(folder))
    head = beside.head
    heads, of_heads = read_heads(folder, begin) if not head else ({}, {})
    if head:
        heads = {name: (head, read_facts(metadata, head, str(folder / WEIGHTS)))}
    # Weights mean what the config makes of them (its alphas scale them): another config is another input.
    digests = {**digests, **of_heads, CONFIG: sha256_file(folder / CONFIG)} if digests else {}
    result = (manifest or {}).get("result", {})
    if not prefix and task_type == MERGED_TYPE and heads and isinstance(result.get(PREFIX), str):
        prefix = result[PREFIX]  # merges of old have the backbone's names
    return Adapter(
        name=name,
        base=config.base,
        modules={k[cut:]: factors[k] for k in sorted(factors)},
        task_type=task_type,
        prefix=prefix,
        heads={head: tensors for head, (tensors, _) in heads.items()},
        extras=beside.whole,
        modules_to_save=beside.saved,
        copies=beside.copies,
        revision=config.revision,
        target_modules=config.target_modules,
        target_parameters=tuple(t.removeprefix(f"{prefix}.") if prefix else t for t in config.target_parameters),
        fan_in_fan_out=config.fan_in_fan_out,
        source={
            "path": str(folder),
            **({"sha256": sha256_json(digests)} if digests else {}),
            **hub_facts(folder),
            **_kept_facts(manifest),
        },
        head_facts={h: facts.otherwise(recorded_facts(result, h, name)) for h, (_, facts) in heads.items()},
    )


def _own_name(manifest: Mapping[str, Any] | None, folder: Path) -> str:
    """The task that the manifest records, else the folder's name."""
    hint = f"NAME={folder} gives it another name"
    result = Record.of((manifest or {}).get("result", {}), str(folder / MANIFEST), inside="result", hint=hint)
    if not result.has("task"):
        return checked_name(name_of(folder), "adapter")
    return checked_in_file(result.text("task"), "result.task", str(folder / MANIFEST), hint)


def _kept_facts(manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    result = (manifest or {}).get("result", {})
    known = ("base_sha256", "base_weights_sha256", "backbone_prefix", "labels", "kind")
    training = (manifest or {}).get("options", {}).get("training")
    constraint = training.get(CONSTRAINT) if isinstance(training, Mapping) else None
    trained = {CONSTRAINT: constraint} if isinstance(constraint, str) else {}
    return {k: result[k] for k in known if k in result} | trained


def _pair(
    tensors: Mapping[str, Tensor], config: AdapterConfig, folder: Path
) -> tuple[dict[str, LoraFactors], dict[str, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, str] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in without_adapter_name(tensors, str(folder)).items():
        bare = _bare_key(key, folder)
        for suffix, (half, kind) in SUFFIXES.items():
            if bare.endswith(suffix):
                module = bare[: -len(suffix)]
                halves.setdefault(module, {})[half] = tensor
                kinds[module] = kind
                break
        else:
            if not bare.endswith(_OF_TRAINING):
                others[bare] = tensor
    if not halves:
        raise InputError(f"holds no LoRA factors, but {kinds_of_names(tensors)}", where=str(folder / WEIGHTS))
    return all_factors(halves, kinds, config, folder), others


def _bare_key(key: str, folder: Path) -> str:
    if not key.startswith(ROOT):
        raise InputError(f"tensor {key!r} does not start with {ROOT!r}", where=str(folder), hint="not saved by PEFT?")
    bare = key[len(ROOT) :]
    for wrapper in _WRAPPERS:
        if wrapper in bare and not (wrapper == "module." and not bare.startswith(wrapper)):
            raise InputError(
                f"tensor {key!r} carries the wrapper {wrapper!r}: saved from a wrapped model",
                where=str(folder),
                hint="unwrap the model (accelerator.unwrap_model) and save again",
            )
    return bare


# --- writing ----------------------------------------------------------------------------------------------------------


def write_adapter(
    folder: Path | str,
    adapter: Adapter,
    fill: Callable[[PutFactors], None] | None = None,
    hashing: Hashing | None = None,
) -> dict[str, Digest]:
    """Write an adapter as a PEFT folder, which is made where there is none; files of an adapter that lie in it are replaced.

    Nothing is staged here: see `store.staged_folder` for a folder that is written whole or not at all.

    One head and a classification task type: the head lies in adapter_model.safetensors as PEFT has it. Otherwise heads
    go to ``heads/<task>.safetensors``. `init_lora_weights` is true: with it every trainer loads the factors as they are.
    A classification adapter without a head (one that is yet to be trained) has no task type in its config: PEFT would
    look for the head's tensors. The file's metadata keeps it, and names of classes beside the head.

    Names are the whole model's, in tensors and in `target_modules`, wherever the backbone's own name is known
    (`Adapter.prefix`), so that PEFT loads the folder over the class it is for and raises over another. Adapters of a bare
    backbone know none: their folders hold the backbone's names, as PEFT saved them, for AutoModel alone.

    Args:
        folder: Where to.
        adapter: What to write.
        fill: Where the factors are only to come, and the adapter's are shapes on the meta device with a scaling of 1:
            called with a function that takes (module, factors), once for each, in any order, from any thread. The file
            is the same as if they had been there.
        hashing: Hashes the weights as far as they are written.

    Returns:
        Name of a file -> its hash, for those that `hashing` took.
    """
    folder = Path(folder)
    if adapter.source.get("format", "peft") != "peft":
        raise InputError(
            "named as in its LoRA file, not as PEFT does", where=adapter.name, hint="plait convert --to peft"
        )
    inline = adapter.heads.get(adapter.name) if adapter.task_type in CLASSIFICATION_TYPES else None
    others = {ROOT + k: v for k, v in {**adapter.extras, **adapter.copies, **(inline or {})}.items()}
    config, fold = peft_config(adapter, inline)
    named = naming(adapter, fold)
    tensors = {k: v for m, f in adapter.modules.items() for k, v in named(m, f).items()} | others
    metadata = {_TASK_TYPE: adapter.task_type} if adapter.task_type else {}
    if adapter.task_type == MERGED_TYPE and adapter.prefix:
        metadata |= {PREFIX: adapter.prefix}
    if inline:
        metadata |= head_metadata(adapter.facts_of(adapter.name), inline)
    folder.mkdir(parents=True, exist_ok=True)
    written = hashing.file(folder / WEIGHTS) if hashing else None
    if fill is None:
        write_tensors(folder / WEIGHTS, tensors, metadata, written)
    else:
        fill_tensors(folder / WEIGHTS, tensors, metadata, lambda put: _filled(put, others, named, fill), written)
    if inline is None and adapter.heads:
        (folder / HEADS).mkdir()
        for task, head in adapter.heads.items():
            facts = head_metadata(adapter.facts_of(task), head)
            write_tensors(folder / HEADS / f"{checked_name(task, 'head')}.safetensors", head, facts)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    return {WEIGHTS: written.whole()} if written else {}


def _filled(
    put: Put,
    others: Mapping[str, Tensor],
    named: Callable[[str, LoraFactors], dict[str, Tensor]],
    fill: Callable[[PutFactors], None],
) -> None:
    for name, tensor in others.items():
        put(name, tensor)

    def put_factors(module: str, factors: LoraFactors) -> None:
        for name, tensor in named(module, factors).items():
            put(name, tensor)

    fill(put_factors)
