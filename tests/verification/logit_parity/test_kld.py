"""llama.cpp's base files: what is written is read, what the tool prints is printed, what is damaged is refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_gguf import CHUNKS, N_CTX, VOCAB, token_chunks, write_tiny
from verification_models import Family

from pipeline.cli.main import main
from so8t_core.errors import InputError
from verification.engines.llama_logits import LlamaLogits
from verification.logit_parity.kl import divergence
from verification.logit_parity.llama_cpp_commands import candidate_statistics, write_base_of
from verification.logit_parity.llama_cpp_file import encode, read_base, row_width, write_base
from verification.logit_parity.llama_cpp_statistics import KldTotals, statistics

RECORDED = Path(__file__).parents[1] / "data" / "kld"
SCRIPT = Path(__file__).parents[3] / "scripts" / "compare_with_llama_perplexity.py"


def recorded() -> dict[str, str]:
    return dict(json.loads((RECORDED / "recorded.json").read_text(encoding="utf-8")))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def candidate_logits() -> list[np.ndarray]:
    return list(np.load(RECORDED / "candidate_logits.npy"))


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_the_statistics_agree_with_the_real_tools_printed_digits() -> None:
    """A recorded run of llama-perplexity: same base file, same model, same tokens, every line the same."""
    assert digest(RECORDED / "base.kld") == recorded()["base"]
    assert digest(RECORDED / "candidate_logits.npy") == recorded()["candidate_logits"]
    ours = statistics(read_base(RECORDED / "base.kld"), candidate_logits())
    assert lines(ours.text) == lines((RECORDED / "printed.txt").read_text(encoding="utf-8"))


@pytest.mark.parametrize("fault", ["one position", "one logit in one position", "chunks swapped", "candidate is base"])
def test_a_planted_fault_changes_the_printed_digits(fault: str) -> None:
    logits = candidate_logits()
    if fault == "one position":
        logits = [np.roll(chunk, 1, axis=0) for chunk in logits]
    elif fault == "one logit in one position":
        logits[2][7, logits[2][7].argmax()] += 0.01
    elif fault == "chunks swapped":
        logits[0], logits[1] = logits[1], logits[0]
    else:
        logits = [read_base(RECORDED / "base.kld").log_probs(i) for i in range(CHUNKS)]
    ours = statistics(read_base(RECORDED / "base.kld"), logits)
    assert lines(ours.text) != lines((RECORDED / "printed.txt").read_text(encoding="utf-8"))


def test_the_recorded_run_can_be_made_again_here(tmp_path: Path) -> None:
    """The models are integer arithmetic and come out byte-equal; their logits agree to float32's rounding."""
    reference, candidate = write_tiny(tmp_path / "r.gguf"), write_tiny(tmp_path / "c.gguf", nudge=0.5)
    assert digest(reference) == recorded()["reference_gguf"]
    assert digest(candidate) == recorded()["candidate_gguf"]
    with LlamaLogits(candidate, n_ctx=N_CTX) as engine:
        here = [engine.chunk(tokens) for tokens in token_chunks()]
    # F32 weights and an F16 cache: sums of at most 64 terms in another order, 64 * 2^-24 * 12 = 5e-5, cache 5e-4
    assert max(np.abs(a - b).max() for a, b in zip(here, candidate_logits(), strict=True)) < 2e-3
    ours = candidate_statistics(RECORDED / "base.kld", candidate)
    recorded_kld = statistics(read_base(RECORDED / "base.kld"), candidate_logits()).values["Mean    KLD"][0]
    assert ours.values["Mean    KLD"][0] == pytest.approx(recorded_kld, rel=1e-3)


def test_the_mean_agrees_with_the_verifiers_own_divergence() -> None:
    """Two implementations: float64 over exact logits, and the tool's float32 over codes of 16/65535 nats a step."""
    base = read_base(RECORDED / "base.kld")
    exact = divergence(
        (base.log_probs(i) for i in range(CHUNKS)), candidate_logits(), [t.astype(np.int64) for t in base.tokens]
    )
    ours = statistics(base, candidate_logits()).values
    assert ours["Mean    KLD"][0] == pytest.approx(exact.mean_kld_llama_cpp, abs=3e-4)  # the codes do not sum to one
    assert ours["Same top p"][0] == pytest.approx(100 * exact.top1)


@pytest.mark.parametrize("vocab", [64, 65])
def test_what_is_written_is_read_within_half_a_step(tmp_path: Path, vocab: int) -> None:
    rng = np.random.default_rng(0)
    chunks = [rng.normal(0, 4, (31, vocab)).astype(np.float32) for _ in range(3)]
    chunks[1][4] = 2.5  # all logits equal: scale 0
    tokens = [rng.integers(0, vocab, 64) for _ in range(3)]
    base = read_base(write_base(tmp_path / "b.kld", tokens, iter(chunks), vocab=vocab), vocab=vocab)
    assert np.array_equal(base.tokens, np.stack(tokens))
    for number, logits in enumerate(chunks):
        x = logits.astype(np.float64)
        log_p = x - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True)) - x.max(1, keepdims=True)
        kept = x > x.max(1, keepdims=True) - 16
        error = np.abs(base.log_probs(number) - log_p)
        assert error[kept].max() < 0.5 * 16 / 65535 + 2e-6  # half a step and a few float32 roundings of log p <= 20
        assert (base.log_probs(number)[~kept] <= log_p.max() - 16 + 1e-3).all()


def test_a_row_is_the_documented_bytes() -> None:
    """Golden: logits 0, 8, 16 span the whole scale; an odd vocabulary pads one code."""
    row = encode(np.array([[0.0, 8.0, 16.0]], dtype=np.float32))[0]
    assert len(row) == row_width(3) == 8
    scale, low = struct.unpack("<2f", row[:4].tobytes())
    assert scale == np.float32(16) / np.float32(65535)
    assert low == pytest.approx(-16 - np.log1p(np.exp(-8) + np.exp(-16)), abs=2e-6)
    assert row[4:].tolist() == [0, 32768, 65535, 0]


def damaged(tmp_path: Path, change: str) -> Path:
    data = bytearray((RECORDED / "base.kld").read_bytes())
    path = tmp_path / "b.kld"
    if change == "missing":
        return path
    cut = {"empty": 0, "magic": 5, "header": 15, "tokens": 700, "rows": len(data) - 1, "last chunk": len(data) - 4340}
    if change in cut:
        data = data[: cut[change]]
    elif change == "longer":
        data += b"\0"
    elif change == "vocabulary":
        data[12:16] = struct.pack("<i", VOCAB + 1)
    elif change == "negative":
        data[16:20] = struct.pack("<i", -3)
    elif change == "token":
        data[20:24] = struct.pack("<i", VOCAB)
    else:
        data[:8] = b"GGUF\0\0\0\0"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "does not exist"),
        ("empty", "no base file"),
        ("magic", "no base file"),
        ("header", "truncated"),
        ("tokens", r"truncated.*23000 bytes, the file has 700"),
        ("rows", "truncated"),
        ("last chunk", "truncated"),
        ("longer", "bytes too many"),
        ("vocabulary", "vocabulary of 66, the candidate has 65"),
        ("negative", "damaged"),
        ("token", "token ids outside"),
        ("other format", "no base file"),
    ],
)
def test_a_damaged_base_file_is_refused(tmp_path: Path, change: str, message: str) -> None:
    """The stock tool exits 0 on each of these."""
    with pytest.raises(InputError, match=message):
        read_base(damaged(tmp_path, change), vocab=VOCAB)


def so8t(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["so8t", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_the_verb_exits_2_where_the_stock_tool_exits_0(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    candidate = write_tiny(tmp_path / "c.gguf", nudge=0.5)
    for change in ("missing", "rows", "vocabulary"):
        assert so8t(monkeypatch, "kld", damaged(tmp_path, change), "--candidate", candidate) == 2
        assert "so8t: base file" in capsys.readouterr().err
    assert so8t(monkeypatch, "kld", RECORDED / "base.kld", "--candidate", candidate, "-q") == 0
    assert "Same top p:" in capsys.readouterr().out


def test_another_vocabulary_is_refused(tmp_path: Path, family: Family) -> None:
    with pytest.raises(InputError, match=f"vocabulary of 65, the candidate has {family.vocab}"):
        candidate_statistics(RECORDED / "base.kld", family.files["F16"])


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    base, logits = read_base(RECORDED / "base.kld"), candidate_logits()
    with pytest.raises(InputError, match="4 chunks of logits came for the 5"):
        statistics(base, logits[:-1])
    with pytest.raises(InputError, match="more chunks"):
        statistics(base, [*logits, logits[0]])
    with pytest.raises(InputError, match="shape"):
        statistics(base, [chunk[:, :-1] for chunk in logits])
    logits[1][3, 5] = np.nan
    with pytest.raises(InputError, match="NaN or infinite"):
        statistics(base, logits)
    few = KldTotals(VOCAB)
    few.add(base.log_probs(0), candidate_logits()[0], base.tokens[0][N_CTX // 2 + 1 :])
    with pytest.raises(InputError, match="31 scored tokens are too few"):
        few.result()
    chunks = [np.zeros((31, 8), dtype=np.float32)]
    tokens = [np.zeros(64, dtype=np.int64)] * 2
    with pytest.raises(InputError, match="1 chunks of logits came for 2"):
        write_base(tmp_path / "x.kld", tokens, chunks, vocab=8)
    with pytest.raises(InputError, match="shape"):
        write_base(tmp_path / "x.kld", tokens, [chunks[0][1:]] * 2, vocab=8)
    with pytest.raises(InputError, match="NaN"):
        write_base(tmp_path / "x.kld", tokens, [chunks[0] + np.inf] * 2, vocab=8)
    assert list(tmp_path.iterdir()) == []


def test_a_base_from_the_checkpoint_shows_the_conversion_as_harmless(family: Family, tmp_path: Path) -> None:
    """HF fp32 logits as base: the F16 file is near it, the Q4_K_M file is not."""
    text = write_base_of(family.reference, tmp_path / "b.kld", chunks=4, n_ctx=64)
    assert np.array_equal(read_base(tmp_path / "b.kld", vocab=family.vocab).tokens, np.stack(text.chunks))
    near = candidate_statistics(tmp_path / "b.kld", family.files["F16"]).values
    far = candidate_statistics(tmp_path / "b.kld", family.files["Q4_K_M"]).values
    assert abs(near["Mean    KLD"][0]) < 1e-3 < 0.05 < far["Mean    KLD"][0]


def test_threads_change_no_digit() -> None:
    """Of SmolLM2's vocabulary ten positions are a block, so that 300 of them are really shared out."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (300, 49152)).astype(np.float32)
    base = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    other, targets = (logits + random.normal(0, 0.1, logits.shape)).astype(np.float32), random.integers(0, 49152, 300)
    texts = []
    for threads in (1, 2, 5):
        totals = KldTotals(49152, threads)
        totals.add(base, other, targets)
        texts.append(totals.result())
    assert texts[0] == texts[1] == texts[2]
    assert texts[0].tokens == 300


def test_the_race_of_the_two_commands_tells_who_is_slower() -> None:
    race = runpy.run_path(str(SCRIPT))["race"]
    wait = [[sys.executable, "-c", f"import time; time.sleep({seconds})"] for seconds in (0, 1)]
    assert re.search(r": 0\.\d\dx its time \[0\.\d\d, 0\.\d\d\] in 2 rounds$", race(wait[0], wait[1], 2))
    assert re.search(r": [1-9]\d*\.\d\dx its time", race(wait[1], wait[0], 1))
    with pytest.raises(subprocess.CalledProcessError):
        race(wait[0], [sys.executable, "-c", "raise SystemExit(3)"], 1)


@pytest.mark.skipif("SO8T_LLAMA_PERPLEXITY" not in os.environ, reason="SO8T_LLAMA_PERPLEXITY names no real binary")
def test_the_real_tool_prints_the_same_here(tmp_path: Path) -> None:
    candidate = write_tiny(tmp_path / "c.gguf", nudge=0.5)
    command = [sys.executable, str(SCRIPT), "--binary", os.environ["SO8T_LLAMA_PERPLEXITY"]]
    command += ["--candidate", str(candidate), "--base", str(RECORDED / "base.kld")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
