"""The README as a newcomer uses it: what it shows is printed, what it loads loads, its links lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch

from plait.adapters.peft_format import write_adapter
from plait.cli import main
from plait.merging import merge_methods
from tests.docs.test_tutorials import CONSOLE, shape, steps_of
from tests.panels import random_adapter

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#]+)(?:#[^)]*)?\)|!\[[^\]]*\]\(([^)]+)\)")


@pytest.fixture
def two_adapters(tiny_base, tmp_path, monkeypatch):
    """Tiny adapters of a tiny Llama, under the names and in the places of the README's."""
    monkeypatch.chdir(tmp_path)
    base = tiny_base("llama")
    Path("SmolLM2-135M").symlink_to(base.name)
    for i, name in enumerate(("sentiment", "topics")):
        adapter = random_adapter(base, "llama", name, "causal", i)
        folder = Path("adapters") / name
        folder.mkdir(parents=True)
        write_adapter(folder, adapter)
    Path("prompts.csv").write_text('prompt\n"w1 w2 w3"\n"w4 w5"\n', encoding="utf-8")


def test_the_three_commands_print_what_is_shown_and_the_result_loads(two_adapters, capsys):
    done = []
    for command, lines in steps_of(CONSOLE.findall(TEXT)):
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(command)[1:])
        said = capsys.readouterr()
        assert not ended.value.code, f"{command}: {said.err}"
        done.append(command.split()[1])
        if done[-1] == "merge":
            assert [shape(line) for line in lines] == [shape(line) for line in said.out.splitlines() if line]
        elif done[-1] == "try":  # the answers are those of other adapters
            who = {line.split("  ")[1].strip() for line in lines if line.startswith("   ") and "  " in line.strip()}
            assert who >= {"the bare base", "sentiment", "topics", "the merge"} and all(w in said.out for w in who)
    assert done == ["merge", "try", "export"]
    code = next(b for b in re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    ids = torch.tensor([[5, 7, 9]])
    bare = load_base(Path("SmolLM2-135M"))
    assert not torch.allclose(names["model"].eval()(ids).logits, bare(ids).logits, atol=1e-4)


def load_base(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def test_every_link_leads_to_a_file_of_the_repository():
    targets = {a or b for a, b in LINK.findall(TEXT)} - {""}
    assert len(targets) > 20
    for target in targets:
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_no_link_is_relative_on_the_package_index():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    home, page = project["project"]["urls"]["Repository"], TEXT
    for rule in project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(rule["pattern"], rule["replacement"], page)
    targets = re.findall(r"\]\(([^)]*)\)", page)
    assert all(t.startswith("https://") for t in targets)
    assert sum(t.startswith(home) for t in targets) > 20
    raw = home.replace("github.com", "raw.githubusercontent.com")
    assert all(t.startswith(raw) for t in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", page))


def test_the_table_of_what_is_supported_is_that_of_the_code():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    first, last = generate.MARKS
    assert TEXT.split(first)[1].split(last)[0] == generate.support_table(), "python docs/generate.py"


def test_methods_that_are_named_exist_and_the_page_is_short():
    named = re.findall(
        r"^\| `(\w+)`(?: \(default\))? \|", TEXT.split("## Which method?")[1].split("## ")[0], re.MULTILINE
    )
    assert len(named) > 5 and set(named) <= set(merge_methods())
    assert len(TEXT.splitlines()) <= 200
