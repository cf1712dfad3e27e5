"""Memory does not grow with the length: logits on disk, sums in memory; and what is read back is what was written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from verification_models import Family

import verification.logit_parity.logit_store as spool_module
from so8t_core.errors import InputError
from verification.engines.huggingface import hf_chunk, hf_rows, load_hf
from verification.logit_parity.logit_store import LogitSpool

GIB = 2**30
STREAM = """
import json, sys
from pathlib import Path
import numpy as np
from verification.logit_parity.kl import DivergenceAccumulator
from verification.logit_parity.logit_store import LogitSpool

vocab, rows, chunks, keep = 262144, 32, int(sys.argv[1]), sys.argv[2] == "keep"
rng, kept = np.random.default_rng(0), []
base = rng.standard_normal((rows, vocab), dtype=np.float32)  # drawn once and rolled: drawing is what would take long
noise = 0.1 * rng.standard_normal((rows, vocab), dtype=np.float32)
total = DivergenceAccumulator(reference="r", candidate="c", n_ctx=rows + 1, vocab=vocab)
with LogitSpool(Path(sys.argv[3]), rows=rows * chunks, vocab=vocab) as spool:
    for chunk in range(chunks):
        spool.append(np.roll(base, chunk, axis=1))
    for chunk in range(chunks):
        own = spool.read(rows * chunk, rows * (chunk + 1))
        other = own + np.roll(noise, 7 * chunk, axis=1)
        total.begin_chunk()
        total.add(own, other, np.arange(rows), first_position=0)
        if keep:
            kept.append(other)
d = total.result()
# not ru_maxrss: it survives exec, and would be the peak of the process that started this one
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([int(peak.split()[1]) * 1024, d.tokens, d.mean_kld]))
"""


def peak_of(chunks: int, directory: Path, *, keep: bool = False) -> tuple[int, int, float]:
    command = [sys.executable, "-c", STREAM, str(chunks), "keep" if keep else "stream", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    peak, tokens, kld = json.loads(done.stdout.splitlines()[-1])
    return peak, tokens, kld


@pytest.mark.timeout(600)
def test_a_vocabulary_of_262144_stays_under_4_gib_whatever_the_length(tmp_path: Path) -> None:
    """One chunk of logits is 32 MiB; 16 chunks kept whole would be half a GiB on each side."""
    short, long = peak_of(4, tmp_path), peak_of(16, tmp_path)
    assert (short[1], long[1]) == (128, 512)
    assert long[2] == pytest.approx(0.005, rel=0.05)  # sigma^2 / 2 for weak Gaussian noise
    assert long[0] < 2 * GIB
    assert long[0] - short[0] < 0.1 * GIB
    assert peak_of(16, tmp_path, keep=True)[0] - short[0] > 0.25 * GIB  # the planted fault shows


def test_rows_come_back_bit_equal_in_any_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((n, 100), dtype=np.float32) for n in (3, 1, 7)]
    parts[1][0, 5] = np.nan
    with LogitSpool(tmp_path, rows=11, vocab=100) as spool:
        for part in parts:
            spool.append(part)
        assert np.array_equal(spool.read(4, 11), parts[2])
        assert np.array_equal(spool.read(0, 11), np.concatenate(parts), equal_nan=True)
        with pytest.raises(IndexError):
            spool.read(4, 12)
        with pytest.raises(InputError, match="99 logits a token, then 100"):
            spool.append(parts[0][:, :99])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_before_it_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(InputError, match=r"need 1\.5 GiB in .*0\.9 GiB free; set TMPDIR"):
        LogitSpool(tmp_path, rows=8000, vocab=50000)


def test_long_chunks_come_in_pieces_that_equal_the_whole(family: Family) -> None:
    """The body runs once and the head once a piece: the same logits, up to the order of fp32 sums in the head."""
    model = load_hf(family.reference)
    tokens = np.random.default_rng(1).integers(100, family.vocab, 64)
    calls: list[int] = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    whole = hf_chunk(model, tokens)
    pieces = list(hf_rows(model, tokens, piece=10 * family.vocab))
    handle.remove()
    assert [len(piece) for piece in pieces] == [10, 10, 10, 1]
    assert len(calls) == 2
    # 256 products of size 0.22 * 1 summed in another order: eps 6e-8 * sqrt(256) * 4 = 4e-6, ten times that allowed
    assert np.abs(np.concatenate(pieces) - whole).max() < 4e-5
    assert "forward" not in vars(model.model)
    again = hf_chunk(model, tokens[::-1].copy())
    assert np.abs(again - whole).max() > 1  # nothing of the pieces is remembered
    assert torch.equal(torch.from_numpy(hf_chunk(model, tokens)), torch.from_numpy(whole))
