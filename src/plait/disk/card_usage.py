"""The lines of a card that load what it describes: each of them runs from the folder's parent, and from anywhere once it is on the hub."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from plait.disk.card_contents import MLX, MODEL, CardContents, CardHead

_PLACE = "{what} = {place!r}  # this folder, seen from the one above it"
_PUBLISHED = "{what} = {place!r}"
_FROM_CONFIG = "base = PeftConfig.from_pretrained(adapter).base_model_name_or_path  # {called}"
_LANGUAGE = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
_CLASSIFIERS = {
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
}
_PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_2_SEQ_LM": "text2text-generation"} | {
    kind: pipeline for kind, (_, pipeline) in _CLASSIFIERS.items()
}
_ARCHITECTURES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
}


def pipeline_tag(contents: CardContents) -> str | None:
    """Name the hub's task of a folder: "text-generation", "text-classification"; None where nothing tells it."""
    if contents.library != MODEL:
        return _PIPELINES.get(contents.task_type)
    auto = _auto_of(contents.architecture)
    return {"AutoModelForCausalLM": "text-generation"}.get(auto) or ("text-classification" if contents.heads else None)


def published(card: str, name: str, repo: str) -> str:
    """Have a card's lines load the repository it goes to in place of the folder it comes from.

    >>> published("adapter = 'merged'  # this folder, seen from the one above it", "merged", "alice/merged")
    "adapter = 'alice/merged'"

    Args:
        card: The card's text.
        name: Name of the folder.
        repo: Name on the hub.
    """
    for what in ("adapter", "model_name"):
        card = card.replace(_PLACE.format(what=what, place=name), _PUBLISHED.format(what=what, place=repo))
    quoted = shlex.quote(name)
    for before, after in (("plait export ", " "), (f"--lora-modules {quoted}=", "\n"), ("--adapter-path ", " ")):
        card = card.replace(f"{before}{quoted}{after}", f"{before}{repo}{after}")
    return card


def usage(contents: CardContents, name: str, loader: str = "") -> str:
    """Write the Markdown that says how to load a folder.

    Args:
        contents: What lies in it.
        name: Name of the folder.
        loader: What it was exported for, if it was: "vllm" is told how to serve it.
    """
    if loader == "vllm":
        base = contents.base or contents.base_called or "BASE"
        options = (
            f"--enable-lora --max-lora-rank {contents.rank} --lora-modules {shlex.quote(name)}={shlex.quote(name)}"
        )
        return _block([f"vllm serve {shlex.quote(base)} {options}"], "bash")
    if contents.library == MLX:
        return _block(
            [
                f"mlx_lm.generate --model {shlex.quote(contents.base or 'BASE')} --adapter-path {shlex.quote(name)} --prompt TEXT"
            ],
            "bash",
        )
    if contents.library == MODEL:
        return _model(contents, name)
    if contents.inline is not None:
        return _classifier(contents, contents.inline, name)
    if contents.heads:
        return _several_heads(contents, name)
    if contents.task_type in _LANGUAGE:
        return _language(contents, name)
    return _without_head(contents, name)


def loading(contents: CardContents, place: str, seen: str) -> str:
    """Give the lines of Python alone that load an adapter folder, for where it is seen from elsewhere.

    Args:
        contents: What lies in it.
        place: Its path, as the lines name it.
        seen: From where that path is right, which stands beside it.
    """
    code = usage(contents, place).partition("```python\n")[2].partition("\n```")[0]
    return code.replace(_PLACE.format(what="adapter", place=place), f"adapter = {place!r}  # {seen}")


def _block(lines: list[str], language: str = "python") -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _base_lines(contents: CardContents, name: str) -> list[str]:
    """The adapter's place and its base's: by the hub's name where it has one, else as the adapter's config says."""
    place = _PLACE.format(what="adapter", place=name)
    if contents.base:
        return [place, f"base = {contents.base!r}"]
    return [place, _FROM_CONFIG.format(called=contents.base_called or "the base that it names")]


def _imports(contents: CardContents, transformers: str, *, more: str = "") -> list[str]:
    config = "" if contents.base else "PeftConfig, "
    lines = [f"from peft import {config}PeftModel", f"from transformers import {transformers}"]
    return [more, *lines, ""] if more else [*lines, ""]


def _of_base(contents: CardContents, auto: str, more: str = "") -> str:
    revision = f", revision={contents.revision!r}" if contents.base and contents.revision else ""
    return f"{auto}.from_pretrained(base{revision}{more})"


def _language(contents: CardContents, name: str) -> str:
    auto = _LANGUAGE[contents.task_type]
    lines = [
        *_imports(contents, f"{auto}, AutoTokenizer"),
        *_base_lines(contents, name),
        f"model = PeftModel.from_pretrained({_of_base(contents, auto)}, adapter)",
        f"tokenizer = {_of_base(contents, 'AutoTokenizer')}",
        'answer = model.generate(**tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)',
        "print(tokenizer.decode(answer[0], skip_special_tokens=True))",
    ]
    if contents.task_type != "CAUSAL_LM":
        return _block(lines)
    base = contents.base or "path/to/the/base"
    served = [
        f"plait export {shlex.quote(name)} --for vllm --out for-vllm  # prints the line that serves it",
        f"plait export {shlex.quote(name)} --for gguf --base {base} --out adapter.gguf  # for llama.cpp and Ollama",
    ]
    return "\n\n".join([_block(lines), "vLLM and llama.cpp take what these write:", _block(served, "bash")])


def _classifier(contents: CardContents, head: CardHead, name: str) -> str:
    auto, pipeline = _CLASSIFIERS.get(contents.task_type, _CLASSIFIERS["SEQ_CLS"])
    lines = [
        *_imports(contents, f"{auto}, AutoTokenizer, pipeline"),
        *_base_lines(contents, name),
        f"head = {_head_values(head)}  # PEFT's config has no place for the classes",
        f"model = PeftModel.from_pretrained({_of_base(contents, auto, ', **head')}, adapter)",
        f"classify = pipeline({pipeline!r}, model=model, tokenizer={_of_base(contents, 'AutoTokenizer')})",
    ]
    return _block(lines)


def _head_values(head: CardHead) -> Mapping[str, Any]:
    count = head.outputs or len(head.labels) or 2
    if not head.labels:
        return {"num_labels": count}
    names = dict(enumerate(head.labels))
    return {"num_labels": count, "id2label": names, "label2id": {label: i for i, label in names.items()}}


def _several_heads(contents: CardContents, name: str) -> str:
    auto = _CLASSIFIERS.get(contents.task_type, _CLASSIFIERS["SEQ_CLS"])[0]
    first = contents.heads[0]
    count = f", num_labels={first.outputs}" if first.outputs else ""
    lines = [
        *_imports(contents, auto, more="import plait"),
        *_base_lines(contents, name),
        f"model = PeftModel.from_pretrained({_of_base(contents, auto, count)}, adapter)",
        f"plait.load_head(model, adapter, {first.name!r})  # or another of its heads",
    ]
    note = "transformers reports the head as newly initialised before the last line puts it in. PEFT knows of one head per folder;"
    one = f"plait export {shlex.quote(name)} --for peft --task {shlex.quote(first.name)} --out {shlex.quote(first.name + '-alone')}"
    return "\n\n".join([_block(lines), f"{note} this writes an ordinary one of one task:", _block([one], "bash")])


def _without_head(contents: CardContents, name: str) -> str:
    auto = _CLASSIFIERS[contents.task_type][0] if contents.task_type in _CLASSIFIERS else "AutoModel"
    lines = [
        *_imports(contents, auto),
        *_base_lines(contents, name),
        f"model = PeftModel.from_pretrained({_of_base(contents, auto)}, adapter)",
    ]
    return _block(lines)


def _model(contents: CardContents, name: str) -> str:
    place = _PLACE.format(what="model_name", place=name)
    if not contents.heads:
        auto = _auto_of(contents.architecture)
        lines = [
            f"from transformers import {auto}, AutoTokenizer",
            "",
            place,
            f"model = {auto}.from_pretrained(model_name)",
            "tokenizer = AutoTokenizer.from_pretrained(model_name)",
        ]
        return _block(lines)
    head = contents.heads[0]
    auto = _CLASSIFIERS.get(head.task_type, _CLASSIFIERS["SEQ_CLS"])[0]
    count = f", num_labels={head.outputs}" if head.outputs else ""
    lines = [
        "from safetensors.torch import load_file",
        f"from transformers import {auto}",
        "from transformers.utils import cached_file",
        "",
        place,
        f"model = {auto}.from_pretrained(model_name{count})",
        f"head = load_file(cached_file(model_name, {json.dumps(f'heads/{head.name}.safetensors')}))  # or another of its heads",
        "unexpected = model.load_state_dict(head, strict=False).unexpected_keys",
        'assert not unexpected, f"not a head of this class: {unexpected}"',
    ]
    return _block(lines)


def _auto_of(architecture: str) -> str:
    return next((auto for end, auto in _ARCHITECTURES.items() if architecture.endswith(end)), "AutoModel")
