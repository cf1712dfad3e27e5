"""Checks of a GGUF file alone, without the checkpoint that it was made from.

Layout (tensors aligned, in order, without overlap, zeros between them, no bytes after them), counts that metadata and
tensors both state, token lists of one length, special ids inside the vocabulary, weights that are NaN, Inf or saturated
at F16's end, the types that the file type promises, and whether llama.cpp accepts the file (llama.cpp checks every
tensor's name and shape against the architecture, and names a missing tensor). Sources: GGUF specification; llama.cpp,
src/llama-model-loader.cpp.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from verification.contract.finding import Finding, show
from verification.engines.quantise import main_type, nominal_types
from verification.gguf.kind import kind_of
from verification.gguf.local_paths import local_paths
from verification.gguf.reader import FLOAT_TYPES, GGUFFile

F16_MAX = 65504.0
_MARKERS = ("bos_token_id", "eos_token_id", "eot_token_id")
_LAST_TYPE = 6  # token types: 0 undefined, 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
_SHOWN = 20  # duplicate tokens that are listed; one is enough to refuse the file
_NEVER_TEXT = (2, 3, 4)  # token types unknown, control, user-defined
_AGAIN = "convert or copy the file again"
_BY_BLOCK = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")  # a list has one item a block


def layout(file: GGUFFile) -> list[Finding]:
    """Tensor data in wrong places, in each shard."""
    return [finding for shard in file.shards for finding in _layout(shard)]


def _layout(file: GGUFFile) -> list[Finding]:
    alignment = int(file.metadata.get("general.alignment", 32))
    found: list[Finding] = []
    end = None
    data, behind = np.memmap(file.path, dtype=np.uint8, mode="r"), file.header
    for tensor in sorted(file.tensors.values(), key=lambda t: t.offset):
        if data[behind : tensor.offset].any():
            found.append(Finding(tensor.name, "zeros in the padding before it", "data", _AGAIN, "hidden bytes"))
        behind = tensor.offset + tensor.raw.size
        if tensor.offset % alignment:
            found.append(Finding(tensor.name, f"data at a multiple of {alignment}", f"byte {tensor.offset}", _AGAIN))
        if end is not None and tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "a gap before it"
            found.append(Finding(tensor.name, f"data at byte {end}", f"byte {tensor.offset}", _AGAIN, kind))
        end = -(-(tensor.offset + tensor.raw.size) // alignment) * alignment
    size = file.path.stat().st_size
    if end is not None and size > end:
        found.append(
            Finding(str(file.path.name), f"{end} bytes", f"{size} bytes", _AGAIN, "data behind the last tensor")
        )
    return found


def accepted(file: GGUFFile, refused: str) -> list[Finding]:
    """llama.cpp's refusal to load the file: a tensor missing or of another shape, a key missing or out of range."""
    return [Finding(file.path.name, "a file that llama.cpp loads", refused, _AGAIN)] if refused else []


def published_paths(file: GGUFFile) -> list[Finding]:
    """Keys whose value names a place on the maker's computer."""
    action = "write the key again without the folder (gguf's gguf-new-metadata), before publishing"
    cause = "a local path is published"
    return [
        Finding(key, "a name without a folder", show(path), action, cause) for key, path in local_paths(file).items()
    ]


def _first_key_length(file: GGUFFile) -> int | None:
    """Channels of a key head in the first layer: a windowed one may have others (Gemma 4)."""
    pattern, windowed = file.get("attention.sliding_window_pattern"), file.get("attention.key_length_swa")
    first = windowed if windowed and isinstance(pattern, list) and pattern[:1] == [True] else None
    length: int | None = first or file.get("attention.key_length")
    return length


def counts(file: GGUFFile) -> list[Finding]:
    """Numbers that metadata and tensors both state."""
    found: list[Finding] = []

    def equal(where: str, expected: Any, actual: Any, why: str) -> None:
        if expected is not None and actual is not None and expected != actual:
            found.append(Finding(where, f"{show(expected)} ({why})", show(actual), _AGAIN))

    def rows(name: str) -> int | None:
        return file.tensors[name].shape[0] if name in file.tensors else None

    arch = file.architecture
    blocks = {int(n.split(".")[1]) for n in file.tensors if n.startswith("blk.") and n.split(".")[1].isdigit()}
    if blocks:
        equal(f"{arch}.block_count", max(blocks) + 1, file.get("block_count"), "blocks in the file")
        absent = sorted(set(range(max(blocks) + 1)) - blocks)
        if absent:
            found.append(Finding(f"blk.{absent[0]}", "tensors of every block", "none", _AGAIN, "a layer is missing"))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and len(embedding.shape) == 2:
        equal(f"{arch}.embedding_length", embedding.shape[1], file.get("embedding_length"), "columns of token_embd")
        tokens = file.metadata.get("tokenizer.ggml.tokens")
        equal("tokenizer.ggml.tokens", embedding.shape[0], len(tokens) if tokens else None, "rows of token_embd")
    heads, key = file.get("attention.head_count"), _first_key_length(file)
    if isinstance(heads, int) and heads > 0 and not file.get("attention.kv_lora_rank"):  # MLA has other sizes
        dim = key or (file.get("embedding_length") or 0) // heads
        equal("blk.0.attn_q.weight", heads * dim, rows("blk.0.attn_q.weight"), "heads x channels a head")
        kv = file.get("attention.head_count_kv") or heads
        if isinstance(kv, int):
            equal("blk.0.attn_k.weight", kv * dim, rows("blk.0.attn_k.weight"), "KV heads x channels a head")
    wide, up = file.get("feed_forward_length"), rows("blk.0.ffn_up.weight")
    no_gate = "blk.0.ffn_gate.weight" not in file.tensors
    if isinstance(wide, int) and not (no_gate and up == 2 * wide):  # lists: a width a layer; Phi-3's up holds the gate
        equal("blk.0.ffn_up.weight", wide, up, "feed_forward_length")
    blocks_stated = file.get("block_count") or 0
    for name, value in file.metadata.items():
        if name.startswith(f"{arch}.") and name.removeprefix(f"{arch}.") in _BY_BLOCK and isinstance(value, list):
            equal(name, blocks_stated, len(value), "one item a block")
    eps, theta = file.get("attention.layer_norm_rms_epsilon"), file.get("rope.freq_base")
    if eps is not None and not 0 < eps <= 1e-3:
        found.append(Finding(f"{arch}.attention.layer_norm_rms_epsilon", "above 0, at most 1e-3", show(eps), _AGAIN))
    if theta is not None and not theta >= 100:
        found.append(Finding(f"{arch}.rope.freq_base", "at least 100", show(theta), _AGAIN))
    return found


def vocabulary(file: GGUFFile) -> list[Finding]:
    """Token lists and special ids that do not fit together."""
    tokens = file.metadata.get("tokenizer.ggml.tokens") or []
    found: list[Finding] = []
    if not tokens and file.metadata.get("tokenizer.ggml.model") in ("none", "no_vocab"):
        return []
    if not tokens:
        return [Finding("tokenizer.ggml.tokens", "a vocabulary", "nothing", _AGAIN)]
    for name in ("token_type", "scores"):
        values = file.metadata.get(f"tokenizer.ggml.{name}")
        if values is not None and len(values) != len(tokens):
            found.append(Finding(f"tokenizer.ggml.{name}", f"{len(tokens)} items", f"{len(values)}", _AGAIN))
    types = file.metadata.get("tokenizer.ggml.token_type") or []
    if not any(types) and not kind_of(file).has_logits:  # older encoders have no token types
        types = []
    found += _token_lists(file, tokens)
    for key, value in file.metadata.items():
        if not (key.startswith("tokenizer.ggml.") and key.endswith("_token_id")):
            continue
        if not 0 <= value < len(tokens):
            found.append(Finding(key, f"an id below {len(tokens)}", str(value), "set the key to a token's id"))
        elif key.split(".")[-1] in _MARKERS and len(types) == len(tokens) and types[value] not in _NEVER_TEXT:
            where = f"{key} = {value} {tokens[value]!r}"
            found.append(Finding(where, "a control token", f"token type {types[value]}", _AGAIN, "special id shifted"))
    if file.metadata.get("tokenizer.ggml.model") == "gpt2" and file.metadata.get("tokenizer.ggml.pre") in (
        None,
        "default",
    ):
        action = "convert again with a converter that knows this tokenizer; llama.cpp splits wrongly without a name"
        found.append(
            Finding(
                "tokenizer.ggml.pre", "a pre-tokenizer's name", show(file.metadata.get("tokenizer.ggml.pre")), action
            )
        )
    return found


def _token_lists(file: GGUFFile, tokens: list[str]) -> list[Finding]:
    """Duplicate tokens, at which llama.cpp ends the process, and invalid scores and types."""
    found: list[Finding] = []
    first: dict[str, int] = {}
    twice = [(number, first[token]) for number, token in enumerate(tokens) if first.setdefault(token, number) != number]
    twice = [pair for pair in twice if tokens[pair[0]]]  # llama.cpp gives each empty token a name with its number
    for number, other in twice[:_SHOWN]:
        action = "give each id a text of its own in the tokenizer and convert again"
        more = f"{len(twice)} such tokens" if len(twice) > _SHOWN else ""
        where, text = f"token {number}", f"{show(tokens[number])}, as token {other}"
        found.append(Finding(where, "a text of its own", text, action, more))
    scores = file.metadata.get("tokenizer.ggml.scores") or []
    odd = next((i for i, score in enumerate(scores) if score != score), None)
    if odd is not None:
        found.append(Finding(f"tokenizer.ggml.scores[{odd}]", "a number", "NaN", _AGAIN))
    kinds = file.metadata.get("tokenizer.ggml.token_type") or []
    odd = next((i for i, kind in enumerate(kinds) if not 0 <= kind <= _LAST_TYPE), None)
    if odd is not None:
        where = f"tokenizer.ggml.token_type[{odd}]"
        found.append(Finding(where, f"0 to {_LAST_TYPE}", str(kinds[odd]), _AGAIN))
    return found


def weights(file: GGUFFile, *, known_good: Collection[str] = ()) -> tuple[list[Finding], list[Finding]]:
    """(weights that are NaN or Inf, weights that sit at F16's largest value), by tensor.

    Args:
        known_good: tensors that are skipped, because they equal finite values of a reference.
    """
    broken, saturated = [], []
    for tensor in file.tensors.values():
        if tensor.name in known_good:
            continue
        bad = clipped = 0
        for piece in tensor.pieces():
            values = piece.raw.view(np.float16) if tensor.type == "F16" else piece.values()
            bad += int(values.size - np.count_nonzero(np.isfinite(values)))
            if tensor.type == "F16":
                clipped += int(np.count_nonzero(np.abs(values) == np.float16(F16_MAX)))
        if bad:
            broken.append(
                Finding(tensor.name, "finite weights", f"{bad} NaN or Inf", "convert from the original weights")
            )
        if clipped:
            where = f"{clipped} weights at {F16_MAX:.0f}"
            saturated.append(
                Finding(tensor.name, "weights below F16's end", where, "convert to BF16 or F32", "F16 overflow clipped")
            )
    return broken, saturated


def promised_types(file: GGUFFile) -> list[Finding]:
    """Compare the file type with the type of most weights; in a float file, with the type of every weight."""
    if file.file_type == "unknown":
        return []
    if file.is_float:  # F32 beside F16 or BF16 loses nothing
        odd = [t for t in file.tensors.values() if t.type not in (file.file_type, "F32")]
        if 0 < len(odd) <= len(file.tensors) // 2:
            return [
                Finding(t.name, f"{file.file_type} or F32", t.type, "convert again", "file type and tensors disagree")
                for t in odd
            ]
    sizes: Counter[str] = Counter()
    for row in nominal_types(file):
        tensor = file.tensors[row.name]
        if len(tensor.shape) > 1 and not row.name.startswith(("token_embd", "output")):
            sizes[row.nominal] += int(np.prod(tensor.shape))
    if not sizes:
        return []
    main, promised = sizes.most_common(1)[0][0], main_type(file.file_type)
    bits = {kind: _bits(kind) for kind in (main, promised)}
    wrong = main != promised if file.is_float or main in FLOAT_TYPES else abs(bits[main] - bits[promised]) > 1.1
    if not wrong:
        return []
    return [
        Finding(
            "general.file_type",
            f"{file.file_type} ({promised} for most weights)",
            main,
            "quantise again",
            "file type and tensors disagree",
        )
    ]


def fallbacks(file: GGUFFile) -> list[Finding]:
    """Tensors whose rows the promised type cannot hold."""
    return [
        Finding(
            row.name,
            row.nominal,
            row.actual,
            "none needed if the size is right; rows are no multiple of 256",
            "fallback type",
        )
        for row in nominal_types(file)
        if row.is_fallback
    ]


def _bits(kind: str) -> float:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return float(8 * size / block)
