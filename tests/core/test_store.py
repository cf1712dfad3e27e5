"""save_adapter and load_adapter: bit-equal, or refused with the model as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from core_models import LORA, gap, logits, randomise, tiny_llama
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from so8t_core import InputError, SO8TConfig, attach, load_adapter, save_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = randomise(attach(tiny_llama(), SO8TConfig(layers=[0, -1], lora=LORA)))
    return save_adapter(model, tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LORA], ids=["rotation", "with LoRA"])
def test_a_saved_adapter_reloads_bit_for_bit(dtype, lora, tmp_path):
    model = randomise(attach(tiny_llama().to(dtype), SO8TConfig(layers=[0, -1], lora=lora)))
    save_adapter(model, tmp_path / "a")
    again = load_adapter(tiny_llama().to(dtype), tmp_path / "a")
    assert torch.equal(logits(again), logits(model))
    save_adapter(again, tmp_path / "b")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert gap(logits(tiny_llama().to(dtype)), logits(model)) > 0.1
    through_peft = PeftModel.from_pretrained(tiny_llama().to(dtype), tmp_path / "a").eval()
    assert torch.equal(logits(through_peft), logits(model))


def test_the_file_holds_the_documented_names_in_float32(saved):
    tensors = load_file(saved / WEIGHTS)
    root = "base_model.model.model.layers"
    assert {name for name in tensors if "theta" in name} == {
        f"{root}.{k}.self_attn.o_proj.lora_so8t.theta" for k in (0, 2)
    }
    assert f"{root}.1.self_attn.o_proj.base_layer.lora_A.weight" in tensors
    assert f"{root}.1.self_attn.q_proj.lora_B.weight" in tensors
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    fields = json.loads((saved / CONFIG).read_text())
    assert (fields["peft_type"], fields["layers"], fields["lora"]["r"]) == ("SO8T", [0, -1], 2)


@pytest.mark.parametrize("trainable", [False, True])
def test_loading_decides_what_is_trained(saved, trainable):
    model = load_adapter(tiny_llama(), saved, trainable=trainable)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if trainable and ".lora_" in n
    }


def test_a_head_lora_saves_the_adapter_alone(tmp_path):
    model = attach(tiny_llama(), SO8TConfig(lora={"r": 2, "target_modules": ["lm_head"]}))
    save_adapter(model, tmp_path / "a")
    assert all(".lora_" in name for name in load_file(tmp_path / "a" / WEIGHTS))


def edit_config(directory: Path, **fields: object) -> None:
    known = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**known, **fields}))


def edit_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def poison(tensors) -> None:
    next(t for n, t in tensors.items() if "theta" in n)[0, 0] = torch.nan


def rename(tensors) -> None:
    name = next(n for n in tensors if "theta" in n)
    tensors[name.replace("layers.0", "layers.1")] = tensors.pop(name)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


DAMAGE = {
    "no config": (lambda d: (d / CONFIG).unlink(), "adapter_config.json is missing"),
    "no tensors": (lambda d: (d / WEIGHTS).unlink(), "adapter_model.safetensors is missing"),
    "half a config": (lambda d: cut(d / CONFIG, 0.5), "adapter_config.json is damaged"),
    "not UTF-8": (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe{"), "adapter_config.json is damaged"),
    "a list": (lambda d: (d / CONFIG).write_text("[]"), "expected an object, got list"),
    "half the tensors": (lambda d: cut(d / WEIGHTS, 0.5), "adapter_model.safetensors is damaged"),
    "empty tensors": (lambda d: (d / WEIGHTS).write_bytes(b""), "adapter_model.safetensors is damaged"),
    "a stock LoRA": (lambda d: edit_config(d, peft_type="LORA"), "holds a LORA adapter, expected SO8T"),
    "unknown key": (lambda d: edit_config(d, twist=1), "unknown keys twist"),
    "wrong type": (lambda d: edit_config(d, init_scale="big"), "adapter_config.json: "),
    "layer out of range": (lambda d: edit_config(d, layers=[9]), "layer 9 is out of range: the model has 3 layers"),
    "other layers": (lambda d: edit_config(d, layers=[0]), "another model: 0 tensors are missing, 1 have no place"),
    "NaN": (lambda d: edit_tensors(d, poison), "NaN or Inf in base_model.*theta"),
    "renamed": (lambda d: edit_tensors(d, rename), "another model: 1 tensors are missing, 1 have no place"),
    "a tensor less": (
        lambda d: edit_tensors(d, lambda t: t.pop(sorted(t)[0])),
        "1 tensors are missing, 0 have no place",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_adapter_is_refused_and_the_model_stays_as_it_was(saved, damage, message):
    damage(saved)
    assert_refused(tiny_llama(), saved, message)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 64}, r"was made for another model: .* is \(2, 32\), this model needs \(2, 64\)"),
        ({"num_hidden_layers": 5}, "was made for another model: .* tensors are missing"),
        ({"num_hidden_layers": 2}, "was made for another model: 1 tensors are missing, .* have no place"),
    ],
)
def test_an_adapter_for_another_model_is_refused_and_the_model_stays_as_it_was(saved, other, message):
    assert_refused(tiny_llama(**other), saved, message)


def assert_refused(model, directory, message) -> None:
    before = logits(model)
    trained = [p.requires_grad for p in model.parameters()]
    with pytest.raises(InputError, match=message):
        load_adapter(model, directory)
    assert torch.equal(logits(model), before)
    assert [p.requires_grad for p in model.parameters()] == trained
    assert not any(isinstance(m, BaseTunerLayer) for m in model.modules())
    attach(model, SO8TConfig())  # still usable


def test_a_model_without_an_adapter_is_not_saved(tmp_path):
    with pytest.raises(InputError, match="carries no SO8T adapter; attach or load one first"):
        save_adapter(tiny_llama(), tmp_path / "a")
    assert not (tmp_path / "a").exists()
