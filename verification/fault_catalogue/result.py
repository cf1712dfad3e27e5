"""The self-test's data: one row a fault and strength, one a healthy file, and the whole answer.

`self_test.json` is `SelfTest`; the table and the page are drawn from it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = "1.0"
SEEN_ELSEWHERE = 0.97  # share of the faults at their real strength that must be refused in files made elsewhere
NAMED_RIGHT = 0.9  # share of the caught rows whose diagnosis must have the right class and place
Says = Literal["pass", "fail", "refused", "not run"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Row(_Model):
    """One fault at one strength."""

    fault: str
    kind: str
    pair: str
    level: str
    strength: str
    value: float | None
    real: bool  # the strength that people met
    identical: bool = False  # nothing is left of it: the file is the healthy one, bit by bit
    caught: bool
    caught_by: list[str] = Field(default_factory=list)
    margin: float | None = None  # measured value over its bound, where there is a scale
    margin_words: str = ""
    diagnosis: str = ""
    named_kind: str = ""
    named_where: str = ""
    named_right: bool | None = None  # None where nothing was caught
    nmse: float | None = None
    nmse_says: Says = "not run"
    kld: float | None = None  # of the file as Q4_K_M, or of itself where it is quantised
    kld_says: Says = "not run"
    own_kld: float | None = None  # the gate's own logit leg, where it was asked
    own_kld_says: Says = "not run"
    seconds: float = 0.0


class HealthyRow(_Model):
    """One healthy file."""

    pair: str
    level: str
    passed: bool
    alarms: list[str] = Field(default_factory=list)
    mean_kld: float | None = None
    bound: float | None = None
    nmse: float | None = None
    nmse_says: Says = "not run"
    entropy_share: float | None = None  # of the reference's mean entropy in ln V


class SelfTest(_Model):
    """The whole answer; `self_test.json` is this."""

    schema_version: str = SCHEMA_VERSION
    verdict: Literal["pass", "fail"]
    summary: str
    quick: bool
    model: str
    rows: list[Row]
    healthy: list[HealthyRow]
    missed: list[str]
    alarms: list[str]
    named_right: float
    versions: dict[str, str]
    seconds: float
