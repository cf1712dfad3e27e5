"""The report's data model: the measured values, their bounds, and the decision.

`report.json` is this model and the source of every other form (HTML, Markdown, JUnit). A check passes only if it was
evaluated and kept its bound. A leg takes the worst status of its checks; waived and passed checks together are a pass.
The verdict takes the worst status of the legs.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

# Added in 1.1: legs `evidence` and `cells`, fields `cells` and `noise`; in 1.2: `trained_function`; in 1.3: check
# `quantise.unexplained`, tensors' `drawer`, `why` and `own_error`, checks' `code` and `where`; in 1.4: artefacts'
# `type`, the role `reference_file` of an input, tensors' `blocks`, `blocks_differ` and `found`; in 1.5: checks
# `quantise.codes_error` and `quantise.kld_ratio`, tensors' `rows` and `columns`
SCHEMA_VERSION = "1.5"

Status = Literal["pass", "fail", "inconclusive", "not evaluated", "waived"]
Verdict = Literal["pass", "fail", "inconclusive", "incomplete"]
LegName = Literal["bake", "dtype", "convert", "quantise", "quality", "contract", "controls", "evidence", "cells"]
Relation = Literal["<=", ">=", "==", "!="]
NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # words, because JSON has no such numbers


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Artefact(_Model):
    """One input of the verification, bound to its bytes."""

    role: Literal["reference", "reference_file", "candidate", "base", "adapter", "corpus", "policy", "imatrix"]
    path: str
    # digest of the file; for a directory, of the sorted list of (name, sha256) of its files
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    label: str = ""  # short name used in tables and plots, e.g. "Q4_K_M (my-model.gguf)"
    type: str = ""  # a candidate's file type, "Q4_K_M"; it chooses the checks and bounds

    @model_validator(mode="after")
    def _type_of_old_reports(self) -> Artefact:
        """Take the type from the label: before schema 1.4 the label began with the type."""
        if self.role == "candidate" and not self.type:
            self.type = self.label.split(" ")[0]
        return self


class Check(_Model):
    """One measured value and the bound that it is compared with."""

    name: str  # stable dotted id, e.g. "convert.mean_kld"
    title: str  # for people, e.g. "Mean KL divergence"
    subject: str = ""  # candidate label ("Q8_0"), or "" when the check is about the reference
    status: Status
    value: float | int | str | None = None
    bound: float | int | str | None = None
    relation: Relation | None = None
    interval: tuple[float, float] | None = None  # 95 % interval of the value, if there is one
    unit: str = ""
    detail: str = ""  # one sentence: the tensor, the token, the diagnosis, or why it was not evaluated
    code: str = ""  # the recognised kind of fault, for programs: "flipped_bit"; see `contract.finding`
    where: str = ""  # the tensor, key or token that the check names first
    reason: str = ""  # why the check was waived

    @field_validator("value", "bound", "interval", mode="before")
    @classmethod
    def _numbers(cls, given: Any) -> Any:
        """Refuse `true` as a number; an end of an interval may be a word in `NOT_FINITE`, but no other text."""
        ends = given if isinstance(given, list | tuple) else []
        if any(isinstance(number, bool) for number in (given, *ends)):
            raise ValueError("true and false are no numbers")
        if any(isinstance(end, str) and end not in NOT_FINITE for end in ends):
            raise ValueError("a text is no number")
        return given


class Leg(_Model):
    """One step of the ladder from the trained model to the shipped file."""

    name: LegName
    title: str
    compared: str  # "saved checkpoint (fp32) vs GGUF F16"
    status: Status
    checks: list[Check]


class Divergence(_Model):
    """Statistics of one comparison of two logit streams over the same tokens."""

    reference: str
    candidate: str
    tokens: int  # scored positions
    chunks: int
    n_ctx: int
    vocab: int
    mean_kld: float  # nats, full support, float64
    mean_kld_interval: tuple[float, float]  # 95 %, chunk-clustered bootstrap
    mean_kld_llama_cpp: float  # with llama.cpp's cut at logp_base > -16
    max_kld: float
    kld_percentiles: dict[str, float]  # "50", "90", "95", "99", "99.9"
    top1: float  # share of equal argmax, 0..1
    top1_interval: tuple[float, float]
    rms_dp: float  # root mean square of p_cand - p_ref of the corpus token, 0..1
    ppl_reference: float
    ppl_candidate: float
    ppl_ratio: float
    ppl_ratio_interval: tuple[float, float]
    reference_entropy: float  # mean, nats
    kld_by_position: list[tuple[int, float]]  # (first position of a bucket in its chunk, mean KLD)
    kld_by_confidence: list[tuple[float, float, int]]  # (reference top-1 probability bucket start, mean KLD, count)
    histogram: list[tuple[float, int]]  # (log10 KLD bucket start, count)
    non_finite: int = 0  # scored positions with a NaN or Inf logit on either side; left out of every mean


class CellResult(_Model):
    """One candidate in one way of running it: a length, an allocated context, a batch size, decoding, BOS, a chat."""

    cell: str  # "short", "n_ctx_shipped", "decode", ...
    title: str
    candidate: str
    setting: str  # the special setting in words: "allocated n_ctx 4096"
    why: str = ""  # why the cell does not apply; empty if it was measured
    divergence: Divergence | None = None  # against the reference on the same tokens


class NoiseRow(_Model):
    """One file compared with itself, run another way: the divergence that llama.cpp's arithmetic alone causes."""

    candidate: str
    setting: str  # "same again", "n_batch 16", "1 thread"
    positions: int
    mean_kld: float
    max_abs_logit: float
    top1: float


class TensorRow(_Model):
    """One tensor of a candidate file against the reference."""

    candidate: str
    name: str
    shape: list[int]
    nominal_type: str  # the type that the file type promises
    actual_type: str
    rel_error: float | None = None  # ||dequantised - reference|| / ||reference||
    max_abs_error: float | None = None
    bytes_equal_oracle: bool | None = None
    layer: int | None = None
    drawer: Literal["proven", "judged", "unexplained", "not compared"] | None = None  # None before schema 1.3
    why: str = ""  # how the tensor was proven equal, or why its different bytes are healthy
    own_error: float | None = None  # rel_error of llama.cpp's quantiser at this type
    blocks: int = Field(default=0, ge=0)  # number of blocks (float types: weights); 0 if not counted
    blocks_differ: int = Field(default=0, ge=0)  # blocks whose bytes differ from llama.cpp's quantiser's
    found: str = ""  # the first fault in words, with its place in the tensor
    rows: list[float] = Field(default_factory=list, max_length=32)  # relative errors of groups of rows,
    columns: list[float] = Field(default_factory=list, max_length=32)  # of columns; only of a tensor with a fault


# `why` of a tensor that `quantise.output_error` decides, and of a tensor that `quantise.codes_error` decides too
BY_OUTPUT = "by the error of its layer's output"
BY_CODES = "by the error of its layer's output: not the nearest codes"


class TrainedFunction(_Model):
    """The trained model compared with the shipped checkpoint, if training quantised the base; information only."""

    quantization: Literal["8bit", "4bit"]
    weight_error: float  # ||quantised - original|| / ||original|| over all quantised weights of the base
    weights: int  # number of quantised tensors
    divergence: Divergence  # quantised base + adapter as reference, the saved checkpoint as candidate


class Report(_Model):
    """Every value that a decision needs; `so8t gate` decides again from this file alone."""

    schema_version: str = SCHEMA_VERSION
    verdict: Verdict
    summary: str  # one sentence a person can act on
    created: str  # ISO 8601, UTC
    artefacts: list[Artefact]
    legs: list[Leg]
    divergences: list[Divergence] = Field(default_factory=list)
    base_divergences: list[Divergence] = Field(default_factory=list)  # damage of the quantised base, information
    cells: list[CellResult] = Field(default_factory=list)
    noise: list[NoiseRow] = Field(default_factory=list)
    tensors: list[TensorRow] = Field(default_factory=list)
    trained_function: TrainedFunction | None = None
    policy: dict[str, Any]
    tokens_sha256: str = ""  # digest of the scored ids as int32, chunk after chunk
    versions: dict[str, str]
    durations: dict[str, float]  # seconds per stage
    notes: list[str] = Field(default_factory=list)  # limits that readers must know (e.g. the base lies on a 4-bit grid)
    training: TrainingRecord | None = None
    answers: AnswerRecord | None = None

    @model_validator(mode="after")
    def _labels(self) -> Report:
        """Refuse two files with one label: they would share their checks, and one file would not be verified."""
        labels = [artefact.label for artefact in self.artefacts if artefact.role == "candidate"]
        if "" in labels or len(set(labels)) < len(labels):
            raise ValueError(f"every candidate needs a label of its own, found {labels[:20]}")
        return self


class Curve(_Model):
    """One curve of the training."""

    name: str  # "loss", "heldout_loss", "lambda", "pet", "orthogonality", "max_angle", "mean_angle", "learning_rate"
    unit: str = ""
    points: list[tuple[int, float]]  # (optimiser step, value)


class TrainingRecord(_Model):
    """The record of a training, for the report's curves."""

    steps: int
    seconds: float
    trainable_parameters: int
    rotation_parameters: int
    heldout_loss_before: float
    heldout_loss_after: float
    curves: list[Curve]
    angles_by_layer: list[tuple[int, float, float]] = Field(
        default_factory=list
    )  # layer, mean |angle|, max |angle|, rad
    angles_by_block: list[tuple[int, list[float]]] = Field(default_factory=list)  # layer, largest angle of a block, rad
    so8t_only: dict[str, float] | None = None  # only the rotation trained: heldout_loss_before/after, steps, max_angle
    heldout_loss_rotation_off: float | None = None  # trained adapter, rotation replaced by the identity


class AnswerRecord(_Model):
    """Held-out prompts answered by the shipped file, before and after training."""

    model_before: str
    model_after: str
    prompts: int
    form_before: float  # share in /think form
    form_after: float
    exact_before: float  # share with exactly the right answer
    exact_after: float
    by_family: dict[str, tuple[int, int, int]] = Field(default_factory=dict)  # family: prompts, in form, exact (after)
    samples: list[dict[str, str]] = Field(default_factory=list)  # prompt, expected, before, after


Report.model_rebuild()
