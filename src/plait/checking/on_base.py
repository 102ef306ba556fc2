"""A folder loaded by PEFT itself on its base, and held against the base with every update added by hand."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from plait.errors import InputError
from plait.loading import tensor_names as names
from plait.loading.contents import WEIGHTS, PeftFolder, contents
from plait.loading.settings import Settings
from plait.loading.single_experts import single_expert
from plait.model.layout import layout_in
from plait.model.quiet import quiet_transformers

_HALVES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}  # of a fused gate_up_proj
_TOKENS, _ROWS, _SEED = 16, 2, 0
_EQUAL = 1e-4  # of the adapter's own effect: float32 through some dozen layers leaves 1e-6
# task_type -> transformers' class, as PEFT's own AutoPeftModel classes choose it.
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_VARIANTS = (
    *(
        "use_dora",
        "lora_bias",
        "trainable_token_indices",
        "target_parameters",
        "use_qalora",
        "use_bdlora",
        "kasa_config",
    ),
    *("monteclora_config", "arrow_config", "alora_invocation_tokens", "layer_replication"),
)
_BY_HAND = "its updates are not scaling * B A added to weights: --base compares plain LoRA"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What PEFT made of a folder on its base.

    Args:
        model: The class that was loaded, as transformers calls it.
        error: Largest difference between PEFT's output and that of the base with scaling * B A added to its weights.
        effect: Largest difference between PEFT's output and the base's own.
        restored: Largest difference between the output with the adapter switched off and the base's own.
        missing: Parameters of the adapter that the file does not hold, by PEFT's own word.
        unexpected: Tensors of the file that became no parameter, by PEFT's own word.
        faults: What is not as it was meant; empty where all is.
    """

    model: str
    error: float
    effect: float
    restored: float
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    faults: tuple[str, ...]


def compare_on_base(path: Path, base: str) -> Comparison:
    """Load the base, let PEFT load the folder on it, and compare its output on random tokens with updates added by hand.

    Raises:
        InputError: No PEFT folder, a variant whose update is no scaling * B A, or a folder that PEFT refuses.
    """
    import torch

    content = contents(path)
    if len(content) != 1 or not isinstance(content[0], PeftFolder):
        raise InputError("is no PEFT folder: --base is for one adapter", where=str(path))
    folder = content[0]
    if variant := next((k for k in _VARIANTS if folder.settings.raw.get(k)), None):
        raise InputError(f"{variant}: {_BY_HAND}", where=str(folder.settings.path))
    from safetensors.torch import load_file

    tensors = load_file(folder.path / WEIGHTS)
    with torch.no_grad():
        classes = _classes(folder, base)
        plain = _loaded(base, classes, folder.settings, tensors)
        batch = _batch(plain.config, base)
        before = _output(plain, batch)
        model, result = _by_peft(_loaded(base, classes, folder.settings, tensors), folder.path)
        after = _output(model, batch)
        with model.disable_adapter():
            off = _output(model, batch)
        skipped = _add_by_hand(plain, tensors, folder.settings)
        expected = _output(plain, batch)
    error, effect, restored = (
        float((a - b).abs().max()) for a, b in ((after, expected), (after, before), (off, before))
    )
    missing = tuple(sorted(k for k in result.missing_keys if ".default" in k))
    unexpected = tuple(sorted(result.unexpected_keys))
    trained = any(bool(t.any()) for n, t in tensors.items() if names.named(n).kind in (names.B, names.EMBEDDING_B))
    found = Comparison(type(plain).__name__, error, effect, restored, missing, unexpected, ())
    return replace(found, faults=tuple(_faults(found, skipped, trained=trained)))


def _faults(found: Comparison, skipped: Sequence[str], *, trained: bool) -> Iterator[str]:
    """Say in words what is not as it was meant.

    Args:
        found: What was measured.
        skipped: Updates for which the base has no module.
        trained: Whether any B is more than zero, so that there is an effect to expect.
    """
    yield from (f"PEFT starts {m} anew: the file does not hold it" for m in found.missing[:3])
    yield from (f"PEFT drops {u}" for u in found.unexpected[:3])
    yield from (f"the base has no module for {s}" for s in skipped[:3])
    if trained and found.effect == 0.0:
        yield "the adapter has no effect: PEFT's output is the base's own"
    if not found.error <= _EQUAL * max(found.effect, 1e-3):
        yield (
            f"PEFT's output is off by {found.error:.2g} from the base with its updates added (the adapter's effect is "
            f"{found.effect:.2g})"
        )
    if found.restored != 0.0:
        yield f"with the adapter switched off the base is another by {found.restored:.2g}: its weights were overwritten"


def _classes(folder: PeftFolder, base: str) -> str:
    """Choose the class of the base: by the task type, by the heads beside, else by what the base was saved as."""
    if named := _CLASSES.get(folder.settings.task_type or ""):
        return named
    if any(t.startswith("heads/") for t in folder.beside):  # a merge of classifiers: its update goes under any head
        return "AutoModelForSequenceClassification"
    return _class_of_base(base, [names.named(t).module for t in folder.header.tensors])


def _loaded(base: str, named: str, settings: Settings, tensors: dict[str, Any]) -> Any:
    """The base as the adapter asks for it, float32, in evaluation mode; its head's sizes follow the file."""
    import torch
    import transformers as hf

    cls = getattr(hf, named)
    heads = [
        t.shape[0] for n, t in tensors.items() if settings.saved_as(n.removeprefix(names.ROOT)) and n.endswith("weight")
    ]
    labels = {"num_labels": heads[-1]} if cls is hf.AutoModelForSequenceClassification and heads else {}
    torch.manual_seed(_SEED)  # a head that the base has not is drawn at random, the same one each time
    try:
        with quiet_transformers():
            return cls.from_pretrained(base, dtype=torch.float32, use_safetensors=True, **labels).eval()
    except (OSError, ValueError) as e:
        raise InputError(f"transformers cannot load it: {e}", where=base) from None


def _class_of_base(base: str, modules: Sequence[str]) -> str:
    """The class that the base was saved as, where AutoModel would leave its head out; modules are the adapter's."""
    import transformers as hf

    named = (hf.AutoConfig.from_pretrained(base).architectures or [""])[0]
    if re.search(r"CausalLM|LMHeadModel", named):
        return "AutoModelForCausalLM"
    if "ForImageClassification" in named:
        return "AutoModelForImageClassification"
    if "ConditionalGeneration" in named:
        return "AutoModelForSeq2SeqLM"
    backbone = getattr(getattr(hf, named, None), "base_model_prefix", "")
    return named if backbone and any(m.startswith(f"{backbone}.") for m in modules) else "AutoModel"


def _by_peft(base: Any, folder: Path) -> tuple[Any, Any]:
    """The folder on the base, and what PEFT itself says of its tensors."""
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = PeftModel.from_pretrained(base, str(folder)).eval()
            result: Any = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        except (ValueError, RuntimeError, KeyError, TypeError) as e:
            raise InputError(f"PEFT refuses it: {type(e).__name__}: {e}", where=str(folder)) from None
    return model, result


def _batch(config: Any, base: str) -> dict[str, Tensor]:
    """Random tokens, or random images for a model that reads no tokens."""
    import torch

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    generator = torch.Generator().manual_seed(_SEED)
    if not hasattr(text, "vocab_size"):
        size = getattr(config, "image_size", None)
        if size is None or not hasattr(config, "num_channels"):
            raise InputError(
                "reads neither tokens nor images, as far as its config says: --base asks no others", where=base
            )
        height, width = (size, size) if isinstance(size, int) else size
        shape = (_ROWS, config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float32)}
    length = min(_TOKENS, int(getattr(text, "max_position_embeddings", _TOKENS)) // 2 or _TOKENS)
    ids = torch.randint(5, int(text.vocab_size), (_ROWS, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**inputs, "decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else inputs


def _output(model: Any, batch: Mapping[str, Tensor]) -> Any:
    outputs = model(**batch)
    return next(outputs[k] for k in ("logits", "start_logits", "last_hidden_state") if k in outputs)


def _add_by_hand(model: Any, tensors: dict[str, Any], settings: Settings) -> list[str]:
    """Add scaling * B A to the base's weights, put in what was kept whole; the tensors that found no place."""
    modules, skipped = dict(model.named_modules(remove_duplicate=False)), []
    elsewhere: dict[str, tuple[dict[str, Any], float]] = {}
    halves: dict[str, dict[str, Any]] = {}
    for tensor, values in tensors.items():
        name = names.named(tensor)
        if name.kind in names.HALVES:
            halves.setdefault(name.module, {})[name.kind] = values.float()
        elif name.kind == names.PARAMETER:
            module, _, leaf = name.module.rpartition(".")
            if module in modules:
                _untied(modules[module], leaf, values.float())
            else:
                skipped.append(tensor)
    for module, pair in halves.items():
        rank, alpha = settings.rank_of(module), settings.alpha_of(module)
        scaling = alpha / math.sqrt(rank) if settings.flag("use_rslora") else alpha / rank
        if len(pair) != 2 or not hasattr(modules.get(module), "weight"):
            elsewhere[module] = pair, scaling
            continue
        weight = modules[module].weight
        if names.A in pair:
            delta = (pair[names.B].flatten(1) @ pair[names.A].flatten(1)).reshape(-1, *pair[names.A].shape[1:])
            delta = delta.T if type(modules[module]).__name__ == "Conv1D" else delta
        else:
            delta = (pair[names.EMBEDDING_B] @ pair[names.EMBEDDING_A]).T
        _untied(modules[module], "weight", weight + scaling * delta)
    return [*skipped, *_add_where_renamed(model, elsewhere)]


def _add_where_renamed(model: Any, updates: Mapping[str, tuple[dict[str, Any], float]]) -> list[str]:
    """Add updates of modules under transformers 4's names to what those became, such as one of a mixture's experts; the rest."""
    linear = {m: pair for m, (pair, _) in updates.items() if pair.keys() == {names.A, names.B}}
    found = {
        stored.removesuffix(".weight"): parameter
        for parameter, place in (layout_in(model, [f"{m}.weight" for m in linear]) if linear else {}).items()
        for part in place.parts
        for stored in part
    }
    for module, pair in linear.items():
        delta = updates[module][1] * pair[names.B] @ pair[names.A] if pair[names.A].ndim == 2 else None
        if module not in found or delta is None or not _added(model.get_parameter(found[module]), module, delta):
            found.pop(module, None)
    return [m for m in updates if m not in found]


def _added(weight: Any, module: str, delta: Any) -> bool:
    """Add one matrix to the weight that holds it: as a whole, or as an expert's, of whose gate and up projection the gate lies first."""
    expert = single_expert(module)
    if expert is None:
        place = weight
    elif weight.ndim != 3 or expert.number >= weight.shape[0]:
        return False
    else:
        place = weight[expert.number]
        if expert.leaf in _HALVES and place.shape[0] == 2 * delta.shape[0]:
            place = place.chunk(2)[_HALVES[expert.leaf]]
    if place.shape != delta.shape:
        return False
    place += delta
    return True


def _untied(module: Any, leaf: str, values: Any) -> None:
    """Give a module a parameter of its own: what is tied to the old one keeps the old one, as PEFT's wrappers do."""
    import torch

    setattr(module, leaf, torch.nn.Parameter(values, requires_grad=False))
