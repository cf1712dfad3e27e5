"""Fold: the correctly rounded product, bit for bit, whoever computes it; and what is folded can be undone."""

from __future__ import annotations

import json
import threading
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from core_models import LORA, gap, logits, randomise, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t_core import InputError, SO8TConfig, attach, bake, exp_so8, save_adapter, unbake
from so8t_core.folding import Fold

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTEGER = {4: torch.int32, 2: torch.int16}


def weight(dtype: torch.dtype, out: int = 6, width: int = 16, seed: int = 0) -> torch.Tensor:
    return (torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def fold(out: int = 6, width: int = 16, seed: int = 1, scale: float = 0.5) -> Fold:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(2, width, generator=generator), torch.randn(out, 2, generator=generator) * 0.05
    return Fold([(A, B, scale)], 0.3 * torch.randn(width // 8, 28, generator=generator))


def exact_product(W: torch.Tensor, f: Fold, R: torch.Tensor) -> list[list[Fraction]]:
    """(W + s B A) @ blockdiag(R) without any rounding."""
    (A, B, scale), (out, width) = f.loras[0], W.shape
    whole = [[Fraction(W[o, i].item()) for i in range(width)] for o in range(out)]
    for o in range(out):
        for i in range(width):
            whole[o][i] += Fraction(scale) * sum(
                Fraction(B[o, r].item()) * Fraction(A[r, i].item()) for r in range(len(A))
            )
    turned = [[Fraction(0)] * width for _ in range(out)]
    for o in range(out):
        for j in range(width):
            k = j // 8
            turned[o][j] = sum(whole[o][8 * k + i] * Fraction(R[k, i, j % 8].item()) for i in range(8))
    return turned


def misses(y: torch.Tensor, exact: list[list[Fraction]]) -> int:
    """How many values have a neighbour in their type that lies nearer to the exact one."""
    bits = y.contiguous().view(INTEGER[y.dtype.itemsize])
    steps = [(bits + step).view(y.dtype).double() for step in (-1, 1)]
    count = 0
    for o, row in enumerate(exact):
        for j, value in enumerate(row):
            mine = abs(Fraction(y[o, j].double().item()) - value)
            count += any(abs(Fraction(step[o, j].item()) - value) < mine for step in steps)
    return count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fold_is_the_correctly_rounded_product(dtype):
    W, f = weight(dtype), fold()
    R = exp_so8(f.theta.double())
    exact = exact_product(W, f, R)
    assert misses(f.apply(W), exact) == 0
    # Planted: float32 arithmetic, and the inverse rotation.
    (A, B, scale), turn = f.loras[0], torch.block_diag(*R)
    assert misses(((W.double() + scale * (B.double() @ A.double())) @ turn.T).to(dtype), exact) > 80
    assert dtype != torch.float32 or misses((W + scale * (B @ A)) @ turn.float(), exact) > 10


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_neither_threads_nor_strides_nor_inference_mode_change_a_bit(dtype, inference):
    W, f = weight(dtype, 1000, 64), fold(1000, 64)
    want = f.apply(W)
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode(inference):
                assert torch.equal(f.apply(W.clone()), want)
                assert torch.equal(f.apply(W.T.contiguous().T), want)
            seen = [torch.get_num_threads()]
            newcomer = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))  # noqa: B023
            newcomer.start()
            newcomer.join()
            assert seen == [threads, threads]  # the caller's number is as it was, and that of threads to come
            with pytest.raises(InputError, match="NaN or Inf"):
                f.apply(W.float().index_fill(0, torch.tensor([999]), torch.nan))
    finally:
        torch.set_num_threads(1)


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), dtype=st.sampled_from(DTYPES), scale=st.sampled_from([0.0, 0.5, 4.0]))
def test_undoing_restores_within_one_rounding(seed, dtype, scale):
    """|w_j - original| <= u |block of W + s B A|_2 + u |w_j|, u = eps / 2: the bake's rounding of each value, turned
    by R^T, which keeps the block's length; then that of the result. Subnormals of float16 add half a step each."""
    W, f = weight(dtype, 32, 64, seed), fold(32, 64, seed + 1, scale)
    baked = f.apply(W)
    back = f.apply(baked, undo=True)
    A, B, _ = f.loras[0]
    whole = W.double() + scale * (B.double() @ A.double())
    u, tiny = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    length = whole.view(32, -1, 8).norm(dim=-1).repeat_interleave(8, 1)
    bound = u * (1 + 1e-6) * (length + back.double().abs()) + tiny * (1 + 8**0.5)
    assert bool(((back.double() - W.double()).abs() <= bound).all())
    for wrong in (f.apply(baked), f.apply(f.apply(baked), undo=True)):  # planted: turned twice; not undone at all
        assert bool(((wrong.double() - W.double()).abs() > bound).any())


@pytest.mark.parametrize("lora", [None, LORA], ids=["rotation", "rotation and LoRA"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unbake_restores_the_base_model(tmp_path, dtype, lora):
    model = randomise(attach(tiny_llama().to(dtype), SO8TConfig(layers=[0, -1], lora=lora)))
    save_adapter(model, tmp_path / "adapter")
    baked = bake(model)
    state = {name: tensor.clone() for name, tensor in baked.state_dict().items()}
    assert unbake(baked, tmp_path / "adapter") is baked
    plain = tiny_llama().to(dtype).state_dict()
    for name, tensor in baked.state_dict().items():
        folded = ("o_proj" in name and ".1." not in name) or (lora and ("q_proj" in name or "o_proj" in name))
        if not folded:
            assert torch.equal(tensor, plain[name])
            continue
        # The bound of the law above, with the longest block of the baked weight: its rotation keeps the length.
        length = max(t.double().view(-1, 8).norm(dim=-1).max().item() for t in (state[name], plain[name]))
        assert gap(tensor.double(), plain[name].double()) <= 1.01 * torch.finfo(dtype).eps * length
        assert gap(state[name].double(), plain[name].double()) > 10 * torch.finfo(dtype).eps * length  # it was far off
    if dtype == torch.float32:
        assert gap(logits(baked), logits(tiny_llama())) < 1e-3


def shorten(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("layers.1.self_attn.o_proj.lora_so8t.theta"))
    tensors[key] = tensors[key][:-1].contiguous()
    save_file(tensors, adapter / "adapter_model.safetensors")


def test_unbake_refuses_by_name_what_does_not_fit_and_changes_nothing(tmp_path):
    adapter = save_adapter(randomise(attach(tiny_llama(), SO8TConfig())), tmp_path / "adapter")
    with pytest.raises(InputError, match="the model carries an adapter; unbake takes the plain model"):
        unbake(attach(tiny_llama(), SO8TConfig()), adapter)
    small, same = tiny_llama(num_hidden_layers=2), tiny_llama(num_hidden_layers=2)
    with pytest.raises(InputError, match=r"made for another model: .* has no model\.layers\.2\.self_attn\.o_proj"):
        unbake(small, adapter)
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), same.parameters(), strict=True))
    shorten(adapter)
    model = tiny_llama()
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.o_proj\.weight has 32 columns, the rotation turns 24"):
        unbake(model, adapter)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny_llama().parameters(), strict=True))
    model.model.layers[0].self_attn.o_proj = torch.nn.Bilinear(4, 4, 4)
    with pytest.raises(InputError, match=r"o_proj.weight is Bilinear .*not a plain weight matrix"):
        unbake(model, adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(InputError, match="holds a LORA adapter, expected SO8T"):
        unbake(tiny_llama(), adapter)
