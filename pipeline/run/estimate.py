"""Estimate time, memory and disk of each step from the configuration, before a run starts.

Known: parameters (the model is built without memory), mean length of sampled rows, bytes of every file type. Estimated:

    a forward pass              2 P floating-point operations a token
    the backward through a frozen base   2 P, and 2 P more where activations are computed again
    state of training           16 bytes a trainable parameter: weight, gradient, two moments, all float32
    activations                 12 H + 4 I numbers a token and layer; with checkpointing H, and one layer's at a time
    logits                      (a + 12) bytes a token and vocabulary entry: the logits and three float32 copies
P parameters, H hidden size, I intermediate size, a bytes of an activation. A short matrix product gives the speed;
constants below give a process's own memory and the speed of disks and quantisers. tests/pipeline/run/test_plan.py
compares the estimates with measured runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from pipeline.config import RunConfig, TrainConfig
from verification.engines.threads import torch_threads
from verification.logit_parity.text import BASE_CHUNKS

RUNTIME = 0.7e9  # bytes of a process that has imported torch, transformers and peft; measured 0.5 to 0.8
STARTED = 3.0  # seconds until such a process works, for example upstream's converter
DISK = 0.4e9  # bytes a second read, changed, written and hashed
QUANTISED = {"Q8_0": 3e8}  # weights a second and thread; the others:
SLOWLY = 1.5e7  # K-quants and below search for their scales
EFFICIENCY = 0.5  # speed of a whole model as a part of a matrix product's; measured 0.4 to 0.65
DECODING = 5.0  # cost of a token decoded alone, in tokens of a long prompt
CELLS = 1500  # tokens of the cells' passages, for each file
BAKE_PASSES = 10  # passes over a chunk in the legs bake and controls
MIXED = {
    "Q4_K_M": 0.62,
    "Q5_K_M": 0.72,
    "Q4_K_S": 0.58,
    "Q5_K_S": 0.70,
    "Q3_K_M": 0.49,
    "Q3_K_L": 0.54,
}  # bytes a weight


@dataclass(frozen=True)
class Shape:
    """The sizes of a model and its adapter that the estimates need."""

    parameters: int
    linear: int  # parameters of linear layers except the head, which a quantised base holds in fewer bits
    trainable: int
    largest: int  # parameters of the largest tensor
    folded: int  # parameters of the largest linear layer
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    kv_bytes: int  # bytes of a token in llama.cpp's float16 cache
    stored: float  # bytes of a parameter in the checkpoint
    name: str


@dataclass(frozen=True)
class Cost:
    """One step's estimate in seconds and bytes; `disk` counts the files that stay, `gpu` is 0 without a GPU."""

    seconds: float = 0.0
    host: float = 0.0  # bytes at the peak
    gpu: float = 0.0
    disk: float = 0.0


@dataclass(frozen=True)
class Machine:
    """Speed of the device that trains, floating-point operations a second, and of the CPU that verifies."""

    device: float
    cpu: float
    cuda: bool
    threads: int


def shape_of(directory: Path, settings: TrainConfig, *, gguf: str | None = None) -> Shape:
    """Build the model and its adapter without memory.

    Raises:
        InputError: a layer, a target or a width that does not exist.
    """
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    from pipeline.train.fit import adapter_config
    from so8t_core import attach, trainable_counts

    options = {"gguf_file": gguf} if gguf else {}
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = [parameter.numel() for parameter in model.parameters()]
    head = model.get_output_embeddings()
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    with torch.device("meta"):
        attach(model, adapter_config(settings))
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    dtype = getattr(config, "dtype", None)
    return Shape(
        parameters=sum(sizes),
        linear=sum(linear),
        trainable=trainable_counts(model)[0],
        largest=max(sizes),
        folded=max(linear),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        kv_bytes=4 * text.num_hidden_layers * kept * width,
        stored=dtype.itemsize if isinstance(dtype, torch.dtype) else 2,
        name=type(model).__name__,
    )


def this_machine(threads: int | None) -> Machine:
    """Time a matrix product on the CPU (with the run's threads) and on the GPU, where there is one."""
    with torch_threads(threads) as count:
        cpu = _speed(torch.device("cpu"), torch.float32, 384)  # about a millisecond, to fit between two interruptions
    cuda = torch.cuda.is_available()
    device = _speed(torch.device("cuda"), torch.bfloat16, 4096) if cuda else cpu
    return Machine(device, cpu, cuda, count)


def _speed(device: torch.device, dtype: torch.dtype, n: int) -> float:
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = float("inf")
    began = time.monotonic()
    while time.monotonic() - began < 0.3:
        started = time.monotonic()
        (a @ a).sum().item()  # .item() waits for the GPU
        best = min(best, time.monotonic() - started)
    return 2 * n**3 / best


def bytes_a_weight(kind: str) -> float:
    """Bytes of a weight in a GGUF file type; for mixed K-quants, the share of larger types is that of a 3.8 B model."""
    if kind in MIXED:
        return MIXED[kind]
    stem = kind.rsplit("_", 1)[0] if kind.endswith(("_S", "_M", "_L")) else kind
    if stem not in GGMLQuantizationType.__members__:
        return 1.0
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[stem]]
    return float(size / block)


def costs(config: RunConfig, shape: Shape, machine: Machine, *, rows: int, tokens: float) -> dict[str, Cost]:
    """Every step's estimate.

    Args:
        rows: number of training and held-out rows.
        tokens: mean number of tokens in a row.
    """
    kinds = [kind.upper() for kind in config.convert.types]
    baked_bytes = shape.parameters * (
        getattr(torch, config.model.dtype).itemsize if config.model.dtype else shape.stored
    )
    files = {kind: shape.parameters * bytes_a_weight(kind) for kind in kinds}
    return {
        "base": Cost(),
        "data": Cost(2 + rows / 300, RUNTIME, 0, rows * tokens * 12),
        "train": training(config.train, shape, machine, longest=config.data.max_tokens, tokens=tokens),
        "bake": _baking(config.train, shape, machine, baked_bytes),
        "convert": _converting(kinds, files, shape, machine, baked_bytes),
        "answers": _answering(config, shape, machine, tokens),
        "verify": _verifying(config, kinds, files, shape, machine),
    }


def training(
    settings: TrainConfig, shape: Shape, machine: Machine, *, longest: int, tokens: float, width: int | None = None
) -> Cost:
    """The estimate of the training: memory for a batch of the longest rows, time for rows of mean length.

    Args:
        width: bytes of a weight and of an activation; None = bfloat16 on a GPU, else float32.
    """
    width = width or (2 if machine.cuda else 4)
    packed = {"none": float(width), "8bit": 1.0, "4bit": 0.56}[settings.quantization]
    weights = shape.linear * packed + (shape.parameters - shape.linear) * width
    state = 16.0 * shape.trainable
    batch = settings.batch_size * longest
    a_layer = (12 * shape.hidden + 4 * shape.intermediate) * width
    if settings.gradient_checkpointing:
        activations = batch * (shape.layers * shape.hidden * width + a_layer)
    else:
        activations = batch * shape.layers * a_layer
    logits = batch * shape.vocabulary * (width + 12)
    device = weights + state + activations + logits
    passes = 3 if settings.gradient_checkpointing else 2
    steps = settings.steps + settings.so8t_only_steps
    trained = steps * settings.batch_size * settings.gradient_accumulation * tokens
    looks = 3 + settings.steps / settings.checkpoint_every + (3 if settings.so8t_only_steps else 0)
    evaluated = looks * settings.heldout_rows * tokens
    work = 2.0 * shape.parameters * (passes * trained + evaluated)
    loads = shape.parameters * shape.stored / DISK * (2 if settings.so8t_only_steps else 1)
    return Cost(
        seconds=STARTED + loads + work / (machine.device * EFFICIENCY),
        host=RUNTIME + (3e9 if machine.cuda else device),  # with a GPU: its runtime, and one shard on its way to it
        gpu=device if machine.cuda else 0.0,
        disk=4.0 * shape.trainable + 2 * 12.0 * shape.trainable,  # the adapter, and two checkpoints while it trains
    )


def _baking(settings: TrainConfig, shape: Shape, machine: Machine, written: float) -> Cost:
    rank = settings.lora.r if settings.lora else 0
    fold = 2.0 * shape.linear * (rank + 8)  # B A and the product with R, in float64: half the speed
    seconds = 2 * shape.parameters * shape.stored / DISK + fold / (machine.cpu / 2 * EFFICIENCY)
    return Cost(seconds, RUNTIME + 2 * shape.stored * shape.folded, 0, written)  # a weight before and after


def _converting(kinds: list[str], files: dict[str, float], shape: Shape, machine: Machine, read: float) -> Cost:
    seconds = 0.0
    for kind in kinds:
        if kind in ("F32", "F16", "BF16"):
            seconds += 2 * STARTED + (read + 3 * files[kind]) / DISK
        else:
            seconds += quantising(kind, shape, machine) + 2 * files[kind] / DISK
    return Cost(seconds, RUNTIME + 2 * shape.stored * shape.largest, 0, sum(files.values()))


def quantising(kind: str, shape: Shape, machine: Machine) -> float:
    """Seconds that llama.cpp's quantiser takes."""
    return shape.parameters * (1 / (QUANTISED.get(kind, SLOWLY) * machine.threads) + 2 / DISK)


def _answering(config: RunConfig, shape: Shape, machine: Machine, tokens: float) -> Cost:
    settings = config.answers
    if not settings.prompts:
        return Cost()
    kind = settings.type.upper()
    alone = DECODING / min(settings.parallel, 4)  # tokens decoded together read the weights once
    work = 2 * settings.prompts * (tokens / 2 + alone * settings.max_new_tokens) * 2.0 * shape.parameters
    oracle = shape.parameters * (2 + bytes_a_weight(kind))
    cache = settings.parallel * (tokens + settings.max_new_tokens) * shape.kv_bytes
    made = 2 * STARTED + 2 * oracle / DISK + quantising(kind, shape, machine)
    return Cost(made + work / (machine.cpu * EFFICIENCY), RUNTIME + shape.parameters * 2.2 + cache, 0, oracle)


def _verifying(config: RunConfig, kinds: list[str], files: dict[str, float], shape: Shape, machine: Machine) -> Cost:
    settings = config.verify
    scored = settings.chunks * settings.n_ctx
    loads = 6 * shape.parameters * 4 / DISK
    forward = 2 * scored + CELLS + BAKE_PASSES * settings.n_ctx  # the reference, the baked model, the bake's legs
    forward += scored + CELLS  # the reference file's own pass
    forward += len(kinds) * (scored + 2 * CELLS)
    own = {"F16": shape.parameters * 2.0, **files}  # the oracle's files of the checkpoint
    again = own if settings.base_damage else {}
    if config.answers.prompts:  # the step answers has made two files of the base
        again = {kind: size for kind, size in again.items() if kind not in ("F16", config.answers.type.upper())}
    disk = sum(own.values()) + sum(again.values())
    made = 2 * STARTED + 2 * disk / DISK
    made += sum(quantising(kind, shape, machine) for kind in [*own, *again] if kind not in ("F32", "F16", "BF16"))
    if settings.base_damage:
        forward += min(settings.chunks, BASE_CHUNKS) * settings.n_ctx * len(kinds)
    spool = (scored / 2 + CELLS) * shape.vocabulary * 4.0
    logits = settings.n_ctx * shape.vocabulary * 4.0 * 4
    work = 2.0 * shape.parameters * forward / (machine.cpu * EFFICIENCY)
    return Cost(
        2 * STARTED + loads + made + work,
        RUNTIME + 4.0 * shape.parameters + 8.0 * shape.largest + logits,
        0,
        disk + spool,
    )


def mean_length(config: RunConfig, tokenizer: Any | None) -> float:
    """Mean tokens of a row, from the first rows of every source and of the generator; else half of `max_tokens`."""
    from pipeline.data.generator import generate
    from pipeline.data.masking import render_row
    from pipeline.data.rows import to_think_row
    from pipeline.data.source_rows import read_rows
    from pipeline.data.think_form import RowError, chat, format_assistant

    lengths: list[int] = []
    wanted = config.data.generator if tokenizer is not None else None
    if wanted is not None:
        for row in generate(min(wanted.rows, 24), 0, wanted.languages, config.seed)[0]:
            answer = {"role": "assistant", "content": format_assistant(row["steps"], row["answer"])}
            lengths.append(len(render_row(tokenizer, [*chat(row["prompt"]), answer]).input_ids))
    for name in config.data.sources:
        if tokenizer is None or not Path(name).exists():
            continue  # a URL: its rows are not here
        for _, found in islice(read_rows(Path(name)), 24):
            try:
                if isinstance(found, dict):
                    messages = to_think_row(found, family="sample").messages
                    lengths.append(len(render_row(tokenizer, messages).input_ids))
            except RowError:
                continue  # the data step counts such rows
    mean = sum(lengths) / len(lengths) if lengths else config.data.max_tokens / 2
    return min(mean, float(config.data.max_tokens))
