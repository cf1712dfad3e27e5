"""Blocks that fit worse than the quantiser's own: another build's ties are explained, flipped bits are not.

`contracted_ties.npz` holds blocks of SmolLM2-135M (weights in F16) whose squared error is 1.2 to 4.3 times that of this
build's blocks. They were written by llama.cpp b11434, compiled with -march=x86-64-v3 and GCC's default
-ffp-contract=fast, as compilers for arm64 do by default; this project's wheel is compiled without.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from verification.engines.quantise import quantised_bytes
from verification.gguf.reader import GGUFTensor
from verification.weight_parity import last_bits
from verification.weight_parity.neighbours import held_together
from verification.weight_parity.result import TensorResult
from verification.weight_parity.values import Start, Wanted, compared

RECORDED = Path(__file__).parents[1] / "data" / "contracted_ties.npz"
KINDS = ("Q4_K", "IQ4_NL")
ENOUGH = 30  # blocks a tensor: more than nine in ten are the own quantiser's


def ties(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, values) weights, and the other build's bytes (blocks, size)."""
    with np.load(RECORDED) as data:
        return data[f"{kind} weights"].astype(np.float32), data[f"{kind} blocks"]


def own_bytes(kind: str, W: np.ndarray) -> np.ndarray:
    raw = quantised_bytes(W, kind)
    assert raw is not None
    return raw.reshape(len(W), -1)


def errors(kind: str, W: np.ndarray, raw: np.ndarray) -> np.ndarray:
    """Squared errors, one block a row: (rows, 1)."""
    values = GGUFTensor("", W.shape, kind, np.ascontiguousarray(raw).reshape(-1)).values()
    return ((values.astype(np.float64) - W) ** 2).sum(axis=1, keepdims=True)


def flipped(kind: str, raw: np.ndarray) -> np.ndarray:
    """Every block with one high bit of one code turned; the codes are a block's last bytes."""
    changed = raw.copy()
    changed[:, -1] ^= 0x80
    return changed


@pytest.mark.parametrize("kind", KINDS)
def test_another_builds_ties_are_explained(kind: str) -> None:
    W, theirs = ties(kind)
    mine, other = errors(kind, W, own_bytes(kind, W)), errors(kind, W, theirs)
    assert len(W) >= 10
    assert (other > last_bits.WORSE * mine).all()
    assert (other / mine).max() > 2
    assert last_bits.unexplained(kind, W, W, other, mine) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_not_explained(kind: str) -> None:
    """Of the same blocks: those that turn worse than any answer of the quantiser, and those are nearly all."""
    W, _ = ties(kind)
    own = own_bytes(kind, W)
    mine, other = errors(kind, W, own), errors(kind, W, flipped(kind, own))
    worse = int((other > last_bits.WORSE * mine).sum())
    assert worse >= 0.8 * len(W)
    assert last_bits.unexplained(kind, W, W, other, mine) >= 0.9 * worse


def test_without_other_answers_a_tie_would_be_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the draws are for."""
    monkeypatch.setattr(last_bits, "DRAWS", 0)
    W, theirs = ties("Q4_K")
    found = last_bits.unexplained("Q4_K", W, W, errors("Q4_K", W, theirs), errors("Q4_K", W, own_bytes("Q4_K", W)))
    assert found == len(W)


def results(kind: str, damage: bool) -> list[TensorResult]:
    """A file of four tensors by another build: each has one tied block among equal ones, the last a flipped bit too."""
    tied, theirs = ties(kind)
    found = []
    for number in range(4):
        rng = np.random.default_rng(number)
        W = rng.standard_normal((ENOUGH, tied.shape[1])).astype(np.float16).astype(np.float32)
        W[0] = tied[number]
        raw = own_bytes(kind, W)
        raw[0] = theirs[number]
        if damage and number == 3:
            raw[5] = flipped(kind, raw[5:6])
        tensor = GGUFTensor(f"blk.{number}.ffn_up.weight", W.shape, kind, np.ascontiguousarray(raw).reshape(-1))
        found.append(compared(tensor, Wanted(W, lambda W=W: iter([Start("F16", W)]))).result)
    return held_together(found, ())


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_build_has_no_damage_and_a_flipped_bit_in_it_is_named(kind: str) -> None:
    assert [r.findings for r in results(kind, damage=False)] == [()] * 4
    *healthy, damaged = results(kind, damage=True)
    assert [r.findings for r in healthy] == [()] * 3
    assert damaged.findings[0].found == f"1 worse blocks of {ENOUGH}"


def test_each_row_is_asked_under_its_own_matrix() -> None:
    """An expert's rows have the expert's matrix: the own blocks under it are no worse than themselves."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((8, 256)).astype(np.float16).astype(np.float32)
    matrices = np.repeat(np.exp(2 * rng.standard_normal((2, 256))).astype(np.float32), 4, axis=0)
    made = np.concatenate([quantised_bytes(W[i : i + 4], "Q4_K", matrices[i]).reshape(4, -1) for i in (0, 4)])
    theirs = errors("Q4_K", W, made)
    mine = errors("Q4_K", W, own_bytes("Q4_K", W))  # without a matrix, the unweighted error is smaller
    assert (theirs > last_bits.WORSE * mine).sum() >= 6
    assert last_bits.unexplained("Q4_K", W, W, theirs, mine, matrices) == 0
    assert last_bits.unexplained("Q4_K", W, W, theirs, mine, matrices[::-1].copy()) > 0
