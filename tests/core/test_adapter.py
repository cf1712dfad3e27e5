"""The adapter as a citizen of PEFT and transformers: chosen layers, the order of rotation and LoRA, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from core_models import IDS, LORA, gap, logits, randomise, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from so8t_core import (
    InputError,
    SO8TConfig,
    attach,
    detach,
    exp_so8,
    gates,
    load_adapter,
    orthogonality_loss,
    resolve_layers,
    save_adapter,
    trainable_counts,
)
from so8t_core.adapter import SO8TLinear


def rotated_layers(model: nn.Module) -> set[int]:
    return {int(name.split(".")[2]) for name in gates(model)}


@pytest.mark.parametrize(("layers", "want"), [(None, {0, 1, 2}), ([0], {0}), ([-1, 0], {0, 2}), ([1, 1, -2], {1})])
def test_the_chosen_layers_alone_are_touched(layers, want):
    model = attach(tiny_llama(), SO8TConfig(layers=layers))
    assert rotated_layers(model) == want
    randomise(model)
    seen: dict[int, float] = {}

    def compare(index):
        def hook(module, args, output):
            plain = module.get_base_layer()(args[0])
            seen[index] = gap(plain, output)

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_hook(compare(index))
    logits(model)
    assert {index for index, difference in seen.items() if difference > 0} == want


@pytest.mark.parametrize("layer", [3, -4, 100])
def test_a_layer_out_of_range_is_refused_with_the_number_of_layers(layer):
    model = tiny_llama()
    before = logits(model)
    with pytest.raises(
        ValueError, match=rf"layer {layer} is out of range: the model has 3 layers \(0 to 2, or -3 to -1\)"
    ):
        attach(model, SO8TConfig(layers=[0, layer]))
    assert is_plain(model)
    assert torch.equal(logits(model), before)


def is_plain(model: nn.Module) -> bool:
    hooks = any(module._forward_pre_hooks for module in model.modules())
    adapters = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    return not hooks and not adapters and not hasattr(model, "peft_config")


def test_an_empty_choice_is_refused():
    with pytest.raises(InputError, match="nothing would be rotated"):
        resolve_layers([], 3)


def test_a_width_that_is_no_multiple_of_8_is_refused_by_name_and_the_model_stays_plain():
    model = tiny_llama(hidden_size=24, num_attention_heads=2, num_key_value_heads=2, head_dim=6)
    with pytest.raises(
        ValueError, match=r"model\.layers\.0\.self_attn\.o_proj has 12 input features, not a multiple of 8"
    ):
        attach(model, SO8TConfig())
    assert is_plain(model)


def test_only_the_chosen_layers_need_a_multiple_of_8():
    model = tiny_llama()
    model.model.layers[1].self_attn.o_proj = nn.Linear(12, 32)
    assert rotated_layers(attach(model, SO8TConfig(layers=[0, 2]))) == {0, 2}
    model = tiny_llama()
    model.model.layers[1].self_attn.o_proj = nn.Linear(12, 32)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.o_proj has 12"):
        attach(model, SO8TConfig())
    assert is_plain(model)


def test_a_chosen_layer_without_the_target_is_refused():
    model = tiny_llama()
    model.model.layers[1].self_attn.o_proj = nn.Module()
    del model.model.layers[1].self_attn.o_proj
    with pytest.raises(InputError, match="layer 1 has no `o_proj`"):
        attach(model, SO8TConfig(layers=[1]))
    assert rotated_layers(attach(model, SO8TConfig())) == {0, 2}


def test_a_target_that_matches_nothing_is_refused():
    with pytest.raises(InputError, match="no decoder layer of LlamaForCausalLM has a `dense`"):
        attach(tiny_llama(), SO8TConfig(target="dense"))
    model = tiny_llama()
    model.model.layers[0].self_attn.odd = nn.Embedding(2, 2)
    with pytest.raises(InputError, match="Embedding, not a linear layer"):
        attach(model, SO8TConfig(target="odd"))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_proj", "qkv_proj"]}, "lora target qkv_proj matches no layer; .*gate_proj, k_proj"),
        ({"target_modules": ["mlp.q_proj"]}, "lora target mlp.q_proj matches no layer"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [7]},
            r"q_proj matches no layer in layers_to_transform=\[7\]",
        ),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is a Embedding; only linear layers"),
    ],
)
def test_a_lora_target_that_matches_nothing_is_refused(lora, message):
    model = tiny_llama()
    with pytest.raises(InputError, match=message):
        attach(model, SO8TConfig(lora={"r": 2, **lora}))
    assert is_plain(model)


def test_a_lora_on_a_tied_head_is_refused():
    with pytest.raises(InputError, match="lm_head shares its weight with the embedding"):
        attach(tiny_llama(tie_word_embeddings=True), SO8TConfig(lora={"target_modules": ["lm_head"]}))
    attach(tiny_llama(), SO8TConfig(lora={"target_modules": ["lm_head"]}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_scale": -0.1}, "init_scale must be a finite number >= 0, got -0.1"),
        ({"init_scale": float("nan")}, "got nan"),
        ({"layers": [0.5]}, r"layers must be integers, .*got \[0.5\]"),
        ({"layers": [True]}, "layers must be integers"),
        ({"lora": {}}, "target_modules must be a non-empty list"),
        ({"lora": {"target_modules": "all-linear"}}, "non-empty list"),
        ({"lora": {**LORA, "r": 0}}, "lora.r must be at least 1, got 0"),
        ({"lora": {**LORA, "rang": 3}}, "lora.rang=3"),
        ({"lora": {**LORA, "use_dora": True}}, "lora.use_dora=True is not supported"),
        ({"lora": {**LORA, "bias": "all"}}, "lora.bias='all'"),
        ({"lora": {**LORA, "lora_bias": True}}, "lora.lora_bias=True"),
        ({"lora": {**LORA, "modules_to_save": ["lm_head"]}}, "lora.modules_to_save"),
        ({"lora": {**LORA, "init_lora_weights": "olora"}}, "init_lora_weights must be one of .*got 'olora'"),
    ],
)
def test_a_config_that_the_bake_could_not_honour_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        SO8TConfig(**fields)


def test_defaults_may_be_written_out():
    assert SO8TConfig(lora={**LORA, "bias": "none", "use_dora": False}).target_modules == ["o_proj", "q_proj"]


def test_scale_zero_is_the_base_and_another_scale_is_not():
    model = tiny_llama()
    before = logits(model)
    assert torch.equal(logits(attach(copy.deepcopy(model), SO8TConfig(lora=LORA))), before)
    torch.manual_seed(0)
    assert gap(logits(attach(model, SO8TConfig(init_scale=0.05))), before) > 1e-3


def test_the_function_is_w_plus_lora_times_r():
    model = randomise(attach(tiny_llama(), SO8TConfig(layers=[1], lora=LORA))).double()
    layer = model.model.layers[1].self_attn.o_proj
    lora = layer.base_layer
    R = torch.block_diag(*exp_so8(gates(model)["model.layers.1.self_attn.o_proj"].theta))
    A, B, W = lora.lora_A["default"].weight, lora.lora_B["default"].weight, layer.weight
    x = torch.randn(5, 32, dtype=torch.float64)
    y = layer(x)
    s = LORA["lora_alpha"] / LORA["r"]
    assert gap(y, x @ ((W + s * B @ A) @ R).T) < 1e-12
    for wrong in (W @ R + s * B @ A, (W + s * B @ A) @ R.T, (W + B @ A) @ R, R @ (W + s * B @ A)):
        assert gap(y, x @ wrong.T) > 0.1


def test_all_but_the_adapter_is_frozen():
    model = attach(tiny_llama(), SO8TConfig(lora=LORA))
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    assert trainable_counts(model) == (3 * (4 * 28 + 4 * 2 * 32), 3 * 4 * 28)
    logits_of = model(input_ids=IDS).logits
    logits_of.square().mean().backward()
    assert all(gate.theta.grad.abs().max() > 0 for gate in gates(model).values())


def test_the_orthogonality_loss_is_rounding_noise_and_needs_a_gate():
    model = randomise(attach(tiny_llama(), SO8TConfig()), angle=1.0)
    assert 0 < orthogonality_loss(model).item() < 64 * (64 * torch.finfo(torch.float32).eps) ** 2
    with pytest.raises(InputError, match="no rotation gate"):
        orthogonality_loss(tiny_llama())


def test_detach_gives_the_base_back_bit_for_bit():
    model = tiny_llama()
    before = logits(model)
    randomise(attach(model, SO8TConfig(lora=LORA)))
    assert gap(logits(model), before) > 0.1
    assert detach(model) is model
    assert is_plain(model)
    assert torch.equal(logits(model), before)
    assert is_plain(detach(randomise(get_peft_model(model, SO8TConfig(lora=LORA)))))
    assert torch.equal(logits(model), before)
    assert rotated_layers(attach(model, SO8TConfig(layers=[0]))) == {0}  # and may be attached again


@pytest.mark.parametrize("targets", [["o_proj"], ["q_proj", "o_proj"]])
@pytest.mark.parametrize("how", ["attach, get_peft_model", "attach, add_adapter", "get_peft_model twice"])
def test_a_lora_wrapped_around_the_rotation_is_an_error_and_not_a_silent_bypass(how, targets):
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = tiny_llama()
    with pytest.raises(InputError, match="would bypass it"):  # noqa: PT012 (either call may be the one to refuse)
        if how == "attach, get_peft_model":
            model = get_peft_model(attach(model, SO8TConfig()), lora)
        elif how == "attach, add_adapter":
            attach(model, SO8TConfig()).add_adapter(lora, adapter_name="outer")
        else:
            model = get_peft_model(get_peft_model(model, SO8TConfig()).base_model.model, lora)
        logits(model)


def test_a_copy_refuses_an_outer_lora_as_well():
    model = copy.deepcopy(attach(tiny_llama(), SO8TConfig()))
    logits(model)
    with pytest.raises(InputError, match="would bypass it"):
        logits(get_peft_model(model, LoraConfig(target_modules=["o_proj"])))
    assert is_plain(detach(copy.deepcopy(attach(tiny_llama(), SO8TConfig()))))


def test_a_model_that_already_has_a_lora_is_refused():
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(InputError, match="PeftModel already"):
        attach(model, SO8TConfig())
    with pytest.raises(InputError, match="already carries an adapter; detach it first"):
        attach(model.base_model.model, SO8TConfig())
    with pytest.raises(InputError, match="o_proj already carries an adapter"):
        get_peft_model(model.base_model.model, SO8TConfig())


@pytest.mark.parametrize("training", [False, True])
def test_the_adapter_is_in_the_models_mode(training, tmp_path):
    """A LoRA's dropout that stays on in an evaluated model makes every answer another one."""
    config = SO8TConfig(init_scale=0.1, lora={**LORA, "lora_dropout": 0.5})
    model = randomise(attach(tiny_llama(), config))
    assert gap(logits(model), logits(model)) == 0
    save_adapter(model, tmp_path)
    other = load_adapter(tiny_llama().train(training), tmp_path)
    assert {module.training for module in other.modules()} == {training}
    assert (gap(logits(other), logits(other)) == 0) != training


def test_attaching_twice_is_refused():
    model = attach(tiny_llama(), SO8TConfig())
    with pytest.raises(InputError, match="already carries an adapter"):
        attach(model, SO8TConfig())


@pytest.mark.parametrize("lora", [None, LORA], ids=["rotation", "with LoRA"])
def test_peft_saves_loads_disables_merges_and_unmerges(lora, tmp_path):
    base = tiny_llama()
    plain = logits(base)
    model = randomise(get_peft_model(base, SO8TConfig(layers=[0, -1], lora=lora)))
    want = logits(model)
    assert gap(want, plain) > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), want)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low).eval()
        assert torch.equal(logits(again), want)
        assert not any(p.requires_grad for p in again.parameters())
    trained = PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert all(p.requires_grad == (".lora_" in name) for name, p in trained.named_parameters())
    K_EPS = 32**0.5 * torch.finfo(torch.float32).eps
    scale = want.abs().max().item()
    model.merge_adapter()
    assert gap(logits(model), want) < 64 * K_EPS * scale
    with pytest.raises(InputError, match="merged into the weights already"):
        detach(model)
    model.unmerge_adapter()
    assert gap(logits(model), want) < 64 * K_EPS * scale
    merged = again.merge_and_unload()
    assert is_plain(merged)
    assert gap(logits(merged), want) < 64 * K_EPS * scale


def test_two_adapters_live_side_by_side(tmp_path):
    model = get_peft_model(tiny_llama(), SO8TConfig(layers=[0], lora=LORA), adapter_name="a")
    randomise(model, seed=1)
    a = logits(model)
    model.add_adapter("b", SO8TConfig(layers=[1, 2]))
    assert torch.equal(logits(model), a)
    model.set_adapter("b")
    randomise(model, seed=2)
    model.set_adapter("a")
    randomise(model, seed=1)
    a = logits(model)
    model.set_adapter("b")
    b = logits(model)
    assert gap(a, b) > 0.1
    assert rotated_layers(model) == {1, 2}
    save_adapter(model, tmp_path / "mine")
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", adapter_name="a").eval()
    fresh.load_adapter(tmp_path / "b", adapter_name="b")
    fresh.load_adapter(tmp_path / "mine", adapter_name="mine")
    for name, want in (("a", a), ("b", b), ("mine", b), ("a", a)):
        fresh.set_adapter(name)
        assert torch.equal(logits(fresh), want)
    fresh.base_model.set_adapter(["a", "b"])
    both = logits(fresh)
    with pytest.raises(InputError, match="2 adapters are active"):
        save_adapter(fresh, tmp_path / "both")
    fresh.merge_adapter()
    assert gap(logits(fresh), both) < 1e-3
    fresh.unmerge_adapter()
    fresh.merge_adapter(["a"])
    with pytest.raises(InputError, match="a is merged already; unmerge first"):
        fresh.merge_adapter(["b"])


def test_transformers_loads_the_adapter(tmp_path):
    model = randomise(attach(tiny_llama(), SO8TConfig(layers=[1], lora=LORA)))
    save_adapter(model, tmp_path)
    other = tiny_llama()
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other.eval()), logits(model))


def test_a_quantised_base_is_not_merged():
    bnb = pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    old = model.model.layers[0].self_attn.o_proj
    quantised = bnb.nn.Linear8bitLt(32, 32, bias=False, has_fp16_weights=False)
    quantised.load_state_dict(old.state_dict())
    wrapper = SO8TLinear(quantised.to("cpu"), "default")
    wrapper.add_gate("default", init_scale=0.1, layer="x")
    with pytest.raises(InputError, match=r"Linear8bitLt holds quantised weights.*bake_checkpoint"):
        wrapper.merge()
    assert not wrapper.merged
