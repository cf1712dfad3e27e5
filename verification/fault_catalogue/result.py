"""The self-test's data: one row for each fault and strength, one for each healthy file, and the whole result.

`self_test.json` is `SelfTest`; the table and the page are made from it.
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
    identical: bool = False  # the file equals the healthy one, bit by bit
    caught: bool
    caught_by: list[str] = Field(default_factory=list)
    margin: float | None = None  # measured value divided by its bound, if both exist
    margin_words: str = ""
    diagnosis: str = ""
    named_kind: str = ""
    named_where: str = ""
    named_right: bool | None = None  # None if the fault was not caught
    nmse: float | None = None
    nmse_says: Says = "not run"
    kld: float | None = None  # of the file as Q4_K_M, or of the file itself if it is quantised
    kld_says: Says = "not run"
    own_kld: float | None = None  # KLD in the gate's logit leg, if that was run
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
    entropy_share: float | None = None  # the reference's mean entropy, divided by ln V


class SelfTest(_Model):
    """The whole result, stored as `self_test.json`."""

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
