"""A GGUF file is read whole or refused; values agree with upstream's reader."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, LlamaFileType
from gguf.quants import dequantize
from verification_models import Family, rewrite

from so8t_core.errors import InputError
from verification.engines.quantise import nominal_types, quantise
from verification.gguf.imatrix import read_imatrix
from verification.gguf.reader import FILE_TYPES, read_gguf

# Written down by hand: the numbers stand in files that exist, whatever a later gguf package calls them.
NUMBERED = """
0 F32 1 F16 2 Q4_0 3 Q4_1 7 Q8_0 8 Q5_0 9 Q5_1 10 Q2_K 11 Q3_K_S 12 Q3_K_M 13 Q3_K_L 14 Q4_K_S 15 Q4_K_M 16 Q5_K_S
17 Q5_K_M 18 Q6_K 19 IQ2_XXS 20 IQ2_XS 21 Q2_K_S 22 IQ3_XS 23 IQ3_XXS 24 IQ1_S 25 IQ4_NL 26 IQ3_S 27 IQ3_M 28 IQ2_S
29 IQ2_M 30 IQ4_XS 31 IQ1_M 32 BF16 36 TQ1_0 37 TQ2_0 38 MXFP4
"""


def test_file_types_keep_their_numbers_and_have_no_others_than_gguf() -> None:
    wanted = {int(number): name for number, name in re.findall(r"(\d+) (\w+)", NUMBERED)}
    assert {number: FILE_TYPES.get(number) for number in wanted} == wanted
    assert set(FILE_TYPES) == set(LlamaFileType) - {LlamaFileType.GUESSED}
    assert len(set(FILE_TYPES.values())) == len(FILE_TYPES)  # a name finds its number again


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_K_M"])
def test_reading_agrees_with_upstreams_reader(family: Family, kind: str) -> None:
    ours, theirs = read_gguf(family.files[kind]), GGUFReader(family.files[kind])
    assert ours.file_type == kind
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        expected = dequantize(tensor.data, tensor.tensor_type).reshape(mine.shape)
        assert np.array_equal(mine.values(), expected.astype(np.float32))
    for name, field in theirs.fields.items():
        if not name.startswith("GGUF."):
            assert ours.metadata[name] == field.contents()


@pytest.mark.parametrize("keep", [0, 3, 10, 100, 5000, 500_000, -1])
def test_every_truncation_is_refused_with_sizes(family: Family, tmp_path: Path, keep: int) -> None:
    data = family.files["Q8_0"].read_bytes()
    short = tmp_path / "short.gguf"
    short.write_bytes(data[:keep])
    with pytest.raises(InputError, match=r"short\.gguf.*(truncated|not a GGUF file).*\d"):
        read_gguf(short)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(InputError, match="expected b'GGUF'"):
        read_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 99, 0, 0))
    with pytest.raises(InputError, match="version 99"):
        read_gguf(path)
    with pytest.raises(InputError, match="is not a file"):
        read_gguf(tmp_path / "none.gguf")


def test_quantising_is_the_same_for_any_number_of_threads(family: Family, tmp_path: Path) -> None:
    one, two = (quantise(family.files["F16"], tmp_path / f"{n}.gguf", "Q4_K_M", threads=n) for n in (1, 2))
    assert one.read_bytes() == two.read_bytes()


def test_quantising_refuses_a_quant_and_an_unknown_type(family: Family, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="never from a quant"):
        quantise(family.files["Q8_0"], tmp_path / "x.gguf", "Q4_K_M")
    with pytest.raises(InputError, match=r"unknown quantisation type 'Q9_9'; known: F32"):
        quantise(family.files["F16"], tmp_path / "x.gguf", "Q9_9")
    assert list(tmp_path.iterdir()) == []


def test_rows_of_a_multiple_of_256_need_no_fallback(family: Family) -> None:
    assert not any(row.is_fallback for row in nominal_types(read_gguf(family.files["Q4_K_M"])))


def test_the_fault_injector_alone_changes_nothing(family: Family, tmp_path: Path) -> None:
    copy = read_gguf(rewrite(family.files["F16"], tmp_path / "copy.gguf"))
    assert copy.metadata == read_gguf(family.files["F16"]).metadata


def header(*entries: bytes, tensors: bytes = b"", n_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, len(entries)) + b"".join(entries) + tensors + bytes(64)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def test_damaged_headers_are_refused_not_crashed_on(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    number = struct.pack("<I", 4)
    for entry, message in (
        (text("general.alignment") + number + struct.pack("<I", 0), "alignment is 0"),
        (text("general.alignment") + struct.pack("<I", 8) + text("x"), "alignment is string, wanted integer"),
        (text("a") + struct.pack("<IIQ", 9, 9, 1) * 5000, "array of arrays"),
        (text("split.count") + struct.pack("<IH", 2, 3), "shard 1 of 3, but its name does not end in -00001-of-"),
    ):
        path.write_bytes(header(entry))
        with pytest.raises(InputError, match=message):
            read_gguf(path)
    size = text("t") + struct.pack("<IQQIQ", 2, 1 << 32, 1 << 32, 0, 0)  # 2^64 elements: zero in 64 bits
    path.write_bytes(header(tensors=size, n_tensors=1))
    with pytest.raises(InputError, match="truncated"):
        read_gguf(path)
    path.write_bytes(header(text("general.file_type") + struct.pack("<IIQI", 9, 4, 1, 7)))
    with pytest.raises(InputError, match="file_type is array of u32, wanted integer"):
        read_gguf(path)


def test_an_admission_names_the_fault_and_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    u32, boolean, string, array = (struct.pack("<I", kind) for kind in (4, 7, 8, 9))
    for entry, message in (
        (text("general.alignment") + u32 + struct.pack("<I", 48), "alignment is 48, not a power of two"),
        (text("general.alignment") + u32 + struct.pack("<I", 1 << 30), "alignment is 1073741824, not"),
        (text("general.name") + string + text("a\0b"), "NUL at character 1"),
        (text("a\0b") + string + text("x"), "NUL at character 1"),
        (text("general.name") + string + struct.pack("<Q", 1) + b"\xff", "not UTF-8"),
        (text("") + string + text("x"), "empty key"),
        (text("tokenizer.ggml.add_bos_token") + boolean + b"\xff", "truth value 255"),
        (text("tokenizer.ggml.bos_token_id") + string + text("1"), "is string, wanted integer"),
        (text("llama.block_count") + array + struct.pack("<IQ", 4, 0), "is array of u32, wanted integer"),
        (text("a") + array + struct.pack("<IQ", 0, 1 << 33), "8589934592 items, at most 4194304"),
    ):
        path.write_bytes(header(entry))
        with pytest.raises(InputError, match=message) as refused:
            read_gguf(path)
        assert len(str(refused.value).splitlines()) == 1
    one = struct.pack("<IQIQ", 1, 1, 0, 0)
    for tensor, message in (
        (text("blk.4000000000.x") + one, "block number from 0 to 9999"),
        (struct.pack("<Q", 8) + "blk.².x".encode() + one, "block number from 0 to 9999"),
        (text("t") + struct.pack("<I", 1 << 31), "2147483648 dimensions"),
        (text("t" * 64) + one, "64 characters, at most 63"),
        (text("") + one, "0 bytes"),
    ):
        path.write_bytes(header(tensors=tensor, n_tensors=1))
        with pytest.raises(InputError, match=message):
            read_gguf(path)
    path.write_bytes(header(tensors=text("t") + struct.pack("<IQQIQ", 2, 0, 1 << 63, 1, 0), n_tensors=1))
    with pytest.raises(InputError, match="so no element"):
        read_gguf(path)
    path.write_bytes(header(text("llama.attention.head_count") + array + struct.pack("<IQI", 4, 1, 7)))
    assert read_gguf(path).metadata["llama.attention.head_count"] == [7]
    path.write_bytes(header(tensors=text("t") + struct.pack("<IQIQ", 1, 2, 26, 0), n_tensors=1))
    assert read_gguf(path).tensors["t"].values().tolist() == [0, 0]  # I32


@pytest.mark.parametrize("count", [3])
def test_an_importance_matrix_whose_counts_do_not_divide_its_sums_is_refused(tmp_path: Path, count: int) -> None:
    path = tmp_path / "x.gguf"
    sums = text("a.in_sum2") + struct.pack("<IQIQ", 1, 4, 0, 0)
    counts = text("a.counts") + struct.pack("<IQIQ", 1, count, 0, 0)
    path.write_bytes(header(tensors=sums + counts, n_tensors=2))
    with pytest.raises(InputError, match=f"a has {count} counts for 4 sums"):
        read_imatrix(path)
