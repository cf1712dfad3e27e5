"""The pytest plugin: silent and light without its options, one test a check with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from policy_reports import released
from verification_models import Family, rewrite

import verification
from verification.show.write import to_json

ROOT = Path(__file__).parents[3]
pytest_plugins = ["pytester"]
NAMED = ("-p", "verification.commands.pytest_plugin")

POLICY = """
required: [convert, contract, bake]
waivers:
  - {check: convert.top1, reason: known and accepted}
"""


@pytest.fixture
def asked(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project of one test; the plugin is named here, and not found a second time where so8t is installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(test_mine="def test_mine(): pass")
    return pytester


def test_every_check_is_a_test(asked: pytest.Pytester, family: Family, tmp_path: Path) -> None:
    """With o_proj transposed: what fails, fails; a waiver and a leg without data are skipped with their reason."""
    changed = {"blk.1.attn_output.weight": np.transpose}
    broken = rewrite(family.files["F16"], tmp_path / "b-F16.gguf", tensors=changed)
    policy = tmp_path / "gate.yaml"
    policy.write_text(POLICY, encoding="utf-8")
    options = [f"--so8t-reference={family.reference}", f"--so8t-candidate={broken}", f"--so8t-policy={policy}"]
    options += [f"--so8t-out={tmp_path / 'out'}", "--so8t-chunks=2", "--so8t-n-ctx=64", "--so8t-threads=1", "-rA"]
    done = asked.runpytest_subprocess(*NAMED, *options)
    assert done.ret == 1
    done.stdout.fnmatch_lines_random(
        [
            "PASSED test_mine.py::test_mine",
            "PASSED so8t::contract::token_ids[[]F16]",
            "FAILED so8t::convert::mean_kld[[]F16]*",
            "FAILED so8t::verdict*",
            "fail: Mean KL divergence (F16): * nats, bound *",
            "SKIPPED * waived: known and accepted",
            "SKIPPED * not evaluated: the policy requires this leg*",
        ]
    )
    done.stdout.no_fnmatch_line("*Traceback*")
    assert (tmp_path / "out" / "report.intoto.json").is_file()


STUB = """
import json
from pathlib import Path
import pytest
import verification
from verification.show.write import load_report

def measured(*_, **__):
    return load_report(Path(__file__).with_name("report.json"))

verification.verify = measured
"""


@pytest.fixture
def measured(asked: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A session whose measuring gives a report that is there already: it passes, or is cut and therefore incomplete."""
    monkeypatch.setattr(verification, "verify", verification.verify)  # the stub replaces it in this very process
    whole = released()
    legs = [leg for leg in whole.legs if leg.name != "cells"]
    cut = whole.model_copy(update={"legs": legs, "verdict": "incomplete", "summary": "Incomplete: no cells."})
    for name, report in (("pass", whole), ("incomplete", cut)):
        (asked.path / f"{name}.json").write_text(to_json(report), encoding="utf-8")
    asked.makeconftest(STUB)
    return asked


def session(measured: pytest.Pytester, verdict: str, *more: str) -> pytest.RunResult:
    (measured.path / "report.json").write_bytes((measured.path / f"{verdict}.json").read_bytes())
    return measured.runpytest_inprocess(*NAMED, "--so8t-reference=.", "--so8t-candidate=test_mine.py", *more)


WITHOUT_VERDICT = {
    "-k": ["-k", "not verdict"],
    "-m": ["-m", "not so8t"],
    "--deselect": ["--deselect", "so8t::verdict"],
    "--collect-only": ["--collect-only"],
    "--setup-only": ["--setup-only"],
    "--setup-plan": ["--setup-plan"],
    "--ignore": ["--ignore", "test_mine.py", "-k", "token_ids"],
}


@pytest.mark.parametrize("how", WITHOUT_VERDICT)
@pytest.mark.parametrize("verdict", ["pass", "incomplete"])
def test_a_session_that_did_not_run_the_verdict_is_not_green(measured: pytest.Pytester, verdict: str, how: str) -> None:
    done = session(measured, verdict, *WITHOUT_VERDICT[how])
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*so8t: no passed verdict in this session, so it does not end with 0*"])


def test_a_session_is_green_only_with_a_verdict_that_passed(measured: pytest.Pytester) -> None:
    done = session(measured, "pass")
    assert done.ret == 0
    done.stdout.no_fnmatch_line("*no passed verdict*")
    assert session(measured, "pass", "-k", "verdict").ret == 0
    assert session(measured, "incomplete").ret == pytest.ExitCode.TESTS_FAILED
    assert session(measured, "incomplete", "-k", "verdict").ret == pytest.ExitCode.TESTS_FAILED


def test_a_hook_or_a_test_that_wants_0_does_not_get_it(measured: pytest.Pytester) -> None:
    measured.makeconftest(
        STUB
        + """
def pytest_runtest_call(item):
    if item.name == "verdict":
        pytest.skip("not today")

def pytest_sessionfinish(session):
    session.exitstatus = 0
"""
    )
    assert session(measured, "pass").ret == pytest.ExitCode.TESTS_FAILED
    measured.makeconftest(STUB)
    measured.makepyfile(test_mine="import pytest\ndef test_mine(): pytest.exit('enough', returncode=0)")
    assert session(measured, "pass").ret == pytest.ExitCode.TESTS_FAILED


def test_an_earlier_report_is_gone_before_anything_can_stop_the_session(measured: pytest.Pytester) -> None:
    out = measured.mkdir("out")
    (out / "report.json").write_text("an earlier pass", encoding="utf-8")
    measured.makepyfile(test_mine="import nothing_of_this_name")
    assert session(measured, "pass", f"--so8t-out={out}").ret == pytest.ExitCode.INTERRUPTED
    assert not (out / "report.json").exists()
    done = session(measured, "pass", "--so8t-out=test_mine.py")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert "Traceback" not in done.stderr.str() + done.stdout.str()


def test_a_step_summary_that_fails_changes_nothing(measured: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = measured.path / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert session(measured, "pass").ret == 0
    assert "Pass: ready to release" in summary.read_text(encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(measured.path))
    assert session(measured, "pass").ret == 0
    assert session(measured, "incomplete").ret == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--so8t-reference", "."], "belong together"),
        (["--so8t-candidate", "x.gguf"], "belong together"),
        (["--so8t-reference", ".", "--so8t-candidate", "gone.gguf"], "gone.gguf does not exist"),
        (["--so8t-reference", ".", "--so8t-candidate", "test_mine.py"], "is not a GGUF file"),
    ],
)
def test_a_mistake_is_a_usage_error_without_a_traceback(
    asked: pytest.Pytester, options: list[str], message: str
) -> None:
    loads_torch = "test_mine.py" in options  # in this process, pytester would throw the modules away afterwards
    done = (asked.runpytest_subprocess if loads_torch else asked.runpytest_inprocess)(*NAMED, *options)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert message in done.stderr.str()
    assert "Traceback" not in done.stderr.str() + done.stdout.str()


def test_without_its_options_the_entry_point_costs_nothing(tmp_path: Path) -> None:
    """A distribution with our entry point, as an installation makes it: pytest starts, torch does not."""
    meta = tmp_path / "site" / "so8t_entry-0.dist-info"
    meta.mkdir(parents=True)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: so8t-entry\nVersion: 0\n", encoding="utf-8")
    (meta / "entry_points.txt").write_text("[pytest11]\nso8t = verification.commands.pytest_plugin\n", encoding="utf-8")
    (tmp_path / "test_it.py").write_text(
        "import sys\ndef test_light(request):\n"
        "    assert request.config.pluginmanager.get_plugin('so8t').__name__ == 'verification.commands.pytest_plugin'\n"
        "    heavy = {'torch', 'transformers', 'pydantic', 'llama_cpp', 'gguf'}\n"
        "    assert not heavy & set(sys.modules)\n",
        encoding="utf-8",
    )
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path / 'site')!r}]\nimport pytest\n"
        # langsmith, which langchain-openai installs, has a pytest plugin that imports pydantic
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-p', 'no:langsmith_plugin', '-W', 'error']))"
    )
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "so8t" not in done.stdout


def test_the_entry_point_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"so8t": "verification.commands.pytest_plugin"}
