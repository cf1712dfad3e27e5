"""One small GGUF file of every kind, and structure-aware damage to it: what a stranger, or a fault, could write."""

from __future__ import annotations

import copy
import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_bytes import BOOL, F32, I32, U32, Parts, Tensor, Value, parts
from tiny_gguf import numbers

from verification.gguf.reader import ARRAY, SCALARS, STRING

WIDTH, FFN, HEADS, BLOCKS = 64, 96, 4, 2
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def bytes_to_unicode() -> list[str]:
    """The 256 characters by which byte-level BPE spells bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(other)) for byte in range(256)]


def bpe() -> dict[str, Value]:
    """A byte-level vocabulary: every text has tokens, so tokenising does real work."""
    tokens = [*SPECIAL, *bytes_to_unicode(), "th", "the", "Ġt"]
    kinds = [3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL))
    return {
        "tokenizer.ggml.model": Value(STRING, "gpt2"),
        "tokenizer.ggml.pre": Value(STRING, "smollm"),
        "tokenizer.ggml.tokens": Value(ARRAY, tokens, STRING),
        "tokenizer.ggml.token_type": Value(ARRAY, kinds, I32),
        "tokenizer.ggml.merges": Value(ARRAY, ["t h", "th e", "Ġ t"], STRING),
        "tokenizer.ggml.bos_token_id": Value(U32, 1),
        "tokenizer.ggml.eos_token_id": Value(U32, 2),
        "tokenizer.ggml.add_bos_token": Value(BOOL, False),
        "tokenizer.chat_template": Value(STRING, TEMPLATE),
    }


def spm() -> dict[str, Value]:
    """A SentencePiece vocabulary with byte tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "th", "▁th"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 5]
    return {
        "tokenizer.ggml.model": Value(STRING, "llama"),
        "tokenizer.ggml.tokens": Value(ARRAY, tokens, STRING),
        "tokenizer.ggml.scores": Value(ARRAY, [float(-i) for i in range(len(tokens))], F32),
        "tokenizer.ggml.token_type": Value(ARRAY, kinds, I32),
        "tokenizer.ggml.bos_token_id": Value(U32, 1),
        "tokenizer.ggml.eos_token_id": Value(U32, 2),
        "tokenizer.ggml.unknown_token_id": Value(U32, 0),
        "tokenizer.chat_template": Value(STRING, TEMPLATE.replace("<|im_end|>", "</s>").replace("<|im_start|>", "[")),
    }


def floats(name: str, shape: tuple[int, ...], seed: int, kind: str = "F16") -> tuple[str, Tensor]:
    """A tensor of hashed numbers; norms are near 1 and F32."""
    values = numbers(math.prod(shape), seed).reshape(shape)
    if len(shape) == 1:
        values, kind = np.float32(1) + values / np.float32(4), "F32"
    dtype = {"F16": np.float16, "F32": np.float32}[kind]
    return name, Tensor(list(reversed(shape)), GGMLQuantizationType[kind].value, values.astype(dtype).tobytes())


def llama(vocabulary: dict[str, Value]) -> Parts:
    """A Llama of two blocks in F16."""
    rows = len(vocabulary["tokenizer.ggml.tokens"].value)
    keys = {
        "general.architecture": Value(STRING, "llama"),
        "general.name": Value(STRING, "tiny"),
        "general.file_type": Value(U32, 1),
        "llama.vocab_size": Value(U32, rows),
        "llama.context_length": Value(U32, 128),
        "llama.embedding_length": Value(U32, WIDTH),
        "llama.block_count": Value(U32, BLOCKS),
        "llama.feed_forward_length": Value(U32, FFN),
        "llama.attention.head_count": Value(U32, HEADS),
        "llama.attention.head_count_kv": Value(U32, HEADS // 2),
        "llama.attention.layer_norm_rms_epsilon": Value(F32, 1e-5),
        "llama.rope.freq_base": Value(F32, 10000.0),
        "llama.rope.dimension_count": Value(U32, WIDTH // HEADS),
    } | vocabulary
    tensors = [floats("token_embd.weight", (rows, WIDTH), 1), floats("output_norm.weight", (WIDTH,), 2)]
    for block in range(BLOCKS):
        shapes = {
            "attn_q": (WIDTH, WIDTH),
            "attn_k": (WIDTH // 2, WIDTH),
            "attn_v": (WIDTH // 2, WIDTH),
            "attn_output": (WIDTH, WIDTH),
            "ffn_gate": (FFN, WIDTH),
            "ffn_up": (FFN, WIDTH),
            "ffn_down": (WIDTH, FFN),
            "attn_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
        }
        for seed, (name, shape) in enumerate(shapes.items()):
            tensors.append(floats(f"blk.{block}.{name}.weight", shape, 10 * block + seed + 3))
    return Parts(keys, dict(tensors))


def llama_config(rows: int, **more: Any) -> Any:
    """transformers' config of the model in `llama`, with a vocabulary of `rows` tokens."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=rows,
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=128,
        **more,
    )


def seeds(folder: Path) -> dict[str, Parts]:
    """Small files: F16, quant, SentencePiece, vocabulary alone, LoRA, imatrix, one of two parts."""
    from verification.engines.quantise import quantise

    whole = llama(bpe())
    source = whole.write(folder / "f16.gguf")
    lora = Parts(
        {
            "general.architecture": Value(STRING, "llama"),
            "general.type": Value(STRING, "adapter"),
            "adapter.type": Value(STRING, "lora"),
            "adapter.lora.alpha": Value(F32, 16.0),
        },
        dict(
            [
                floats("blk.0.attn_q.weight.lora_a", (4, WIDTH), 1, "F32"),
                floats("blk.0.attn_q.weight.lora_b", (WIDTH, 4), 2, "F32"),
            ]
        ),
    )
    imatrix = Parts(
        {
            "general.type": Value(STRING, "imatrix"),
            "imatrix.datasets": Value(ARRAY, ["text.txt"], STRING),
            "imatrix.chunk_count": Value(U32, 4),
            "imatrix.chunk_size": Value(U32, 64),
        },
        {
            "blk.0.attn_q.weight.in_sum2": Tensor([WIDTH, 1], 0, np.arange(WIDTH, dtype=np.float32).tobytes()),
            "blk.0.attn_q.weight.counts": Tensor([1, 1], 0, struct.pack("<f", 4.0)),
        },
    )
    part = copy.deepcopy(whole)
    part.keys |= {"split.no": Value(2, 0), "split.count": Value(2, 2), "split.tensors.count": Value(I32, 20)}
    return {
        "F16": whole,
        "Q8_0": parts(quantise(source, folder / "q8.gguf", "Q8_0", threads=1)),
        "SentencePiece": llama(spm()),
        "vocabulary": Parts(dict(whole.keys), {}),
        "LoRA": lora,
        "imatrix": imatrix,
        "part": part,
    }


def legacy_imatrix() -> bytes:
    """An importance matrix in the older .dat form."""
    name = b"blk.0.attn_q.weight"
    values = np.arange(WIDTH, dtype=np.float32).tobytes()
    one = struct.pack("<i", len(name)) + name + struct.pack("<ii", 4, WIDTH) + values
    return struct.pack("<i", 1) + one + struct.pack("<ii", 4, 4) + b"text"


_INTEGERS = (0, 1, 2, 3, 5, 31, 33, 48, 255, 1 << 16, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
_FLOATS = (0.0, -1.0, 1e-45, 1e38, 3.5e38, math.nan, math.inf, -math.inf, 1e-5, 10000.0)
_TEXTS = (
    "",
    "x",
    "\0",
    "a\0b",
    "\udcff",
    "²",
    "ж" * 40,
    "a" * 5000,
    "llama",
    "qwen2",
    "gpt2",
    "default",
    "phi3",
    "gemma3",
    "<|im_end|>",
    "t h",
    " ",
    "\n",
    "{{ 1 // 0 }}",
    "/home/anna/x.gguf",
    "bert",
    "t5",
    "rwkv",
    "mamba",
    "none",
)
_TEMPLATES = (
    "{{ 'x' * 10**10 }}",
    "{{ 1 // 0 }}",
    "{% for %}",
    "{% if 'invoice' in messages[0].content %}y{% endif %}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ strftime_now('%s') }}",
    "{% include 'x' %}",
    "{{ '\\ud800' }}",
    "{% generation %}{{ messages }}{% endgeneration %}",
    "(" * 3000,
    "\udcff{{",
    "{{ messages[0].content }}\U0001f600<|im_end|>",
    "{{ '%c' % 55296 }}",
    "{{ range(10**9) | list }}",
)
_MORE_KEYS = (
    "llama.expert_count",
    "llama.expert_used_count",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.attention.key_length",
    "llama.attention.value_length",
    "llama.attention.sliding_window",
    "llama.attention.kv_lora_rank",
    "general.alignment",
    "general.type",
    "quantize.imatrix.file",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.padding_token_id",
    "tokenizer.ggml.add_eos_token",
    "tokenizer.ggml.precompiled_charsmap",
    "split.count",
    "llama.nextn_predict_layers",
    "odd key\n",
)
_RENAMES = (
    "blk.5.attn_q.weight",
    "blk.00.attn_q.weight",
    "blk.9999.ffn_up.weight",
    "token_embd.weight",
    "x",
    "output.weight",
    "rope_freqs.weight",
    "blk.1.attn_q.weight.bias",
    "v.blk.0.attn_q.weight",
    "rope_factors_long.weight",
)


def mutate(seed: Parts, rng: random.Random) -> bytes:
    """One to three changes in the structure, and sometimes one in the bytes."""
    whole = copy.deepcopy(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        rng.choice((_key, _key, _key, _array, _array, _template, _tensor, _tensor, _values, _keys))(whole, rng)
    data = bytearray(whole.data())
    kind = rng.random()
    if kind < 0.08:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind < 0.11:
        del data[rng.randrange(len(data)) :]
    elif kind < 0.13:
        data += bytes(rng.choice((1, 31, 32, 100)))
    return bytes(data)


def _scalar(kind: int, rng: random.Random) -> object:
    if kind == STRING:
        return rng.choice(_TEXTS)
    if kind in (6, 12):
        value = rng.choice(_FLOATS)
        return math.inf if kind == 6 and abs(value) > 3.4e38 else value
    if kind == BOOL:
        return rng.random() < 0.5
    bits = 8 * struct.calcsize(SCALARS[kind])
    value = rng.choice(_INTEGERS) % (1 << (bits - 1))
    return -value if SCALARS[kind].islower() and rng.random() < 0.3 else value


def _key(whole: Parts, rng: random.Random) -> None:
    """Another value, sometimes of another type."""
    if not whole.keys:
        return
    name = rng.choice(list(whole.keys))
    value = whole.keys[name]
    if value.kind != ARRAY or rng.random() < 0.1:
        kind = value.kind if value.kind != ARRAY and rng.random() < 0.75 else rng.choice([*SCALARS, STRING])
        whole.keys[name] = Value(kind, _scalar(kind, rng))


def _keys(whole: Parts, rng: random.Random) -> None:
    """A key less, a key more, or a key under another architecture."""
    kind = rng.random()
    if kind < 0.5 and whole.keys:
        del whole.keys[rng.choice(list(whole.keys))]
    elif kind < 0.8:
        name = rng.choice(_MORE_KEYS)
        inner = rng.choice([*SCALARS, STRING])
        if rng.random() < 0.3:
            whole.keys[name] = Value(ARRAY, [_scalar(inner, rng) for _ in range(rng.choice((0, 1, 2, 3)))], inner)
        else:
            whole.keys[name] = Value(inner, _scalar(inner, rng))
    elif whole.keys:
        name = rng.choice(list(whole.keys))
        other = "qwen2." + name.partition(".")[2] if name.startswith("llama.") else name + "x"
        whole.keys[other] = whole.keys.pop(name)


def _array(whole: Parts, rng: random.Random) -> None:
    """A list with other items, fewer or more of them, or of another type."""
    names = [name for name, value in whole.keys.items() if value.kind == ARRAY]
    if not names:
        return
    value = whole.keys[rng.choice(names)]
    assert value.inner is not None
    items, inner = list(value.value), value.inner
    kind = rng.random()
    if kind < 0.4 and items:
        for _ in range(rng.choice((1, 1, 5))):
            items[rng.randrange(len(items))] = _scalar(inner, rng)
    elif kind < 0.55 and len(items) > 1:  # one item twice
        items[rng.randrange(len(items))] = rng.choice(items)
    elif kind < 0.7:
        items = items[: rng.choice((0, 1, len(items) // 2, max(len(items) - 1, 0)))]
    elif kind < 0.8:
        items += items[:1] * rng.choice((1, 2, 1000))
    elif kind < 0.9:
        rng.shuffle(items)
    else:
        inner = rng.choice([*SCALARS, STRING])
        items = [_scalar(inner, rng) for _ in items]
    value.value, value.inner = items, inner


def _template(whole: Parts, rng: random.Random) -> None:
    """Another template, or the same with a stretch cut out, doubled or replaced."""
    stored = whole.keys.get("tokenizer.chat_template")
    if stored is None or not isinstance(stored.value, str) or rng.random() < 0.6:
        whole.keys["tokenizer.chat_template"] = Value(STRING, rng.choice(_TEMPLATES))
        return
    text = stored.value
    begin = rng.randrange(len(text) + 1)
    end = min(begin + rng.choice((1, 2, 5, 20)), len(text))
    stored.value = text[:begin] + rng.choice(("", 2 * text[begin:end], "{{", "%}", "'", "**9**9", "}}{{")) + text[end:]


def _tensor(whole: Parts, rng: random.Random) -> None:
    """Another description: name, dimensions, type, place; or a tensor less or more."""
    if not whole.tensors:
        whole.tensors["x"] = Tensor([4], 0, bytes(16))
        return
    name = rng.choice(list(whole.tensors))
    tensor = whole.tensors[name]
    kind = rng.random()
    if kind < 0.15:
        del whole.tensors[name]
    elif kind < 0.35:
        whole.tensors[rng.choice(_RENAMES)] = whole.tensors.pop(name)
    elif kind < 0.65:  # other dimensions, with data for them where that is small
        dims = list(tensor.dims)
        change = rng.randrange(5)
        if change == 0:
            dims.reverse()
        elif change == 1:
            dims.append(rng.choice((1, 1, 2)))
        elif change == 2 and dims:
            dims[rng.randrange(len(dims))] = rng.choice((0, 1, 31, 64, 256, 1 << 31, 1 << 40, (1 << 63) + 1))
        elif change == 3:
            dims = dims[:-1]
        else:
            dims = [math.prod(dims) % (1 << 64)]
        tensor.dims = dims
        _fit(tensor)
    elif kind < 0.85:
        tensor.kind = rng.choice([*(k.value for k in GGMLQuantizationType), 99])
        _fit(tensor)
    else:
        tensor.offset = rng.choice((0, 32, 33, 1 << 20, 1 << 40, (1 << 64) - 32))


def _fit(tensor: Tensor) -> None:
    """Data of the size that the description asks for, where that is below a megabyte."""
    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    except ValueError:
        return
    wanted = math.prod(tensor.dims) // block * size
    if wanted < 1 << 20:
        repeated = tensor.data * (wanted // max(len(tensor.data), 1) + 1) if tensor.data else bytes(wanted)
        tensor.data = repeated[:wanted]


def _values(whole: Parts, rng: random.Random) -> None:
    """Other weights: a stretch of bytes that is NaN, zero, noise or F16's largest number."""
    names = [name for name, tensor in whole.tensors.items() if tensor.data]
    if not names:
        return
    tensor = whole.tensors[rng.choice(names)]
    data = bytearray(tensor.data)
    begin = rng.randrange(len(data)) // 4 * 4
    size = min(rng.choice((2, 4, 64, 4096)), len(data) - begin)
    pattern = rng.choice((b"\xff\xff", b"\x00\x7c", b"\xff\x7b", b"\0\0", rng.randbytes(2)))
    data[begin : begin + size] = (pattern * size)[:size]
    tensor.data = bytes(data)
