"""After the admission no code asks for a type, a rank or a sign: what could crash a reader is refused by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf_bytes import BOOL, F32, I32, U32, Parts, Tensor, Value, parts
from tiny_gguf import write_tiny

from so8t_core.errors import InputError
from verification.contract import file_structure
from verification.gguf import admission
from verification.gguf.edit_keys import drop_keys
from verification.gguf.key_types import wanted
from verification.gguf.local_paths import local_paths
from verification.gguf.reader import ARRAY, STRING, read_gguf

Change = Callable[[Parts], None]


def key(name: str, kind: int, value: object, inner: int | None = None) -> Change:
    def change(whole: Parts) -> None:
        whole.keys[name] = Value(kind, value, inner)

    return change


def tensor(name: str, dims: list[int], kind: int = 0, size: int | None = None) -> Change:
    def change(whole: Parts) -> None:
        whole.tensors[name] = Tensor(dims, kind, bytes(4 * math.prod(dims) if size is None else size))

    return change


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


REFUSED: list[tuple[str, Change, str]] = [
    ("a NaN theta", key("llama.rope.freq_base", F32, math.nan), "freq_base is nan, wanted a finite number"),
    ("an infinite eps", key("llama.attention.layer_norm_rms_epsilon", F32, math.inf), "epsilon is inf"),
    ("a float64 beyond float32", key("llama.rope.freq_base", 12, 1e300), "freq_base is 1e.300"),
    ("a negative count", key("llama.block_count", I32, -2), "block_count is -2, wanted 0 or more"),
    ("a negative item", key("llama.attention.head_count_kv", ARRAY, [4, -4], I32), "head_count_kv is -4"),
    ("a count beyond 32 bits", key("llama.context_length", 10, 1 << 40), "context_length is 1099511627776"),
    ("too many blocks", key("llama.block_count", U32, 20_000), "block_count is 20000, at most 10000"),
    ("a negative id", key("tokenizer.ggml.bos_token_id", I32, -1), "bos_token_id is -1"),
    ("a number for a text", key("general.name", U32, 1), "general.name is u32, wanted string"),
    ("a text for a number", key("llama.expert_count", STRING, "8"), "expert_count is string, wanted integer"),
    ("a list for a number", key("llama.rope.freq_base", ARRAY, [1.0], F32), "is array of f32, wanted float"),
    ("a text for a truth", key("llama.use_parallel_residual", STRING, "x"), "wanted array of bool or bool"),
    ("a number for a template", key("tokenizer.chat_template.tool_use", U32, 3), "wanted string"),
    ("an odd architecture", key("general.architecture", STRING, "lla\nma"), r"architecture is 'lla\\nma', wanted at"),
    ("an architecture in Greek", key("general.architecture", STRING, "λama"), "architecture is 'λama'"),
    ("texts as token types", key("tokenizer.ggml.token_type", ARRAY, ["1"], STRING), "is array of string"),
    ("a matrix of three ranks", tensor("blk.0.attn_q.weight", [32, 16, 2]), r"\[32, 16, 2\], 2 are wanted here"),
    ("a norm of two ranks", tensor("blk.0.attn_norm.weight", [4, 8]), "1 are wanted here"),
    ("integers as weights", tensor("token_embd.weight", [32, 65], 26), "is I32, a type in which no weights"),
    ("float64 as weights", tensor("blk.1.ffn_up.weight", [32, 64], 28, 32 * 64 * 8), "is F64, a type in which"),
    ("no element", tensor("blk.0.attn_q.weight", [32, 0]), "so no element"),
    ("a type for sums in memory", tensor("x", [256], 15, 292), "tensor x is Q8_K, a type in which"),
]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_could_crash_a_reader_is_refused_in_one_line(
    tiny: Path, tmp_path: Path, change: Change, message: str
) -> None:
    whole = parts(tiny)
    change(whole)
    with pytest.raises(InputError, match=message) as refused:
        read_gguf(whole.write(tmp_path / "x.gguf"))
    assert len(str(refused.value).splitlines()) == 1


FOUND: list[tuple[str, Change, str]] = [
    ("a block beyond the last", tensor("blk.5.attn_q.weight", [32, 32]), "llama.block_count: expected 6"),
    ("a theta of zero", key("llama.rope.freq_base", F32, 0.0), "freq_base: expected at least 100, found 0"),
    ("a negative theta", key("llama.rope.freq_base", F32, -1e4), "freq_base: expected at least 100, found -10000"),
    ("an eps of zero", key("llama.attention.layer_norm_rms_epsilon", F32, 0.0), "epsilon: expected above 0"),
    ("heads of three blocks", key("llama.attention.head_count", ARRAY, [4, 4, 4], I32), "expected 2 (one item a"),
    ("a list of widths", key("llama.feed_forward_length", ARRAY, [64], I32), "expected 2 (one item a block), found 1"),
    ("no heads", key("llama.attention.head_count", U32, 0), ""),
    ("an id outside", key("tokenizer.ggml.eos_token_id", U32, 65), "eos_token_id: expected an id below 65"),
    (
        "a token twice",
        key("tokenizer.ggml.tokens", ARRAY, [f"t{i % 64}" for i in range(65)], STRING),
        "token 64: expected a text of its own, found 't0', as token 0",
    ),
    ("scores too short", key("tokenizer.ggml.scores", ARRAY, [0.0], F32), "scores: expected 65 items, found 1"),
    ("a NaN score", key("tokenizer.ggml.scores", ARRAY, [math.nan] * 65, F32), "scores[0]: expected a number"),
    ("a type of its own", key("tokenizer.ggml.token_type", ARRAY, [9] * 65, I32), "token_type[0]: expected 0 to 6"),
]


@pytest.mark.parametrize(("change", "sentence"), [row[1:] for row in FOUND], ids=[row[0] for row in FOUND])
def test_what_no_reader_stumbles_over_is_a_finding(tiny: Path, tmp_path: Path, change: Change, sentence: str) -> None:
    whole = parts(tiny)
    change(whole)
    file = read_gguf(whole.write(tmp_path / "x.gguf"))
    found = [*file_structure.counts(file), *file_structure.vocabulary(file)]
    assert any(sentence in finding.sentence for finding in found)


def test_ones_that_pad_a_rank_are_no_rank(tiny: Path, tmp_path: Path) -> None:
    whole = parts(tiny)
    healthy = whole.tensors["blk.0.attn_q.weight"]
    healthy.dims = [*healthy.dims, 1, 1]
    whole.tensors["blk.0.attn_norm.weight"].dims = [32, 1]
    whole.tensors["scalar"] = Tensor([], 0, bytes(4))
    file = read_gguf(whole.write(tmp_path / "x.gguf"))
    assert file.tensors["blk.0.attn_q.weight"].shape == (32, 32)
    assert file.tensors["blk.0.attn_norm.weight"].shape == (32,)
    assert file.tensors["scalar"].values().shape == (1,)


def test_overlapping_tensors_cannot_ask_for_more_than_the_file(tiny: Path, tmp_path: Path) -> None:
    whole = parts(tiny)
    whole.tensors |= {f"x{i}": Tensor([65 * 32], 0, b"", offset=0) for i in range(100)}
    with pytest.raises(InputError, match=r"the tensors take \d+ bytes, the file has \d+; they overlap"):
        read_gguf(whole.write(tmp_path / "x.gguf"))


def test_a_header_beyond_any_models_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """16 strings of 16 MB each are within every other bound."""
    path = tmp_path / "x.gguf"
    whole = Parts({f"k{i}": Value(STRING, "x" * admission.MAX_STRING) for i in range(5)})
    begin = time.process_time()
    with pytest.raises(InputError, match="beyond 33554432 bytes"):
        read_gguf(whole.write(path))
    assert time.process_time() - begin < 5


def test_the_table_of_keys_is_upstreams(tiny: Path) -> None:
    """Every key of a healthy file with a row is of its type, and upstream's keys with numbers have rows."""
    for name, value in parts(tiny).keys.items():
        rule = wanted(name)
        assert rule is None or rule.allows(value.kind, value.inner), name
    for name in (
        "llama.rope.freq_base_swa",
        "qwen2.rope.scaling.yarn_beta_fast",
        "x.ssm.conv_kernel",
        "split.no",
        "tokenizer.ggml.fim_pad_token_id",
        "tokenizer.ggml.add_sep_token",
        "general.sampling.top_k",
        "gemma3.attention.sliding_window_pattern",
        "llama.expert_gating_func",
    ):
        assert wanted(name) is not None, name
    assert wanted("general.author") is None  # nothing computes with it


def test_dropped_keys_leave_everything_else(tiny: Path, tmp_path: Path) -> None:
    whole = parts(tiny)
    whole.keys["general.license.link"] = Value(STRING, "/home/anna/LICENSE")
    path = whole.write(tmp_path / "x.gguf")
    assert local_paths(read_gguf(path)) == {"general.license.link": "/home/anna/LICENSE"}
    drop_keys(path, local_paths(read_gguf(path)))
    assert path.read_bytes() == parts(tiny).write(tmp_path / "y.gguf").read_bytes()


def test_pieces_are_the_whole(tiny: Path) -> None:
    for tensor in read_gguf(tiny).tensors.values():
        joined = np.concatenate([piece.values() for piece in tensor.pieces(100)])
        assert np.array_equal(joined.reshape(tensor.shape), tensor.values())


def test_a_truth_value_is_one_bit(tiny: Path, tmp_path: Path) -> None:
    whole = parts(tiny)
    whole.keys["tokenizer.ggml.add_bos_token"] = Value(BOOL, True)
    path = whole.write(tmp_path / "x.gguf")
    data = path.read_bytes()
    at = data.index(b"tokenizer.ggml.add_bos_token") + len("tokenizer.ggml.add_bos_token") + 4
    path.unlink()
    path.write_bytes(data[:at] + b"\x02" + data[at + 1 :])
    with pytest.raises(InputError, match="truth value 2"):
        read_gguf(path)


def test_more_tokens_than_any_model_has_are_refused(tmp_path: Path) -> None:
    """llama.cpp needs seconds to load them, and the file only megabytes to hold them."""
    whole = Parts({"tokenizer.ggml.tokens": Value(ARRAY, ["t"] * (admission.MAX_TOKENS + 1), STRING)})
    with pytest.raises(InputError, match=f"holds {admission.MAX_TOKENS + 1} tokens, at most {admission.MAX_TOKENS}"):
        read_gguf(whole.write(tmp_path / "x.gguf"))
