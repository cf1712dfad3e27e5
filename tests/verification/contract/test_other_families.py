"""Healthy files of families and types that state their sizes in their own way raise no alarm; wrong ones still do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from verification.contract.file_structure import counts, promised_types
from verification.contract.metadata import against_config
from verification.engines.quantise import main_type
from verification.gguf.reader import FILE_TYPES, GGUFFile, GGUFTensor
from verification.logit_parity.compare import compare_rows
from verification.logit_parity.kl import DivergenceAccumulator
from verification.logit_parity.run_modes import Passage
from verification.weight_parity import checks
from verification.weight_parity.expected import Inventory


def file_of(architecture: str, tensors: dict[str, tuple[tuple[int, ...], str]], **metadata: Any) -> GGUFFile:
    """A header without data."""
    values = {f"{architecture}.{key.replace('__', '.')}": value for key, value in metadata.items()}
    made = {name: GGUFTensor(name, shape, kind, np.zeros(1, np.uint8)) for name, (shape, kind) in tensors.items()}
    return GGUFFile(Path("x.gguf"), {"general.architecture": architecture, **values}, made)


def quant(file_type: str, kind: str) -> GGUFFile:
    file = file_of("llama", {"blk.0.ffn_up.weight": ((512, 256), kind)})
    number = next(number for number, name in FILE_TYPES.items() if name == file_type)
    return GGUFFile(file.path, {**file.metadata, "general.file_type": number}, file.tensors)


@pytest.mark.parametrize(
    ("file_type", "kind"),
    [
        ("IQ2_M", "IQ2_S"),
        ("IQ3_M", "IQ3_S"),
        ("IQ3_XS", "IQ3_S"),
        ("IQ3_S", "IQ3_S"),
        ("Q4_K_M", "Q4_K"),
        ("Q2_K_S", "Q2_K"),
        ("Q8_0", "Q8_0"),
    ],
)
def test_the_main_type_of_a_file_type(file_type: str, kind: str) -> None:
    assert main_type(file_type) == kind
    assert promised_types(quant(file_type, kind)) == []
    wrong = "Q8_0" if kind != "Q8_0" else "Q4_K"
    assert promised_types(quant(file_type, wrong))


@pytest.mark.parametrize(
    ("rows", "gate", "held"),
    [(1024, False, True), (512, False, True), (1024, True, False), (768, False, False), (512, True, True)],
)
def test_gate_and_up_may_stand_in_one_tensor(rows: int, gate: bool, held: bool) -> None:
    """GLM-4, like Phi-3: then there is no gate of its own."""
    tensors = {"blk.0.ffn_up.weight": ((rows, 256), "F16")}
    tensors |= {"blk.0.ffn_gate.weight": ((512, 256), "F16")} if gate else {}
    found = counts(file_of("glm4", tensors, feed_forward_length=512, block_count=1))
    assert (found == []) == held


def test_a_width_of_its_own_for_every_layer() -> None:
    tensors = {"blk.0.ffn_up.weight": ((1024, 256), "F16"), "blk.0.ffn_gate.weight": ((1024, 256), "F16")}
    assert counts(file_of("gemma4", tensors, feed_forward_length=[1024], block_count=1)) == []
    listed = file_of("gemma4", {}, feed_forward_length=[1024, 512])
    assert against_config({"intermediate_size": 512}, listed) == []
    known = file_of("llama", {}, feed_forward_length=[1024, 512])  # this family has one width
    assert [f.where for f in against_config({"intermediate_size": 512}, known)] == ["llama.feed_forward_length"]


def test_a_windowed_first_layer_has_heads_of_its_own() -> None:
    """Gemma 4: `key_length` is that of the layers with full attention."""
    keys: dict[str, Any] = {
        "attention__head_count": 4,
        "attention__head_count_kv": 2,
        "attention__key_length": 512,
        "attention__key_length_swa": 128,
        "embedding_length": 256,
        "block_count": 1,
    }
    tensors = {"blk.0.attn_q.weight": ((512, 256), "F16")}
    windowed = {"attention__sliding_window_pattern": [True, False]}
    assert counts(file_of("gemma4", tensors, **keys, **windowed)) == []
    assert [f.where for f in counts(file_of("gemma4", tensors, **keys))] == ["blk.0.attn_q.weight"]
    full = {"blk.0.attn_q.weight": ((2048, 256), "F16")}
    assert [f.where for f in counts(file_of("gemma4", full, **keys, **windowed))] == ["blk.0.attn_q.weight"]


def test_sizes_that_a_config_states_by_layer() -> None:
    gemma4 = {"head_dim": 128, "global_head_dim": 512, "num_attention_heads": 4, "hidden_size": 256}
    keys: dict[str, Any] = {"attention__key_length": 512, "attention__value_length": 512, "attention__head_count": 4}
    keys |= {"attention__head_count_kv": 4, "embedding_length": 256}
    assert against_config(gemma4, file_of("gemma4", {}, **keys)) == []
    assert against_config(gemma4, file_of("gemma4", {}, **{**keys, "attention__key_length": 128}))
    llama4 = {"intermediate_size": 256, "intermediate_size_mlp": 512}
    assert against_config(llama4, file_of("llama4", {}, feed_forward_length=512)) == []
    assert against_config(llama4, file_of("llama4", {}, feed_forward_length=256))
    hybrid = {"max_position_embeddings": 512}  # without RoPE, the converter writes 2^20
    assert against_config(hybrid, file_of("granitehybrid", {}, context_length=1 << 20)) == []
    assert against_config(hybrid, file_of("granite", {}, context_length=1 << 20))


def test_layers_that_predict_further_tokens_count_as_blocks_where_config_json_has_them() -> None:
    config = {"num_hidden_layers": 2, "mtp_num_hidden_layers": 1}
    with_them = file_of("qwen35", {}, block_count=3, nextn_predict_layers=1)
    assert against_config(config, with_them) == []
    assert against_config(config, file_of("qwen35", {}, block_count=2)) == []
    for wrong in (file_of("qwen35", {}, block_count=3), file_of("qwen35", {}, block_count=4, nextn_predict_layers=1)):
        assert [f.where for f in against_config(config, wrong)] == ["qwen35.block_count"]
    assert [f.where for f in against_config({"num_hidden_layers": 2}, with_them)] == ["qwen35.block_count"]


@pytest.mark.parametrize(
    ("architecture", "oracle", "lost"),
    [
        ("gemma4", {"token_embd.weight"}, []),  # its converter writes blk.0.layer_output_scale.weight
        ("gemma4", {"token_embd.weight", "output_norm.weight"}, ["output_norm.weight"]),
        ("gemma4", set(), ["blk.0.layer_output_scale"]),
        ("llama", {"token_embd.weight"}, ["blk.0.layer_output_scale"]),
    ],
)
def test_the_conversion_says_what_a_family_that_is_not_mapped_must_hold(
    architecture: str, oracle: set[str], lost: list[str]
) -> None:
    file = file_of(architecture, {"token_embd.weight": ((8, 256), "F16")})
    found = Inventory({}, [], ["blk.0.layer_output_scale"], [])
    check = checks._inventory(file, found, oracle, [], "x")
    assert (check.value, check.detail) == (len(lost), ", ".join(f"missing {name}" for name in lost))


def test_latent_attention_is_no_contradiction() -> None:
    """DeepSeek-V2: the latent is stored as one KV head."""
    config = {"hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16, "kv_lora_rank": 512}
    keys: dict[str, Any] = {
        "attention__key_length": 576,
        "attention__value_length": 512,
        "attention__head_count": 16,
        "attention__head_count_kv": 1,
        "attention__kv_lora_rank": 512,
        "embedding_length": 2048,
        "block_count": 1,
    }
    tensors = {"blk.0.attn_q.weight": ((3072, 2048), "F16")}
    assert against_config(config, file_of("deepseek2", tensors, **keys)) == []
    assert counts(file_of("deepseek2", tensors, **keys)) == []
    plain = {key: value for key, value in config.items() if key != "kv_lora_rank"}
    assert against_config(plain, file_of("deepseek2", tensors, **keys))
    assert counts(file_of("deepseek2", tensors, **{**keys, "attention__kv_lora_rank": None}))


@pytest.mark.parametrize("n_ctx", [1021, 1022, 1023, 1024, 1025])
def test_every_context_length_shows_its_alignment(n_ctx: int) -> None:
    """At 1022 and 1023 the engine's first batch of 512 holds a single scored row."""
    rng = np.random.default_rng(0)
    first = n_ctx // 2
    passage = Passage(rng.integers(0, 50, n_ctx), first)
    logits = rng.standard_normal((passage.rows, 50)).astype(np.float32)

    class Kept:
        def read(self, _: Passage, start: int, stop: int) -> Any:
            return logits[start:stop]

    batches = [(max(b, first), min(b + 512, n_ctx - 1)) for b in range(0, n_ctx, 512)]
    parts = [logits[a - first : b - first] for a, b in batches if b > a]
    into = DivergenceAccumulator(reference="r", candidate="c", n_ctx=n_ctx, vocab=50)
    ratio = compare_rows(iter(parts), Kept(), passage, into)  # type: ignore[arg-type]
    assert ratio is not None
    assert ratio > 2
