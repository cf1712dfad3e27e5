"""The result of comparing one tensor with its expected values: the proof, the measurements and the findings.

A tensor is in one of three drawers. *proven*: the bytes are those that the tool makes from the reference, or the values
are the reference's. *judged*: the bytes differ, and the error looks like the type's rounding. *unexplained*: all other
tensors. A tensor without expected values is "not compared".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from verification.contract.finding import Finding
from verification.weight_parity.hypotheses import Nearest
from verification.weight_parity.profile import Profile
from verification.weight_parity.structure.direction import Direction
from verification.weight_parity.structure.rotation import Residual

Drawer = Literal["proven", "judged", "unexplained", "not compared"]


@dataclass(frozen=True)
class TensorResult:
    """The result of one tensor; verify and lint decide on the same result."""

    name: str
    type: str
    compared: bool  # whether it was compared with the reference's values
    proof: str = ""  # how the tensor was proven: "as F16", "from F16", "from BF16 with the imatrix"; "" if it was not
    rel_error: float | None = None  # ||dequantised - reference|| / ||reference||
    max_abs_error: float | None = None
    own_error: float | None = None  # relative error of llama.cpp's quantiser on the same values
    roundings: float | None = None  # worst weight, float types
    blocks: int = 0
    blocks_differ: int = 0
    blocks_damaged: int = 0
    size: int = 0
    clipped: int = 0  # weights beyond F16's range
    flushed: int = 0  # weights that became zero
    non_finite: int = 0
    explanation: str = ""  # why different bytes are healthy: "by another build or machine"
    codes_nearest: bool | None = None  # whether every code is the nearest on the file's own scales; None: not asked
    open: str = ""  # why only the error of the layer's output can decide; "" if the weights decide
    nearest: tuple[Nearest, ...] = ()
    residual: Residual | None = None
    along: Direction | None = None  # change from the base in the error, if judged and the base is known
    findings: tuple[Finding, ...] = ()
    profile: Profile | None = None  # the error by place; only for a tensor with findings

    @property
    def equal(self) -> bool:
        """Whether every weight is proven and there is no finding."""
        return bool(self.proof) and not self.findings

    @property
    def drawer(self) -> Drawer:
        if self.findings or self.non_finite:
            return "unexplained"
        if not self.compared:
            return "not compared"
        return "proven" if self.proof else "judged"
