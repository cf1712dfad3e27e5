"""House rules that a program can hold: the direction of imports, ASCII identifiers, markers in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "so8t_core": set(),
    "verification": {"so8t_core"},
    "pipeline": {"so8t_core", "verification"},
}
OURS = {*MAY_IMPORT, "benchmarks", "tests"}
FILES = [path for name in MAY_IMPORT for path in sorted((ROOT / name).rglob("*.py"))]


def imported(tree: ast.AST) -> Iterator[str]:
    """Packages that a module imports anywhere, inside functions as well."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def names(tree: ast.AST) -> Iterator[str]:
    """Every identifier of a module."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


def broken(package: str, source: str) -> list[str]:
    """House rules that a module of a package breaks."""
    tree = ast.parse(source)
    wrong = sorted((set(imported(tree)) & OURS) - MAY_IMPORT[package] - {package})
    return [f"imports {name}" for name in wrong] + [
        f"is named {n}" for n in sorted(set(names(tree))) if not n.isascii()
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way_and_names_are_ascii(path: Path) -> None:
    assert broken(path.relative_to(ROOT).parts[0], path.read_text(encoding="utf-8")) == []


def test_the_markers_are_spelled_out_in_one_module() -> None:
    from pipeline.data.think_form import ANSWER_MARKER

    wanted = {ROOT / "pipeline" / "data" / "think_form.py"}  # verification's own texts hold them too: fixtures, no rule
    code = {
        path
        for path in FILES
        if path.relative_to(ROOT).parts[0] == "pipeline" and any(ANSWER_MARKER in text for text in _literals(path))
    }
    assert code == wanted


def _literals(path: Path) -> Iterator[str]:
    """Texts of a module but its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.value


@pytest.mark.parametrize(
    ("package", "source", "said"),
    [
        ("so8t_core", "def f():\n    from verification import verify", ["imports verification"]),
        ("verification", "import pipeline.config as c", ["imports pipeline"]),
        ("pipeline", "from benchmarks.study import x", ["imports benchmarks"]),
        ("pipeline", "答え = 1", ["is named 答え"]),
        ("pipeline", "from so8t_core import bake\nimport verification\nfrom . import x", []),
    ],
)
def test_a_broken_rule_is_seen(package: str, source: str, said: list[str]) -> None:
    assert broken(package, source) == said
