"""config.json in the form in which models are published, where a newer transformers writes the same under other names.

transformers 5.23 saves the layers of a Granite hybrid as "linear_attention" and "full_attention" (published: "mamba",
"attention"), and Gemma 4's larger heads of the layers with full attention in `per_layer_config` (published:
`global_head_dim`, `num_global_key_value_heads`). Upstream's converter reads the published names alone: it fails, or
takes every layer for a recurrent one.
"""

from __future__ import annotations

from typing import Any

_HYBRID = {"linear_attention": "mamba", "full_attention": "attention"}
_GLOBAL = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}


def as_published(config: dict[str, Any]) -> dict[str, Any]:
    """A config, and the text model's inside it, with the published names; the same object where nothing differs."""
    text = config.get("text_config")
    if isinstance(text, dict) and (changed := as_published(text)) is not text:
        config = {**config, "text_config": changed}
    layers = config.get("layer_types")
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        return config
    if config.get("model_type") == "granitemoehybrid" and set(layers) <= _HYBRID.keys():
        return {**config, "layer_types": [_HYBRID[layer] for layer in layers]}
    if str(config.get("model_type")).startswith("gemma4"):
        more = _of_full_attention(config, layers)
        return {**config, **more} if more else config
    return config


def for_converter(config: dict[str, Any]) -> dict[str, Any]:
    """`as_published`, and so that the converter reads the file itself: transformers would write Gemma 4's names anew.

    The converter asks transformers for the config first, and reads config.json where transformers does not know the
    type of the model.
    """
    config = as_published(config)
    text = config.get("text_config")
    inside = (config, text if isinstance(text, dict) else {})
    if any(str(one.get("model_type")).startswith("gemma4") and "global_head_dim" in one for one in inside):
        return {key: value for key, value in config.items() if key != "model_type"}
    return config


def _of_full_attention(config: dict[str, Any], layers: list[str]) -> dict[str, int]:
    """Sizes that all layers with full attention share, as keys that the config does not have yet."""
    given = config.get("per_layer_config")
    by_layer = {int(key): value for key, value in given.items() if key.isdecimal()} if isinstance(given, dict) else {}
    found = {}
    for name, published in _GLOBAL.items():
        plain = config.get(name)
        sizes = {
            value.get(name, plain) if isinstance(value := by_layer.get(number), dict) else plain
            for number, layer in enumerate(layers)
            if layer == "full_attention"
        }
        size = next(iter(sizes), None)
        if len(sizes) == 1 and isinstance(size, int) and (name == "head_dim" or size != plain):
            found[published] = size
    return {name: size for name, size in found.items() if config.get(name) is None}
