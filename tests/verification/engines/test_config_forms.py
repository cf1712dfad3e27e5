"""What a newer transformers writes under other names is read under the published ones; nothing else is changed."""

from __future__ import annotations

from typing import Any

import pytest

from verification.reference.config_forms import as_published, for_converter

LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GEMMA: dict[str, Any] = {"model_type": "gemma4_text", "head_dim": 128, "num_key_value_heads": 2, "layer_types": LAYERS}


def by_layer(**sizes: int) -> dict[str, dict[str, int]]:
    return {"01": dict(sizes), "03": dict(sizes)}


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (GEMMA | {"per_layer_config": by_layer(head_dim=512)}, {"global_head_dim": 512}),
        (
            GEMMA | {"per_layer_config": by_layer(num_key_value_heads=1)},
            {"global_head_dim": 128, "num_global_key_value_heads": 1},
        ),
        (GEMMA, {"global_head_dim": 128}),
        (GEMMA | {"global_head_dim": 512}, {}),
        (GEMMA | {"per_layer_config": {"1": {"head_dim": 512}}}, {}),  # two layers, two sizes: no one name for them
        (GEMMA | {"per_layer_config": {"x": 1, "1": 2}}, {"global_head_dim": 128}),
        (GEMMA | {"layer_types": [1, 2]}, {}),
        (GEMMA | {"model_type": "gemma3_text"}, {}),
    ],
)
def test_gemma_4_has_its_published_names(config: dict[str, Any], more: dict[str, int]) -> None:
    assert as_published(config) == config | more
    nested = {"model_type": "gemma4", "text_config": config}
    if config["model_type"] == "gemma4_text":
        assert as_published(nested) == nested | {"text_config": config | more}


def test_a_granite_hybrid_has_its_published_layers() -> None:
    saved = {"model_type": "granitemoehybrid", "layer_types": ["linear_attention", "full_attention"]}
    assert as_published(saved)["layer_types"] == ["mamba", "attention"]
    published = saved | {"layer_types": ["mamba", "attention"]}
    assert as_published(published) is published
    qwen = {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"]}
    assert as_published(qwen) is qwen


def test_the_converter_reads_gemma_4_itself_and_other_models_through_transformers() -> None:
    assert "model_type" not in for_converter(GEMMA)
    assert "model_type" not in for_converter({"model_type": "gemma4", "text_config": GEMMA})
    llama = {"model_type": "llama", "head_dim": 64}
    assert for_converter(llama) is llama
