"""House rules that a program can hold: the direction of imports, what an import loads, ASCII identifiers, markers.

Who may import whom stands in pyproject.toml as import-linter's contracts.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("so8t", "so8t_core", "verification", "pipeline")
FILES = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter on the packages of a folder, by the contracts of its pyproject.toml."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    paths = {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=os.environ | paths, capture_output=True, text=True, check=False)


def test_imports_go_one_way() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages and their contracts, for imports that may not be."""
    folder = tmp_path_factory.mktemp("house")
    for name in (*PACKAGES, "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def with_line(copy: Path, module: str, line: str) -> subprocess.CompletedProcess[str]:
    """import-linter's answer where a module of the copy has one line more."""
    path = copy.joinpath(*module.split(".")).with_suffix(".py")
    before = path.read_text(encoding="utf-8") if path.exists() else None
    path.write_text(f"{before or ''}\n{line}\n", encoding="utf-8")
    try:
        return lint_imports(copy)
    finally:
        path.write_text(before, encoding="utf-8") if before is not None else path.unlink()


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("so8t_core.gate", "verification"),
        ("so8t_core.gate", "tests"),
        ("verification.gate.check", "pipeline.config"),
        ("verification.gate.decide", "verification.gguf.reader"),
        ("verification.show.words", "verification.gguf.reader"),
        ("verification.gguf.cache", "verification.show.words"),
        ("verification.gguf.cache", "verification.reference.rope"),
        ("verification.reference.rope", "verification.engines.convert"),
        ("verification.engines.convert", "verification.contract.tokens"),
        ("verification.contract.tokens", "verification.weight_parity.values"),
        ("verification.logit_parity.kl", "verification.weight_parity.compare"),
        ("verification.weight_parity.compare", "verification.logit_parity.kl"),
        ("verification.commands.verify", "verification.fault_catalogue.run"),
        ("pipeline.config", "benchmarks.page"),
        ("pipeline.config", "pipeline.data.rows"),
        ("pipeline.data.rows", "pipeline.train.fit"),
        ("pipeline.train.fit", "pipeline.run.steps"),
        ("pipeline.run.steps", "pipeline.serve.http"),
        ("pipeline.serve.http", "pipeline.run.steps"),
    ],
)
def test_an_import_that_may_not_be_is_named(copy: Path, importer: str, imported: str) -> None:
    done = with_line(copy, importer, f"def f():\n    import {imported}")
    assert done.returncode == 1, done.stdout[-2000:]
    assert f"{importer} -> {imported}" in done.stdout


def test_a_circle_and_a_module_outside_the_rooms_are_named(copy: Path) -> None:
    assert (
        "No cycles are allowed in verification.gguf"
        in with_line(copy, "verification.gguf.reader", "import verification.gguf.cache").stdout
    )
    assert "verification.new" in with_line(copy, "verification.new", "").stdout
    assert with_line(copy, "verification.gguf.new", "import verification.gguf.reader").returncode == 0


def loaded(*parts: str) -> list[set[str]]:
    """Modules that a fresh Python has loaded after each of the parts of its code."""
    code = "".join(f"{part}\nimport sys; print(*sys.modules)\n" for part in parts)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_importing_so8t_waits_for_nothing_heavy() -> None:
    [found] = loaded("import so8t")
    assert not found & {"torch", "transformers", "peft", "numpy", "llama_cpp", "pydantic"}


def test_so8t_has_every_public_name_of_core_and_verification() -> None:
    import so8t
    import so8t_core
    import verification

    assert sorted(so8t.__all__) == sorted({*so8t_core.__all__, *verification.__all__})
    assert all(getattr(so8t, name) is getattr(so8t_core, name) for name in so8t_core.__all__)
    assert all(getattr(so8t, name) is getattr(verification, name) for name in verification.__all__)
    with pytest.raises(AttributeError, match="module 'so8t' has no attribute 'bakes'"):
        so8t.bakes  # noqa: B018


SERVER_AND_POLICY = {"phonenumbers", "stdnum", "protego", "fastapi", "uvicorn", "starlette", "httpx"}
ROAD = "import pipeline.run.steps, pipeline.run.plan, pipeline.run.plan_table, pipeline.cli.main"


def test_the_road_loads_neither_the_server_nor_the_data_policy() -> None:
    more = "import pipeline.serve.http, pipeline.data.build, pipeline.data.collect.collect, uvicorn"
    found, seen = loaded(ROAD, more)
    assert not found & SERVER_AND_POLICY
    assert not [name for name in found if name.startswith(("pipeline.serve", "pipeline.data.pii"))]
    assert seen >= SERVER_AND_POLICY - {"httpx"}  # the probe sees what is loaded


def test_server_and_data_policy_are_extras() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def names(requirements: list[str]) -> set[str]:
        return {name.split(">")[0].split("=")[0].lower().replace("-", "") for name in requirements}

    wanted = {"data": {"protego", "phonenumbers", "pythonstdnum"}, "serve": {"fastapi", "uvicorn"}}
    for extra, libraries in wanted.items():
        assert libraries <= names(extras[extra])
        assert not libraries & names(project["dependencies"])


def names(tree: ast.AST) -> Iterator[str]:
    """Every identifier of a module."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_ascii(path: Path) -> None:
    assert [name for name in names(ast.parse(path.read_text(encoding="utf-8"))) if not name.isascii()] == []


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


def test_a_name_that_is_not_ascii_is_seen() -> None:
    assert "答え" in set(names(ast.parse("答え = 1")))


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their names alone: the second of two is not run."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []
