"""Tiny random models for the core's tests: small enough to build in milliseconds, rough enough that a fault shows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from so8t_core import gates

VOCAB = 64
IDS = (torch.arange(24).reshape(2, 12) * 7 + 3) % VOCAB
LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}


def tiny_llama(*, seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """3 layers, hidden 32, 4 heads over 2 key/value heads, untied; large weights, so that its logits spread."""
    torch.manual_seed(seed)
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes})).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.clone()


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def randomise(model: nn.Module, *, angle: float = 0.3, seed: int = 1) -> nn.Module:
    """Give every rotation and LoRA random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates(model).values():
            gate.theta.normal_(std=angle, generator=generator)
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.normal_(std=0.2, generator=generator)
    return model
