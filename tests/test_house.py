"""The house style that a machine can check: what may be imported where, sizes, and a docstring on everything public."""

from __future__ import annotations

import ast
import functools
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "plait"
FILES = sorted(SOURCE.rglob("*.py"))
LOWER = sorted(
    [SOURCE / f"{name}.py" for name in ("errors", "options", "progress", "statistics/moments")]
    + [
        file
        for room in ("border", "disk", "subspaces", "adapters", "formats", "loading", "merging")
        for file in (SOURCE / room).rglob("*.py")
    ]
)
ALLOWED = {"torch", "safetensors", "numpy", "jaxtyping", "plait", "__future__"} | set(sys.stdlib_module_names)
# What a file of those rooms may import beside, where it is installed.
OPTIONAL = {"merging/entries/compiled.py": {"numba"}}
LONGEST_FILE, LONGEST_TABLE, LONGEST_FUNCTION, MOST_FILES_AT_THE_TOP = 300, 500, 60, 8
ONE_CLASS_OR_TABLE = {"merging/plan.py", "runs/layout.py"}  # files that may have up to LONGEST_TABLE lines
# Every room and every file at the top, the lowest first: each may import what stands before it.
ROOMS = [
    "version",
    "errors",
    "border",
    "options",
    "seeds",
    "progress",
    "loading",
    "disk",
    "adapters",
    "tasks",
    "model",
    "statistics",
    "subspaces",
    "formats",
    "merging",
    "extraction",
    "evaluation",
    "training",
    "fidelity",
    "learning",
    "choosing",
    "advice",
    "recipes",
    "runs",
    "report",
    "demo",
    "checking",
    "publishing",
    "trying",
    "cli",
    "__init__",
    "entry",
    "__main__",
]
# Imports from below that are still to be turned round: "file -> file".
UPWARD: set[str] = set()
# Imports beside those that still close a circle of files.
CIRCULAR: set[str] = set()
# How many functions return a dictionary that no type checker sees into: lower it with each that becomes a dataclass.
MOST_UNTYPED_RETURNS = 28
SUBCLASSES = {"training/callbacks.py", "training/selection.py", "training/trainer.py"}  # of the Trainer's classes
HEAVY = {"transformers", "peft", "datasets", "sklearn", "scipy", "pyarrow", "matplotlib", "accelerate", "jinja2"}


# What torch makes in its default dtype where none is given; the second kind only of numbers that are written out.
FLOATS = {"zeros", "ones", "empty", "full", "rand", "randn", "eye", "linspace", "logspace", "tensor", "scalar_tensor"}
FLOATS_OF_NUMBERS = {"arange", "range", "as_tensor", "asarray", "normal"}


def name_of(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@functools.cache
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


def module_of(path: Path) -> str:
    """A file's dotted name inside plait; a room's own `__init__` goes by the room's name."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def arrows() -> set[tuple[str, str]]:
    """(file, file of plait that it imports), also in functions and for types alone."""
    known = {module_of(f) for f in FILES}
    pairs = set()
    for path in FILES:
        for node in ast.walk(parsed(path)):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [f"{node.module}.{a.name}" for a in node.names]
            for name in (n.removeprefix("plait.") for n in names if n.startswith("plait.")):
                target = name if name in known else name.rpartition(".")[0]
                pairs.add((module_of(path), target or "__init__"))
    return pairs


def test_every_room_has_its_place():
    assert set(ROOMS) == {module_of(f).partition(".")[0] for f in FILES}


def test_rooms_import_downwards_only():
    def floor(module: str) -> int:
        return ROOMS.index(module.partition(".")[0])

    upward = {f"{a} -> {b}" for a, b in arrows() if floor(a) < floor(b)}
    assert not upward - UPWARD
    assert not UPWARD - upward, "turned round: strike it from the list"


def test_no_circles_of_files():
    left = {(a, b) for a, b in arrows() if f"{a} -> {b}" not in UPWARD | CIRCULAR}
    before = None
    while left != before:  # what imports nothing that is left, or is imported by nothing, is in no circle
        before, importing, imported = left, {a for a, _ in left}, {b for _, b in left}
        left = {(a, b) for a, b in left if b in importing and a in imported}
    assert not left
    assert not CIRCULAR - {f"{a} -> {b}" for a, b in arrows()}, "opened: strike it from the list"


def test_private_names_stay_in_their_file():
    """What tests, benchmarks and other files need is public."""
    folders = (SOURCE, ROOT / "tests", ROOT / "benchmarks")
    texts = [path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")]
    imported = {name for text in texts for name in private_imports(text)}
    assert not imported


def private_imports(text: str) -> Iterator[str]:
    """Private names that a file imports from plait; told from its text, since parsing a thousand files takes seconds."""
    for module, names in re.findall(r"^ *from (plait[\w.]*) import (\([^)]*\)|.*)$", text, re.MULTILINE):
        alone = re.sub(r"#.*| as \w+", "", names)
        yield from (f"{module}.{name}" for name in re.findall(r"(?<!\w)_(?!_)\w+", alone))


def test_private_imports_are_seen():
    text = "from plait.a import b, _c\n    from plait.d import (\n    _e as e,  # _f\n    g as _h,\n    i_j,\n)\nfrom other import _k\n"
    assert [*private_imports(text)] == ["plait.a._c", "plait.d._e"]


def test_the_top_is_nearly_empty():
    assert len(list(SOURCE.glob("*.py"))) <= MOST_FILES_AT_THE_TOP


def test_returns_without_a_type_become_fewer():
    assert sum(f.read_text(encoding="utf-8").count("-> dict[str, Any]") for f in FILES) <= MOST_UNTYPED_RETURNS


@pytest.mark.parametrize("path", LOWER, ids=name_of)
def test_the_lower_layer_imports_little(path):
    found = set(imports(parsed(path), top_level=True))
    found -= {"yaml"} if name_of(path) == "border/yaml_text.py" else set()  # whose loaders it narrows
    allowed = ALLOWED | OPTIONAL.get(name_of(path), set())
    assert found <= allowed, f"{name_of(path)} imports {sorted(found - allowed)}"
    assert not set(imports(parsed(path))) & {"transformers", "datasets", "sklearn", "scipy", "matplotlib"}


@pytest.mark.parametrize("path", sorted((SOURCE / "loading").rglob("*.py")), ids=name_of)
def test_the_account_of_loading_stands_on_its_own(path):
    """What verifies the writers must not read by their rules: of plait only errors, options and counts in words, no tensor library."""
    tree = parsed(path)
    ours = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("plait")
    }
    ours |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names if a.name.startswith("plait")}
    assert not {
        m
        for m in ours
        if not m.startswith("plait.loading") and m not in ("plait.errors", "plait.options", "plait.border.counts")
    }
    assert set(imports(tree, top_level=True)) <= {"plait"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [f for f in FILES if name_of(f) not in SUBCLASSES], ids=name_of)
def test_heavy_packages_are_imported_in_functions(path):
    assert not set(imports(parsed(path), top_level=True)) & HEAVY


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_small(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    longest = LONGEST_TABLE if name_of(path) in ONE_CLASS_OR_TABLE else LONGEST_FILE
    assert lines <= longest, f"{lines} lines"
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


@pytest.mark.parametrize("room", sorted({f.parent for f in FILES}), ids=name_of)
def test_a_room_that_offers_something_says_what(room):
    """An `__init__` is its docstring alone, or names in `__all__` what is meant to be used from outside."""
    body = [n for n in parsed(room / "__init__.py").body[1:] if not isinstance(n, ast.ImportFrom)]
    assigned = {ast.unparse(t) for n in body if isinstance(n, ast.Assign) for t in n.targets}
    assert not body or "__all__" in assigned


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


def holds_a_float(node: ast.AST) -> bool:
    """Whether a float, or a quotient, is written out in an expression."""
    return any(
        (isinstance(n, ast.Constant) and isinstance(n.value, float))
        or (isinstance(n, ast.BinOp) and isinstance(n.op, ast.Div))
        for n in ast.walk(node)
    )


def follows_the_default_dtype(call: ast.Call) -> bool:
    """Whether the dtype of what torch makes here is the process's default: wrong in a program that changed it.

    `zeros_like`, `new_zeros` and their kin follow a tensor. A quotient of whole numbers is beyond this rule;
    tests/test_default_dtype.py runs what is computed.
    """
    if not isinstance(call.func, ast.Attribute) or ast.unparse(call.func.value) != "torch":
        return False
    name = call.func.attr
    if name in ("get_default_dtype", "set_default_dtype", "Tensor"):
        return True
    if name == "where":  # takes no dtype
        chosen = call.args[1:]
        return (
            bool(chosen)
            and all(isinstance(a, ast.Constant | ast.UnaryOp) for a in chosen)
            and any(map(holds_a_float, chosen))
        )
    if any(k.arg in ("dtype", "out", None) for k in call.keywords):
        return False
    return name in FLOATS or (name in FLOATS_OF_NUMBERS and any(map(holds_a_float, call.args)))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_tensor_follows_the_default_dtype(path):
    calls = [n for n in ast.walk(parsed(path)) if isinstance(n, ast.Call)]
    assert not [f"line {n.lineno}: {ast.unparse(n)}" for n in calls if follows_the_default_dtype(n)]


@pytest.mark.parametrize(
    ("text", "follows"),
    [
        ("torch.zeros(2, 3)", True),
        ("torch.zeros(2, 3, dtype=x.dtype)", False),
        ("torch.randn(2, generator=g).to(device)", True),
        ("torch.tensor([0.5])", True),
        ("torch.arange(3)", False),
        ("torch.arange(0, 1, 0.1)", True),
        ("torch.where(x > 0, 1.0, -1.0)", True),
        ("torch.where(x > 0, x, 0.0)", False),
        ("torch.where(x > 0, 1, 2)", False),
        ("torch.zeros_like(x)", False),
        ("np.zeros(3)", False),
        ("torch.empty(3, **like)", False),
    ],
)
def test_the_rule_about_the_default_dtype(text, follows):
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    assert any(map(follows_the_default_dtype, calls)) == follows


# Where a plural stands behind a count that is never one there, and limits, which are large.
NEVER_ONE = {
    ("adapters/header.py", "len(name)"),
    ("adapters/tensor_file.py", "len(last) - len(head)"),
    ("border/checked.py", "len(text)"),
    ("border/checked.py", "len(value)"),
    ("border/patterns.py", "len(key)"),
    ("cli/checking.py", "len(found)"),
    ("cli/comparing.py", "len(adapters)"),
    ("cli/recipes.py", "len(folders)"),
    ("model/hooks.py", "len(hits)"),
    ("model/stored_names.py", "len(endings)"),
    ("recipes/problems.py", "len(told)"),
    ("runs/single/train.py", "len(arms)"),
    ("tasks/answers.py", "len(labels)"),
    ("tasks/rows.py", "len(known)"),
}
VERBS = {"is", "has", "was", "needs", "takes", "holds", "does", "lacks", "differs", "folders"}


def counts_with_plurals(tree: ast.AST) -> Iterator[str]:
    """Expressions with a `len` in them that an f-string writes right before a plural: of one thing it would read "1 adapters"."""
    for text in (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)):
        for count, rest in itertools.pairwise(text.values):
            after = isinstance(rest, ast.Constant) and re.match(r" (?:[a-z-]+ ){0,2}?([a-z]+s)\b", str(rest.value))
            shown = ast.unparse(count.value) if isinstance(count, ast.FormattedValue) else ""
            if after and after[1] not in VERBS and shown.startswith("len("):
                yield shown


def test_counts_agree_with_their_nouns():
    """`plait.border.counts.plural` writes a count and its noun."""
    seen = {(name_of(f), shown) for f in FILES for shown in counts_with_plurals(parsed(f))}
    assert not seen - NEVER_ONE, "plural() writes a count and its noun"
    assert not NEVER_ONE - seen, "gone: strike it from the list"
    assert [*counts_with_plurals(ast.parse("f'{len(x)} merged adapters'"))] == ["len(x)"]
