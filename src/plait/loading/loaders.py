"""The loaders that are accounted for, each with what it opens and its rules; and the two questions put to them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from plait.errors import InputError, RunError, UsageError
from plait.loading.account import Account, Fault
from plait.loading.contents import Contents, GgufFile, LoraFile, MlxFolder, ModelFolder, PeftFolder, contents
from plait.loading.diffusers import diffusers_account, is_lora_file
from plait.loading.llama_cpp import gguf_account, llama_cpp_account
from plait.loading.mlx import mlx_account
from plait.loading.peft import peft_account
from plait.loading.trainers import TRAINERS, trainer_account
from plait.loading.transformers import adapter_account, model_account
from plait.loading.vllm import vllm_account
from plait.options import did_you_mean


@dataclass(frozen=True, slots=True)
class Loader:
    """A way of loading: which of the kinds in `contents` it opens, and the account of each."""

    name: str
    accounts: tuple[tuple[type, Callable[[Any], Account]], ...]

    def account(self, found: Contents) -> Account | None:
        """The account of what was found; None where this loader opens nothing of its kind."""
        return next((account(found) for kind, account in self.accounts if isinstance(found, kind)), None)


LOADERS = {
    loader.name: loader
    for loader in (
        Loader("peft", ((PeftFolder, peft_account),)),
        Loader("transformers", ((ModelFolder, model_account), (PeftFolder, adapter_account))),
        Loader("vllm", ((PeftFolder, vllm_account),)),
        Loader("llama.cpp", ((PeftFolder, llama_cpp_account), (GgufFile, gguf_account))),
        Loader("diffusers", ((LoraFile, diffusers_account),)),
        Loader("mlx-lm", ((MlxFolder, mlx_account),)),
        *(Loader(t, ((PeftFolder, partial(trainer_account, trainer=t)),)) for t in TRAINERS),
    )
}
# Of each kind, the loader whose own format it is: the accounts of all others say `own` False.
_OWN: dict[type, str] = {
    PeftFolder: "peft", ModelFolder: "transformers", GgufFile: "llama.cpp", LoraFile: "diffusers", MlxFolder: "mlx-lm",
}  # fmt: skip
_ALIASES = {"gguf": "llama.cpp", "llamafactory": "llama-factory", "mlx": "mlx-lm"}


def loader_named(name: str) -> str:
    """The name in `LOADERS` that a word means.

    Raises:
        UsageError: None of them.
    """
    found = _ALIASES.get(name.lower(), name.lower())
    if found not in LOADERS:
        raise UsageError(f"no account of {name!r} here", hint=did_you_mean(name, [*LOADERS, *_ALIASES]))
    return found


def accounts(path: Path | str, loaders: Collection[str] | None = None) -> tuple[Account, ...]:
    """What each loader would load from a folder or file, tensor by tensor, from names, shapes and config alone.

    Args:
        path: An adapter folder, a folder of such (the components of a pipeline), a whole model, or a file of factors.
        loaders: Names in `LOADERS`; by default all that open what is there.

    Returns:
        In the order of `LOADERS`; for a folder of folders, one for each of them, named by `inside`.

    Raises:
        InputError: Nothing there that any loader opens, or a header or config that cannot be read.
        UsageError: An unknown loader.
    """
    path = Path(path)
    chosen = list(LOADERS) if loaders is None else [loader_named(name) for name in loaders]
    found = [c for c in contents(path) if not isinstance(c, LoraFile) or is_lora_file(c)]
    if not found:
        raise InputError("holds no adapter, no model and no file of factors", where=str(path))
    return tuple(_accounts(path, chosen, found))


def _accounts(path: Path, chosen: list[str], found: list[Contents]) -> Iterator[Account]:
    for name in chosen:
        for content in found:
            if (account := LOADERS[name].account(content)) is not None:
                inside = "" if content.path == path else content.path.name
                yield replace(account, inside=inside)


def require_loadable(path: Path | str, *, meant: Collection[str] | None = None) -> tuple[Account, ...]:
    """Refuse what its own format's loader would load otherwise than was meant; to be called on what was just written.

    Args:
        path: A folder or file; one in which no loader finds anything of its own (statistics, scores) passes.
        meant: Names of the modules whose update must take effect, as the base names them; by default those that the folder
            itself speaks of.

    Returns:
        The accounts of the format's own loader.

    Raises:
        RunError: Names the first tensor at fault, the loader and the next step.
    """
    path = Path(path)
    found = tuple(a for c in _with_factors(path) for a in _accounts(path, [_OWN[type(c)]], [c]) if a.own)
    for account in found:
        faults = [*account.faults, *(_lost(account, meant) if meant is not None else ())]
        if faults:
            first, more = faults[0], len(faults) - 1
            others = f", and {more} more like it" if more else ""
            where = f"{account.inside}/{first.tensor}" if account.inside else first.tensor
            raise RunError(
                f"{first.what} (loaded by {account.loader} {account.version}{others})", where=where, hint=first.hint
            )
    return found


def _with_factors(path: Path) -> Iterator[Contents]:
    return (c for c in contents(path) if not isinstance(c, LoraFile) or is_lora_file(c))


def _lost(account: Account, meant: Collection[str]) -> Iterator[Fault]:
    """Modules whose update was meant to take effect and would not."""
    loaded = {module for p in account.placements if p.effect == "loaded" for module in _adapted(p.parameter)}
    for module in meant:
        if module not in loaded:
            yield Fault(module, "has no factors that are loaded", "please report this")


def _adapted(parameter: str) -> Iterator[str]:
    """Every name of the module that a parameter is a factor of: whole, and without one or more of its first parts."""
    parts = parameter.split(".")
    for stop in (i for i, part in enumerate(parts) if part.startswith("lora_")):
        yield from (".".join(parts[start:stop]) for start in range(stop))
