"""llama.cpp: its converter of PEFT folders (convert_lora_to_gguf.py), and its loader of GGUF adapters (build 11434)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from plait.loading import tensor_names as names
from plait.loading.account import Account, Effect, Fault, Placement
from plait.loading.contents import GgufFile, PeftFolder
from plait.loading.settings import Settings
from plait.loading.tensor_names import ROOT

VERSION = "build 11434"
_EXPORT = "plait export --for gguf folds scalings and writes what it takes"
_A, _B, _NORM = ".lora_a", ".lora_b", "_norm.weight"


def llama_cpp_account(folder: PeftFolder) -> Account:
    """Every tensor of a PEFT folder as the converter takes it; scalings are alpha of the config over each tensor's rank."""
    settings = folder.settings
    faults = list(_config_faults(settings))
    lines: list[Placement] = []
    halves: dict[str, list[str]] = defaultdict(list)
    for tensor, stored in folder.header.tensors.items():
        name = names.named(tensor)
        effect: Effect = "loaded"
        if name.kind in names.HALVES and not name.adapter and not stored.is_empty:
            halves[name.module].append(tensor)
            if len(stored.shape) > 2:
                effect = "refused"
                faults.append(
                    Fault(
                        tensor,
                        "is a convolution's, for which no language model of llama.cpp has a place",
                        _EXPORT,
                        True,
                    )
                )
            elif name.kind.startswith("lora_embedding") and names.is_looked_up(name.module) is False:
                effect = "refused"
                what = (
                    "lies as an embedding's factors do, and its module is multiplied with: the loader refuses the shape"
                )
                faults.append(Fault(tensor, what, _EXPORT, True))
        elif ".base_layer.weight" in tensor and not stored.is_empty:
            effect = "dropped"
        elif "_layernorm" in tensor or ".norm" in tensor:
            effect = "dropped"
            faults.append(Fault(tensor, "is carried into the file, and the loader skips it in silence", _EXPORT))
        else:
            effect = "refused"
            faults.append(Fault(tensor, "is no half of factors: the converter stops", _EXPORT, True))
        parameter = (
            f"{tensor.replace(ROOT, '')} (named as GGUF by the base's architecture)" if effect == "loaded" else ""
        )
        lines.append(Placement(tensor, parameter, name.kind, effect))
    for module, found in halves.items():
        if len(found) != 2:
            faults.append(Fault(found[0], f"stands alone for {module!r}: the converter stops", _EXPORT, True))
    lines += [Placement(t, "", "head" if t.startswith("heads/") else "another file", "beside") for t in folder.beside]
    return Account("llama.cpp", VERSION, tuple(lines), tuple(_notes(settings, halves)), tuple(faults))


def _config_faults(settings: Settings) -> Iterator[Fault]:
    if settings.raw.get("alpha_pattern"):
        yield Fault("alpha_pattern", "is not read by the converter: these modules get the config's lora_alpha", _EXPORT)
    if settings.flag("use_rslora") and settings.number("r", 8) != 1:
        yield Fault(
            "use_rslora", "is not read by the converter: alpha is divided by the rank, not by its root", _EXPORT
        )
    if settings.flag("fan_in_fan_out"):
        what = "the converter turns factors of such modules (Conv1D) with the base's weights: refused by shape, or wrong where square"
        yield Fault("fan_in_fan_out", what, _EXPORT)
    init = settings.raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda", "loftq")):
        yield Fault(
            "init_lora_weights",
            f"{init!r} changed the base, which the converter does not follow",
            "plait convert --initial",
        )


def _notes(settings: Settings, modules: dict[str, list[str]]) -> Iterator[str]:
    yield "python convert_lora_to_gguf.py --base BASE FOLDER (the base's architecture has to be known to it)"
    if settings.raw.get("rank_pattern") and not settings.raw.get("alpha_pattern"):
        yield "several ranks under one alpha: each tensor's scaling is alpha over its own rank, as in PEFT"
    if any(m.rpartition(".")[2] == "lm_head" for m in modules):
        yield "lm_head: the converter stops where the base ties it to the embedding"


def gguf_account(file: GgufFile) -> Account:
    """Every tensor of a GGUF adapter as the loader takes it; names are the model's own with .lora_a and .lora_b."""
    lines: list[Placement] = []
    halves: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = defaultdict(dict)
    faults = list(_gguf_faults(file))
    for tensor, stored in file.header.tensors.items():
        suffix = next((s for s in (_A, _B) if tensor.endswith(s)), "")
        if suffix:
            weight = tensor.removesuffix(suffix)
            halves[weight][suffix] = (tensor, stored.shape)
            lines.append(Placement(tensor, weight, suffix[1:], "loaded"))
        elif tensor.endswith(_NORM):
            lines.append(Placement(tensor, "", "norm", "dropped"))
            faults.append(Fault(tensor, "is skipped in silence", "leave norms out"))
        else:
            lines.append(Placement(tensor, "", "weight", "refused"))
            faults.append(Fault(tensor, "has an unknown suffix: the loader stops", "leave it out", True))
    for weight, found in halves.items():
        if len(found) < 2:
            faults.append(
                Fault(next(iter(found.values()))[0], "has no other half: the loader stops", "write both", True)
            )
        elif not _fits(weight, found[_A][1], found[_B][1]):
            what = f"is {list(found[_A][1])} beside {list(found[_B][1])}: not (rank, in) and (out, rank)"
            faults.append(
                Fault(found[_A][0], what, "write A as (rank, in), for token_embd as (vocabulary, rank)", True)
            )
    return Account("llama.cpp", VERSION, tuple(lines), (), tuple(faults), own=True)


def _fits(weight: str, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    if len(a) < 2 or len(b) < 2:
        return False
    return a[-1] == b[-1] if weight == "token_embd.weight" else a[-2] == b[-1]


def _gguf_faults(file: GgufFile) -> Iterator[Fault]:
    values = file.header.values
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if values.get(key) != wanted:
            yield Fault(key, f"is {values.get(key)!r}, expected {wanted!r}: the loader stops", "convert it again", True)
    if not values.get("general.architecture"):
        yield Fault("general.architecture", "is missing: the loader stops", "convert it again", True)
    if not values.get("adapter.lora.alpha"):
        yield Fault("adapter.lora.alpha", "is missing or 0: the scaling is then 1 whatever the rank", "write the alpha")
