"""Mutants: a Python file with one small fault in it, made from its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARE: dict[type, tuple[str, ...]] = {
    ast.Lt: ("<=", ">="), ast.LtE: ("<", ">"), ast.Gt: (">=", "<="), ast.GtE: (">", "<"), ast.Eq: ("!=",),
    ast.NotEq: ("==",), ast.In: ("not in",), ast.NotIn: ("in",), ast.Is: ("is not",), ast.IsNot: ("is",),
}  # fmt: skip
_ARITHMETIC: dict[type, str] = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
}  # fmt: skip
_TEXT = (ast.JoinedStr,)


@dataclass(frozen=True, slots=True)
class Mutant:
    """One fault.

    Args:
        kind: "comparison", "arithmetic", "constant", "boolean", "condition", "return" or "removed".
        line: Line at which the changed code starts.
        lines: All lines of the statement that it stands in (of its head, where that holds others).
        span: Bytes of the file that are replaced.
        before: What stands there.
        after: What stands there instead.
    """

    kind: str
    line: int
    lines: tuple[int, ...]
    span: tuple[int, int]
    before: str
    after: str

    @property
    def text(self) -> str:
        """The change in one line."""
        short = " ".join(self.before.split())
        return f"{self.kind}: {short[:90]} -> {self.after or 'pass'}"

    def applied(self, source: str) -> str:
        """The file with the fault."""
        data = source.encode()
        return (data[: self.span[0]] + self.after.encode() + data[self.span[1] :]).decode()


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a file, in the order of its lines: none in annotations, texts and what is said in errors."""
    tree, places = ast.parse(source), _Places(source)
    found = list(_of(tree, places, ()))
    return sorted(found, key=lambda m: (m.span, m.after))


class _Places:
    """Where nodes lie among the bytes of a file."""

    def __init__(self, source: str) -> None:
        self.data = source.encode()
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line.encode()))

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        last = node.end_lineno or node.lineno
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[last - 1] + (node.end_col_offset or 0)

    def text(self, node: ast.expr | ast.stmt) -> str:
        start, stop = self.span(node)
        return self.data[start:stop].decode()

    def mutant(self, kind: str, node: ast.expr | ast.stmt, after: str, lines: tuple[int, ...]) -> Mutant:
        return Mutant(kind, node.lineno, lines, self.span(node), self.text(node), after)


def _of(node: ast.AST, places: _Places, lines: tuple[int, ...]) -> Iterator[Mutant]:
    if isinstance(node, ast.stmt):
        lines = _head(node)
        yield from _of_statement(node, places, lines)
    elif isinstance(node, ast.expr):
        yield from _of_expression(node, places, lines)
    for name, value in ast.iter_fields(node):
        if _says_only(node, name):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _of(child, places, lines)


def _head(node: ast.stmt) -> tuple[int, ...]:
    body = getattr(node, "body", None)
    last = body[0].lineno - 1 if isinstance(body, list) and body else node.end_lineno or node.lineno
    return tuple(range(node.lineno, max(last, node.lineno) + 1))


def _says_only(node: ast.AST, name: str) -> bool:
    """Whether a part of a node is a type, a text or a message, which no test needs to notice."""
    if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
        return True
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert)):
        return True
    if _is_for_types(node):
        return True
    targets = [ast.unparse(t) for t in node.targets] if isinstance(node, ast.Assign) else []
    return bool(targets) and name == "value" and targets[0] == "__all__"


def _is_for_types(node: ast.AST) -> bool:
    """Whether a statement holds imports that nothing runs."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _of_statement(node: ast.stmt, places: _Places, lines: tuple[int, ...]) -> Iterator[Mutant]:
    if isinstance(node, (ast.If, ast.While)) and not _is_for_types(node):
        for value in ("True", "False"):
            if isinstance(node, ast.If) or value == "False":
                yield places.mutant("condition", node.test, value, lines)
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield places.mutant("return", node.value, "None", lines)
    elif isinstance(node, (ast.Raise, ast.AugAssign, ast.Continue, ast.Break)) or _is_call(node):
        yield places.mutant("removed", node, "pass", lines)


def _is_call(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Await))


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _of_expression(node: ast.expr, places: _Places, lines: tuple[int, ...]) -> Iterator[Mutant]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = (f"({places.text(n)})" for n in (node.left, node.comparators[0]))
        for sign in _COMPARE.get(type(node.ops[0]), ()):
            yield places.mutant("comparison", node, f"({left} {sign} {right})", lines)
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC and not _joins(node):
        left, right = (f"({places.text(n)})" for n in (node.left, node.right))
        yield places.mutant("arithmetic", node, f"({left} {_ARITHMETIC[type(node.op)]} {right})", lines)
    elif isinstance(node, ast.BoolOp):
        sign = " or " if isinstance(node.op, ast.And) else " and "
        yield places.mutant("boolean", node, f"({sign.join(f'({places.text(v)})' for v in node.values)})", lines)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield places.mutant("boolean", node, f"bool({places.text(node.operand)})", lines)
    elif isinstance(node, ast.IfExp):
        yield places.mutant("condition", node.test, f"(not ({places.text(node.test)}))", lines)
    elif isinstance(node, ast.Constant) and not _is_none(node):
        if isinstance(node.value, bool):
            yield places.mutant("constant", node, str(not node.value), lines)
        elif isinstance(node.value, (int, float)):
            yield places.mutant("constant", node, f"({node.value!r} + 1)", lines)


def _joins(node: ast.BinOp) -> bool:
    """Whether an operator joins or formats texts or lists."""
    sides = (node.left, node.right)
    texts = any(isinstance(n, ast.Constant) and isinstance(n.value, str | bytes) for n in sides)
    return texts or any(isinstance(n, (ast.JoinedStr, ast.List, ast.ListComp, ast.Tuple)) for n in sides)
