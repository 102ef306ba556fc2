"""PEFT, 0.18 to 0.21: what `PeftModel.from_pretrained` makes of a folder.

PEFT builds factors for the modules that the config names, then loads the file's tensors by name. Tensors for which nothing
was built go into the base's own weights where one has that name, and are dropped without a word where none has.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

from plait.border.counts import plural
from plait.errors import InputError
from plait.loading import tensor_names as names
from plait.loading.account import Account, Effect, Fault, Placement
from plait.loading.contents import WEIGHTS, PeftFolder
from plait.loading.factors import Half, factor_faults
from plait.loading.header import Stored
from plait.loading.settings import HEADS_OF, KNOWN_FIELDS, Settings, is_at
from plait.loading.single_experts import single_expert_notes
from plait.loading.tensor_names import ROOT, Named

VERSIONS = "0.18 to 0.21"
_INITS = ("gaussian", "eva", "orthogonal", "lora_ga", "mica", "olora", "corda", "loftq")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "mica")
_HEADS = frozenset(h for heads in HEADS_OF.values() for h in heads) | {"classification_head", "pre_classifier"}
# Tensors that are loaded where the config switches their kind on, and dropped where it does not.
_SWITCHED = {
    names.MAGNITUDE: "use_dora",
    names.BIAS_OF_B: "lora_bias",
    names.TOKENS: "trainable_token_indices",
    names.VELORA: "velora_config",
}
_SAVE = "save the adapter again from the model it was trained in (save_pretrained of the unwrapped PeftModel)"


def peft_account(folder: PeftFolder) -> Account:
    """Every tensor of the folder as PEFT places it.

    Raises:
        InputError: No LoRA adapter, whose rules these are.
    """
    settings = folder.settings
    if (kind := settings.text("peft_type")) != "LORA":
        raise InputError(f"peft_type is {kind!r}, only LORA is accounted for", where=str(settings.path))
    taken = {tensor: names.named(tensor) for tensor in folder.header.tensors}
    faults = list(_config_faults(settings, taken, folder))
    lines: dict[str, Placement] = {}
    halves: dict[str, list[Half]] = defaultdict(list)
    for tensor, stored in folder.header.tensors.items():
        name = taken[tensor]
        lines[tensor], fault = _placed(tensor, name, stored, settings)
        if once := _saved_twice(tensor, folder.header.tensors, settings):
            lines[tensor], fault = once, None
        if fault:
            faults.append(fault)
        elif name.kind in names.HALVES:
            halves[name.module].append(Half(tensor, name.kind, stored.shape))
    for fault in factor_faults(halves, settings):
        faults.append(fault)
        if fault.raises:
            lines |= {h.tensor: Placement(h.tensor, "", h.kind, "refused") for h in halves[taken[fault.tensor].module]}
    placements = [*lines.values(), *(Placement(t, "", _kind_beside(t), "beside") for t in folder.beside)]
    return Account("peft", VERSIONS, tuple(placements), tuple(_notes(folder, taken)), tuple(faults), own=True)


def _saved_twice(tensor: str, tensors: Collection[str], settings: Settings) -> Placement | None:
    """The line of what PEFT saves beside a module kept whole, where the vocabulary was resized.

    Its weight once more, which is loaded by its other name, and the base's, which PEFT puts back where it was.
    """
    if not settings.saved_as(names.named(tensor).module):
        return None
    if (once := tensor.replace(".modules_to_save.", ".", 1)) != tensor and once in tensors:
        place = tensor.replace(".modules_to_save.", ".modules_to_save.default.", 1)
        return Placement(tensor, place, "whole weight", "replaces")
    if (own := tensor.replace(".original_module.", ".", 1)) != tensor and own in tensors:
        return Placement(tensor, tensor, "copy of a base weight", "overwrites")
    return None


def _placed(tensor: str, name: Named, stored: Stored, settings: Settings) -> tuple[Placement, Fault | None]:
    """One tensor's line, and what is wrong with it by itself."""
    kind = name.kind

    def dropped(what: str, hint: str) -> tuple[Placement, Fault]:
        return Placement(tensor, "", kind, "dropped"), Fault(tensor, what, hint)

    if stored.is_empty:
        hint = "gather the shards before saving (ZeRO-3, FSDP), and save again"
        return Placement(tensor, "", kind, "refused"), Fault(
            tensor, f"is empty, {list(stored.shape)}: a size mismatch", hint, True
        )
    if not name.rooted:
        return dropped(f"is dropped in silence: PEFT's names start with {ROOT!r}", _SAVE)
    if wrapper := names.wrapper_in(name.module):
        return dropped(f"is dropped in silence: {wrapper!r} is a training wrapper's, no module of the base", _SAVE)
    if name.adapter:
        fault = Fault(tensor, f"keeps the adapter's name {name.adapter!r}: PEFT before 0.21 drops it in silence", _SAVE)
        effect: Effect = "loaded" if name.adapter == "default" else "dropped"
        return Placement(tensor, names.parameter_of(name) if effect == "loaded" else "", kind, effect), fault
    if kind in names.HALVES:
        return _factor(tensor, name, settings)
    if switch := _SWITCHED.get(kind):
        if settings.raw.get(switch):
            return Placement(tensor, names.parameter_of(name), kind, "loaded"), None
        return dropped(
            f"is dropped in silence: the config says nothing of {switch}", "restore the config it was saved with"
        )
    if kind == names.COPY:
        leaf = tensor.rpartition(".")[2]
        of_rows = name.module.endswith(".token_adapter") and settings.raw.get("trainable_token_indices")
        if of_rows or settings.is_target(name.module) or settings.parameters_in(name.module.replace(".base_layer", "")):
            return Placement(tensor, f"{ROOT}{name.module}.base_layer.{leaf}", kind, "overwrites"), None
        return dropped("is dropped in silence: its module gets no factors, so nothing has that name", _SAVE)
    return _whole(tensor, name.module, settings)


def _factor(tensor: str, name: Named, settings: Settings) -> tuple[Placement, Fault | None]:
    """One half of a module's factors: loaded where the config gives the module factors of this kind."""
    kind, module = name.kind, name.module.replace(".base_layer.", ".")
    loaded = Placement(tensor, names.parameter_of(name), kind, "loaded")
    container = re.sub(r"(\.base_layer)+$", "", module)
    depth = (len(module) - len(container)) // len(".base_layer")
    target = settings.is_target(module)
    if not target and ".base_layer." in name.module:  # inside a multi-head attention, which adapts its parts with it
        target = settings.is_target(name.module.partition(".base_layer.")[0])
    what = ""
    if parameters := settings.parameters_in(container):
        if depth >= len(parameters) and not (depth == 0 and target):
            what = (
                f"the config names {plural(len(parameters), 'parameter')} of {container!r}, and this would be one more"
            )
    elif not target:
        what = f"by target_modules {module!r} gets no factors"
    elif kind in (names.EMBEDDING_A, names.EMBEDDING_B) and names.is_looked_up(module) is False:
        what = f"{module!r} is multiplied with: PEFT's factors of it are called lora_A and lora_B, and lie the other way round"
    elif kind in (names.A, names.B) and names.is_looked_up(module):
        what = f"{module!r} is an embedding: PEFT's factors of it are called lora_embedding_A and lora_embedding_B"
    if what:
        return Placement(tensor, "", kind, "dropped"), Fault(tensor, f"is dropped in silence: {what}", _SAVE)
    return loaded, None


def _whole(tensor: str, parameter: str, settings: Settings) -> tuple[Placement, Fault | None]:
    """A weight that is no factor: kept beside the base where it is declared, written into the base where it is not."""
    module, _, leaf = parameter.rpartition(".")
    if saved := settings.saved_as(parameter):
        inner = parameter[len(saved) + 1 :]
        if leaf == "bias" and settings.raw.get("bias", "none") != "none":
            return _bias_of_saved(tensor, saved, inner), None
        if inner.startswith(("modules_to_save.", "original_module.")):
            fault = Fault(tensor, "is no name that PEFT saves: it stops with a KeyError", _SAVE, True)
            return Placement(tensor, "", "whole weight", "refused"), fault
        kind = "head" if saved.rpartition(".")[2] in _HEADS else "whole weight"
        return Placement(tensor, f"{ROOT}{saved}.modules_to_save.default.{inner}", kind, "replaces"), None
    if leaf == "bias" and settings.raw.get("bias", "none") != "none":
        return Placement(tensor, tensor, "bias", "overwrites"), None
    step = "declare its module in modules_to_save, or leave it out"
    if settings.is_target(module):
        what = f"is dropped in silence: {module!r} has factors, and its own weight is called {module}.base_layer.{leaf} there"
        return Placement(tensor, "", "whole weight", "dropped"), Fault(tensor, what, step)
    what = "is written over the base's own weight, and stays there when the adapter is switched off; a base without it drops it"
    return Placement(tensor, tensor, "whole weight", "overwrites"), Fault(
        tensor, f"{what}: modules_to_save does not name it", step
    )


def _bias_of_saved(tensor: str, saved: str, inner: str) -> Placement:
    """With bias="all" the biases of a module kept whole are saved once more, its own and the base's."""
    if inner.startswith("original_module."):
        return Placement(tensor, tensor, "bias", "overwrites")
    own = inner.removeprefix("modules_to_save.")
    return Placement(tensor, f"{ROOT}{saved}.modules_to_save.default.{own}", "bias", "replaces")


def _config_faults(settings: Settings, taken: Mapping[str, Named], folder: PeftFolder) -> Iterator[Fault]:
    """What the config promises and the file does not hold."""
    if folder.sharded:
        yield Fault(
            WEIGHTS, "is not there: PEFT reads one file, no shards", "plait merge FOLDER --out DIR writes one", True
        )
    parameters = [n.module for n in taken.values() if n.kind == names.PARAMETER]
    present = [p for p in parameters if settings.saved_as(p)]
    heads = HEADS_OF.get(settings.task_type or "", ())
    missing = [m for m in settings.declared if m not in _HEADS and not any(f".{m}." in f".{p}" for p in present)]
    if heads and not any(settings.saved_as(p) for p in present if any(h in p for h in (*heads, *_HEADS))):
        missing.append(heads[0])
    for module in missing:
        yield Fault(
            module,
            "is to be kept whole by the config, and the file holds none of it: PEFT stops with a KeyError",
            _SAVE,
            True,
        )
    init = settings.raw.get("init_lora_weights", True)
    if isinstance(init, str) and not init.lower().startswith(("pissa", *_INITS)):
        yield Fault("init_lora_weights", f"is {init!r}, which PEFT refuses", "true loads the factors as they are", True)
    prefix = folder.record.get("backbone_prefix")
    modules = {n.module.replace(".base_layer.", ".") for n in taken.values() if n.kind in names.HALVES}
    bare = [m for m in modules if not m.startswith(f"{prefix}.")]
    if isinstance(prefix, str) and prefix and bare and any(t.startswith("heads/") for t in folder.beside):
        what = (
            f"is a name of the backbone alone: over the classifier, where it lies in {prefix!r}, nothing takes effect"
        )
        yield Fault(min(bare), what, "merge it again with this version, which writes names of the whole model")
    wanted = settings.raw.get("target_modules")
    for target in wanted if isinstance(wanted, list) else ():
        if not settings.is_target(str(target)):
            continue
        named = str(target).replace(".base_layer.", ".")  # what lies inside a multi-head attention
        if re.search(r"\.\d+\.", named) and not any(is_at(m, named) for m in modules):
            what = "is named in target_modules and has no tensors: PEFT starts it anew, without effect, with a warning"
            yield Fault(str(target), what, "take the whole file from where it came")


def _notes(folder: PeftFolder, taken: Mapping[str, Named]) -> Iterator[str]:
    settings = folder.settings
    if unknown := sorted(set(settings.raw) - KNOWN_FIELDS):
        yield f"PEFT warns of unknown fields in the config, and drops them: {', '.join(unknown[:5])}"
    if settings.task_type is None:
        yield "no task_type: AutoPeftModel cannot tell the model's class, PeftModel.from_pretrained gives a bare PeftModel"
    init = settings.raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        yield f"init_lora_weights {init!r}: PEFT changes the base's weights when it loads this"
    if copies := [t for t, n in taken.items() if n.kind == names.COPY]:
        yield f"{copies[0]}: PEFT writes such copies over the base's weights, which changes nothing on the base it was trained on"
    if tied := sorted(
        {n.module.rpartition(".")[2] for n in taken.values()} & {"embed_tokens", "lm_head", "wte", "shared"}
    ):
        yield f"{', '.join(tied)}: whether the base ties input and output embeddings decides what else this moves (--base tells)"
    yield from uneven(n.module for n in taken.values() if n.kind in names.HALVES)
    yield from single_expert_notes({n.module for n in taken.values() if n.kind in names.HALVES}, settings)
    if any(t.startswith("heads/") for t in folder.beside):
        yield "heads/ holds plait's heads, one file a task; PEFT does not open them"


def uneven(modules: Iterator[str]) -> Iterator[str]:
    """Modules that other layers have and one lacks, though it has their neighbours: probably lost, and then without effect."""
    layers: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for module in set(modules):
        parent, _, leaf = module.rpartition(".")
        layers[re.sub(r"\d+", "#", parent)][parent].add(leaf)
    for same in layers.values():
        everything = set().union(*same.values())
        for parent, leaves in sorted(same.items()):
            if lacking := sorted(everything - leaves):
                yield f"{parent} has no factors of {', '.join(lacking)}, which others of its kind have: without effect there"


def _kind_beside(tensor: str) -> str:
    folder = tensor.partition("/")[0] if "/" in tensor.partition(":")[0] else ""
    return {"heads": "head", "masks": "mask"}.get(folder, "another file")
