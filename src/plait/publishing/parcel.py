"""What goes to the hub of a folder: its files, with a card, and without the paths of the machine it was made on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plait.border.own_paths import scrubbed
from plait.border.yaml_text import YAML_ERRORS
from plait.disk.card import card_of
from plait.disk.card_contents import MODEL, CardContents, contents_of
from plait.disk.card_usage import published
from plait.disk.files import read_json, sha256_file, text_of
from plait.disk.hub import is_hub_name, snapshot_of, split_revision
from plait.disk.links import require_inside
from plait.disk.manifest import CARD, CARD_HASH, MANIFEST, read_manifest, sealed
from plait.errors import InputError, UsageError, printable

_CONFIG, _MODEL_CONFIG, _TOKENIZER_CONFIG = "adapter_config.json", "config.json", "tokenizer_config.json"
_NAMES_OF_BASE = (
    "_name_or_path",
    "name_or_path",
    "tokenizer_file",
)  # what transformers, or an older one, fills in with a path
# What a folder that plait did not write may hold beside its weights; never a pickle.
_TAKEN = {".safetensors", ".json", ".jinja", ".model", ".txt", ".md", ".gguf", ".yaml"}
_OF_TRAINING = {"trainer_state.json"}
_CHECKPOINT = re.compile(r"checkpoint-|global_step\d")  # folders of the HF Trainer, and of DeepSpeed in them
_NOT_RECORD = {"files", "sizes", "manifest_sha256", CARD_HASH}


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is sent.

    Args:
        repo: "user/name".
        files: Path in the repository -> the file, or its text where what is sent is not what lies there.
        left_out: Files of the folder that are not sent, each with the reason.
        base: Name of the base on the hub; None for a whole model without one.
    """

    repo: str
    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...]
    base: str | None

    def size(self, name: str) -> int:
        """Bytes of one file as it is sent."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def parcel(folder: Path, repo: str, base: str | None = None) -> Parcel:
    """Pack a folder for the hub; nothing is written.

    A folder of plait's: the files of its manifest, and a manifest in which paths are cut to their last part. Of any other: weights in
    safetensors or GGUF, configs, tokenizer and texts. The card is written anew, unless somebody edited it.

    Args:
        folder: An adapter or a whole model.
        repo: Where it goes.
        base: Name of the base on the hub, where the folder names another or a path.

    Raises:
        InputError: Neither an adapter nor a model, one that cannot be read, or one with a link to a file outside it.
        UsageError: Its base is a folder of this machine, and no name was given.
    """
    contents = contents_of(folder) if folder.is_dir() else None
    if contents is None:
        raise InputError(
            "neither an adapter folder nor a model",
            where=str(folder),
            hint="a folder that plait merge, export or bake wrote",
        )
    named = _base(folder, contents, base)
    manifest = read_manifest(folder)
    names, left_out = _own_files(folder) if manifest is None else (sorted(manifest.get("files", {})), [])
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    for name in {*names, CARD}:
        require_inside(folder / name, folder, "would be published")
    for config in {_CONFIG, _MODEL_CONFIG, _TOKENIZER_CONFIG} & files.keys():
        files[config] = _config(folder / config, named if config == _CONFIG else None)
    record = {k: scrubbed(v) for k, v in (manifest or {}).items() if k not in _NOT_RECORD}
    card = _card(folder, repo, manifest, record, named)
    files[CARD] = card.encode()
    if manifest is not None:
        files[MANIFEST] = _manifest(record, manifest, files)
    return Parcel(repo, dict(sorted(files.items())), tuple(left_out), named)


def _base(folder: Path, contents: CardContents, asked: str | None) -> str | None:
    """The base's name on the hub: as asked, as the folder has it, or as the hub's cache lays it out."""
    if asked is not None:
        if "/" not in asked or not is_hub_name(asked):
            raise UsageError(f"{printable(asked)!r} is no name on the hub", hint="--base USER/NAME")
        return split_revision(asked)[0]
    if contents.base or contents.library == MODEL:
        return contents.base
    config = _object(folder / _CONFIG)
    place = str(config.get("base_model_name_or_path") or config.get("model") or "")
    if place and (hub := snapshot_of(Path(place).absolute())):
        return hub.repo
    what = f"its config names {place!r} as its base, a folder of this machine" if place else "its config names no base"
    raise UsageError(
        f"{what}: nobody else could load it", where=str(folder), hint="--base USER/NAME names it on the hub"
    )


def _own_files(folder: Path) -> tuple[list[str], list[str]]:
    """Files of a folder that plait did not write: what is sent, and what is not; a training's checkpoints in it in one line each."""
    sent, left_out = [], dict[str, None]()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        inside = path.relative_to(folder)
        name = inside.as_posix()
        if any(part.startswith(".") for part in inside.parts):
            continue
        if checkpoint := next((n for n, part in enumerate(inside.parts[:-1], 1) if _CHECKPOINT.match(part)), 0):
            left_out[f"{'/'.join(inside.parts[:checkpoint])}/ (a checkpoint of a training, not its result)"] = None
        elif inside.name in _OF_TRAINING:
            left_out[f"{name} (how the training stood, which names paths of its machine)"] = None
        elif path.suffix.lower() not in _TAKEN and path.stem.upper() != "LICENSE":
            left_out[f"{name} (not weights in safetensors, a config, a tokenizer or a text)"] = None
        else:
            sent.append(name)
    return sent, [*left_out]


def _config(path: Path, base: str | None) -> Path | bytes:
    """A config as it lies there, where it names no path and the right base; else its text without them."""
    config = _object(path)
    changed = dict(config)
    if base is not None and config.get("base_model_name_or_path") != base:
        changed |= {"base_model_name_or_path": base}
    changed |= {key: scrubbed(config[key]) for key in _NAMES_OF_BASE if isinstance(config.get(key), str)}
    return (
        path
        if changed == config
        else (json.dumps(changed, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    )


def _object(path: Path) -> Mapping[str, Any]:
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError("not a JSON object", where=str(path))
    return config


def _card(
    folder: Path, repo: str, manifest: Mapping[str, Any] | None, record: Mapping[str, Any], base: str | None
) -> str:
    """The card for the repository: written anew, or the edited one with its lines and its base set right."""
    lying, name = folder / CARD, repo.rpartition("/")[2]
    known = (manifest or {}).get(CARD_HASH)
    edited = lying.is_file() and (known is None or sha256_file(lying) != known)
    if not edited:
        return published(_new_card(folder, name, record, base), name, repo)
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(published(text_of(lying), folder.resolve().name, repo))
    except YAML_ERRORS as e:
        what = f"its metadata cannot be read: {' '.join(str(e).split())}"
        raise InputError(what, where=str(lying), hint="correct the lines between ---") from None
    data: Any = card.data
    own = data.to_dict().get("base_model")
    if base and not isinstance(own, list) and (not isinstance(own, str) or not is_hub_name(own)):
        data.base_model = base
    return str(card)


def _new_card(folder: Path, name: str, record: Mapping[str, Any], base: str | None) -> str:
    try:
        return card_of(folder, name, record, base=base) or ""
    except (
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
    ) as e:  # a record of somebody else, whose values are not what plait's are
        what = f"its record is none that plait writes: {type(e).__name__}: {e}"
        raise InputError(
            what, where=str(folder / MANIFEST), hint="write the result anew, or remove the record"
        ) from None


def _manifest(record: Mapping[str, Any], manifest: Mapping[str, Any], files: Mapping[str, Path | bytes]) -> bytes:
    """The manifest of what is sent: hashes of the files as they are sent, and a digest of itself."""
    import hashlib

    digests, sizes = manifest.get("files", {}), manifest.get("sizes", {})
    listed = {}
    for name, digest in digests.items():
        content = files[name]
        if isinstance(content, bytes):
            listed[name] = (len(content), hashlib.sha256(content).hexdigest())
        else:
            listed[name] = (sizes.get(name, content.stat().st_size), digest)
    card = files[CARD]
    whole = {**record, CARD_HASH: hashlib.sha256(card).hexdigest()} if isinstance(card, bytes) else record
    text = json.dumps(sealed(whole, listed), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()
