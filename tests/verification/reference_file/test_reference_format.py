"""The bytes of a reference file: golden, read back, and refused where they are not what the format allows."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference_samples import small_file

from so8t_core.errors import InputError
from verification.gguf.candidate import Candidate
from verification.gguf.reader import read_gguf
from verification.reference_file.contract import RecordedTokenizer, static_findings
from verification.reference_file.estimate import compare
from verification.reference_file.format import MAGIC, ReferenceFile, from_bytes, read, to_bytes, write

GOLDEN = Path(__file__).parents[1] / "data" / "reference_v1.so8t"


def signed(head: bytes, arrays: bytes) -> bytes:
    """A file of this header and these arrays, whose digest is right."""
    body = MAGIC + struct.pack("<II", 1, len(head)) + head + arrays
    return body + hashlib.sha256(body).digest()


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and arrays of a file."""
    (size,) = struct.unpack_from("<I", data, 12)
    return json.loads(data[16 : 16 + size]), data[16 + size : -32]


def test_the_bytes_of_version_1_are_golden() -> None:
    assert to_bytes(small_file()) == GOLDEN.read_bytes()


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    write(small_file(), tmp_path / "r.so8t")
    again = read(tmp_path / "r.so8t")
    assert again.header == small_file().header
    assert to_bytes(again) == GOLDEN.read_bytes()
    assert again.passage(1).tolist() == [9, 8, 7, 6, 5, 4, 3, 2]
    assert again.rows_of(1, 5).top_ids.tolist() == [[9, 3, 0, 7], [2, 4, 6, 8]]


CASES = {
    "no magic": (lambda data: b"GGUF" + data[4:], "is not a reference file"),
    "version": (lambda data: data[:8] + struct.pack("<I", 2) + data[12:], "has format version 2, this so8t reads 1"),
    "cut": (lambda data: data[:-40], "is damaged"),
    "header beyond the file": (lambda data: data[:12] + struct.pack("<I", 1 << 31) + data[16:], "the header states"),
    "one bit": (lambda data: data[:-50] + bytes([data[-50] ^ 1]) + data[-49:], "is damaged"),
    "empty": (lambda data: b"", "is not a reference file"),
}


@pytest.mark.parametrize("case", CASES)
def test_other_bytes_are_refused(case: str) -> None:
    change, words = CASES[case]
    with pytest.raises(InputError, match=words):
        from_bytes(change(GOLDEN.read_bytes()), "r.so8t")


HEADERS: dict[str, tuple[str, Any, str]] = {
    "unknown field": ("new", 1, "Extra inputs"),
    "a number as text": ("vocab", "10", "vocab"),
    "a truth as number": ("vocab", True, "vocab"),
    "a huge vocabulary": ("vocab", 1 << 40, "vocab"),
    "more top than vocabulary": ("top", 11, "top = 11"),
    "a huge context": ("n_ctx", 1 << 30, "n_ctx"),
    "another context": ("n_ctx", 9, "n_ctx = 9"),
    "no corpus": ("groups", {}, "corpus"),
    "a passage that is not there": ("groups", {"corpus": [{"passage": 2, "first": 4}] * 2}, "passage 2 of 2"),
    "scored too early": ("groups", {"corpus": [{"passage": 0, "first": 1}] * 2}, "from 1"),
    "no digest": ("sha256", "0" * 63, "sha256"),
    "many passages": ("passages", [{"length": 2, "first": 0}] * 5000, "passages"),
    "nothing scored": ("passages", [{"length": 8, "first": 7}] * 2, "without a scored position"),
    "a text for a number": ("metadata", {"llama.embedding_length": "x"}, "no whole number"),
    "tensors twice": ("tensors", [{"name": "a", "shape": [1], "finite": True}] * 2, "twice"),
    "a shape of zero": ("tensors", [{"name": "a", "shape": [0], "finite": True}], "shape"),
    "a mode without passages": ("modes", [{"name": "x", "title": "", "setting": "", "passages": "y"}], "no passages"),
    "a mode's name": ("modes", [{"name": "../x", "title": "", "setting": ""}], "modes"),
    "architecture": ("architecture", "a b", "architecture"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_out_of_bounds_is_refused(case: str) -> None:
    key, value, words = HEADERS[case]
    header, arrays = parts(GOLDEN.read_bytes())
    with pytest.raises(InputError, match=words) as caught:
        from_bytes(signed(json.dumps({**header, key: value}).encode(), arrays), "r.so8t")
    assert len(str(caught.value)) < 600


def test_json_that_two_readers_understand_in_two_ways_is_refused() -> None:
    header, arrays = parts(GOLDEN.read_bytes())
    text = json.dumps(header).encode()
    for bad in (
        text.replace(b'{"', b'{"vocab": 9, "', 1),
        text.replace(b"10000.0", b"NaN", 1),
        b"[" * 100_000,
        b"\xff",
    ):
        with pytest.raises(InputError, match="header is not JSON"):
            from_bytes(signed(bad, arrays), "r.so8t")


ARRAYS: dict[str, tuple[str, Any, str]] = {
    "a token beyond": ("tokens", lambda a: a + 10, "token beyond"),
    "an id beyond": ("top_ids", lambda a: a + 10, "id beyond"),
    "a top token twice": ("top_ids", lambda a: np.full_like(a, 3), "stands twice"),
    "out of order": ("top_codes", lambda a: a[:, ::-1], "out of order"),
    "above one": ("top_codes", lambda a: a // 2, "do not add up"),
    "positive": ("lowest", lambda a: -a, "above zero"),
    "not a number": ("lowest", lambda a: a * np.nan, "not finite"),
    "no tail": ("tail_mass", lambda a: a * np.inf, "tail's mass"),
    "a heavy tail": ("tail_mass", lambda a: a / 2, "do not add up"),
    "an impossible entropy": ("tail_entropy", lambda a: a + 9, "entropy"),
    "a likely tail token": ("tail_log_p", lambda a: a / 9, "more likely"),
    "a tail token of the top": ("tail_ids", lambda a: np.full_like(a, 1), "among the top"),
    "another target": ("target", lambda a: a - 1, "contradicts"),
    "an infinite norm": ("norms", lambda a: a * np.inf, "statistics"),
    "large projections": ("sketches", lambda a: a * 1e4, "larger than its norm"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays_that_no_model_gives_are_refused(case: str) -> None:
    name, change, words = ARRAYS[case]
    file = small_file()
    owner = file.rows if hasattr(file.rows, name) else file
    object.__setattr__(owner, name, change(getattr(owner, name)).astype(getattr(owner, name).dtype))
    with pytest.raises(InputError, match=words):
        from_bytes(to_bytes(file), "r.so8t")


_VALUES = (None, True, 0, -1, 1, 2, 9, 1 << 20, 1 << 62, 0.5, 1e300, "", "a", "\0", "\ud800", [], [[]], {}, {"a": 1})


def mutated(rng: random.Random) -> bytes:
    """A file with one to three changes of header values or array bytes, and its digest made right again."""
    header, arrays = parts(GOLDEN.read_bytes())
    header, data = copy.deepcopy(header), bytearray(arrays)
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.4:
            at = rng.randrange(len(data))
            data[at : at + 4] = struct.pack("<I", rng.choice((0, 1, 0x7FC00000, 0xFF800000, rng.getrandbits(32))))
            del data[len(arrays) :]
            continue
        node: Any = header
        while True:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not (isinstance(node[key], dict | list) and node[key]) or rng.random() < 0.3:
                break
            node = node[key]
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = rng.choice(_VALUES)
        if not header:
            break
    return signed(json.dumps(header).encode(), bytes(data))


def use(file: ReferenceFile, candidate: Candidate) -> None:
    """Everything that is computed from an admitted file in this process."""
    static_findings(candidate.file, file)
    RecordedTokenizer(file.header.tokenizer)("a", add_special_tokens=True)
    logits = np.zeros((len(file.rows), file.header.vocab), dtype=np.float32)
    if logits.size < 1 << 20:
        compare(file.rows, logits, file.targets())


def fuzz(seeds: range, candidate: Candidate) -> dict[str, int]:
    """How many mutated files were read and refused; anything else is raised."""
    ended = {"read": 0, "refused": 0}
    for seed in seeds:
        words = ""
        try:
            use(from_bytes(mutated(random.Random(seed)), "r.so8t"), candidate)
        except InputError as error:
            words = str(error)
        assert len(words) < 600, seed
        ended["refused" if words else "read"] += 1
    return ended


@pytest.fixture
def candidate(tmp_path: Path) -> Candidate:
    from tiny_gguf import write_tiny

    return Candidate("F16", read_gguf(write_tiny(tmp_path / "tiny.gguf")))


def test_a_mutated_file_is_read_or_refused(candidate: Candidate) -> None:
    ended = fuzz(range(400), candidate)
    assert min(ended.values()) > 20, ended


@pytest.mark.soak
def test_many_mutated_files_are_read_or_refused(candidate: Candidate) -> None:
    assert min(fuzz(range(1000, 101_000), candidate).values()) > 1000
