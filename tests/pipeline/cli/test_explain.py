"""Laws of `so8t lint --explain`: every check and every code has one explanation, and what was found is explained."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from rich.console import Console
from tiny_gguf import write_tiny

import verification
from pipeline.cli.explain import explained
from pipeline.cli.main import main
from verification.commands import lint as lint_module
from verification.commands.lint_result import LintCheck, LintFinding, LintReport
from verification.contract.explanations import CHECKS, CODES, explanation
from verification.contract.finding import Code


def test_every_check_and_every_code_has_one_explanation_and_no_other_stands_there() -> None:
    assert set(CHECKS) == set(lint_module._TITLES)
    assert set(CODES) == set(get_args(Code)) - {""}
    assert not set(CHECKS) & set(CODES)


def test_every_name_that_lint_gives_a_check_is_in_its_list() -> None:
    """A check that is added under a new name must not miss its title and its explanation."""
    tree = ast.parse(Path(lint_module.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    names = {
        node.args[0].value
        for node in calls
        if node.func.attr in ("add", "skip") and node.args and isinstance(node.args[0], ast.Constant)  # type: ignore[attr-defined]
    }
    assert len(names) > 15
    assert names <= set(CHECKS)


def test_every_code_in_the_sources_is_a_known_one() -> None:
    used = set()
    for path in Path(verification.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                used |= {k.value.value for k in node.keywords if k.arg == "code" and isinstance(k.value, ast.Constant)}
    assert used
    assert used <= set(CODES)


@pytest.mark.parametrize("text", [*CHECKS.values(), *CODES.values()])
def test_an_explanation_is_for_a_person(text: str) -> None:
    assert 50 <= len(text) <= 320
    assert text.endswith(".")
    assert text[0].isupper() or text.startswith("llama.cpp")


def shown(report: LintReport) -> str:
    console = Console(width=400)
    with console.capture() as captured:
        console.print(explained(report))
    return captured.get()


def report_of(*checks: LintCheck) -> LintReport:
    return LintReport(
        verdict="fail",
        file="m.gguf",
        sha256="0" * 64,
        bytes=1,
        architecture="llama",
        file_type="Q8_0",
        tensors_total=1,
        reference=None,
        checks=list(checks),
        tensors=[],
        hypotheses=[],
        seconds={},
    )


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("status", ["fail", "note", "not evaluated"])
def test_what_did_not_pass_is_explained_and_what_passed_is_not(name: str, status: Any) -> None:
    finding = LintFinding(where="w", expected="a", found="b")
    found = [] if status == "not evaluated" else [finding]
    text = shown(report_of(LintCheck(name=name, title="t", status=status, findings=found)))
    assert CHECKS[name] in text
    assert CHECKS[name] not in shown(report_of(LintCheck(name=name, title="t", status="pass")))


@pytest.mark.parametrize("code", CODES)
def test_a_recognised_kind_is_explained_once(code: Any) -> None:
    finding = LintFinding(where="w", expected="a", found="b", code=code)
    text = shown(report_of(LintCheck(name="weights", title="t", status="fail", findings=[finding] * 3)))
    assert text.count(CODES[code]) == 1
    assert explanation("weights", code) in text


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["so8t", "lint", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_the_command_explains_what_it_found(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny(tmp_path / "m.gguf")
    plain = run(monkeypatch, path)
    before = capfd.readouterr().out
    assert run(monkeypatch, path, "--explain") == plain == 1
    after = capfd.readouterr().out
    failed = [name for name in CHECKS if f"FAIL {name}" in before]
    assert failed
    for name in failed:
        assert any(line.startswith(name) and line.endswith("(fail)") for line in after.splitlines())
        assert " ".join(CHECKS[name].split()) in " ".join(after.split())


def test_without_a_file_it_lists_everything(capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "--explain") == 0
    said = " ".join(capfd.readouterr().out.split())
    assert all(" ".join(text.split()) in said for text in (CHECKS | CODES).values())
    assert run(monkeypatch) == 2
    assert "--explain" in capfd.readouterr().err
