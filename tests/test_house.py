"""The house style that a machine can check: what may be imported where, sizes, and a docstring on everything public."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "plait"
FILES = sorted(SOURCE.rglob("*.py"))
LOWER = sorted(
    [SOURCE / "errors.py", SOURCE / "locks.py", SOURCE / "store.py", SOURCE / "statistics" / "moments.py"]
    + [f for room in ("subspaces", "adapters", "formats", "merging") for f in (SOURCE / room).rglob("*.py")]
)
ALLOWED = {"torch", "safetensors", "numpy", "jaxtyping", "plait", "__future__"} | set(sys.stdlib_module_names)
LONGEST_FILE, LONGEST_FUNCTION = 300, 60
# What the lower layer takes from above it, inside functions: a base's weights to bake into, its modules to start in.
SUBCLASSES = {"training/callbacks.py", "training/selection.py", "training/trainer.py"}  # of the Trainer's classes
HEAVY = {"transformers", "peft", "datasets", "sklearn", "scipy", "pyarrow", "matplotlib", "accelerate", "jinja2"}


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST, *, top_level: bool = False) -> Iterator[str]:
    """Packages imported anywhere, or only when the module itself is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").partition(".")[0]
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, top_level=top_level)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef))


@pytest.mark.parametrize("path", LOWER, ids=name_of)
def test_the_lower_layer_imports_little(path):
    found = set(imports(parsed(path), top_level=True))
    assert found <= ALLOWED, f"{name_of(path)} imports {sorted(found - ALLOWED)}"
    assert not set(imports(parsed(path))) & {"transformers", "datasets", "sklearn", "scipy", "matplotlib"}


@pytest.mark.parametrize("path", [f for f in FILES if name_of(f) not in SUBCLASSES], ids=name_of)
def test_heavy_packages_are_imported_in_functions(path):
    assert not set(imports(parsed(path), top_level=True)) & HEAVY


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines"
    long = {
        f.name: size
        for f in functions(parsed(path))
        if not isinstance(f, ast.ClassDef)
        and (size := (f.end_lineno or 0) - f.lineno + 1 - docstring_lines(f)) > LONGEST_FUNCTION
    }
    assert not long


def docstring_lines(function: ast.FunctionDef | ast.ClassDef) -> int:
    first = function.body[0]
    is_text = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return (first.end_lineno or 0) - first.lineno + 1 if is_text else 0


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_everything_public_says_what_it_does(path):
    tree = parsed(path)
    public = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")]
    public += [
        m
        for c in public
        if isinstance(c, ast.ClassDef)
        for m in c.body
        if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")
    ]
    assert ast.get_docstring(tree), "the module says nothing"
    assert not [n.name for n in public if not ast.get_docstring(n)]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_asserts_do_not_guard_and_pickles_are_not_loaded(path):
    tree = parsed(path)
    asserted = [ast.unparse(n.test) for n in ast.walk(tree) if isinstance(n, ast.Assert)]
    assert not [text for text in asserted if not text.endswith(" is not None")]  # those only tell mypy what is known
    called = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not called & {"torch.load", "pickle.load", "pickle.loads", "eval", "exec", "yaml.unsafe_load", "os.system"}
