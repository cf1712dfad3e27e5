"""A small mutation runner: every single change of a kind to a module's source, as modules of their own.

Kinds: comparisons turned or loosened by one, `and`/`or`, `not` dropped, conditions made constant, integers off by one,
strings emptied, + and -, min/max and any/all swapped, method calls dropped, slices widened, statements removed.
Docstrings, annotations, imports and `repr` of defaults are left alone.
"""

from __future__ import annotations

import ast
import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_COMPARE: dict[type, list[type]] = {
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Gt: [ast.GtE, ast.Lt], ast.GtE: [ast.Gt], ast.Lt: [ast.LtE],
    ast.LtE: [ast.Lt], ast.In: [ast.NotIn], ast.NotIn: [ast.In], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is],
}  # fmt: skip
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


def _replacements(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """(what, the node instead); None = remove the statement."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in _COMPARE:
            for other in _COMPARE[type(op)]:
                changed = copy.deepcopy(node)
                changed.ops = [other()]
                yield f"{type(op).__name__} -> {other.__name__}", changed
        case ast.BoolOp(op=op):
            changed = copy.deepcopy(node)
            changed.op = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield "and <-> or", changed
            for index in range(len(node.values)):
                yield f"operand {index} alone", copy.deepcopy(node.values[index])
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield "not dropped", copy.deepcopy(operand)
        case ast.If(test=test):
            for value in (True, False):
                changed = copy.deepcopy(node)
                changed.test = ast.copy_location(ast.Constant(value), test)
                yield f"if {value}", changed
        case ast.Constant(value=bool()):
            yield "flipped", ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield "+ 1", ast.Constant(node.value + 1)
            yield "- 1", ast.Constant(node.value - 1)
        case ast.Constant(value=str()):
            yield "text changed", ast.Constant(node.value + "XX")
            if node.value:
                yield "text emptied", ast.Constant("")
        case ast.BinOp(op=ast.Add() | ast.Sub()):
            changed = copy.deepcopy(node)
            changed.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
            yield "+ <-> -", changed
        case ast.Call(func=ast.Name(id=name)) if name in _NAMES:
            changed = copy.deepcopy(node)
            changed.func = ast.Name(_NAMES[name], ast.Load())
            yield f"{name} -> {_NAMES[name]}", changed
        case ast.Call(func=ast.Name(), args=[first, *_]):
            yield "call dropped", copy.deepcopy(first)
        case ast.Call(func=ast.Attribute(value=value)):
            yield "method dropped", copy.deepcopy(value)
        case ast.Subscript(slice=ast.Slice()):
            yield "slice dropped", copy.deepcopy(node.value)
        case ast.Assign() | ast.AugAssign() | ast.Raise() | ast.Expr():
            yield "statement removed", None


def mutants(path: Path) -> Iterator[tuple[str, str]]:
    """(name, source) of every mutant of a file."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    left_alone = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_alone |= set(ast.walk(node))
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            left_alone |= set(ast.walk(node.body[0]))
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                left_alone |= set(ast.walk(annotation))
    for index, node in enumerate(list(ast.walk(tree))):
        if node in left_alone:
            continue
        for what, _ in _replacements(node):
            changed = ast.parse(source)
            target = list(ast.walk(changed))[index]
            new = dict(_replacements(target))[what]
            for parent in ast.walk(changed):
                _put(parent, target, new)
            line = getattr(node, "lineno", 0)
            yield f"{line}: {ast.unparse(node)[:60]!r}: {what}", ast.unparse(ast.fix_missing_locations(changed))


def _put(parent: ast.AST, target: ast.AST, new: ast.AST | None) -> None:
    for name, value in ast.iter_fields(parent):
        if value is target:
            setattr(parent, name, new)
        elif isinstance(value, list) and any(item is target for item in value):
            at = next(i for i, item in enumerate(value) if item is target)
            value[at] = ast.Pass() if new is None else new


def load(source: str, name: str) -> ModuleType:
    """Run a mutant's source as a module."""
    module = ModuleType(name)
    sys.modules[name] = module  # dataclasses look themselves up
    try:
        exec(compile(source, name, "exec"), module.__dict__)
    finally:
        del sys.modules[name]
    return module
