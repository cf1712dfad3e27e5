"""Blocks that fit worse than the quantiser's own: another build's ties are explained, flipped bits are not.

`contracted_ties.npz` holds weights of SmolLM2-135M (F16) and the blocks that llama.cpp b11434 made of them when
compiled with -march=x86-64-v3 and GCC's default -ffp-contract=fast, as compilers for arm64 do by default (this
project's wheel is compiled without): blocks with 1.2 to 5.4 times the squared error of this build's blocks.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from verification.engines.quantise import quantised_bytes
from verification.gguf.reader import GGUFTensor
from verification.weight_parity import last_bits
from verification.weight_parity.last_bits import damaged_blocks
from verification.weight_parity.neighbours import held_together
from verification.weight_parity.own_quantiser import log_normal
from verification.weight_parity.result import TensorResult
from verification.weight_parity.values import Start, Wanted, compared

RECORDED = Path(__file__).parents[1] / "data" / "contracted_ties.npz"
KINDS = ("Q4_K", "IQ4_NL")
ENOUGH = 30  # blocks a tensor: more than nine in ten are the own quantiser's


def recorded(name: str) -> np.ndarray:
    with np.load(RECORDED) as data:
        return data[name]


def ties(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(blocks, values) weights, and the other build's bytes (blocks, size)."""
    return recorded(f"{kind} weights").astype(np.float32), recorded(f"{kind} blocks")


def own_bytes(kind: str, W: np.ndarray, matrix: np.ndarray | None = None) -> np.ndarray:
    raw = quantised_bytes(W, kind, matrix)
    assert raw is not None
    return raw.reshape(len(W), -1)


def tensor(kind: str, W: np.ndarray, raw: np.ndarray) -> GGUFTensor:
    return GGUFTensor("", W.shape, kind, np.ascontiguousarray(raw).reshape(-1))


def worse(kind: str, W: np.ndarray, raw: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Squared error of each row of one block over the own quantiser's, (rows,)."""
    theirs, mine = (((tensor(kind, W, x).values().astype(np.float64) - W) ** 2).sum(axis=1) for x in (raw, own))
    return theirs / mine


def damaged(kind: str, W: np.ndarray, raw: np.ndarray, matrices: np.ndarray | None = None, each: int = 1) -> int:
    """Damaged blocks of a tensor with `each` blocks a row."""
    own = own_bytes(kind, W) if matrices is None else own_bytes(kind, W, matrices[0])
    asked = (raw.reshape(len(W) * each, -1) != own.reshape(len(W) * each, -1)).any(axis=1)
    file = tensor(kind, W, raw)
    return damaged_blocks(file, file.values(), tensor(kind, W, own).values(), W, W, asked, matrices)


def flipped(raw: np.ndarray) -> np.ndarray:
    """Every row with the highest bit of its last code turned; the codes are a block's last bytes."""
    changed = raw.copy()
    changed[:, -1] ^= 0x80
    return changed


@pytest.mark.parametrize("kind", KINDS)
def test_another_builds_ties_are_no_damage(kind: str) -> None:
    W, theirs = ties(kind)
    ratio = worse(kind, W, theirs, own_bytes(kind, W))
    assert len(W) >= 10
    assert ratio.min() > last_bits.WORSE
    assert ratio.max() > 2
    assert damaged(kind, W, theirs) == 0


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_another_builds_ties_under_a_matrix_are_no_damage(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    W, theirs = recorded(f"{kind}+imatrix weights").astype(np.float32), recorded(f"{kind}+imatrix rows")
    matrices = np.tile(log_normal(W.shape[1], 2.0, 6), (len(W), 1))
    each = W.shape[1] // 32
    assert damaged(kind, W, theirs, matrices, each) == 0
    monkeypatch.setattr(last_bits, "WORSE_AFTER_FIT", last_bits.WORSE)
    monkeypatch.setattr(last_bits, "DRAWS", 0)
    monkeypatch.setattr(last_bits, "nearest_values", lambda *_: None)
    assert damaged(kind, W, theirs, matrices, each) >= 9


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_damage(kind: str) -> None:
    """Of the same blocks: all that it makes worse, but for a few whose two scales make it a tie."""
    W, _ = ties(kind)
    own = own_bytes(kind, W)
    count = int((worse(kind, W, flipped(own), own) > last_bits.WORSE).sum())
    assert count >= 0.8 * len(W)
    assert damaged(kind, W, flipped(own)) >= 0.9 * count


@pytest.mark.parametrize("lost", ["ties", "scale"])
def test_each_explanation_is_needed(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ties only the scale can explain a block, and the reverse: some are then called damaged."""
    monkeypatch.setattr(last_bits, *(("DRAWS", 0) if lost == "ties" else ("nearest_values", lambda *_: None)))
    monkeypatch.setattr(last_bits, "WORSE_AFTER_FIT", last_bits.WORSE)
    W, theirs = recorded("Q5_1+imatrix weights").astype(np.float32), recorded("Q5_1+imatrix rows")
    matrices = np.tile(log_normal(W.shape[1], 2.0, 6), (len(W), 1))
    assert damaged("Q5_1", W, theirs, matrices, W.shape[1] // 32) > 2


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
            raw[5] = flipped(raw[5:6])
        found.append(compared(tensor(kind, W, raw), Wanted(W, lambda W=W: iter([Start("F16", W)]))).result)
    return held_together(found, ())


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_build_has_no_damage_and_a_flipped_bit_in_it_is_named(kind: str) -> None:
    assert [r.findings for r in results(kind, damage=False)] == [()] * 4
    *healthy, last = results(kind, damage=True)
    assert [r.findings for r in healthy] == [()] * 3
    assert last.findings[0].found == f"1 worse blocks of {ENOUGH}"


def test_each_row_is_asked_under_its_own_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert's rows have the expert's matrix: under it the answers are as bad as the file's blocks."""
    monkeypatch.setattr(last_bits, "nearest_values", lambda *_: None)
    rng = np.random.default_rng(0)
    W = rng.standard_normal((8, 256)).astype(np.float16).astype(np.float32)
    matrices = np.repeat(np.exp(2 * rng.standard_normal((2, 256))).astype(np.float32), 4, axis=0)
    file = tensor("Q4_K", W, np.concatenate([own_bytes("Q4_K", W[i : i + 4], matrices[i]) for i in (0, 4)]))
    mine = tensor("Q4_K", W, own_bytes("Q4_K", W)).values()
    asked = np.ones(8, dtype=np.bool_)
    assert damaged_blocks(file, file.values(), mine, W, W, asked, matrices) == 0
    assert damaged_blocks(file, file.values(), mine, W, W, asked, matrices[::-1].copy()) > 0
