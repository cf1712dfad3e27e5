"""Two independent oracles: stock PEFT OFT is the same operator, and the value heads can carry the rotation instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from core_models import IDS, LORA, gap, logits, randomise, tiny_llama
from peft import OFTConfig, PeftModel, get_peft_model
from warm_programs import Warm

from so8t_core import InputError, SO8TConfig, attach, exp_so8, export_oft, gates, import_oft, load_adapter, save_adapter
from so8t_core.rotation import plane_angles


def _saved(folder: Path, *, angle: float, layers: list[int] | None = None) -> torch.Tensor:
    """Save an adapter whose largest plane angle is `angle`; returns its model's logits."""
    model = randomise(attach(tiny_llama(), SO8TConfig(layers=layers)))
    with torch.no_grad():
        for gate in gates(model).values():
            gate.theta *= angle / plane_angles(gate.theta).max()
    save_adapter(model, folder)
    return logits(model)


@pytest.mark.parametrize("layers", [None, [0, -1]])
@pytest.mark.parametrize("angle", [1e-3, 0.5, 2.0, 3.0])
def test_stock_oft_gives_the_same_logits(angle: float, layers: list[int] | None, tmp_path: Path) -> None:
    want = _saved(tmp_path / "so8t", angle=angle, layers=layers)
    export_oft(tmp_path / "so8t", tmp_path / "oft")
    stock = PeftModel.from_pretrained(tiny_llama(), tmp_path / "oft")
    # PEFT solves its Cayley map in float32: relative errors of 6e-8 * tan(angle / 2), 14 at 3 rad. The bar is 2e-6.
    assert gap(logits(stock), want) <= 2e-6 * max(1.0, want.abs().max().item())
    if angle >= 0.5:
        assert gap(logits(tiny_llama()), want) > 1e-2  # so that equality means something


def test_stock_oft_needs_no_so8t(tmp_path: Path, warm_python: Warm) -> None:
    want = _saved(tmp_path / "so8t", angle=1.0)
    export_oft(tmp_path / "so8t", tmp_path / "oft")
    tiny_llama().save_pretrained(tmp_path / "base")
    code = (
        "import sys; assert 'so8t_core' not in sys.modules; sys.modules['so8t_core'] = None\n"
        "import torch; from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r})\n"
        f"m = PeftModel.from_pretrained(m, {str(tmp_path / 'oft')!r}).eval()\n"
        f"torch.save(m(input_ids=torch.tensor({IDS.tolist()})).logits.detach(), {str(tmp_path / 'out.pt')!r})"
    )
    done = warm_python.run("-c", code)
    assert done.returncode == 0, done.stderr
    assert gap(torch.load(tmp_path / "out.pt"), want) <= 2e-6 * max(1.0, want.abs().max().item())


@pytest.mark.parametrize("angle", [1e-3, 1.0, 3.0])
def test_export_then_import_gives_the_adapter_back(angle: float, tmp_path: Path) -> None:
    want = _saved(tmp_path / "so8t", angle=angle)
    import_oft(export_oft(tmp_path / "so8t", tmp_path / "oft"), tmp_path / "back")
    assert gap(logits(load_adapter(tiny_llama(), tmp_path / "back")), want) <= 2e-6 * max(1.0, want.abs().max().item())


def test_adapter_trained_with_stock_oft_is_imported(tmp_path: Path) -> None:
    config = OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=False, target_modules=["o_proj"])
    model = get_peft_model(tiny_llama(), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "oft_R" in name:
                parameter.normal_(std=0.3)
    want = logits(model)
    model.save_pretrained(tmp_path / "oft")
    import_oft(tmp_path / "oft", tmp_path / "so8t")
    assert gap(logits(load_adapter(tiny_llama(), tmp_path / "so8t")), want) <= 2e-6 * max(1.0, want.abs().max().item())


def test_an_adapter_trained_with_peft_s_default_series_is_refused(tmp_path: Path) -> None:
    """Cayley-Neumann is the default of `OFTConfig`: what a user trained without thinking of it."""
    model = get_peft_model(tiny_llama(), OFTConfig(r=0, oft_block_size=8, target_modules=["o_proj"]))
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimiser.step()
    model.save_pretrained(tmp_path / "oft")
    with pytest.raises(InputError, match="use_cayley_neumann=True: its truncated series is not a rotation"):
        import_oft(tmp_path / "oft", tmp_path / "so8t")
    assert not (tmp_path / "so8t").exists()
    # Read as the exact map it would have been another function, without a word.
    fields = json.loads((tmp_path / "oft" / "adapter_config.json").read_text())
    (tmp_path / "oft" / "adapter_config.json").write_text(json.dumps({**fields, "use_cayley_neumann": False}))
    import_oft(tmp_path / "oft", tmp_path / "so8t")
    assert gap(logits(load_adapter(tiny_llama(), tmp_path / "so8t")), logits(model)) > 1e-3


@pytest.mark.parametrize("angle", [3.12, torch.pi])
def test_angles_near_pi_are_refused(angle: float, tmp_path: Path) -> None:
    _saved(tmp_path / "so8t", angle=angle)
    with pytest.raises(InputError, match=r"o_proj turns a plane by 3\.1\d+ rad"):
        export_oft(tmp_path / "so8t", tmp_path / "oft")
    assert not (tmp_path / "oft").exists()


def test_more_than_half_a_turn_is_the_shorter_way_round(tmp_path: Path) -> None:
    want = _saved(tmp_path / "so8t", angle=5.0, layers=[1])
    try:
        export_oft(tmp_path / "so8t", tmp_path / "oft")
    except InputError:
        pytest.skip("another plane of this random adapter lies near pi")
    assert gap(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "oft")), want) <= 1e-5


def test_what_the_other_side_cannot_hold_is_refused(tmp_path: Path) -> None:
    save_adapter(randomise(attach(tiny_llama(), SO8TConfig(lora=LORA))), tmp_path / "lora")
    with pytest.raises(InputError, match="LoRA inside"):
        export_oft(tmp_path / "lora", tmp_path / "out")
    _saved(tmp_path / "so8t", angle=1.0)
    oft = export_oft(tmp_path / "so8t", tmp_path / "oft")
    fields = json.loads((oft / "adapter_config.json").read_text())
    for option in ("use_cayley_neumann", "coft", "block_share"):
        (oft / "adapter_config.json").write_text(json.dumps({**fields, option: True}))
        with pytest.raises(InputError, match=option):
            import_oft(oft, tmp_path / "out")
    with pytest.raises(InputError, match="holds a SO8T adapter"):
        import_oft(tmp_path / "so8t", tmp_path / "out")
    with pytest.raises(InputError, match=r"not an adapter directory: adapter_config\.json is missing"):
        import_oft(tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
def test_value_heads_can_carry_the_rotation(heads: int, groups: int) -> None:
    """Attention mixes positions, not channels: turning each value head's output turns o_proj's input alike.

    With grouped heads this holds where R is shared inside a group, since one value head feeds several query heads.
    """
    model = attach(tiny_llama(num_attention_heads=heads, num_key_value_heads=groups), SO8TConfig())
    width = 32 // heads // 8  # blocks a head
    torch.manual_seed(5)
    twin = tiny_llama(num_attention_heads=heads, num_key_value_heads=groups)
    with torch.no_grad():
        for layer, gate in zip(twin.model.layers, gates(model).values(), strict=True):
            theta_GW = 0.5 * torch.randn(groups, width, 28)
            gate.theta.copy_(theta_GW.repeat_interleave(heads // groups, dim=0).reshape(-1, 28))
            R = torch.block_diag(*exp_so8(theta_GW.reshape(-1, 28).double()))
            layer.self_attn.v_proj.weight.copy_((R @ layer.self_attn.v_proj.weight.double()).float())
    want = logits(model)
    assert gap(logits(twin), want) <= 1e-5 * want.abs().max().item()
    assert gap(logits(tiny_llama(num_attention_heads=heads, num_key_value_heads=groups)), want) > 1e-2
    with torch.no_grad():  # the inverse rotation is another function: R is not its own transpose
        for gate in gates(model).values():
            gate.theta.neg_()
    assert gap(logits(twin), logits(model)) > 1e-2
