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


def test_every_check_is_a_test(asked: pytest.Pytester, small_checkpoint: Path, tmp_path: Path) -> None:
    """With o_proj transposed: what fails, fails; a waiver and a leg without data are skipped with their reason."""
    from verification.engines.convert import convert

    healthy = convert(small_checkpoint, tmp_path / "m-F16.gguf", model_name="m")
    broken = rewrite(healthy, tmp_path / "b-F16.gguf", tensors={"blk.0.attn_output.weight": np.transpose})
    policy = tmp_path / "gate.yaml"
    policy.write_text(POLICY, encoding="utf-8")
    options = [f"--so8t-reference={small_checkpoint}", f"--so8t-candidate={broken}", f"--so8t-policy={policy}"]
    options += [f"--so8t-out={tmp_path / 'out'}", "--so8t-chunks=2", "--so8t-n-ctx=64", "-rA"]
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
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-W', 'error']))"
    )
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "so8t" not in done.stdout


def test_the_entry_point_is_declared() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"so8t": "verification.commands.pytest_plugin"}
