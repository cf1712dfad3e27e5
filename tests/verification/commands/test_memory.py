"""`so8t verify` itself, in a process of its own, on a vocabulary of 262,144: its peak memory, whatever the length."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GIB = 2**30
VOCAB = 262_144
RUN = """
import json, sys
from pipeline.cli.main import main
try:
    main()
except SystemExit as end:
    code = end.code
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))  # ru_maxrss survives exec
print(json.dumps([code, 1024 * int(peak.split()[1])]))
"""


@pytest.fixture(scope="module")
def wide(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two thin layers whose vocabulary the converter fills up with unused tokens, F16 and Q8_0."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from verification.engines.convert import convert
    from verification.engines.quantise import quantise

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.3,
    )
    root = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "reference")
    tokenizer.save_pretrained(root / "reference")
    quantise(convert(root / "reference", root / "w-F16.gguf", outtype="f16"), root / "w-Q8_0.gguf", "Q8_0")
    return root


def peak_of(root: Path, chunks: int) -> tuple[int, dict[str, Any]]:
    out = root / f"report-{chunks}"
    command = [sys.executable, "-c", RUN, "verify", "--reference", root / "reference", "--out", out, "-q"]
    command += ["--candidate", root / "w-F16.gguf", "--candidate", root / "w-Q8_0.gguf"]
    command += ["--chunks", chunks, "--n-ctx", 512, "--threads", 1]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.stdout, done.stderr
    code, peak = json.loads(done.stdout.splitlines()[-1])
    assert code in (0, 1), done.stderr
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    shutil.rmtree(out)
    print(f"{chunks} chunks: {peak / GIB:.2f} GiB, {report['durations']['total']:.0f} s")
    return peak, report


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_verify_holds_a_vocabulary_of_262144_in_4_gib_whatever_the_length(wide: Path) -> None:
    """One chunk's 255 rows are 255 MiB in float32; 8 more chunks kept would be 2 GiB on each side."""
    (short, first), (long, second) = peak_of(wide, 2), peak_of(wide, 10)
    assert [d["vocab"] for d in second["divergences"]] == [VOCAB] * 2
    assert [d["tokens"] for d in first["divergences"]] == [510] * 2
    assert [d["tokens"] for d in second["divergences"]] == [2550] * 2
    assert long < 4 * GIB
    assert long - short < 0.25 * GIB
