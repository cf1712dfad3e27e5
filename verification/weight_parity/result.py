"""A tensor against what it should be: how far it is proven, what was measured, and what was found.

A tensor is in one of three drawers. *proven*: the bytes are what the tool makes of the reference, or their values are
the reference's. *judged*: the bytes differ, and what differs looks like the type's rounding. *unexplained*: anything
else. A tensor that nothing of the reference explains was not compared.
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
    """One tensor's outcome; verify and lint decide on the same one."""

    name: str
    type: str
    compared: bool  # with the reference's values
    proof: str = ""  # how the tensor was proven: "from F16", "from BF16 with the imatrix", "dequantised from this file"
    rel_error: float | None = None  # ||dequantised - reference|| / ||reference||
    max_abs_error: float | None = None
    own_error: float | None = None  # relative error of the type's own quantiser on the same values
    roundings: float | None = None  # worst weight, float types
    blocks: int = 0
    blocks_differ: int = 0
    blocks_damaged: int = 0
    size: int = 0
    clipped: int = 0  # weights beyond F16's range
    flushed: int = 0  # weights that became zero
    non_finite: int = 0
    explanation: str = ""  # why other bytes are healthy: "by another build or machine"
    codes_nearest: bool | None = None  # whether every code is the nearest on the file's own scales; None: not asked
    open: str = ""  # why only the error of the layer's output can decide; "" where it need not
    nearest: tuple[Nearest, ...] = ()
    residual: Residual | None = None
    along: Direction | None = None  # of the change from the base, where the tensor was judged and the base is known
    findings: tuple[Finding, ...] = ()
    profile: Profile | None = None  # where its error sits; of a tensor with findings

    @property
    def equal(self) -> bool:
        """Every weight is what the type's own rounding or quantiser gives, or what the reference was made from."""
        return bool(self.proof) and not self.findings

    @property
    def drawer(self) -> Drawer:
        if self.findings or self.non_finite:
            return "unexplained"
        if not self.compared:
            return "not compared"
        return "proven" if self.proof else "judged"
