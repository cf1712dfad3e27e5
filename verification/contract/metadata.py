"""A GGUF file's metadata against what the reference asks for, compared in two ways that do not share a mistake.

`against_oracle` compares every key with the one that upstream's converter writes for this reference. A key that
llama.cpp reads (`key_effects` lists them) and that differs is a fault, unless `effects` proves it harmless; one that it
does not read is a note (`unread_differences`). `against_config` reads config.json itself, because a converter can be
wrong as well (a theta it does not read is missing on both sides of the first comparison). A key that is absent is
compared with the value that llama.cpp takes then. Floats are compared as float32, as GGUF stores them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from verification.contract.finding import Finding, show
from verification.gguf.key_effects import effect_of, is_information
from verification.gguf.reader import GGUFFile
from verification.reference import rope
from verification.reference.families import KNOWN

# differences that other checks hold: `read_gguf` refuses a part of a set
_HELD_ELSEWHERE = frozenset({"split.no", "split.count", "split.tensors.count"})
_SAMPLING = "general.sampling."
_MEND = "convert the reference again, or set the key with gguf's gguf-set-metadata and lint once more"
_GRANITE = {  # key -> config.json's name
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_BY_LAYER = frozenset({"feed_forward_length", "attention.head_count", "attention.head_count_kv"})
# llama.cpp masks by the window only for these; elsewhere the key is not written and every token is attended to
_WINDOWED = frozenset({"gemma2", "gemma3", "phi3", "cohere2", "gpt-oss"})


def against_config(config: dict[str, Any], file: GGUFFile, *, tokenizer_size: int | None = None) -> list[Finding]:
    """Keys that contradict config.json, with llama.cpp's default where a key is absent."""
    found: list[Finding] = []
    for key, wanted in expected_metadata(config, file.architecture).items():
        actual = value_or_default(file, key)
        by_layer = isinstance(actual, list) and file.architecture not in KNOWN  # config.json says it in its own way
        if wanted is not None and not by_layer and not same(wanted, actual):
            found.append(Finding(f"{file.architecture}.{key}", show(wanted), show(actual), _MEND))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        return found
    rows, vocabulary = embedding.shape[0], config.get("vocab_size")
    if tokenizer_size is not None and rows < tokenizer_size:
        action = "resize the embedding to the tokenizer before converting"
        found.append(Finding("token_embd.weight", f"at least {tokenizer_size} rows", f"{rows} rows", action))
    # Gemma-3's converter leaves out rows behind the last token
    if vocabulary is not None and rows != vocabulary and file.architecture != "gemma3":
        found.append(Finding("token_embd.weight", f"{vocabulary} rows", f"{rows} rows", _MEND, "vocabulary padding"))
    return found


def expected_metadata(config: dict[str, Any], architecture: str = "llama") -> dict[str, Any]:
    """GGUF keys (without architecture prefix) and the values config.json asks for; None means it says nothing."""
    get = config.get
    settings, dim = rope.rope_parameters(config), rope.head_dim(config)
    theta, kind, partial = settings.get("rope_theta"), settings["rope_type"], settings.get("partial_rotary_factor")
    scaled = kind in ("linear", "yarn")
    by_factors = kind == "proportional"  # Gemma 4: channels that are not rotated have a factor in `rope_freqs`
    latent = bool(get("kv_lora_rank"))  # MLA is stored as one KV head of the latent's width: the oracle's to judge
    window = get("sliding_window")
    scales = _GRANITE if architecture.startswith("granite") else {}
    return {
        **{key: _float(get(name)) for key, name in scales.items()},
        "block_count": get("num_hidden_layers"),
        "context_length": get("max_position_embeddings") if architecture != "granitehybrid" else None,  # without RoPE
        "embedding_length": get("hidden_size"),
        "feed_forward_length": get("intermediate_size_mlp")
        or get("intermediate_size"),  # Llama 4 names the experts' so
        "attention.head_count": get("num_attention_heads"),
        "attention.head_count_kv": None if latent else get("num_key_value_heads") or get("num_attention_heads"),
        "attention.key_length": None if latent else get("global_head_dim") or dim,
        "attention.value_length": None if latent else get("global_head_dim") or dim,
        "attention.layer_norm_rms_epsilon": _float(get("rms_norm_eps")),
        "rope.freq_base": _float(theta),
        "rope.freq_base_swa": rope.local_theta(config) if architecture in ("gemma3", "gemma4") else None,
        "rope.dimension_count": int(dim * partial) if dim and partial and partial != 1 and not by_factors else None,
        "rope.scaling.type": kind if scaled else None,
        "rope.scaling.factor": _float(settings.get("factor")) if scaled else None,
        "rope.scaling.original_context_length": settings.get("original_max_position_embeddings")
        if kind in ("yarn", "longrope")
        else None,
        "rope.scaling.attn_factor": rope.attention_factor(config),
        "attn_logit_softcapping": _float(get("attn_logit_softcapping")),
        "final_logit_softcapping": _float(get("final_logit_softcapping")),
        "attention.sliding_window": window if architecture in _WINDOWED else None,
        "vocab_size": get("vocab_size") if architecture != "gemma3" else None,
    }


def unused_window(config: dict[str, Any], file: GGUFFile) -> int | None:
    """A sliding window that the reference has and llama.cpp will not apply; None when there is none."""
    window = config.get("sliding_window")
    if not window or not config.get("use_sliding_window", True):
        return None
    longer = int(window) < int(config.get("max_position_embeddings") or 0)
    return int(window) if longer and not file.get("attention.sliding_window") else None


def value_or_default(file: GGUFFile, key: str) -> Any:
    """The value llama.cpp works with: the key's own, or what it takes when the key is absent."""
    value = file.get(key)
    if value is not None:
        return value
    heads, width = file.get("attention.head_count"), file.get("embedding_length")
    if key == "attention.head_count_kv":
        return heads
    if key in ("attention.key_length", "attention.value_length"):
        return width // heads if isinstance(heads, int) and heads and width else None
    if key == "rope.dimension_count":
        return value_or_default(file, "attention.key_length")
    if key == "rope.freq_base_swa":  # Gemma-3's local layers
        return 1e4
    if key == "rope.freq_base":
        return 1e4
    if key == "general.alignment":
        return 32
    if key == "general.type":
        return "model"
    if key == "vocab_size":
        return len(file.metadata.get("tokenizer.ggml.tokens") or [])
    return None


def against_oracle(file: GGUFFile, oracle: GGUFFile, config: dict[str, Any] | None = None) -> list[Finding]:
    """Keys that differ from upstream's own conversion of the reference.

    Args:
        oracle: a conversion, or its metadata alone (`convert_metadata`).
        config: explains keys that the converter writes together with tensors, and a metadata-only run does not.
    """
    found = []
    for key in ("general.architecture", *sorted(file.metadata.keys() | oracle.metadata.keys())):
        if not is_read(key, file.architecture) or is_harmless(key):
            continue
        wanted, actual = oracle.metadata.get(key), file.metadata.get(key)
        short = key.removeprefix(f"{file.architecture}.")
        if wanted is None and config is not None and short == "rope.scaling.attn_factor":
            wanted = rope.attention_factor(config)
        if actual is None and file.architecture == oracle.architecture:
            actual = value_or_default(file, short)
        if short in _BY_LAYER and one_for_all(wanted) == one_for_all(actual):
            continue
        if same(wanted, actual) or (wanted is None and same(value_or_default(oracle, short), actual)):
            continue
        if actual is None and key.startswith(_SAMPLING):  # older converters write none; every caller may set its own
            continue
        found.append(_difference(key, wanted, actual))
    return found


def unread_differences(file: GGUFFile, oracle: GGUFFile) -> list[Finding]:
    """Keys that differ from upstream's own conversion, and that no code of llama.cpp reads: nothing changes by them."""
    return [
        dataclasses.replace(
            _difference(key, oracle.metadata.get(key), file.metadata.get(key)),
            action="nothing for llama.cpp; another program may read it",
            cause="not read by llama.cpp",
        )
        for key in sorted(file.metadata.keys() | oracle.metadata.keys())
        if not is_read(key, file.architecture) and not same(oracle.metadata.get(key), file.metadata.get(key))
    ]


def one_for_all(value: Any) -> Any:
    """A list of one number a layer, all equal, as that number: llama.cpp reads both alike."""
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        return value[0]
    return value


def is_harmless(key: str) -> bool:
    """Whether no value of this key can change what the file computes, or another check holds it."""
    return key in _HELD_ELSEWHERE or is_information(key)


def is_read(key: str, architecture: str) -> bool:
    """Whether any code of llama.cpp reads this key of a file of this architecture."""
    return effect_of(key, architecture) is not None


def _difference(key: str, wanted: Any, actual: Any) -> Finding:
    """One key's difference; of two lists of the same length the first item that differs."""
    if isinstance(wanted, list) and isinstance(actual, list) and len(wanted) == len(actual):
        wrong = [i for i, (a, b) in enumerate(zip(wanted, actual, strict=True)) if a != b]
        more = f"{len(wrong)} items differ" if len(wrong) > 1 else ""
        return Finding(f"{key}[{wrong[0]}]", show(wanted[wrong[0]]), show(actual[wrong[0]]), _MEND, more)
    return Finding(key, show(wanted), show(actual), _MEND)


def same(wanted: Any, actual: Any) -> bool:
    """Equal as GGUF stores them: floats as float32; a truth value is no number."""
    if isinstance(wanted, float) or isinstance(actual, float):
        if isinstance(wanted, int | float) and isinstance(actual, int | float):
            return bool(np.float32(wanted) == np.float32(actual))
        return False
    return bool(wanted == actual) and isinstance(wanted, bool) == isinstance(actual, bool)


def _float(value: Any) -> float | None:
    return None if value is None else float(value)
