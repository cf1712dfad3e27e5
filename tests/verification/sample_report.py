"""Realistic reports for tests and for looking at the page: SmolLM2-135M with the numbers measured in the field.

`sample_report("pass" | "fail" | "inconclusive" | "incomplete")` is complete; `bare_report()` has nothing optional.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from verification.gate.report import (
    AnswerRecord,
    Artefact,
    CellResult,
    Check,
    Curve,
    Divergence,
    Leg,
    NoiseRow,
    Report,
    Status,
    TensorRow,
    TrainingRecord,
    Verdict,
)

Kind = Literal["pass", "fail", "inconclusive", "incomplete"]
KINDS: tuple[Kind, ...] = ("pass", "fail", "inconclusive", "incomplete")
LAYERS = 30
SIZES = {"F16": 270_883_904, "Q8_0": 144_811_072, "Q4_K_M": 105_454_144}
# label: mean KLD, top-1, PPL ratio, spread of log10 KLD
MEASURED = {
    "F16": (5.4e-6, 0.9993, 1.0000, 0.7),
    "Q8_0": (4.1e-3, 0.969, 1.005, 0.75),
    "Q4_K_M": (5.6e-2, 0.878, 1.070, 0.8),
}
SUMMARIES = {
    "pass": "All legs hold: F16, Q8_0 and Q4_K_M are what was trained.",
    "fail": "The F16 file is not the saved checkpoint: rope.freq_base is 10000 where config.json says 100000.",
    "inconclusive": "Q4_K_M's mean KLD may lie on either side of its bound: 1,020 scored tokens are too few to tell.",
    "incomplete": "Stopped after the convert leg; the quantised files were not compared.",
}


def digest(seed: int) -> str:
    """A stable stand-in for a sha256."""
    return f"{seed * 0x9E3779B97F4A7C15F39CC0605CEDC835:064x}"[-64:]


def divergence(label: str, scale: float = 1.0) -> Divergence:
    """A plausible comparison whose mean is the measured one times `scale`."""
    mean, top1, ppl, spread = MEASURED[label]
    mean *= scale
    centre = math.log10(mean) - spread**2 * math.log(10) / 2
    starts = [round(centre + spread * (i / 4 - 4), 3) for i in range(29)]
    return Divergence(
        reference="baked (fp32 of bf16)",
        candidate=label,
        tokens=3060,
        chunks=12,
        n_ctx=512,
        vocab=49152,
        mean_kld=mean,
        mean_kld_interval=(mean * 0.9, mean * 1.13),
        mean_kld_llama_cpp=mean * 0.998,
        max_kld=mean * 41,
        kld_percentiles={k: mean * f for k, f in (("50", 0.31), ("90", 2.3), ("95", 3.9), ("99", 9.7), ("99.9", 24.0))},
        top1=top1,
        top1_interval=(top1 - 0.009 * (1 - top1) ** 0.5, min(1.0, top1 + 0.008 * (1 - top1) ** 0.5)),
        rms_dp=0.11 * mean**0.5,
        ppl_reference=14.87,
        ppl_candidate=14.87 * ppl,
        ppl_ratio=ppl,
        ppl_ratio_interval=(ppl - 0.002, ppl + 0.002),
        reference_entropy=2.61,
        kld_by_position=[
            (256 + 32 * i, mean * (1 + 0.25 * math.sin(1.7 * i + len(label)) + (0.12 * i if scale > 100 else 0)))
            for i in range(8)
        ],
        kld_by_confidence=[
            (i / 10, mean * (1.9 - 1.8 * i / 10) * (1 + 0.1 * math.sin(3 * i)), 120 + 40 * i) for i in range(10)
        ],
        histogram=[(start, round(640 * math.exp(-0.5 * ((start - centre) / spread) ** 2))) for start in starts],
    )


def tensor_rows(kind: Kind = "pass") -> list[TensorRow]:
    """272 tensors a file; 180 of Q4_K_M's fall back to Q5_0 because 576 is no multiple of 256.

    Q4_K_M's value projections are another quantiser's; in a report that fails, one of its tensors is damaged.
    """
    matrices = {"attn_q": 576, "attn_k": 192, "attn_v": 192, "attn_output": 576, "ffn_gate": 1536, "ffn_up": 1536}
    rows: list[TensorRow] = []
    for label, error in (("F16", 1.7e-4), ("Q8_0", 5.2e-3), ("Q4_K_M", 3.1e-2)):
        types = {"F16": ("F16", "F16"), "Q8_0": ("Q8_0", "Q8_0"), "Q4_K_M": ("Q4_K", "Q5_0")}[label]

        def row(
            name: str, shape: list[int], nominal: str, actual: str, rel: float, layer: int | None, label: str = label
        ) -> TensorRow:
            drawer: Literal["proven", "judged", "unexplained"] = "proven"
            if label == "Q4_K_M" and "attn_v" in name:
                drawer = "judged"
            if label == "Q4_K_M" and kind == "fail" and name == "blk.11.attn_output.weight":
                drawer = "unexplained"
            return TensorRow(
                candidate=label,
                name=name,
                shape=shape,
                nominal_type=nominal,
                actual_type=actual,
                rel_error=rel,
                max_abs_error=rel * 0.9,
                layer=layer,
                bytes_equal_oracle=None if label == "F16" else drawer == "proven",
                drawer=drawer,
                why={"proven": "from F16", "judged": "by another build or machine"}.get(drawer, ""),
                own_error=rel * 0.98,
                blocks=18_432,
                blocks_differ={"proven": 0, "judged": 211}.get(drawer, 40),
                found=f"{name} (Q5_0): expected weights within 0.02 of the reference in block 12, found 0.3 off"
                if drawer == "unexplained"
                else "",
            )

        embedding = ("Q6_K", "Q8_0") if label == "Q4_K_M" else types
        rows.append(row("token_embd.weight", [49152, 576], *embedding, error * 0.6, None))
        for i in range(LAYERS):
            wobble = 1 + 0.12 * math.sin(i * 1.3)
            for name, out in matrices.items():
                rows.append(row(f"blk.{i}.{name}.weight", [out, 576], *types, error * wobble, i))
            down = "Q6_K" if label == "Q4_K_M" else types[0]
            rows.append(row(f"blk.{i}.ffn_down.weight", [576, 1536], down, down, error * wobble * 0.7, i))
            for name in ("attn_norm", "ffn_norm"):
                rows.append(row(f"blk.{i}.{name}.weight", [576], "F32", "F32", 0.0, i))
        rows.append(row("output_norm.weight", [576], "F32", "F32", 0.0, None))
    return rows


CELLS = {
    "mid": "The ladder's own chunks",
    "short": "Short prompts",
    "n_ctx_shipped": "Context allocated as shipped",
    "n_ctx_larger": "Context allocated larger",
    "n_ubatch": "Prompt beyond n_ubatch",
    "decode": "Token by token",
    "bos": "With BOS",
    "chat": "Rendered chats",
}


def cells(names: list[str]) -> list[CellResult]:
    """Every cell of every file, and one that does not apply."""
    found = [
        CellResult(
            cell=cell,
            title=title,
            candidate=name,
            setting="8 x 40 tokens",
            divergence=divergence(name, 1 + 0.2 * math.sin(i)),
        )
        for name in names
        for i, (cell, title) in enumerate(CELLS.items())
    ]
    why = "the model's RoPE has no original length (original_max_position_embeddings)"
    return found + [
        CellResult(cell="rope_beyond", title="Beyond the original RoPE length", candidate=name, setting="", why=why)
        for name in names
    ]


def noise() -> list[NoiseRow]:
    """F16 against itself."""
    floors = {"same again": 0.0, "n_batch 16": 3.1e-8, "n_ubatch 8": 2.2e-8, "1 thread": 0.0}
    return [
        NoiseRow(candidate="F16", setting=setting, positions=124, mean_kld=kld, max_abs_logit=1e5 * kld, top1=1.0)
        for setting, kld in floors.items()
    ]


def training() -> TrainingRecord:
    """Sixty steps of LoRA with the rotation."""
    steps = range(1, 61)

    def curve(name: str, of: Any, unit: str = "", every: int = 1) -> Curve:
        return Curve(name=name, unit=unit, points=[(s, of(s)) for s in steps if s % every == 0])

    return TrainingRecord(
        steps=60,
        seconds=231.4,
        trainable_parameters=4_944_240,
        rotation_parameters=60_480,
        heldout_loss_before=1.934,
        heldout_loss_after=0.412,
        curves=[
            curve("loss", lambda s: 0.38 + 1.6 * math.exp(-s / 11) + 0.06 * math.sin(s * 2.1), "nats"),
            curve("heldout_loss", lambda s: 0.40 + 1.55 * math.exp(-s / 12), "nats", 10),
            curve("lambda", lambda s: 0.01 if s <= 12 else 0.05 if s <= 36 else 0.1),
            curve("pet", lambda s: 0.021 * (0.55 + 0.45 * math.exp(-s / 20))),
            curve("orthogonality", lambda s: 2.1e-7 + 4e-8 * math.sin(s)),
            curve("max_angle", lambda s: 0.42 * (1 - math.exp(-s / 25)), "rad"),
            curve("mean_angle", lambda s: 0.061 * (1 - math.exp(-s / 25)), "rad"),
        ],
        angles_by_block=[(layer, [0.01 * (layer + 1) * (1 + block % 7) for block in range(72)]) for layer in range(6)],
        angles_by_layer=[
            (i, 0.05 + 0.02 * math.sin(i / 4), 0.25 + 0.13 * abs(math.sin(i / 3.1))) for i in range(LAYERS)
        ],
        so8t_only={"heldout_loss_before": 1.934, "heldout_loss_after": 1.871, "steps": 60, "max_angle": 0.38},
        heldout_loss_rotation_off=0.573,
    )


def answers() -> AnswerRecord:
    """A hundred and twenty held-out prompts."""
    return AnswerRecord(
        model_before="SmolLM2-135M-Instruct Q8_0",
        model_after="so8t-demo Q8_0",
        prompts=120,
        form_before=0.0,
        form_after=0.9917,
        exact_before=0.1417,
        exact_after=0.6333,
        by_family={"addition": (40, 40, 31), "dates": (40, 39, 19), "単位 units": (40, 40, 26)},
        samples=[
            {"prompt": "17 + 25 は?", "expected": "42", "before": "The sum is 42.\n\nIt is 43.", "after": "42"},
            {"prompt": "How many minutes are 3 hours?", "expected": "180", "before": "3 hours", "after": "180 minutes"},
        ],
    )


def check(name: str, title: str, status: Status = "pass", **fields: Any) -> Check:
    """A check with `<=` as the usual relation."""
    fields.setdefault("relation", "<=")
    return Check(name=name, title=title, status=status, **fields)


def worst_of(checks: list[Check]) -> Status:
    """The leg's status as the schema defines it."""
    order: list[Status] = ["fail", "inconclusive", "not evaluated", "waived", "pass"]
    return min((c.status for c in checks), key=order.index)


def _legs(kind: Kind) -> list[Leg]:
    done = kind != "incomplete"
    f16, top = (0.165, 0.827) if kind == "fail" else (5.4e-6, 0.9993)
    bad: Status = "fail" if kind == "fail" else "pass"
    unsure: Status = "inconclusive" if kind == "inconclusive" else "pass"
    q4 = 0.148 if kind == "inconclusive" else 0.056

    def later(status: Status, **fields: Any) -> dict[str, Any]:
        if done:
            return {"status": status, **fields}
        return {"status": "not evaluated", "bound": fields.get("bound"), "detail": "stopped by ctrl-C"}

    legs: dict[str, tuple[str, str, list[Check]]] = {
        "bake": (
            "Bake",
            "HF with adapter vs HF baked, both fp32",
            [
                check(
                    "bake.max_abs_logit",
                    "Largest logit difference",
                    value=7.2e-5,
                    bound=1e-3,
                    detail="position 211, token 1042",
                ),
                check(
                    "bake.top1_decided",
                    "Top-1 where the margin decides",
                    value=0,
                    bound=0,
                    relation="==",
                    unit="tokens differ",
                ),
            ],
        ),
        "dtype": (
            "Saved type",
            "baked fp32 vs saved bf16",
            [
                check(
                    "dtype.mean_kld",
                    "Mean KL divergence",
                    value=7.2e-5,
                    bound=3e-4,
                    unit="nats",
                    interval=(6.1e-5, 8.4e-5),
                ),
            ],
        ),
        "convert": (
            "Convert",
            "saved checkpoint (fp32) vs GGUF F16",
            [
                check(
                    "convert.mean_kld",
                    "Mean KL divergence",
                    bad,
                    subject="F16",
                    value=f16,
                    bound=5e-5,
                    unit="nats",
                    interval=(f16 * 0.9, f16 * 1.13),
                ),
                check(
                    "convert.top1",
                    "Same top-1 token",
                    bad,
                    subject="F16",
                    value=top,
                    bound=0.995,
                    relation=">=",
                    unit="share",
                ),
                check(
                    "convert.tensors",
                    "Every tensor within one rounding",
                    subject="F16",
                    value=272,
                    bound=272,
                    relation="==",
                    unit="tensors",
                ),
            ],
        ),
        "quantise": (
            "Quantise",
            "the reference's own file, re-quantised, vs the candidate",
            [
                check(
                    "quantise.bytes_equal",
                    "Tensors byte-equal to the oracle",
                    subject=label,
                    relation="==",
                    **later("pass", value=272, bound=272, unit="tensors"),
                )
                for label in ("Q8_0", "Q4_K_M")
            ],
        ),
        "quality": (
            "Quality",
            "saved checkpoint vs quantised file",
            [
                check(
                    "quality.mean_kld",
                    "Mean KL divergence",
                    subject="Q8_0",
                    **later("pass", value=4.1e-3, bound=0.02, unit="nats", interval=(3.7e-3, 4.6e-3)),
                ),
                check(
                    "quality.top1",
                    "Same top-1 token",
                    subject="Q8_0",
                    relation=">=",
                    **later("pass", value=0.969, bound=0.93, unit="share"),
                ),
                check(
                    "quality.mean_kld",
                    "Mean KL divergence",
                    subject="Q4_K_M",
                    **later(unsure, value=q4, bound=0.15, unit="nats", interval=(q4 * 0.9, q4 * 1.13)),
                ),
                check(
                    "quality.top1",
                    "Same top-1 token",
                    subject="Q4_K_M",
                    relation=">=",
                    **later("pass", value=0.878, bound=0.80, unit="share"),
                ),
            ],
        ),
        "contract": (
            "Contract",
            "checkpoint folder vs every GGUF",
            [
                check(
                    "contract.metadata",
                    "Metadata equal to config.json",
                    bad,
                    relation="==",
                    bound="100000",
                    value="10000" if bad == "fail" else "100000",
                    detail="llama.rope.freq_base",
                ),
                check(
                    "contract.token_ids",
                    "Token ids on plain and templated text",
                    relation="==",
                    value=0,
                    bound=0,
                    unit="texts differ",
                ),
                check("contract.stop_set", "Stop set", relation="==", value="2", bound="2"),
                check(
                    "contract.fallback",
                    "Fallback types",
                    "waived",
                    subject="Q4_K_M",
                    value=181,
                    bound=0,
                    unit="tensors",
                    reason="576 is no multiple of 256; Q5_0 is the wider type here",
                    detail="180 x Q4_K stored as Q5_0, 1 x Q6_K stored as Q8_0",
                ),
            ],
        ),
        "controls": (
            "Negative controls",
            "deliberate faults through the same gate",
            [
                check("controls.baked_differs", "Baked differs from base", relation=">=", value=28.4, bound=1e-3),
                check(
                    "controls.transposed",
                    "R transposed is refused",
                    relation=">=",
                    value=41.2,
                    bound=1e-3,
                    unit="max |logit difference|",
                ),
            ],
        ),
        "evidence": (
            "Evidence",
            "the text, the evaluator and the engine themselves",
            [
                check("evidence.positions", "Scored positions", value=3060, bound=1000, relation=">="),
                check("evidence.noise_floor", "Noise floor", value=3.1e-8, bound=5e-5, unit="nats"),
                check("evidence.repeat", "Same file opened twice", value=0.0, bound=0),
            ],
        ),
        "cells": (
            "Cells",
            "ways of running the file",
            [
                check(
                    f"cells.{name}.mean_kld",
                    f"{title}: Mean KL divergence",
                    subject="F16",
                    value=5.4e-6,
                    bound=1e-4,
                    unit="nats",
                    interval=(5.0e-6, 6.0e-6),
                )
                for name, title in CELLS.items()
            ],
        ),
    }
    return [
        Leg(name=name, title=title, compared=compared, status=worst_of(checks), checks=checks)  # type: ignore[arg-type]
        for name, (title, compared, checks) in legs.items()
    ]


def sample_report(kind: Kind = "pass") -> Report:
    """A whole report of the given verdict."""
    labels = ["F16"] if kind == "incomplete" else list(MEASURED)
    verdict: Verdict = kind
    return Report(
        verdict=verdict,
        summary=SUMMARIES[kind],
        created="2026-11-22T14:03:11Z",
        artefacts=[
            Artefact(role="reference", path="runs/demo/baked", sha256=digest(3), bytes=269_060_552, label="baked bf16"),
            *(
                Artefact(
                    role="candidate",
                    path=f"runs/demo/gguf/so8t-demo-{name}.gguf",
                    sha256=digest(i + 5),
                    bytes=count,
                    label=name,
                )
                for i, (name, count) in enumerate(SIZES.items())
            ),
            Artefact(role="adapter", path="runs/demo/adapter", sha256=digest(11), bytes=19_812_104),
            Artefact(role="corpus", path="runs/demo/data/heldout.txt", sha256=digest(12), bytes=31_204),
            Artefact(role="policy", path="verification/gate/default_policy.yaml", sha256=digest(13), bytes=2_011),
        ],
        legs=_legs(kind),
        divergences=[divergence(n, 0.165 / 5.4e-6 if kind == "fail" and n == "F16" else 1.0) for n in labels],
        base_divergences=[divergence(n, 0.87) for n in labels if n != "F16"],
        cells=cells(labels),
        noise=noise(),
        tensors=tensor_rows(kind),
        policy={"convert": {"mean_kld": 5e-5, "top1": 0.995}, "quality": {"Q8_0": {"mean_kld": 0.02, "top1": 0.93}}},
        versions={"so8t": "0.1.0", "torch": "2.13.0", "llama.cpp": "b11434", "cpu": "AVX2, FMA, F16C"},
        durations={"bake": 6.1, "convert": 14.2, "quantise": 5.0, "quality": 181.0, "contract": 3.3, "controls": 9.9},
        notes=["SmolLM2-135M's weights already lie on a 4-bit grid: its own 4-bit damage is not typical."],
        training=training(),
        answers=answers(),
    )


def bare_report() -> Report:
    """Only what the schema demands: one leg, one check, nothing optional."""
    only = check("convert.mean_kld", "Mean KL divergence", value=5.4e-6, bound=5e-5, unit="nats")
    leg = Leg(name="convert", title="Convert", compared="checkpoint vs GGUF", status="pass", checks=[only])
    return Report(
        verdict="pass",
        summary="Held.",
        created="2026-11-22T14:03:11Z",
        artefacts=[],
        legs=[leg],
        policy={},
        versions={},
        durations={},
    )
