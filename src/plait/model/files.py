"""The files that a base model is loaded from: which they are, and what can be said of them before they are loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.adapters.tensors import read_layout
from plait.disk.hub import Snapshot, is_hub_name, snapshot, split_revision
from plait.disk.store import read_json, require_regular
from plait.errors import InputError

CONFIG, GENERATION, SINGLE = "config.json", "generation_config.json", "model.safetensors"
INDEX = f"{SINGLE}.index.json"
ADAPTER_CONFIG = "adapter_config.json"
_WAY_TO_SAFETENSORS = (
    "hf download NAME --include '*.safetensors' where its owner offers them; else load it once where you trust it and "
    "model.save_pretrained(NEW)"
)
# Configs and tokenizers on the hub; weights go by their names.
_CONFIGS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
# What tokenizers of transformers read.
_TOKENIZER = re.compile(
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)|tekken\.json"
    r"|(vocab|merges)[\w.-]*\.(txt|json)|.+\.(model|spm|tiktoken|codes|bpe)"
)


def read_base_config(folder: Path) -> Mapping[str, Any]:
    """Read a base's config.json.

    Raises:
        InputError: Missing, no JSON object, or the folder is an adapter: transformers would load another base for it.
    """
    if (folder / ADAPTER_CONFIG).exists():
        raise InputError(
            f"holds an {ADAPTER_CONFIG}: an adapter, not a base", where=str(folder), hint="name the base itself"
        )
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise InputError("not a JSON object", where=str(folder / CONFIG))
    if config.get("transformers_weights") is not None:
        raise InputError("names its weights in transformers_weights", where=str(folder / CONFIG), hint=f"use {SINGLE}")
    return config


def indexed_shards(folder: Path) -> list[str]:
    """List the shards that a folder's index names, in order; [] where there is no index.

    Raises:
        InputError: No map from tensors to files of this folder.
    """
    if not (folder / INDEX).exists():
        return []
    index = read_json(folder / INDEX)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files or any(Path(str(f)).name != f for f in files.values()):
        raise InputError("no weight_map from tensor to shard", where=str(folder / INDEX))
    return sorted(set(files.values()))


def weight_files(folder: Path) -> list[Path]:
    """List the files that hold a base's weights: the single one, which loaders look for first, or those that the index names.

    Raises:
        InputError: None, only pickles, or a shard is missing.
    """
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    shards = [folder / name for name in indexed_shards(folder)]
    if not shards:
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        what = f"its weights are a pickle ({pickles[0]})" if pickles else f"no {SINGLE} and no {INDEX}"
        raise InputError(
            what, where=str(folder), hint=_WAY_TO_SAFETENSORS if pickles else "a folder of the base in safetensors"
        )
    for shard in shards:
        if not shard.exists():
            raise InputError(
                f"{INDEX} names {shard.name}, which is not there",
                where=str(folder),
                hint="download it again, whole",
            )
        require_regular(shard)
    return shards


def weight_layout(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the headers of a base: tensor -> {"dtype", "shape", "data_offsets"}; no tensor is read.

    Raises:
        InputError: A file is damaged or cut, or two of them hold one tensor.
    """
    layout: dict[str, dict[str, Any]] = {}
    for path in weight_files(folder):
        _, entries, _ = read_layout(path)
        if twice := next((name for name in entries if name in layout), None):
            raise InputError(f"tensor {twice!r} is in two shards", where=str(path), hint="download it again, whole")
        layout |= entries
    return layout


def base_snapshot(name: str, revision: str | None, *, weights: bool) -> Snapshot:
    """Find a base model of the hub: its config and tokenizer, and its weights in safetensors where they are wanted.

    Raises:
        InputError: Neither in the cache nor on the hub, or without safetensors.
    """
    repository = snapshot(name, revision, _CONFIGS, what="base model")
    if not weights:
        return repository
    wanted = (*_CONFIGS, SINGLE, *indexed_shards(repository.folder))
    return snapshot(name, repository.commit, wanted, what="base model")


def base_place(text: str | Path, *, weights: bool = True) -> Path:
    """Find the folder of a base: a path that exists, else ``name``, ``user/name`` or either ``@revision`` on the hub.

    Args:
        text: Path or name.
        weights: Whether they are wanted beside config and tokenizer.

    Raises:
        InputError: It looks like a hub name and is neither here, nor in the cache, nor on the hub.
    """
    written = str(text)
    if not is_hub_name(written) or Path(Path(written).parts[0]).is_dir():
        return Path(text)
    return base_snapshot(*split_revision(written), weights=weights).folder


def tokenizer_files(folder: Path) -> list[Path]:
    """List the files that make a base's tokenizer, in order; [] where it has none."""
    return sorted(p for p in folder.iterdir() if _TOKENIZER.fullmatch(p.name) and p.is_file())


def require_vocabulary(folder: Path, wanted: Mapping[str, str], where: str) -> None:
    """Refuse a base without the vocabulary of its tokenizer: transformers makes one of five entries, all words unknown.

    Args:
        folder: The base's.
        wanted: `vocab_files_names` of its tokenizer's class.
        where: The base, for the message.

    Raises:
        InputError: Neither tokenizer.json nor all other files that the class reads.
    """
    whole = wanted.get("tokenizer_file", "tokenizer.json")
    others = [name for kind, name in wanted.items() if kind in ("vocab_file", "merges_file")]
    if (folder / whole).is_file() or (others and all((folder / name).is_file() for name in others)):
        return
    if not wanted and (folder / "tokenizer_config.json").is_file():  # of bytes or characters: there is no vocabulary
        return
    lacking = " or ".join([whole, *([" + ".join(others)] if others else [])])
    raise InputError(
        f"no tokenizer: {lacking} is missing",
        where=where,
        hint="copy the tokenizer files of the base into its folder",
    )
