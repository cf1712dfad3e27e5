"""The usual ways to fine-tune, on one random model: base, LoRA, QLoRA, OFT, SO8T, SO8T + LoRA.

Shapes: the exact Phi-3.5-mini (3.8B), and a tiny model of the same architecture, which tests the code on a CPU.
LoRA has rank 16 on all four projections, as users choose it. The rotations are on `o_proj`; PEFT's OFT has its defaults
and the same block of 8. Every method's floor is the frozen base with a gradient through all layers, in the same model:
`floor` switches the adapter off, so that only one model is in memory and both runs take turns.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from torch import Tensor, nn
from transformers import Phi3Config, Phi3ForCausalLM

from so8t_core import SO8TConfig

METHODS = ("base", "LoRA", "QLoRA", "PEFT OFT", "SO8T", "SO8T + LoRA")
PHI35 = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 131072,
}
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
}
_PROJECTIONS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
_LORA = {"r": 16, "lora_alpha": 32, "target_modules": _PROJECTIONS}


def build(method: str, shape: dict[str, int], device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """A random Phi-3 of this shape with the method's adapter on it, ready to train.

    Raises:
        ValueError: `method` is not in METHODS.
    """
    if method not in METHODS:
        raise ValueError(f"{method!r} is not one of {', '.join(METHODS)}")
    config = Phi3Config(
        **shape, original_max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False
    )
    model: Any
    with _default_dtype(dtype), torch.device(device):
        torch.manual_seed(0)
        model = Phi3ForCausalLM(config).requires_grad_(False)
    if method == "QLoRA":
        _to_nf4(model, device, dtype)
    adapters: dict[str, Any] = {
        "LoRA": lambda: LoraConfig(**_LORA),
        "QLoRA": lambda: LoraConfig(**_LORA),
        "PEFT OFT": lambda: OFTConfig(r=0, oft_block_size=8, target_modules=["o_proj"]),
        "SO8T": lambda: SO8TConfig(init_scale=0.05),
        "SO8T + LoRA": lambda: SO8TConfig(init_scale=0.05, lora=_LORA),
    }
    if method in adapters:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(model, adapters[method]())
    model.enable_input_require_grads()
    return model.to(device).train()  # type: ignore[no-any-return]


def _to_nf4(model: nn.Module, device: str, dtype: torch.dtype) -> None:
    """Make every projection a 4-bit linear of bitsandbytes; head and embedding stay, as with its loader."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in _PROJECTIONS:
            assert isinstance(module, nn.Linear)
            packed = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
            )
            packed.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            model.set_submodule(name, packed.to(device))
            module.weight = None  # type: ignore[assignment]
    model.is_loaded_in_4bit = True  # type: ignore[assignment]


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def training_step(model: Any, ids: Tensor) -> Callable[[], None]:
    """Forward, backward and an AdamW step over (batch, tokens) ids."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4) if parameters else None

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        if optimiser is not None:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        synchronise(ids)

    return step


def floor(model: Any, ids: Tensor) -> Callable[[], None]:
    """The same step with the adapter switched off: the cost of the frozen base alone."""

    def step() -> None:
        off = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
        with off:
            model(input_ids=ids, labels=ids).loss.backward()
        synchronise(ids)

    return step


class Prepared(NamedTuple):
    """A method that is ready for timing."""

    step: Callable[[], None]
    floor: Callable[[], None]
    megabytes: float | None  # peak device memory of two steps, with weights and optimiser; None on a CPU


def prepare(method: str, shape: dict[str, int], tokens: int, device: str, dtype: torch.dtype) -> Prepared:
    """Build the model, take two steps, and measure the device's peak memory.

    Raises:
        torch.OutOfMemoryError: the device has too little memory for the method.
    """
    gc.collect()
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
    model, ids = build(method, shape, device, dtype), ids_for(shape, tokens, device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step = training_step(model, ids)
    step()
    step()
    megabytes = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else None
    return Prepared(step, floor(model, ids), megabytes)


def synchronise(tensor: Tensor) -> None:
    """Wait for the device; does nothing on a CPU."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


def ids_for(shape: dict[str, int], tokens: int, device: str) -> Tensor:
    """(1, tokens) random ids."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, shape["vocab_size"], (1, tokens), generator=generator).to(device)
