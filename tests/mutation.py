"""A small mutation runner: every single change of a kind to a module's source, and who survives the module's own tests.

Kinds: comparisons turned or loosened by one, `and`/`or`, `not` dropped, conditions made constant, filters of
comprehensions dropped, numbers changed, strings changed or emptied, + and -, * and / swapped, min/max and any/all
swapped, calls dropped, slices widened, loops over nothing, results replaced by None, statements removed. Docstrings,
annotations, type aliases and imports are left alone. Home-made because cosmic-ray changes no string, drops no
call and starts the tests anew for each mutant (docs/design.md).

`python tests/mutation.py MODULE TEST_FILE ... [--every N] [--jobs N]` prints one JSON object. The tests are collected
once; each mutant then gets a fork of that process, in which it takes the module's place wherever that was imported.
The same exchange with the module's own source has to pass first.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
# an environment may lie in ROOT too: not everything there is ours
OURS = tuple(f"{ROOT / name}/" for name in ("so8t_core", "verification", "pipeline", "tests"))
CPU_LIMIT = 60  # seconds of its own, whatever the machine's load; an endless loop counts as caught

_COMPARE: dict[type, list[type]] = {
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt],
    ast.Lt: [ast.LtE],
    ast.LtE: [ast.Lt],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
}
_ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One change. `key` is "function | code | change": it stays the same when other lines move."""

    line: int
    key: str
    original: str  # the whole source
    node: int  # its place in `ast.walk`
    what: str

    @property
    def source(self) -> str:
        """The whole source with the change."""
        changed = ast.parse(self.original)
        target = list(ast.walk(changed))[self.node]
        new = dict(_replacements(target))[self.what]
        for parent in ast.walk(changed):
            _put(parent, target, new)
        return ast.unparse(ast.fix_missing_locations(changed))


def _replacements(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """(what, the node instead); None = remove the statement."""

    def with_(**fields: object) -> ast.AST:
        changed = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(changed, name, value)
        return changed

    match node:
        case ast.Compare(ops=[op]) if type(op) in _COMPARE:
            for other in _COMPARE[type(op)]:
                yield f"{type(op).__name__} -> {other.__name__}", with_(ops=[other()])
        case ast.Compare(ops=ops):
            for index, op in enumerate(ops):
                for other in _COMPARE[type(op)]:
                    changed = [*ops[:index], other(), *ops[index + 1 :]]
                    yield f"{type(op).__name__} {index} -> {other.__name__}", with_(ops=changed)
        case ast.BoolOp(op=op):
            yield "and <-> or", with_(op=ast.Or() if isinstance(op, ast.And) else ast.And())
            for index in range(len(node.values)):
                yield f"operand {index} alone", copy.deepcopy(node.values[index])
        case ast.UnaryOp(op=ast.Not() | ast.Invert(), operand=operand):
            yield "not dropped", copy.deepcopy(operand)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield "sign dropped", copy.deepcopy(operand)
        case ast.If(test=test):
            for value in (True, False):
                yield f"if {value}", with_(test=ast.copy_location(ast.Constant(value), test))
        case ast.IfExp(body=body, orelse=orelse):
            yield "if True", copy.deepcopy(body)
            yield "if False", copy.deepcopy(orelse)
        case ast.comprehension(ifs=[_, *_]):
            yield "filter dropped", with_(ifs=[])
        case ast.For(iter=over):
            yield "loop over nothing", with_(iter=ast.copy_location(ast.Tuple([], ast.Load()), over))
        case ast.Constant(value=bool()):
            yield "flipped", ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield "+ 1", ast.Constant(node.value + 1)
            yield "- 1", ast.Constant(node.value - 1)
        case ast.Constant(value=float()):
            yield "x 2", ast.Constant(node.value * 2 or 1.0)
            yield "/ 2", ast.Constant(node.value / 2 or -1.0)
        case ast.Constant(value=str()):
            yield "text changed", ast.Constant(node.value + "XX")
            if node.value:
                yield "text emptied", ast.Constant("")
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
            other = _ARITHMETIC[type(op)]
            yield f"{type(op).__name__} -> {other.__name__}", with_(op=other())
        case ast.Call(func=ast.Name(id=name)) if name in _NAMES:
            yield f"{name} -> {_NAMES[name]}", with_(func=ast.Name(_NAMES[name], ast.Load()))
        case ast.Call(func=ast.Name(), args=[first, *_]):
            yield "call dropped", copy.deepcopy(first)
        case ast.Call(func=ast.Attribute(value=ast.Name(id="np" | "torch" | "math"), attr=name), args=[first, *_]):
            if name.removesuffix("imum").removesuffix("imum") in _NAMES:
                other = _NAMES[name.removesuffix("imum")] + "imum"
                yield f"{name} -> {other}", with_(func=ast.Attribute(node.func.value, other, ast.Load()))
            yield "call dropped", copy.deepcopy(first)
        case ast.Call(func=ast.Attribute(value=value)):
            yield "method dropped", copy.deepcopy(value)
        case ast.Subscript(slice=ast.Slice()):
            yield "slice dropped", copy.deepcopy(node.value)
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield "None returned", with_(value=ast.Constant(None))
        case ast.Assign() | ast.AugAssign() | ast.Raise() | ast.Expr() | ast.Continue() | ast.Break():
            yield "statement removed", None


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def mutants(path: Path) -> Iterator[Mutant]:
    """Every mutant of a file, keys unique."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    left_alone, inside = _left_alone(tree), dict(_functions(tree))
    seen: dict[str, int] = {}
    for index, node in enumerate(list(ast.walk(tree))):
        if node in left_alone:
            continue
        for what, _ in _replacements(node):
            key = f"{inside.get(node, 'module')} | {_code(node)} | {what}"
            seen[key] = again = seen.get(key, 0) + 1
            key += f" (number {again})" if again > 1 else ""
            yield Mutant(getattr(node, "lineno", 0), key, source, index, what)


def _code(node: ast.AST) -> str:
    code = " ".join(ast.unparse(node).split())
    return code if len(code) <= 70 else f"{code[:67]}..."


def _left_alone(tree: ast.AST) -> set[ast.AST]:
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= set(ast.walk(node))
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            found |= set(ast.walk(node.body[0]))
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if re.fullmatch("[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*", name):  # a type alias: read by mypy alone
                found |= set(ast.walk(node))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and _code(node.value.func) == "TypeVar":
            found |= set(ast.walk(node))
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                found |= set(ast.walk(annotation))
    return found


def _functions(node: ast.AST, name: str = "") -> Iterator[tuple[ast.AST, str]]:
    """Every node with the dotted name of the function or class around it."""
    for child in ast.iter_child_nodes(node):
        inner = name
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            inner = f"{name}.{child.name}".lstrip(".")
        if inner:
            yield child, inner
        yield from _functions(child, inner)


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


@dataclass(frozen=True)
class Outcome:
    """How many mutants there were, how many were tried, and the keys of those that every test let pass."""

    mutants: int
    tried: int
    survivors: dict[str, int]  # key -> line


def judged(module: str, tests: Sequence[Path], *, every: int = 1, offset: int = 0, jobs: int = 1) -> Outcome:
    """Hold every `every`-th mutant of a module against test files, in a process of its own.

    Raises:
        AssertionError: the tests fail on the module as it is, so that they judge nothing.
    """
    command = [sys.executable, str(Path(__file__).resolve()), module, *map(str, tests)]
    command += ["--every", str(every), "--offset", str(offset), "--jobs", str(jobs)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))


class _Judge:
    """A pytest plugin: in place of running the tests once, it forks for each mutant and runs them there."""

    def __init__(self, module: str, path: Path, *, every: int, offset: int, jobs: int) -> None:
        self.module, self.path, self.jobs = module, path, jobs
        found = list(mutants(path))
        self.count, self.chosen = len(found), found[offset::every]
        self.survivors: dict[str, int] = {}

    def pytest_runtestloop(self, session: Any) -> bool:
        sys.modules["torch"].set_num_threads(1)  # threads do not survive a fork
        gc.freeze()  # a child's collector would copy every page of what is loaded
        healthy = self._fork(session, None)
        if os.waitstatus_to_exitcode(os.waitpid(healthy, 0)[1]) != 0:
            raise AssertionError(f"the tests fail on {self.module} as it is, so they judge nothing")
        waiting, running = self.chosen[::-1], {}
        while waiting or running:
            while waiting and len(running) < self.jobs:
                mutant = waiting.pop()
                running[self._fork(session, mutant)] = mutant
            child, status = os.wait()
            mutant = running.pop(child)
            if os.waitstatus_to_exitcode(status) == 0:
                self.survivors[mutant.key] = mutant.line
                print(f"{mutant.line}: {mutant.key}", file=sys.__stderr__, flush=True)
        return True

    def _fork(self, session: Any, mutant: Mutant | None) -> int:
        """The child takes the mutant in place of the module, runs the tests and exits 0 when they all pass.

        None takes the module's own source.
        """
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT))
            if mutant:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
            source = mutant.source if mutant else self.path.read_text(encoding="utf-8")
            _exchange(importlib.import_module(self.module), source, self.path)
            for number, item in enumerate(session.items):
                following = session.items[number + 1] if number + 1 < len(session.items) else None
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if session.testsfailed:
                    break
            code = int(session.testsfailed > 0)
        except BaseException as error:
            print(repr(error), flush=True)
        finally:
            os._exit(code)


def _exchange(module: ModuleType, source: str, path: Path) -> None:
    """Run another source in a loaded module, and hand its new objects to every module that imported the old ones.

    Raises:
        ImportError: the source no longer has a name that another module imported.
    """
    # pytest's rewriting of asserts adds names that no source could: @py_builtins, @pytest_ar
    old = {name: value for name, value in vars(module).items() if name.isidentifier() and not name.startswith("__")}
    for name in old:
        delattr(module, name)
    exec(compile(source, str(path), "exec"), vars(module))
    for other in [m for m in sys.modules.values() if type(m).__module__ != "_pytest" and m is not module]:
        if not str(getattr(other, "__file__", None) or "").startswith(OURS):
            continue
        for held, value in list(vars(other).items()):
            for name, before in old.items():
                # constants may be one object by chance, so they also need the name; functions and classes are unique
                if before is value and (name == held or callable(before)):
                    if not hasattr(module, name):
                        raise ImportError(f"{other.__name__} imports {name}")
                    setattr(other, held, getattr(module, name))


def main() -> None:
    """The process that forks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    os.chdir(ROOT)
    import pytest

    path = ROOT / (given.module.replace(".", "/") + ".py")
    judge = _Judge(given.module, path, every=given.every, offset=given.offset, jobs=given.jobs)
    code = pytest.main(["-q", "--tb=no", "-p", "no:logging", "-p", "no:cacheprovider", *given.tests], plugins=[judge])
    if code != 0:
        sys.exit(int(code))
    survivors = dict(sorted(judge.survivors.items()))
    print(json.dumps({"mutants": judge.count, "tried": len(judge.chosen), "survivors": survivors}))


if __name__ == "__main__":
    main()
