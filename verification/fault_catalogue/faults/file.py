"""Faults of the file itself: cut, damaged, incomplete, or with additional data."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from verification.fault_catalogue.edit import flipped_bit, padded, renamed, set_metadata, truncated, without_tensor
from verification.fault_catalogue.fault import Fault, Plant, layer_of, steps
from verification.fault_catalogue.models import Healthy, noise
from verification.gguf.reader import read_gguf
from verification.gguf.writer import Info, Raw


def _cut(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    size = source.stat().st_size
    truncated(source, target, size - (size // 2 if strength == 0 else round(strength)))


def _bit(tensor: str, byte: int) -> Plant:
    """Flip bit number `strength` of one byte of a tensor."""

    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        flipped_bit(source, target, layer_of(pair, tensor), byte=byte, bit=round(strength))

    return plant


def _extra(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    """Add a tensor that llama.cpp uses but the model does not have: RoPE divisors near 1."""
    raw = Raw.read(source)
    size = int(read_gguf(source).get("rope.dimension_count")) // 2
    values = (1 + np.float32(strength) * noise((size,), 3)).astype(np.float32)
    raw.tensors.append(Info("rope_freqs.weight", [size], 0, values.tobytes()))
    raw.write(target)


def _duplicate(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    """Write the same key twice: readers differ in the value that they take."""
    raw = Raw.read(source)
    raw.keys["general.twin"] = raw.keys[f"{read_gguf(source).architecture}.rope.freq_base"]
    raw.write(target)
    key = f"{read_gguf(source).architecture}.rope.freq_base".encode()
    twin = b"general.twin"
    data = target.read_bytes()
    at = data.index(twin)
    named = len(key).to_bytes(8, "little") + key
    header = data[: at - 8] + named + data[at + len(twin) :]
    target.write_bytes(header)


def _hidden(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    """Write data into the padding before the first tensor."""
    shutil.copyfile(source, target)
    file = read_gguf(source)
    first = min(tensor.offset for tensor in file.tensors.values())
    if file.header == first:  # there is no padding: add some
        set_metadata(source, target, {"general.description": "x"})
        file = read_gguf(target)
        first = min(tensor.offset for tensor in file.tensors.values())
    with open(target, "r+b") as stream:
        stream.seek(file.header)
        stream.write(b"\x01" * (first - file.header))


FFN = "ffn_up.weight"
HIGH, LOW = 21, 20  # bytes of the eleventh F16 weight: sign and exponent, mantissa
BITS = steps("bit {:g}", 6, 4, 1)
FAULTS = [
    Fault(
        "cut off",
        "file",
        _cut,
        ("ends at byte", "needs bytes"),
        (*steps("half", 0), *steps("{:g} bytes", 4096, 33)),
        real=1,
    ),
    Fault(
        "bytes behind the last tensor",
        "file",
        lambda pair, s, t, x: padded(s, t, round(x)),
        (".gguf",),
        steps("{:g}", 4096, 1),
    ),
    Fault("a bit flipped in an exponent", "file", _bit(FFN, HIGH), (FFN,), steps("bit {:g}", 6, 4, 2)),
    Fault("a bit flipped in a mantissa", "file", _bit(FFN, LOW), (FFN,), steps("bit {:g}", 7, 3, 0)),
    Fault(
        "a bit flipped in a quantised block", "file", _bit(FFN, 40), (FFN,), steps("bit {:g}", 7, 3, 0), level="Q8_0"
    ),
    Fault(
        "a bit flipped in a quantised block", "file", _bit(FFN, 40), (FFN,), steps("bit {:g}", 7, 3, 0), level="Q4_K_M"
    ),
    Fault("a tensor lost", "file", lambda pair, s, t, x: without_tensor(s, t, layer_of(pair, FFN)), (FFN,)),
    Fault(
        "a tensor renamed",
        "file",
        lambda pair, s, t, x: renamed(s, t, layer_of(pair, FFN), layer_of(pair, "ffn_upp.weight")),
        (FFN, "ffn_upp"),
    ),
    Fault("a tensor nobody asked for", "file", _extra, ("rope_freqs",), steps("1 +- {:g}", 0.1, 0.001)),
    Fault(
        "alignment key wrong",
        "file",
        lambda pair, s, t, x: set_metadata(s, t, {"general.alignment": round(x)}),
        ("general.alignment",),
        steps("{:g}", 64, 4096),
    ),
    Fault("a key written twice", "file", _duplicate, ("rope.freq_base",)),
    Fault("bytes hidden in the padding", "file", _hidden, (".weight",)),
]
