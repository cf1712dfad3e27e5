"""Mutation test of the gate: small changes to what it decides with are caught by the fast tests of that module.

The whole run is a soak test; its survivors stand in `surviving_mutants.yaml` with the reason why nobody would notice
them. A survivor that is not listed fails, and so does a listed one that is caught by now.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from mutation import ROOT, judged, mutants

HERE = Path(__file__).parent
EXPLAINED: dict[str, dict[str, str]] = yaml.safe_load((HERE / "surviving_mutants.yaml").read_text(encoding="utf-8"))
JUDGES = {
    "verification.logit_parity.kl": ("test_divergence_fields.py", "test_divergence.py"),
    "verification.gate.decide": ("test_policy_table.py", "test_policy.py"),
    "verification.gate.policy": ("test_policy_table.py", "test_policy.py"),
    "verification.engines.distributed": ("test_distributed.py",),
    "verification.weight_parity.hypotheses": ("test_hypotheses.py",),
    "verification.logit_parity.intervals": ("test_bootstrap_exact.py",),
    "pipeline.cli.exit_codes": ("test_exit_codes.py",),
}
ALLOWED = 0.02  # share of survivors
# 11 of its 13 change how many rows a block has or add a bucket that stays empty: none of them changes a number.
ALLOWED_OF = {"verification.logit_parity.kl": 0.03}
LEAST = {"pipeline.cli.exit_codes": 20}  # mutants; a runner that finds fewer has become blind


def judges_of(module: str) -> list[Path]:
    return [next((ROOT / "tests").rglob(name)) for name in JUDGES[module]]


@pytest.mark.soak
@pytest.mark.parametrize("module", JUDGES)
def test_every_surviving_mutant_is_explained(module: str) -> None:
    outcome = judged(module, judges_of(module), jobs=2)
    explained = EXPLAINED.get(module, {})
    assert outcome.tried == outcome.mutants >= LEAST.get(module, 150)
    assert sorted(set(outcome.survivors) - set(explained)) == []
    assert sorted(set(explained) - set(outcome.survivors)) == []
    assert len(outcome.survivors) < ALLOWED_OF.get(module, ALLOWED) * outcome.mutants


@pytest.mark.soak
def test_tests_that_look_at_too_little_let_mutants_live() -> None:
    """The planted fault: the policy judged by the tests of the hypotheses."""
    outcome = judged("verification.gate.decide", judges_of("verification.weight_parity.hypotheses"), every=15, jobs=2)
    assert len(outcome.survivors) >= 0.95 * outcome.tried > 50  # one that cannot be imported dies anyway


def test_a_sample_of_mutants_is_caught() -> None:
    """Some thirty, others with every change of the file: its length chooses. All of them: `tox -e soak`."""
    source = ROOT / "verification" / "weight_parity" / "hypotheses.py"
    every = len(list(mutants(source))) // 30
    outcome = judged(
        "verification.weight_parity.hypotheses",
        judges_of("verification.weight_parity.hypotheses"),
        every=every,
        offset=len(source.read_bytes()) % every,
    )
    assert outcome.tried >= 28
    assert (
        len(set(outcome.survivors) - set(EXPLAINED["verification.weight_parity.hypotheses"])) < ALLOWED * outcome.tried
    )


@pytest.mark.parametrize("module", JUDGES)
def test_every_explanation_names_a_mutant_of_today_and_a_reason(module: str) -> None:
    keys = {mutant.key for mutant in mutants(ROOT / (module.replace(".", "/") + ".py"))}
    assert sorted(set(EXPLAINED.get(module, {})) - keys) == []
    assert all(len(reason) > 10 for reason in EXPLAINED.get(module, {}).values())


def test_the_runner_makes_the_changes_it_says(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(
        '"""Doc."""\nKind = str\n\ndef f(x: int = 3) -> int:\n    """Doc."""\n    return x + 1 if x < 2 else -x\n'
    )
    found = {mutant.key: mutant.source.splitlines() for mutant in mutants(path)}
    assert {key.split(" | ", 1)[1] for key in found} == {
        "3 | + 1",
        "3 | - 1",
        "return x + 1 if x < 2 else -x | None returned",
        "x + 1 if x < 2 else -x | if True",
        "x + 1 if x < 2 else -x | if False",
        "x < 2 | Lt -> LtE",
        "x + 1 | Add -> Sub",
        "-x | sign dropped",
        "2 | + 1",
        "2 | - 1",
        "1 | + 1",
        "1 | - 1",
    }
    assert found["f | x < 2 | Lt -> LtE"][-1] == "    return x + 1 if x <= 2 else -x"
    assert all(key.startswith("f | ") for key in found)
