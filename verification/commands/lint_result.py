"""The result of `lint`: checks with their findings, one row for each tensor, one for each hypothesis."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from verification.contract.finding import Code, writable
from verification.gguf.reader import GGUFFile
from verification.gguf.runs_on import Need, runs_on
from verification.weight_parity.result import Drawer, TensorResult

SCHEMA_VERSION = "1.4"  # 1.1: `drawer`, `why` of a tensor; 1.2: `open`; 1.3: `kind`; 1.4: `runs_on`
Status = Literal["pass", "fail", "note", "not evaluated"]
Verdict = Literal["pass", "fail", "incomplete"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LintFinding(_Model):
    """One finding: its place, the expected value, the found value, the action to take."""

    where: str
    expected: str
    found: str
    action: str = ""
    cause: str = ""
    code: Code = ""


class LintCheck(_Model):
    """One check and its findings."""

    name: str  # stable id: "oracle_metadata", "weights"
    title: str
    status: Status
    findings: list[LintFinding] = Field(default_factory=list)
    detail: str = ""


class LintTensor(_Model):
    """One tensor against the reference."""

    name: str
    type: str
    how: Literal["bytes of the type's own rounding or quantiser", "within the type's bound", "refused", "not compared"]
    drawer: Drawer = "not compared"
    why: str = ""  # how the tensor was proven equal, or why its different bytes are healthy
    open: str = ""  # why only the error of the layer's output can decide; "" where the tensor alone decides
    rel_error: float | None = None
    own_error: float | None = None
    roundings: float | None = None
    blocks: int = 0
    blocks_differ: int = 0
    clipped: int = 0
    flushed: int = 0


class LintHypothesis(_Model):
    """The hypothesis that an attention tensor is nearest to."""

    name: str
    best: str
    distance: float
    second: str
    second_distance: float
    z: float | None  # None where there is no noise to compare with
    residual_rms: float | None = None  # rad, o_proj only
    residual_largest: float | None = None
    standard_error: float | None = None


class LintNeed(_Model):
    """A build of llama.cpp, and the part of the file that no earlier one knows."""

    build: int  # 5092 for b5092
    what: str
    source: str  # the pull request


class LintRunsOn(_Model):
    """The oldest builds of llama.cpp for the file; see `runs_on`."""

    sentence: str
    loads: LintNeed | None  # None where a name is unknown
    keys: LintNeed | None  # None where every build that loads the file knows its keys
    unknown: list[str]
    newest: int


class LintReport(_Model):
    """The whole result; `so8t lint --out` writes it as lint.json."""

    schema_version: str = SCHEMA_VERSION
    verdict: Verdict
    kind: str = "a language model"
    file: str
    sha256: str
    bytes: int
    architecture: str
    file_type: str
    tensors_total: int
    runs_on: LintRunsOn | None = None  # None of a file that llama.cpp does not load as a model
    reference: str | None
    checks: list[LintCheck]
    tensors: list[LintTensor] = Field(default_factory=list)
    hypotheses: list[LintHypothesis] = Field(default_factory=list)
    seconds: dict[str, float] = Field(default_factory=dict)


def runs_on_row(file: GGUFFile) -> LintRunsOn:
    """The oldest builds of llama.cpp for a model."""
    found = runs_on(file)

    def row(need: Need | None) -> LintNeed | None:
        return None if need is None else LintNeed(build=need.build, what=writable(need.what), source=need.source)

    return LintRunsOn(
        sentence=writable(found.sentence),
        loads=row(found.loads),
        keys=row(found.keys),
        unknown=[writable(name) for name in found.unknown],
        newest=found.newest,
    )


def tensor_row(result: TensorResult) -> LintTensor:
    """A tensor's row of the result."""
    row = {key: value for key, value in asdict(result).items() if key in LintTensor.model_fields}
    if not result.compared:
        how = "not compared"
    elif result.findings:
        how = "refused"
    elif result.equal:
        how = "bytes of the type's own rounding or quantiser"
    else:
        how = "within the type's bound"
    return LintTensor(**row, how=how, drawer=result.drawer, why=result.proof or result.explanation)


def hypothesis_rows(result: TensorResult) -> list[LintHypothesis]:
    """The nearest hypothesis of an attention tensor, one row for each part of a fused tensor."""
    rows = []
    left = result.residual
    for match in result.nearest:
        rows.append(
            LintHypothesis(
                name=match.name,
                best=match.best,
                distance=match.distance,
                second=match.second,
                second_distance=match.second_distance,
                z=match.z if match.z < 1e12 else None,
                residual_rms=left.rms if left else None,
                residual_largest=left.largest if left else None,
                standard_error=left.standard_error if left else None,
            )
        )
    return rows
