"""Under which name a base's files keep the weight of a module, and whether PEFT's copies of such weights are the base's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from plait.adapters.arrays import equal
from plait.adapters.beside import COPY, EMBEDDING_NAMES, TIED_OUTPUT_NAMES
from plait.adapters.lora import Adapter
from plait.border.counts import plural
from plait.border.module_names import named_by
from plait.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from plait.model.stored import StoredTensor

# Attributes that transformers has put around a model's layers, and taken away again, from one version to another: the files
# of many bases, and adapters of other versions, have the names from before.
_WRAPPERS = {"model", "language_model", "llm"}


def without_wrappers(name: str) -> str:
    """Strip a module's name of the attributes that differ between versions and classes of one model."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def by_core(names: Iterable[str]) -> dict[str, str]:
    """Name without wrappers -> name, for those that remain distinct without them."""
    known = list(names)
    counts = Counter(map(without_wrappers, known))
    return {core: name for name in known if counts[core := without_wrappers(name)] == 1}


def tensor_of(module: str, adapter: Adapter, tensors: Mapping[str, StoredTensor], tied: bool) -> tuple[str, bool]:
    """Name of a module's stored weight, and whether it is the tied output layer, which has none of its own.

    Raises:
        InputError: No such weight in the base, or several; what the base holds instead is said.
    """
    prefixes = ["", f"{adapter.prefix}.", f"{adapter.source.get('backbone_prefix', '')}."]
    names = [f"{p}{module}.weight" for p in prefixes if p != "."]
    inner = module.partition(".")[2]  # saved from the backbone alone: "model.layers.0" is "layers.0" there
    for name in [*names, f"{inner}.weight"]:
        if name in tensors:
            return name, False
    endings = [n for n in tensors if named_by(n, f"{module}.weight")]
    if len(endings) == 1:
        return endings[0], False
    if not endings and (older := by_core(tensors).get(f"{without_wrappers(module)}.weight")):
        return older, False
    if tied and module.rpartition(".")[2] in TIED_OUTPUT_NAMES:
        embeddings = embeddings_in(tensors)
        if len(embeddings) == 1:
            return embeddings[0], True
    raise InputError(
        f"the base holds no weight for module {module!r}"
        if not endings
        else f"the base holds {len(endings)} weights for module {module!r}: {', '.join(sorted(endings)[:3])}",
        where=adapter.name,
        hint=_nearest(module, tensors),
    )


def all_named(adapter: Adapter, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the base's files hold the weight of every module under a name that `tensor_of` knows: else only transformers can tell."""
    try:
        for module in adapter.modules:
            tensor_of(module, adapter, tensors, tied=True)
    except InputError:
        return False
    return True


_POSITIONS = {"wpe", "position_embeddings"}


def embeddings_in(tensors: Iterable[str]) -> list[str]:
    """List the weights that are input embeddings by their names."""
    return [n for n in tensors if "." in n and n.rsplit(".", 2)[-2] in EMBEDDING_NAMES - _POSITIONS]


def _nearest(module: str, tensors: Mapping[str, StoredTensor]) -> str:
    """What the base holds where the module would be: its longest beginning, or ending, that occurs there."""
    parts = module.split(".")
    for n in range(len(parts) - 1, 0, -1):
        start, end = ".".join(parts[:n]) + ".", "." + ".".join(parts[-n:]) + "."
        if near := sorted(t for t in tensors if f".{t}".find(f".{start}") >= 0 or end in f".{t}"):
            more = f" and {len(near) - 3} more" if len(near) > 3 else ""
            return f"nearest in its files: {', '.join(near[:3])}{more}"
    first = next(iter(sorted(tensors)), "none")
    return (
        f"its {plural(len(tensors), 'tensor', 'has', 'have')} other names altogether, {first!r} the first: another model, or saved by "
        "another version of transformers"
    )


def compared_copies(
    copies: Mapping[str, Tensor], adapter: Adapter, tensors: Mapping[str, StoredTensor], tied: bool
) -> list[str]:
    """Hold PEFT's copies of base weights against a base's own, to the bit in the narrower of both dtypes.

    Returns:
        A line for each.

    Raises:
        InputError: One differs: the adapter was trained on other weights than these.
    """
    sentences = []
    for key, copy in copies.items():
        module, _, leaf = key.partition(COPY)
        name = tensor_of(module.removesuffix(".token_adapter"), adapter, tensors, tied)[0].removesuffix("weight") + leaf
        stored = tensors.get(name)
        if stored is None or stored.shape != tuple(copy.shape):
            raise InputError(
                f"{key!r} is {tuple(copy.shape)} and the base's {name!r} {stored.shape if stored else 'is missing'}",
                where=adapter.name,
                hint="was the vocabulary resized before training? resize the base's in the same way",
            )
        own = stored.read(0, stored.shape[0])
        if not equal(own.to(copy.dtype), copy) and not equal(copy.to(own.dtype), own):
            far = float((own.double() - copy.double()).norm() / own.double().norm().clamp(min=1e-300))
            raise InputError(
                f"{key!r} differs from the base's {name!r} by {far:.2g} of it: the adapter was trained on other weights there",
                where=adapter.name,
                hint="the base it was trained on, resized or trained as it was then",
            )
        sentences.append(f"{key} equals the base's {name}: it was not trained")
    return sentences
