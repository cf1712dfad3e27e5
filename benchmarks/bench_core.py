"""The core against its peers. Shapes: the 12288 rotations of a Phi-3.5, its o_proj (2048 tokens x 3072) and SmolLM2's
(2048 x 576), decoding of one token, and a whole training step of a Llama 768 x 6 in `number_type`'s type."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, OFTConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.number_type import DTYPE, NAME
from benchmarks.side_by_side import measured
from so8t_core import SO8TConfig, exp_so8, skew

BLOCKS = 12288
FLOOR = "frozen base"
OFT = {"r": 0, "oft_block_size": 8, "target_modules": ["o_proj"]}  # otherwise PEFT's defaults


def _theta(angle: float) -> Tensor:
    theta = torch.randn(BLOCKS, 28, generator=torch.Generator().manual_seed(0))
    return theta / torch.linalg.matrix_norm(skew(theta), 2)[:, None] * angle


@pytest.mark.parametrize(("angle", "bar"), [(1.0, 2.5), (math.pi, 1.9)], ids=["1", "pi"])
def bench_exponential_forward(figures: Any, angle: float, bar: float) -> None:
    theta = _theta(angle)
    with torch.no_grad():
        figures(
            f"exponential of 12288 blocks, forward, angle {angle:.3g}",
            {"so8t": lambda: exp_so8(theta), "torch.matrix_exp": lambda: torch.matrix_exp(skew(theta))},
            rounds=15,
            bar=bar,
        )


@pytest.mark.parametrize(("angle", "bar"), [(1.0, 5.0), (math.pi, 3.8)], ids=["1", "pi"])
def bench_exponential_with_gradient(figures: Any, angle: float, bar: float) -> None:
    theta, weight = _theta(angle).requires_grad_(True), torch.randn(BLOCKS, 8, 8)
    figures(
        f"exponential of 12288 blocks, forward and backward, angle {angle:.3g}",
        {
            "so8t": lambda: torch.autograd.grad(exp_so8(theta), theta, weight),
            "torch.matrix_exp": lambda: torch.autograd.grad(torch.matrix_exp(skew(theta)), theta, weight),
        },
        rounds=9,
        bar=bar,
    )


class _End(torch.autograd.Function):
    """x, g -> the first channel of x; dL/dx is always g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor) -> Tensor:
        ctx.g = g
        return x[..., :1].clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.g, None


class End(nn.Linear):
    """A linear layer that takes no time and has a ready gradient, so that only the adapter on it is measured."""

    def forward(self, x: Tensor) -> Tensor:
        return _End.apply(x, self.g)  # type: ignore[no-untyped-call, no-any-return]


class Projections(nn.Module):
    """Layers in which only the adapter on `o_proj` takes time; each layer has its own input and gradient."""

    def __init__(self, tokens: int, width: int, layers: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(layers))
        self.xs = [torch.randn(1, tokens, width).to(dtype).requires_grad_() for _ in range(layers)]
        for layer in self.layers:
            layer.o_proj = End(width, 8, bias=False, dtype=dtype)
            layer.o_proj.g = torch.randn(1, tokens, width).to(dtype)

    def forward(self) -> Tensor:
        return torch.stack([layer.o_proj(x) for layer, x in zip(self.layers, self.xs, strict=True)]).sum()  # type: ignore[operator]


def _adapted(config: PeftConfig, tokens: int, width: int, layers: int, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
    """The model, and the inputs that have a gradient."""
    plain = Projections(tokens, width, layers, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(plain, config)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return model, plain.xs


def _step(model: Any, xs: list[Tensor]) -> Callable[[], Any]:
    """Forward, backward to the inputs and the parameters, and the optimiser's write, after which cached rotations are
    old."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        torch.autograd.grad(model(), [*xs, *parameters])
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(1.0001)

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("width", "layers", "bar"), [(3072, 2, 4.0), (576, 8, 3.0)])
def bench_adapter_training(
    figures: Any, absent: Any, quick: bool, width: int, layers: int, bar: float, dtype: torch.dtype
) -> None:
    if quick and dtype != torch.bfloat16:
        absent(f"adapter, training step, 2048 x {width} float32", "only in a whole run, beside bfloat16's")
    configs = {"so8t": SO8TConfig(), "PEFT OFT": OFTConfig(**OFT)}
    figures(
        f"adapter, training step, {layers} layers, 2048 x {width} {dtype}".replace("torch.", ""),
        {name: _step(*_adapted(config, 2048, width, layers, dtype)) for name, config in configs.items()},
        rounds=15,
        bar=bar if dtype == torch.bfloat16 else None,
    )


@pytest.mark.parametrize(("tokens", "width", "bar"), [(2048, 3072, 4.0), (2048, 576, 4.0), (1, 3072, 2.0)])
def bench_adapter_inference(figures: Any, tokens: int, width: int, bar: float) -> None:
    ours, oft = (
        _adapted(config, tokens, width, 4, torch.bfloat16)[0].eval() for config in (SO8TConfig(), OFTConfig(**OFT))
    )
    repeat = range(100 if tokens == 1 else 1)
    with torch.no_grad():
        figures(
            f"adapter, inference, 4 layers, {tokens} x {width} bfloat16",
            {"so8t": lambda: [ours() for _ in repeat], "PEFT OFT": lambda: [oft() for _ in repeat]},
            rounds=21,
            bar=bar,
        )


def llama(layers: int = 6, dtype: torch.dtype = DTYPE) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).to(dtype)


@functools.cache
def method(name: str, layers: int = 6, dtype: torch.dtype = DTYPE) -> nn.Module:
    """The frozen base, or a method on its o_proj. The embeddings need a gradient, so that all methods run backward."""
    configs: dict[str, PeftConfig] = {
        "so8t": SO8TConfig(init_scale=0.05),
        "LoRA r=8": LoraConfig(r=8, target_modules=["o_proj"]),
        "PEFT OFT": OFTConfig(**OFT),
    }
    model: Any = llama(layers, dtype).requires_grad_(False)
    if name != FLOOR:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(model, configs[name])
    model.enable_input_require_grads()
    return model  # type: ignore[no-any-return]


def bench_whole_training_step(figures: Any, quick: bool) -> None:
    tokens = 64 if quick else 1024
    ids = torch.randint(0, 4096, (2, tokens // 2), generator=torch.Generator().manual_seed(0))

    def run(model: nn.Module) -> Callable[[], Any]:
        parameters = [p for p in model.parameters() if p.requires_grad]

        def step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            with torch.no_grad():
                for parameter in parameters:
                    parameter.mul_(1.0001)
                    parameter.grad = None

        return step

    floor = run(method(FLOOR))
    for name, bar in (("so8t", None if quick else 1.04), ("LoRA r=8", None), ("PEFT OFT", None)):
        figures(
            f"whole training step, Llama 768 x 6 {NAME}, {tokens} tokens: {name}",
            {name: run(method(name)), FLOOR: floor},
            rounds=11,
            bar=bar,
            lower_is_better=True,
        )


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Bytes that the graph of `run`'s result keeps for the backward, without parameters; each storage counts once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    run()  # the first pass also computes the rotation, for many passes
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    assert result.requires_grad
    return sum(kept.values())


def bench_saved_activations(record: Any) -> None:
    """Bytes a token, channel and layer that the backward needs more than the frozen base's, counted in one layer;
    always in bfloat16, because the base keeps float32 states itself, which an adapter would use again."""
    ids = torch.randint(0, 4096, (1, 512), generator=torch.Generator().manual_seed(0))

    def saved(name: str) -> int:
        model = method(name, 1, torch.bfloat16)
        return saved_bytes(lambda: model(input_ids=ids).logits)

    base = saved(FLOOR)
    for name, bar in (("so8t", 2.2), ("LoRA r=8", None), ("PEFT OFT", None)):
        per = (saved(name) - base) / (512 * 768)
        title = f"saved activations, bytes a token, channel and layer, bfloat16: {name}"
        record(measured(title, per, bar=bar, peer=FLOOR))
