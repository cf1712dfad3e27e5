"""Docstrings of everything public: they exist, name what is raised, and give the shape of every array.

Read from the source, so that no module is imported. Public is what has no underscore in front, in a module that has
none. A method that overrides a library's (`forward`, `__call__`) may be explained by its class.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("so8t_core", "verification", "pipeline")
MODULES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py")) if path.stat().st_size]
ARRAYS = re.compile(r"\b(?:Tensor|NDArray|Array|Ids|Floats)\b")
SHAPE = re.compile(
    r"\([^()]*(?:\.\.\.|,|\bn\b|\b[A-Z]\b)[^()]*\)|_[A-Z]{1,4}[0-9]*\b|shape|scalar|same|like|number", re.IGNORECASE
)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(tree: ast.Module) -> Iterator[tuple[str, ast.AST, ast.ClassDef | None]]:
    """(name, node, its class) of every public class, function and method."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node, None
            for inner in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(inner, Function) and (not inner.name.startswith("_") or inner.name == "__init__"):
                    yield f"{node.name}.{inner.name}", inner, node


def raised(function: ast.AST) -> set[str]:
    """Names of exceptions that the function's own statements raise and do not catch themselves."""
    found: set[str] = set()
    todo: list[ast.AST] = list(ast.iter_child_nodes(function))
    while todo:
        node = todo.pop()
        if isinstance(node, Function | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found.add(node.exc.func.id)
        todo += ast.iter_child_nodes(node)
    return {name for name in found if name[0].isupper() and name not in QUIET}


# Methods that a library calls and explains.
OVERRIDES = {
    "__init__",
    "forward",
    "backward",
    "extra_repr",
    "inject_adapter",
    "runtest",
    "repr_failure",
    "reportinfo",
    "connection_made",
    "connection_lost",
    "on_response_complete",
    "create_optimizer",
    "get_batch_samples",
    "on_step_end",
    "on_save",
}
# Raised for the library that calls the function, not for a reader.
QUIET = {"AttributeError", "NotImplementedError", "AssertionError", "SystemExit"}


def problems(source: str) -> list[str]:
    """What is missing in one module."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else ["the module has no docstring"]
    for name, node, owner in public(tree):
        assert isinstance(node, Function | ast.ClassDef)
        said = ast.get_docstring(node) or ""
        whole = said + (ast.get_docstring(owner) or "" if owner is not None else "")
        # A command's docstring is its help, and how it fails is its exit code.
        told_otherwise = any(re.search(r"validator|overload|\.command\(", ast.unparse(d)) for d in node.decorator_list)
        if isinstance(node, ast.ClassDef):
            if not said:
                found.append(f"{name}: no docstring")
            continue
        named = [d for d in node.decorator_list if ast.unparse(d).endswith((".setter", "property"))]
        if not said and node.name not in OVERRIDES and not named and not told_otherwise:
            found.append(f"{name}: no docstring")
        if (
            not told_otherwise
            and not (node.name in OVERRIDES and not said and owner is not None and node.name != "__init__")
            and (quiet := {e for e in raised(node) if not re.search(rf"{e}|Raises", whole)})
        ):
            found.append(f"{name}: raises {', '.join(sorted(quiet))}, which its docstring does not say")
        annotations = [a.annotation for a in (*node.args.args, *node.args.kwonlyargs) if a.annotation] + [
            node.returns or ast.Constant(None)
        ]
        names = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
        if (
            any(ARRAYS.search(ast.unparse(a)) for a in annotations)
            and said
            and not SHAPE.search(whole + " ".join(names))
        ):
            found.append(f"{name}: takes or gives an array, and says no shape")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_public_is_explained(path: Path) -> None:
    assert problems(path.read_text(encoding="utf-8")) == []


MODULE = '"""M."""\n'
CASES = {
    "def f(): pass": ["the module has no docstring", "f: no docstring"],
    MODULE + 'class C:\n    """C."""\n    def m(self): pass': ["C.m: no docstring"],
    MODULE + 'def f():\n    """Do."""\n    raise ValueError("no")': [
        "f: raises ValueError, which its docstring does not say"
    ],
    MODULE + 'def f():\n    """Do.\n\n    Raises:\n        ValueError: no.\n    """\n    raise ValueError("no")': [],
    MODULE + 'def f(x: Tensor) -> Tensor:\n    """Turn."""': ["f: takes or gives an array, and says no shape"],
    MODULE + 'def f(x: Tensor) -> Tensor:\n    """Turn x (n, 8)."""': [],
    MODULE + 'def _f(): raise ValueError("private")': [],
}


@pytest.mark.parametrize("source", CASES)
def test_what_is_missing_is_seen(source: str) -> None:
    assert problems(source) == CASES[source]
