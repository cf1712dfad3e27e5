"""Judges one file without inference: runs `lint` and the file legs of `verify`, and decides their verdict.

The legs are the functions that `verify` runs, and the same policy decides. A tensor with the bytes of an earlier file's
tensor is not examined again, because its result is stored. Logits are measured only if these legs found no fault.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from so8t_core.errors import InputError
from verification.commands.lint import lint
from verification.commands.lint_result import LintReport
from verification.commands.stages import same_vocabulary
from verification.contract.checks import contract_checks
from verification.engines.huggingface import load_hf
from verification.fault_catalogue.models import Healthy
from verification.fault_catalogue.peer_checks import Said
from verification.gate.check import plain_check
from verification.gate.decide import LEG_TITLES, decide
from verification.gate.policy import Policy
from verification.gate.report import Check, Leg, LegName, Report
from verification.gguf.candidate import Candidate
from verification.gguf.reader import FLOAT_TYPES, GGUFFile, read_gguf
from verification.weight_parity.checks import output_checks, weight_checks
from verification.weight_parity.layer_output_error import output_errors


@dataclass
class Judgement:
    """The gate's verdict on one file."""

    unreadable: str = ""  # why the file was refused before any check
    other_vocabulary: bool = False  # whether the file was refused for the size of its vocabulary
    file: GGUFFile | None = None
    linted: LintReport | None = None
    checks: list[Check] = field(default_factory=list)  # the decided checks of verify

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.status not in ("pass", "waived")]

    @property
    def passed(self) -> bool:
        lint_passed = self.linted is not None and self.linted.verdict == "pass"
        return not self.unreadable and lint_passed and not self.failed

    @property
    def loads(self) -> bool:
        """Whether llama.cpp opens the file."""
        checks = self.linted.checks if self.linted else []
        return any(check.name == "loads" and check.status == "pass" for check in checks)

    @property
    def caught_by(self) -> list[str]:
        """Names of the checks that refused the file, lint's first."""
        if self.unreadable:
            return ["cannot be read"]
        names = [f"lint {check.name}" for check in self.linted.checks if check.status == "fail"] if self.linted else []
        return names + [f"verify {check.name}" for check in self.failed]


def judge(pair: Healthy, path: Path, policy: Policy) -> Judgement:
    """Lint and the file legs of one candidate."""
    try:
        file = read_gguf(path)
    except InputError as error:
        return Judgement(unreadable=str(error))
    try:
        same_vocabulary(pair.checkpoint, [Candidate("candidate", file)])
    except InputError as error:
        return Judgement(unreadable=str(error), other_vocabulary=True)
    result = Judgement(file=file)
    result.linted = lint(
        path,
        reference=pair.reference,
        base=pair.base,
        adapter=pair.adapter,
        oracle=pair.files["F16"],
        memory=pair.memory,
    )
    if not result.loads:  # verify refuses such a file before opening it
        result.checks = [_not_loaded("llama.cpp refuses it")]
        return result
    try:
        result.checks = decided(_file_legs(pair, file), policy)
    except InputError as error:
        result.checks = [_not_loaded(str(error))]
    return result


def _file_legs(pair: Healthy, file: GGUFFile) -> dict[LegName, list[Check]]:
    """The file legs as `stages` runs them; the oracle is the healthy file of the pair, made here by this build."""
    candidate, oracle = Candidate(file.file_type, file), pair.opened["F16"]
    contract = contract_checks(candidate, oracle, pair.checkpoint, pair.tokenizer, pair.reference, memory=pair.memory)
    weights = weight_checks(candidate, pair.conversions, pair.sources, memory=pair.memory)
    outputs = []
    if weights.open:  # on random tokens: any inputs separate error feedback from damage
        tokens = np.random.default_rng(0).integers(0, int(pair.checkpoint.config["vocab_size"]), 384)
        errors = output_errors(load_hf(pair.reference), tokens, weights.open)
        outputs = output_checks(candidate.label, weights.open, errors)
    legs: dict[LegName, list[Check]] = {
        "contract": [*contract, *weights.contract],
        "convert": weights.convert,
        "quantise": [*weights.quantise, *outputs],
    }
    return legs


def logit_checks(file_type: str, said: Said, policy: Policy) -> list[Check]:
    """The leg `convert` or `quality`, decided by the gate's bound on the mean KLD."""
    leg: LegName = "convert" if file_type in FLOAT_TYPES else "quality"
    interval = None if said.mean_kld is None or said.upper is None else (min(said.mean_kld, said.upper), said.upper)
    check = plain_check(
        f"{leg}.mean_kld",
        "Mean KL divergence",
        said.mean_kld,
        subject=file_type,
        unit="nats",
        interval=interval,
        detail=said.refused,
    )
    return decided({leg: [check]}, policy)


def decided(legs: dict[LegName, list[Check]], policy: Policy) -> list[Check]:
    """The checks, each with the status from the policy."""
    bare = policy.model_copy(update={"required": []})
    report = Report(
        verdict="incomplete",
        summary="",
        created=datetime.now(UTC).isoformat(),
        artefacts=[],
        legs=[
            Leg(name=name, title=LEG_TITLES[name], compared="", status="not evaluated", checks=checks)
            for name, checks in legs.items()
            if checks
        ],
        policy=bare.model_dump(mode="json"),
        versions={},
        durations={},
    )
    return [check for leg in decide(report, bare).legs for check in leg.checks]


def _not_loaded(why: str) -> Check:
    return Check(
        name="contract.loads", title="verify opens the file", status="fail", value=1, bound=0, relation="<=", detail=why
    )


def differing_matrices(judgement: Judgement) -> tuple[int, int]:
    """(matrices that are neither proven nor judged healthy, all matrices that were compared)."""
    assert judgement.file is not None
    assert judgement.linted is not None
    matrices = {name for name, tensor in judgement.file.tensors.items() if len(tensor.shape) > 1}
    rows = [row for row in judgement.linted.tensors if row.name in matrices]
    return sum(row.drawer == "unexplained" or bool(row.open) for row in rows), len(rows)
