"""Damaged files of every kind: each is read whole or refused in at most two lines, and nothing else happens.

500 inputs of each kind here, many more in `tox -e soak`. What runs in this process is what no sandbox protects: the
admission, the checks of `lint` on keys and tensors, the importance matrix.
"""

from __future__ import annotations

import random
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_mutations import legacy_imatrix, llama_config, mutate, seeds

from so8t_core.errors import InputError
from verification.contract import file_structure, metadata
from verification.gguf.imatrix import read_imatrix
from verification.gguf.reader import read_gguf
from verification.reference.checkpoint import Checkpoint
from verification.weight_parity.compare import Examination, Sources
from verification.weight_parity.expected import inventory, is_known

_NUMBERS = (0, 1, 2, 5, 9, 48, 255, 1 << 16, 1 << 30, (1 << 31) - 1, (1 << 32) - 1, 1 << 33, (1 << 63), (1 << 64) - 1)
Make = Callable[[random.Random], bytes]
_TEXTS = (b"\0", b"\xff", b"blk.4", "²".encode(), b"\n", b"general.alignment", b"", b"tokenizer.ggml.tokens")


def damage(data: bytes, header: int, rng: random.Random) -> bytes:
    """One to four changes in the first `header` bytes: a bit, a number, a text, a cut, or one stretch over another."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(header, len(changed)) or 1)
        what = rng.randrange(5)
        if what == 0 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            packed = struct.pack("<Q", rng.choice(_NUMBERS))[: rng.choice((1, 4, 8))]
            changed[at : at + len(packed)] = packed
        elif what == 2:
            new = rng.choice(_TEXTS)
            changed[at : at + len(new)] = new
        elif what == 3 and rng.random() < 0.2:
            del changed[at:]
        elif what == 4:
            size, source = rng.randint(1, 64), rng.randrange(header)
            changed[at : at + size] = data[source : source + size]
    return bytes(changed)


def admit(path: Path) -> None:
    """Everything that `lint` does with a file in its own process."""
    file = read_gguf(path)
    file_structure.layout(file)
    file_structure.counts(file)
    file_structure.vocabulary(file)
    file_structure.weights(file)
    file_structure.promised_types(file)
    file_structure.fallbacks(file)
    file_structure.published_paths(file)


def fuzz(
    target: Path, count: int, make: Callable[[random.Random], bytes], use: Callable[[Path], object]
) -> Counter[str]:
    """How many files were "read" and "refused"; anything else is raised."""
    ended: Counter[str] = Counter()
    for number in range(count):
        target.unlink(missing_ok=True)
        target.write_bytes(make(random.Random(number)))
        begin, words = time.process_time(), ""
        try:
            use(target)
        except InputError as error:
            words = str(error)
        except Exception as error:
            raise AssertionError(f"input {number} ended in {type(error).__name__}: {error}") from error
        ended["refused" if words else "read"] += 1
        assert len(words.splitlines()) <= 2, number
        assert time.process_time() - begin < 5, number
    return ended


def structures(folder: Path) -> Make:
    made = list(seeds(folder).values())
    return lambda rng: mutate(rng.choice(made), rng)


def headers(folder: Path) -> Make:
    made = [
        (whole.data(), read_gguf(whole.write(folder / f"{name}.gguf")).header)
        for name, whole in seeds(folder).items()
        if name != "part"
    ]
    return lambda rng: damage(*rng.choice(made), rng)


def matrices(folder: Path) -> Make:
    """Importance matrices in both forms, damaged in their structure or anywhere."""
    made, old = seeds(folder)["imatrix"], legacy_imatrix()

    def one(rng: random.Random) -> bytes:
        if rng.random() < 0.4:
            return mutate(made, rng)
        data = rng.choice((old, made.data()))
        return damage(data, len(data), rng)

    return one


def against_a_reference(folder: Path) -> Callable[[Path], None]:
    """What `lint --reference` does here: keys against config.json and the oracle, tensors against weights."""
    import torch
    from transformers import LlamaForCausalLM

    healthy = seeds(folder)["F16"]
    rows = len(healthy.keys["tokenizer.ggml.tokens"].value)
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config(rows, tie_word_embeddings=True)).save_pretrained(folder / "reference")
    checkpoint, oracle = Checkpoint(folder / "reference"), read_gguf(healthy.write(folder / "oracle.gguf"))

    def use(path: Path) -> None:
        file = read_gguf(path)
        found = inventory(checkpoint, file)
        if is_known(file):
            Examination(file, Sources(checkpoint), found).run()
        metadata.against_config(checkpoint.config, file)
        metadata.against_oracle(file, oracle, checkpoint.config)
        metadata.unused_window(checkpoint.config, file)

    return use


KINDS = {"structures": (structures, admit), "headers": (headers, admit), "imatrix": (matrices, read_imatrix)}


def test_a_damaged_file_is_held_against_a_reference_or_refused(tmp_path: Path) -> None:
    ended = fuzz(tmp_path / "x.gguf", 100, structures(tmp_path), against_a_reference(tmp_path))
    assert ended["read"] > 20


@pytest.mark.soak
def test_many_damaged_files_are_held_against_a_reference_or_refused(tmp_path: Path) -> None:
    fuzz(tmp_path / "x.gguf", 20_000, structures(tmp_path), against_a_reference(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    make, use = KINDS[kind]
    ended = fuzz(tmp_path / "x.gguf", 500, make(tmp_path), use)
    assert ended["read"] > 20
    assert ended["refused"] > 100


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    make, use = KINDS[kind]
    fuzz(tmp_path / "x.gguf", 100_000 if kind == "structures" else 50_000, make(tmp_path), use)
