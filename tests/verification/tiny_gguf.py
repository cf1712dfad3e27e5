"""A GGUF of a few kilobytes, written tensor by tensor from integer arithmetic: the same bytes on every machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

VOCAB, WIDTH, FFN, LAYERS, HEADS, N_CTX, CHUNKS = 65, 32, 64, 2, 4, 64, 5  # an odd vocabulary: rows are padded


def numbers(count: int, seed: int) -> np.ndarray:
    """float32 in [-0.5, 0.5): a multiplicative hash of the index, exact in every step."""
    x = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed * 1_000_003)) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    return ((x >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24) - np.float32(0.5)).astype(np.float32)


def token_chunks() -> list[np.ndarray]:
    ids = ((numbers(N_CTX * CHUNKS, 99) + np.float32(0.5)) * np.float32(VOCAB)).astype(np.int64)
    return list(ids.reshape(CHUNKS, N_CTX))


def write_tiny(path: Path, *, nudge: float = 0.0) -> Path:
    """F32 Llama of two layers; `nudge` moves one tensor, so that two files differ in what they compute."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_file_type(0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    shapes = {"token_embd.weight": (VOCAB, WIDTH), "output.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        block = {f"attn_{x}": (WIDTH, WIDTH) for x in ("q", "k", "v", "output")}
        block |= {"ffn_gate": (FFN, WIDTH), "ffn_up": (FFN, WIDTH), "ffn_down": (WIDTH, FFN)}
        block |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    for seed, (name, shape) in enumerate(shapes.items()):
        values = numbers(int(np.prod(shape)), seed).reshape(shape)
        values = np.float32(1) + values * np.float32(0.5) if len(shape) == 1 else values
        if name == "output.weight":
            values = values * np.float32(2)  # logits of spread 3 to 4: far from uniform
        if name == "blk.1.attn_output.weight":
            values = values + np.float32(nudge) * numbers(values.size, 1000).reshape(shape)
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


WIDE = 256  # one K-quant block a row


def bell(count: int, seed: int) -> np.ndarray:
    """float32 near a normal distribution: the sum of six uniform numbers, in a fixed order."""
    total = numbers(count, 7919 * seed)
    for more in range(1, 6):
        total = total + numbers(count, 7919 * seed + more)
    return total * np.float32(np.sqrt(2) * WIDE**-0.5)


def write_wide(path: Path, *, rotate: float = 0.0) -> Path:
    """F16 Llama of two layers with rows of 256; `rotate` turns neighbours of one layer's o_proj by that angle (rad)."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDE)
    writer.add_block_count(2)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(1)
    writer.add_vocab_size(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(32)])
    writer.add_token_types([1] * 32)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = ["token_embd", "output", *(f"blk.{i}.{x}" for i in (0, 1) for x in _MATRICES)]
    for seed, name in enumerate(names):
        rows = 32 if seed < 2 else WIDE
        values = bell(rows * WIDE, seed).reshape(rows, WIDE)
        if rotate and name == "blk.1.attn_output":
            pairs = values.reshape(rows, -1, 2).astype(np.float64)  # (rows, pair, 2)
            cos, sin = np.cos(rotate), np.sin(rotate)
            values = (pairs @ np.array([[cos, sin], [-sin, cos]])).reshape(rows, WIDE)
        writer.add_tensor(f"{name}.weight", values.astype(np.float16))
    for name in ("output_norm", *(f"blk.{i}.{x}_norm" for i in (0, 1) for x in ("attn", "ffn"))):
        writer.add_tensor(f"{name}.weight", np.float32(1) + numbers(WIDE, len(name)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def importance() -> dict[str, np.ndarray]:
    """An importance matrix for `write_wide`'s tensors: positive, uneven, exact."""
    names = [f"blk.{i}.{x}.weight" for i in (0, 1) for x in _MATRICES]
    return {name: (numbers(WIDE, 500 + n) + np.float32(0.53)) ** 2 for n, name in enumerate(names)}
