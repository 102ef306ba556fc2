"""What the code looks like from outside: files, lines, rooms, arrows between them, circles, untyped returns, long argument lists.

python benchmarks/house.py                 # of this checkout
python benchmarks/house.py OTHER/src/plait # of another one, such as an earlier commit's
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

MERGE_ARGUMENTS = {
    "method", "options", "weights", "scale", "statistics", "rank", "calibrate", "seed", "device", "verify", "base", "name",
}  # fmt: skip
MANY = 5  # of those: a function that spells more carries somebody else's argument list


def main() -> None:
    """Print the figures as JSON."""
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "src" / "plait"
    trees = {module_of(source, f): ast.parse(f.read_text(encoding="utf-8")) for f in sorted(source.rglob("*.py"))}
    files = {a: {b for b in names(tree, trees) if b != a} for a, tree in trees.items()}
    rooms: dict[str, set[str]] = {}
    for a, targets in files.items():
        rooms.setdefault(room_of(a), set()).update(room_of(b) for b in targets if room_of(b) != room_of(a))
    figures = {
        "files": len(trees),
        "lines": sum(len(f.read_text(encoding="utf-8").splitlines()) for f in source.rglob("*.py")),
        "files at the top": len(list(source.glob("*.py"))),
        "rooms": len(rooms),
        "arrows between rooms": sum(map(len, rooms.values())),
        "circles of files": [len(c) for c in circles(files)],
        "rooms in a circle": sum(map(len, circles(rooms))),
        "returns dict[str, Any]": sum(
            f.read_text(encoding="utf-8").count("-> dict[str, Any]") for f in source.rglob("*.py")
        ),
        "calibrate= in the source": sum(
            f.read_text(encoding="utf-8").count("calibrate=") for f in source.rglob("*.py")
        ),
        "spell more than five of twelve merging arguments": sum(spelt(t) for t in trees.values()),
    }
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


def module_of(source: Path, file: Path) -> str:
    """A file's dotted name; a room's own `__init__` goes by the room's name."""
    return ".".join(("plait", *file.relative_to(source).with_suffix("").parts)).removesuffix(".__init__")


def room_of(module: str) -> str:
    """The room of a file; a file at the top is one by itself."""
    return ".".join(module.split(".")[:2])


def names(tree: ast.Module, known: dict[str, ast.Module]) -> Iterator[str]:
    """Files of plait that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import):
            found = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found = [f"{node.module}.{a.name}" for a in node.names]
        for name in (n for n in found if n.startswith("plait.")):
            yield name if name in known else name.rpartition(".")[0]


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of which each reaches every other (Tarjan's components of more than one), the largest first."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(arrows.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(group)

    sys.setrecursionlimit(10_000)
    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return sorted(found, key=len, reverse=True)


def spelt(tree: ast.Module) -> int:
    """Signatures, calls and classes that spell more than `MANY` of a merge's arguments."""
    count = 0
    for node in ast.walk(tree):
        words: set[str] = set()
        if isinstance(node, ast.FunctionDef):
            words = {a.arg for a in (*node.args.args, *node.args.kwonlyargs)}
        elif isinstance(node, ast.Call):
            words = {k.arg for k in node.keywords if k.arg}
        elif isinstance(node, ast.ClassDef):
            words = {s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)}
        count += len(words & MERGE_ARGUMENTS) > MANY
    return count


if __name__ == "__main__":
    main()
