"""The pages that are made of the code: nothing that can be said in a recipe or chosen by name is left out."""

from __future__ import annotations

import importlib.util
import re
import types
from dataclasses import fields
from pathlib import Path

import pytest

from plait.merging import merge_methods
from plait.recipes import sections
from plait.recipes.recipe import Recipe
from plait.subspaces import subspace_methods
from plait.training.settings import TrainingSettings

DOCS = Path(__file__).parents[2] / "docs"
MODELS = [Recipe, *(m for m in vars(sections).values() if isinstance(m, type) and issubclass(m, sections.Strict))]


@pytest.fixture(scope="module")
def generate() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("model", [m for m in MODELS if m.model_fields], ids=lambda m: m.__name__)
def test_every_key_of_a_recipe_says_what_it_means(model, generate):
    page = generate.recipe()
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name}"
        assert f"| `{name}` |" in page, f"{model.__name__}.{name} is in no table"


def test_every_setting_of_a_training_is_explained(generate):
    lines = [line for line in generate.recipe().split("## training")[1].splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == [f.name for f in fields(TrainingSettings)]
    assert all(len(line.rsplit(" | ", 1)[1]) > 10 for line in lines)


def test_every_method_and_command_has_its_entry(generate):
    page = generate.methods()
    assert all(f"| `{name}` |" in page for name in [*merge_methods(), "adamerging", "featcal", "regmean_pp"])
    headings = {line for line in generate.commands().splitlines() if line.startswith("## ")}
    assert {"## plait merge", "## plait stats check", "## plait study run"} <= headings


def test_the_page_of_starts_says_where_each_leaves_its_paper(generate):
    table, _, deviations = generate.subspaces().partition("## Where they deviate")
    assert all(f"| `{name}` |" in table for name in subspace_methods())
    for name in ("osrm", "sc_lora", "inflora", "corda"):
        (line,) = [x for x in deviations.splitlines() if x.startswith(f"- `{name}`: ")]
        assert len(line) > 100 and "Source:" not in line


@pytest.mark.parametrize("name", ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"])
def test_copies_of_the_roots_pages_link_to_the_site_or_to_the_repository(name, generate):
    """A file that is no page of the site, such as benchmarks/README.md, is the repository's."""
    assert set(generate.AT_THE_ROOT) == {"CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"}
    for link in re.findall(r"\]\(([^)#\s]+)", generate.of_the_root(name)):
        beside = link.upper().replace(".MD", ".md") in generate.AT_THE_ROOT
        assert beside or link.startswith("https://") or (DOCS / "generated" / link).resolve().is_file(), link
