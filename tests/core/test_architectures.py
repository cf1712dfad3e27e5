"""attach -> a training step -> save -> reload -> bake -> a plain reload, on every architecture of the list."""

from __future__ import annotations

import pytest
import torch
from core_models import IDS, VOCAB, gap, logits
from transformers import AutoConfig, AutoModelForCausalLM

from so8t_core import SO8TConfig, attach, bake, bake_checkpoint, gates, load_adapter, save_adapter

TYPES = ["llama", "phi3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "olmo2"]


def tiny(model_type: str, kv_heads: int):
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["MHA", "GQA"])
@pytest.mark.parametrize("model_type", TYPES)
def test_the_whole_road_keeps_the_function(model_type, kv_heads, tmp_path):
    model = tiny(model_type, kv_heads)
    model.save_pretrained(tmp_path / "base")
    base = logits(model)
    projections = ["qkv_proj", "o_proj"] if model_type == "phi3" else ["v_proj", "o_proj"]
    attach(model, SO8TConfig(init_scale=0.05, lora={"r": 2, "target_modules": projections}))
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    before = {name: gate.theta.detach().clone() for name, gate in gates(model).items()}
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimiser.step()
    model.eval()
    assert len(before) == 2
    assert all(not torch.equal(gate.theta, before[name]) for name, gate in gates(model).items())
    want = logits(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), tmp_path / "adapter")
    assert torch.equal(logits(again), want)
    # c * eps * sqrt(K) of the logits' size; measured: c up to 1.7, so 16 leaves room for other machines.
    bound = 16 * 32**0.5 * torch.finfo(torch.float32).eps * max(want.abs().max().item(), 1)
    assert gap(want, base) > 1000 * bound
    in_memory = logits(bake(again))
    out = bake_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    assert gap(logits(plain), want) < bound
    assert torch.equal(logits(plain), in_memory)
    assert sorted(plain.state_dict()) == sorted(AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict())
