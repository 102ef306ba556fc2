"""vLLM 0.32: what its multi-LoRA serving makes of a PEFT folder."""

from __future__ import annotations

from collections.abc import Iterator

from plait.loading import tensor_names as names
from plait.loading.account import Account, Effect, Fault, Placement
from plait.loading.contents import PeftFolder
from plait.loading.header import Stored
from plait.loading.settings import Settings
from plait.loading.tensor_names import ROOT

VERSION = "0.32"
# Ranks that it takes as --max-lora-rank; everything it holds is padded to the one chosen.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
DEFAULT_RANK = 16
FUSED_NOTE = "factors of fused experts: only for models that vLLM serves with their experts fused"
_LOW_RANK = "plait convert --base DIR makes it part of the factors"
_EXPORT = "plait export --for vllm writes what it takes"
_HEADS = ("classifier", "score")
_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_REFUSED = {
    "use_dora": "DoRA", "lora_bias": "lora_bias", "alora_invocation_tokens": "aLoRA", "layer_replication": "layer_replication",
    "use_bdlora": "BD-LoRA", "use_qalora": "QALoRA",
}  # fmt: skip


def vllm_account(folder: PeftFolder) -> Account:
    """Every tensor of the folder as vLLM takes it: a name that it does not know makes it refuse the folder."""
    settings = folder.settings
    faults = list(_refusals(folder))
    lines = []
    for tensor, stored in folder.header.tensors.items():
        line, fault = _placed(tensor, stored, settings)
        lines.append(line)
        if fault:
            faults.append(fault)
    if any(f.raises for f in faults):
        lines = [Placement(p.tensor, "", p.kind, "refused") for p in lines]
    lines += [Placement(t, "", "head" if t.startswith("heads/") else "another file", "beside") for t in folder.beside]
    return Account("vllm", VERSION, tuple(lines), tuple(vllm_notes(settings)), tuple(faults))


def _placed(tensor: str, stored: Stored, settings: Settings) -> tuple[Placement, Fault | None]:
    name = names.named(tensor)

    def line(parameter: str, effect: Effect) -> Placement:
        return Placement(tensor, parameter, name.kind, effect)

    if tensor.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
        return line("", "dropped"), None
    parts = tensor.split(".")
    if name.kind == names.PARAMETER and parts[-1] in ("weight", "bias") and parts[-2:-1] and parts[-2] in _HEADS:
        if parts[-2] in settings.declared:
            return Placement(tensor, f"{parts[-2]}.{parts[-1]}", "head", "replaces"), None
        what = f"is taken for half of the factors of {parts[-2]!r}: modules_to_save does not name it"
        return line("", "dropped"), Fault(tensor, what, _EXPORT)
    if name.kind not in names.HALVES or name.adapter:
        return line("", "refused"), Fault(tensor, "is a name that vLLM does not take", _EXPORT, True)
    if stored.is_empty or len(stored.shape) != 2:
        what = f"is {list(stored.shape)}: vLLM adapts linear modules and embeddings alone"
        return line("", "refused"), Fault(tensor, what, _EXPORT, True)
    if name.kind in (names.EMBEDDING_A, names.EMBEDDING_B) and names.is_looked_up(name.module) is False:
        what = "lies as an embedding's factors do, and its module is multiplied with: their shapes do not fit"
        return line("", "refused"), Fault(tensor, what, _EXPORT, True)
    a = name.kind in (names.A, names.EMBEDDING_A)
    rank = stored.shape[0 if a else 1]
    line_ = line(f"{name.module}.{'lora_a' if a else 'lora_b'}", "loaded")
    if rank not in settings.ranks_of(name.module) and not settings.names("target_parameters"):
        what = f"has rank {rank} and the config says {settings.rank_of(name.module):g}, by which vLLM divides alpha"
        return line_, Fault(tensor, what, "restore the config it was saved with")
    if not name.rooted:
        return line_, Fault(
            tensor, f"does not start with {ROOT!r}: matched only where the served model has such a name", _EXPORT
        )
    return line_, None


def _refusals(folder: PeftFolder) -> Iterator[Fault]:
    settings = folder.settings
    if folder.sharded:
        yield Fault("adapter_model.safetensors", "is not there: vLLM reads one file, no shards", _EXPORT, True)
    for key, shown in _REFUSED.items():
        if settings.raw.get(key):
            yield Fault(key, f"vLLM refuses {shown}", "plait convert makes it a plain LoRA where there is one", True)
    init = settings.raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _INITS:
        yield Fault(
            "init_lora_weights", f"vLLM refuses {init!r}", "plait convert --initial makes it a plain LoRA", True
        )
    if other := [m for m in settings.declared if m not in _HEADS]:
        yield Fault(
            "modules_to_save", f"vLLM refuses {', '.join(other)}: only classifier and score are taken", _LOW_RANK, True
        )
    if settings.raw.get("bias", "none") != "none":
        yield Fault(
            "bias", "vLLM refuses trained biases", "plait convert makes it a plain LoRA where there is one", True
        )
    if (rank := highest_rank(settings)) > RANKS[-1]:
        yield Fault("r", f"rank {rank:g} is above what vLLM takes, {RANKS[-1]}", "cut it: plait merge --rank", True)
    for key in ("r", "lora_alpha", "target_modules"):
        if settings.raw.get(key) is None:
            yield Fault(key, "is missing from the config, and vLLM asks for it", _EXPORT, True)


def highest_rank(settings: Settings) -> float:
    """The largest rank that the config names, which vLLM holds against --max-lora-rank whatever the tensors are."""
    table = settings.raw.get("rank_pattern") or {}
    return max([settings.number("r", 8), *(v for v in table.values() if isinstance(v, int | float))])


def rank_flag(rank: float) -> int | None:
    """The smallest --max-lora-rank that holds a rank; None above all of them."""
    return next((r for r in RANKS if r >= rank), None)


def vllm_notes(settings: Settings) -> Iterator[str]:
    """Flags that a config needs, and what depends on the version."""
    flag = rank_flag(highest_rank(settings))
    if flag is not None and flag > DEFAULT_RANK:
        yield f"start it with --max-lora-rank {flag} (its default is {DEFAULT_RANK})"
    parameters = settings.names("target_parameters")
    if settings.raw.get("rank_pattern") or settings.raw.get("alpha_pattern"):
        yield pattern_note(exports=not parameters)
    if parameters:
        yield FUSED_NOTE


def pattern_note(*, exports: bool = True) -> str:
    """What is known of patterns by version.

    Args:
        exports: Whether `plait export --for vllm` takes the adapter.
    """
    known = f"rank_pattern and alpha_pattern: read by vLLM {VERSION}, dropped in silence by older versions (which, was not found)"
    return f"{known}; plait export --for vllm is right for all" if exports else known
