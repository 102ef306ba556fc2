"""Pages made of what the code registers: methods, subspaces, the recipe's keys, the commands."""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

ROOT = Path(__file__).resolve().parents[1]
MARKS = "<!-- support: python docs/generate.py -->\n", "<!-- end of support -->\n"
AT_THE_ROOT = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
_SPELT = {
    "deberta": "DeBERTa",
    "gemma": "Gemma",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "vit": "ViT",
    "bert": "BERT",
    "gpt2": "GPT-2",
    "llama": "Llama",
    "mpnet": "MPNet",
    "roberta": "RoBERTa",
    "t5": "T5",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3-MoE",
    "gpt_oss": "GPT-OSS",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
    "mica": "MiCA",
    "olora": "OLoRA",
    "pissa": "PiSSA",
}
NEEDS = {"moments": "statistics", "fisher": "Fisher files", "output_gradients": "output gradients"}


def write_all(folder: Path) -> None:
    """Write every generated page into a folder, those alone that have changed: Sphinx then builds no more than it must."""
    folder.mkdir(exist_ok=True)
    pages = {
        "methods.md": methods(),
        "subspaces.md": subspaces(),
        "recipe.md": recipe(),
        "commands.md": commands(),
        "support.md": support(),
    }
    pages |= {name.lower(): of_the_root(name) for name in AT_THE_ROOT}
    for name, text in pages.items():
        page = folder / name
        if not page.is_file() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def of_the_root(name: str) -> str:
    """Copy a page from the repository's root, its links turned to where the pages stand here, or to the repository's own."""
    text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](../")
    text = re.sub(r"\]\((\w+)\.md\)", lambda link: f"]({link[1].lower()}.md)", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return re.sub(r"\]\((\w+/)", rf"]({project['urls']['Repository']}/blob/main/\1", text)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Set a Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: object) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _paper(paper: str) -> str:
    number = paper.removeprefix("arXiv:")
    return f"[{number}](https://arxiv.org/abs/{number})" if paper.startswith("arXiv:") else paper or "–"


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={option.default}` ({option.describe()})" for name, option in options.items()) or "–"


def _first(function: object) -> str:
    """First paragraph of a docstring, safe in Markdown: formulae are set as code would be, not as emphasis."""
    return _escaped((inspect.getdoc(function) or "").split("\n\n")[0])


def _deviates(function: object) -> str:
    """What a docstring says of where it leaves its source, "" where it says nothing of it."""
    parts = (inspect.getdoc(function) or "").partition("**Deviates**")[2].split("\n\n")[0].lstrip(": ")
    return _escaped(parts)[:1].upper() + _escaped(parts)[1:]


def _escaped(text: str) -> str:
    """Set formulae as code would be."""
    escaped = re.sub(r"(?<!`)\b(\w+_\w*|\w*_\w+)\b(?!`)", lambda m: m[0].replace("_", "\\_"), text)
    return " ".join(escaped.replace("*", "\\*").split())


def methods() -> str:
    """The page of merge methods, from their registry."""
    from plait.fidelity.forward import METHODS
    from plait.merging import merge_methods

    rows = [
        (
            f"`{m.name}`",
            _first(m.function),
            " and ".join(NEEDS[n] for n in m.needs) or "adapters alone",
            _options(m.options),
            _paper(m.paper),
        )
        for m in merge_methods().values()
    ]
    rows += [
        (f"`{m.name}`", _first(m.function), "the base and texts", _options(m.options), _paper(m.paper))
        for m in METHODS.values()
    ]
    head = ("method", "what it does", "needs", "options (`--set`)", "paper")
    return (
        "# Merge methods\n\n"
        "`plait merge A B --method NAME --set OPTION=VALUE --out MERGED`. $D_t$ is the update of task $t$, $w_t$ its weight.\n"
        "Every method takes `--weights`, `--scale` and `--rank`. [Which merge?](../which.md) helps to choose;\n"
        "`plait ls merges` prints this table.\n\n" + table(head, rows)
    )


def subspaces() -> str:
    """The page of subspace methods, from their registry."""
    from plait.subspaces import subspace_methods

    rows = [
        (f"`{m.name}`", _first(m.function), ", ".join(m.needs) or "nothing", _options(m.options), _paper(m.paper))
        for m in subspace_methods().values()
    ]
    return (
        "# Starts of an adapter\n\n"
        "Where the rows of A stand before training: `plait init --method NAME`, or an arm of that name in a recipe.\n"
        "*Reads*: `own` and `others` are second moments of the task's inputs and of the other tasks', `means` one mean per example,\n"
        "`weights` the base's own. Every start leaves the base as it is: B is zero.\n\n"
        + table(("name", "what it does", "reads", "options", "paper"), rows)
        + "\n## Where they deviate from their sources\n\n"
        + "\n".join(f"- `{m.name}`: {text}" for m in subspace_methods().values() if (text := _deviates(m.function)))
        + "\n"
    )


def recipe() -> str:
    """The page of a recipe's keys, from the models that read it."""
    from plait.recipes import sections
    from plait.recipes.recipe import Recipe

    parts = [
        ("A recipe", "", Recipe),
        ("base", "`base:`", sections.BaseSpec),
        ("data", "`data:`", sections.DataSpec),
        ("A task", "an entry of `tasks:` or `background:`; a name alone is one of GLUE's", sections.TaskSpec),
        ("lora", "`lora:`", sections.LoraSpec),
        ("statistics", "`statistics:`", sections.StatisticsSpec),
        ("An arm", "an entry of `arms:`; a name alone is a [subspace](subspaces.md)", sections.ArmSpec),
        ("A merge", "an entry of `merges:`; a name alone is a [method](methods.md)", sections.MergeSpec),
        ("evaluation", "`evaluation:`", sections.EvaluationSpec),
        ("An ablation", "an entry of `variants:`", sections.Variant),
        ("repair", "`repair:`", sections.Repair),
    ]
    text = (
        "# Recipe reference\n\n"
        "A recipe is a YAML file for `plait run`, `train`, `eval` and `plan`. Unknown keys are refused. `--set lora.rank=16`\n"
        "changes a key at the prompt; `plait validate FILE` checks a file. A key without a default has to be given.\n\n"
    )
    for title, place, model in parts:
        text += (
            f"## {title}\n\n{place + '.' if place else ''}\n\n"
            + table(("key", "value", "default", "meaning"), fields(model))
            + "\n"
        )
    return (
        text
        + "## training\n\n`training:`, and `training:` of an arm, which overrides it.\n\n"
        + table(("key", "default", "meaning"), _training())
    )


def fields(model: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Key, type, default and meaning of each field of a model."""
    for name, field in model.model_fields.items():
        yield f"`{name}`", _type(field.annotation), _default(field), field.description or ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "its own"
    return "–" if value is None else f"`{value}`"


def _type(annotation: Any) -> str:
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inside[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inside)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(a) for a in inside if a is not type(None)))
    if origin is list:
        return f"list of {_type(inside[0])}"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        return "mapping"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        annotation.__name__, annotation.__name__
    )


def _training() -> Iterator[tuple[str, str, str]]:
    from dataclasses import MISSING
    from dataclasses import fields as fields_of

    from plait.training.settings import TrainingSettings

    about = arguments(TrainingSettings)
    for field in fields_of(TrainingSettings):
        made = field.default_factory() if field.default_factory is not MISSING else field.default
        value = list(made) if isinstance(made, tuple) else made
        yield f"`{field.name}`", "–" if value is None else f"`{value}`", about[field.name]


def arguments(documented: object) -> dict[str, str]:
    """Name -> text of the arguments that a Google docstring lists."""
    section = (inspect.getdoc(documented) or "").split("Args:\n")[1].split("\n\n")[0]
    entries = re.findall(r"^ {4}(\w+): (.*?)(?=^ {4}\w+: |\Z)", section + "\n", re.MULTILINE | re.DOTALL)
    return {name: " ".join(text.split()) for name, text in entries}


def commands() -> str:
    """The page of commands, from the program itself."""
    from plait.cli import app

    text = "# Commands\n\n`plait COMMAND --help` prints the same. Every command takes `--json` and `--quiet` where it prints a result.\n\n"
    return text + "".join(_command("plait", typer.main.get_command(app)))


def _command(path: str, command: Any) -> Iterator[str]:
    context = click.Context(command, info_name=path)
    if children := getattr(command, "commands", None):
        for name in sorted(children):
            if not children[name].hidden:
                yield from _command(f"{path} {name}", children[name])
    else:
        about, examples = inspect.cleandoc(command.help or ""), command.epilog
        usage = " ".join([path, *command.collect_usage_pieces(context)])
        yield f"## {path}\n\n{_plain(about)}\n\n```text\n{usage}\n```\n\n"
        if examples:
            yield f"```bash\n{examples.strip()}\n```\n\n"
        options = [p for p in command.params if getattr(p, "help", None) and not getattr(p, "hidden", False)]
        if options:
            yield table(("option", "meaning"), ((f"`{', '.join(_names(p))}`", _plain(p.help)) for p in options)) + "\n"


def _names(parameter: Any) -> list[str]:
    names = [*parameter.opts, *parameter.secondary_opts]
    return names if names[0].startswith("-") else [parameter.name]


def _plain(text: str) -> str:
    return re.sub(r"([*_<>$])", r"\\\1", text.strip())


def support() -> str:
    """The page of what is supported, from the tests' models and the registries of formats and variants."""
    return (
        "# What is supported\n\n"
        "Made of the models that the tests build and of the code's own registries, so that it cannot promise more.\n\n"
        + support_table()
        + "\nThe families of models are those of the tests, built small and random with the layout of the real ones.\n"
        "[Formats and variants](../formats.md) has the details, [loading and serving](../loading.md) what others load.\n"
    )


def support_table() -> str:
    """What is supported, a row a kind of thing."""
    sys.path.insert(0, str(ROOT))
    from tests.mixtures import MIXTURES
    from tests.statistics.models import ATTENTION
    from tests.tiny import ARCHITECTURES

    from plait.formats.gguf_names import ARCHITECTURES as GGUF
    from plait.formats.inspect import _STARTS, _VARIANTS
    from plait.formats.keys import FORMATS
    from plait.loading import LOADERS

    convertible = {name for name, way in _VARIANTS.values() if way} | {_SPELT[n] for n, way in _STARTS.items() if way}
    refused = {name for name, way in _VARIANTS.values() if not way} | {
        _SPELT[n] for n, way in _STARTS.items() if not way
    }
    rows = [
        ("merging", "adapters of any model: it goes by names and shapes, the base is not loaded"),
        ("the whole line: statistics, training, scores", _list(_SPELT[n] for n in ARCHITECTURES)),
        ("statistics and starts, for your own trainer", _list(_SPELT[n] for n in ATTENTION)),
        ("mixtures of experts: merging, baking, scores", _list(_SPELT[n] for n in MIXTURES)),
        (
            "adapters merged as they are",
            "LoRA, rsLoRA, rank and alpha patterns, Conv1D, convolutions, embeddings, classification heads",
        ),
        ("turned into plain LoRA by `plait convert`", _list(convertible)),
        ("refused by name", _list(refused)),
        ("formats read and written", _list([*FORMATS, "gguf"])),
        ("what would be loaded is told (`plait check`)", _list(LOADERS)),
        ("llama.cpp export", _list(GGUF)),
    ]
    return table(("", "supported"), rows)


def into_readme() -> None:
    """Write the table of what is supported into the README, between its two marks."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    readme.write_text(before + MARKS[0] + support_table() + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names), key=str.lower))


if __name__ == "__main__":
    into_readme()
