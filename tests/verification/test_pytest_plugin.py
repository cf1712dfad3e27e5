"""The pytest plugin: silent and light without its options, one test a check with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from verification_models import rewrite

ROOT = Path(__file__).parents[2]
pytest_plugins = ["pytester"]

POLICY = """
required: [convert, contract, bake]
waivers:
  - {check: convert.top1, reason: known and accepted}
"""


@pytest.fixture
def asked(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """An empty project; the plugin is named and not found twice where so8t is installed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.syspathinsert(str(ROOT))
    pytester.makepyfile(test_mine="def test_mine(): pass")
    pytester.plugins = ["verification.pytest_plugin"]
    return pytester


def test_every_check_is_a_test(asked: pytest.Pytester, small_checkpoint: Path, tmp_path: Path) -> None:
    """A healthy file passes; o_proj transposed fails, a waiver and a leg without data are skipped with their reason."""
    from verification.converter import convert

    healthy = convert(small_checkpoint, tmp_path / "m-F16.gguf", model_name="m")
    options = ["--so8t-reference", str(small_checkpoint), "--so8t-chunks", "2", "--so8t-n-ctx", "64", "-rA"]
    done = asked.runpytest_inprocess(*options, "--so8t-candidate", str(healthy), "-m", "so8t")
    assert done.ret == 0
    done.stdout.fnmatch_lines_random(
        ["PASSED so8t::convert::mean_kld[[]F16]", "PASSED so8t::contract::token_ids[[]F16]", "PASSED so8t::verdict"]
    )
    done.stdout.fnmatch_lines(["*1 deselected*"])

    broken = rewrite(healthy, tmp_path / "b-F16.gguf", tensors={"blk.0.attn_output.weight": np.transpose})
    policy = tmp_path / "gate.yaml"
    policy.write_text(POLICY, encoding="utf-8")
    done = asked.runpytest_inprocess(
        *options, "--so8t-candidate", str(broken), "--so8t-policy", str(policy), "--so8t-out", str(tmp_path / "out")
    )
    assert done.ret == 1
    done.stdout.fnmatch_lines_random(
        [
            "PASSED test_mine.py::test_mine",
            "FAILED so8t::convert::mean_kld[[]F16]*",
            "FAILED so8t::verdict*",
            "fail: Mean KL divergence (F16): * nats, bound *",
            "SKIPPED * waived: known and accepted",
            "SKIPPED * not evaluated: the policy requires this leg*",
        ]
    )
    done.stdout.no_fnmatch_line("*Traceback*")
    assert (tmp_path / "out" / "report.intoto.json").is_file()


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
    done = asked.runpytest_inprocess(*options)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([f"*{message}*"])
    assert "Traceback" not in done.stderr.str() + done.stdout.str()


def test_without_its_options_the_entry_point_costs_nothing(tmp_path: Path) -> None:
    """A distribution with our entry point, as an installation makes it: pytest starts, torch does not."""
    meta = tmp_path / "site" / "so8t_entry-0.dist-info"
    meta.mkdir(parents=True)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: so8t-entry\nVersion: 0\n", encoding="utf-8")
    (meta / "entry_points.txt").write_text("[pytest11]\nso8t = verification.pytest_plugin\n", encoding="utf-8")
    (tmp_path / "test_it.py").write_text(
        "import sys\ndef test_light(request):\n"
        "    assert request.config.pluginmanager.get_plugin('so8t').__name__ == 'verification.pytest_plugin'\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'llama_cpp', 'yaml'}\n"
        "    assert not heavy & set(sys.modules)\n",
        encoding="utf-8",
    )
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path / 'site')!r}]\nimport pytest\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-W', 'error']))"
    )
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "so8t" not in done.stdout


def test_the_entry_point_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"so8t": "verification.pytest_plugin"}
