"""SO8T + LoRA on a base of any kind: train, save, reload bit-equal, resume, and bake from the original checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from core_models import IDS, gap, logits, tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from so8t_core import InputError, SO8TConfig, attach, bake, bake_checkpoint, gates, load_adapter, save_adapter

KINDS = ["float32", "bfloat16", "8bit", "4bit"]
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original")
    tiny_llama(**WIDTHS).save_pretrained(directory)
    return directory


def base_of(kind: str, original: Path) -> nn.Module:
    if kind.endswith("bit"):
        pytest.importorskip("bitsandbytes")
        options = (
            BitsAndBytesConfig(load_in_8bit=True)
            if kind == "8bit"
            else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        )
        return AutoModelForCausalLM.from_pretrained(original, quantization_config=options, device_map="cpu").eval()
    return AutoModelForCausalLM.from_pretrained(original, dtype=getattr(torch, kind)).eval()


def train(model: nn.Module, steps: int) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=0.05)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def in_grad_mode(model: nn.Module) -> Tensor:
    """nf4 with LoRA computes in another order under no_grad: only equal modes may be compared."""
    return model(input_ids=IDS).logits.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_train_save_reload_resume_and_bake(kind, original, tmp_path):
    model = attach(base_of(kind, original), SO8TConfig(init_scale=0.05, lora=LORA))
    losses = train(model, 4)
    assert losses[-1] < losses[0]
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(base_of(kind, original), tmp_path / "adapter", trainable=True)
    assert torch.equal(in_grad_mode(again), in_grad_mode(model))
    assert torch.equal(logits(again), logits(model))
    assert train(again, 2) == train(model, 2)  # SGD has no state: going on is the same as not having stopped
    for name, gate in gates(again).items():
        assert torch.equal(gate.theta, gates(model)[name].theta), name
    if kind.endswith("bit"):
        with pytest.raises(InputError, match=r"bake_checkpoint\(base_dir, adapter_dir, out_dir\)"):
            bake(model)
    out = bake_checkpoint(original, tmp_path / "adapter", tmp_path / "baked")
    baked = AutoModelForCausalLM.from_pretrained(out).eval()
    exact = load_adapter(base_of("float32", original), tmp_path / "adapter")
    scale = logits(exact).abs().max().item()
    assert gap(logits(baked), logits(exact)) <= 16 * 64**0.5 * torch.finfo(torch.float32).eps * scale
    assert gap(logits(baked), logits(base_of("float32", original))) > 0.1


def test_the_quantised_bases_are_quantised(original):
    """Otherwise the test above would show nothing."""
    exact = logits(base_of("float32", original))
    for kind in ("8bit", "4bit"):
        model = base_of(kind, original)
        assert "Linear" in type(model.model.layers[0].self_attn.o_proj).__name__
        assert type(model.model.layers[0].self_attn.o_proj) is not nn.Linear
        assert gap(logits(model), exact) > 1e-2


def theta_gradient(model: nn.Module) -> Tensor:
    model.train()
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.eval()
    return torch.cat([gate.theta.grad.flatten() for gate in gates(model).values()])


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_an_evaluation_changes_no_later_gradient(kind, original):
    """bitsandbytes repacks 4-bit weights in evaluation on CPUs with bfloat16, after which their backward is garbage."""
    model = attach(base_of(kind, original), SO8TConfig(init_scale=0.05))
    before = theta_gradient(model)
    assert before.norm() > 0
    logits(model)
    assert torch.equal(theta_gradient(model), before)


def repacked(model: nn.Module) -> bool:
    weight = model.model.layers[0].self_attn.o_proj.weight
    return bool(getattr(weight.quant_state, "packing_format_for_cpu", False))


def test_a_base_that_was_repacked_before_is_refused(original):
    model = base_of("4bit", original)
    logits(model)
    if not repacked(model):
        pytest.skip("this CPU has no bfloat16 unit for which bitsandbytes repacks")
    with pytest.raises(InputError, match=r"_proj: bitsandbytes has repacked .* load the model again and attach"):
        attach(model, SO8TConfig())


def test_the_gradient_through_a_quantised_base_is_that_of_its_dequantised_weights(original):
    bnb = pytest.importorskip("bitsandbytes")
    model = attach(base_of("4bit", original), SO8TConfig(init_scale=0.05))
    plain = base_of("float32", original)
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            exact = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name.replace(".base_layer", "")).weight.data = exact.float()
    attach(plain, SO8TConfig())
    for name, gate in gates(plain).items():
        gate.theta.data.copy_(gates(model)[name].theta)
    want = theta_gradient(plain)
    assert (theta_gradient(model) - want).norm() <= 1e-5 * want.norm()  # float32 sums in another order
