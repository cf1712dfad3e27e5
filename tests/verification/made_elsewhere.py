"""Files of one reference as other people's tools write them: healthy, and not this machine's bytes.

Makers: llama.cpp with importance matrices that nobody hands over (whole, partial, of another text), mixes of types per
tensor, one type throughout, other float files in between; a GPTQ and a rounding search in the manner of AutoRound, on
the model's real activations, written as Q4_0 and Q4_K; another processor's arithmetic; another quantiser's Q8_0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from verification.engines.quantise import quantise, quantised_bytes
from verification.gguf.cache import Memory
from verification.gguf.reader import GGUFFile, GGUFTensor, read_gguf
from verification.gguf.writer import Raw
from verification.reference.checkpoint import Checkpoint
from verification.weight_parity.expected import expected_values

Array = npt.NDArray[np.float32]
VOCAB = 512
SCALE_AT = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}  # where a block keeps its float16 scale; elsewhere at 0


@dataclasses.dataclass(frozen=True)
class Source:
    """A reference, its F16 file and the inputs that its modules see, by GGUF tensor name (positions, channels)."""

    reference: Path
    floats: Path
    inputs: dict[str, Array]
    memory: Memory = dataclasses.field(default_factory=Memory)  # of tensors examined against this reference

    @cached_property
    def file(self) -> GGUFFile:
        return read_gguf(self.floats)


def small_llama(directory: Path, *, other: bool = False) -> Path:
    """A checkpoint of three layers, width 256, with Gaussian and heavy-tailed weights in bfloat16.

    Args:
        other: a model of other sizes, with Laplace weights whose channels differ by a factor of up to ten.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(8 if other else 3)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768 if other else 512,
        num_hidden_layers=3,
        num_attention_heads=4 if other else 8,
        num_key_value_heads=2 if other else 4,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.3, 1.7)  # uneven channels, as trained norms give them
            elif other:
                laplace = torch.distributions.Laplace(0.0, 0.7).sample(weight.shape)
                channels = torch.exp(0.6 * torch.randn(1, weight.shape[1]))
                weight.copy_(laplace * channels * weight.shape[1] ** -0.5)
            else:
                heavy = torch.distributions.StudentT(5.0).sample(weight.shape)
                weight.copy_((heavy if "layers.1" in name else torch.randn(weight.shape)) * weight.shape[1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(directory)
    return directory


def as_gguf(checkpoint: Path, target: Path) -> Path:
    """The checkpoint as an F16 file with a vocabulary of numbers: all that quantisers look at."""
    from gguf import GGUFWriter
    from gguf.constants import MODEL_ARCH
    from gguf.tensor_mapping import get_tensor_name_map

    found = Checkpoint(checkpoint)
    config, names = found.config, get_tensor_name_map(MODEL_ARCH.LLAMA, found.config["num_hidden_layers"])
    writer = GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(1)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["t 0"])
    for name in found:
        target_name = names.get_name(name, try_suffixes=(".weight",))
        assert target_name is not None
        values = expected_values(target_name, name, found, "llama")
        writer.add_tensor(target_name, values.astype(np.float16 if values.ndim > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def activations(model: Any, tokens: npt.NDArray[np.int64], modules: dict[str, str]) -> dict[str, Array]:
    """Inputs of modules on passages (passages, positions); `modules`: GGUF name -> module name."""
    import torch

    found: dict[str, Array] = {}
    known = dict(model.named_modules())

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            found[name] = inputs[0].detach().float().reshape(-1, inputs[0].shape[-1]).numpy().copy()

        return hook

    hooks = [known[module].register_forward_pre_hook(keep(name)) for name, module in modules.items() if module in known]
    with torch.no_grad():
        model(torch.from_numpy(np.asarray(tokens, dtype=np.int64)), use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def matrix(source: Source, spread: float, seed: int) -> dict[str, Array]:
    """A log-normal importance matrix for every matrix but embedding and head."""
    rng = np.random.default_rng(seed)
    return {
        name: np.exp(spread * rng.standard_normal(tensor.shape[-1])).astype(np.float32)
        for name, tensor in source.file.tensors.items()
        if len(tensor.shape) == 2 and name.startswith("blk.")
    }


def own_text(source: Source) -> dict[str, Array]:
    """The importance matrix of the model's own activations."""
    return {name: (x**2).mean(axis=0).astype(np.float32) for name, x in source.inputs.items()}


def rewritten(path: Path, target: Path, change: Callable[[str, str, bytes], tuple[str, bytes] | None]) -> Path:
    """Copy a file; `change(name, type, bytes)` gives a tensor's new type and bytes, or None to leave it."""
    raw = Raw.read(path)
    for info in raw.tensors:
        new = change(info.name, GGMLQuantizationType(info.kind).name, info.data)
        if new is not None:
            info.kind, info.data = int(GGMLQuantizationType[new[0]]), new[1]
    return raw.write(target)


def at_types(source: Source, path: Path, target: Path, types: Callable[[str, str], str]) -> Path:
    """A copy whose matrices have the types that `types(name, present type)` gives, quantised by llama.cpp."""
    tensors = source.file.tensors

    def change(name: str, kind: str, data: bytes) -> tuple[str, bytes] | None:
        wanted = types(name, kind)
        if wanted == kind or len(tensors[name].shape) < 2:
            return None
        raw = quantised_bytes(tensors[name].values(), wanted)
        assert raw is not None
        return wanted, raw.tobytes()

    return rewritten(path, target, change)


def last_bits(path: Path, target: Path, *, share: float, seed: int = 0) -> Path:
    """Another processor's arithmetic: the scale of a share of all blocks moved by its last bit, up or down."""
    rng = np.random.default_rng(seed)

    def change(name: str, kind: str, data: bytes) -> tuple[str, bytes] | None:
        if kind in ("F32", "F16", "BF16"):
            return None
        size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
        blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, size).copy()
        at = SCALE_AT.get(kind, 0)
        scales = np.ascontiguousarray(blocks[:, at : at + 2]).view("<u2").astype(np.int64)[:, 0]
        moved = rng.random(len(blocks)) < share
        step = rng.choice([-1, 1], size=len(blocks))
        scales = np.where(moved & ((scales & 0x7FFF) > 1), scales + step, scales)
        blocks[:, at : at + 2] = scales.astype("<u2")[:, None].view(np.uint8)
        return kind, blocks.tobytes()

    return rewritten(path, target, change)


def rounded_scale_first(source: Source, path: Path, target: Path) -> Path:
    """A Q8_0 quantiser that rounds the scale to float16 before it divides by it, as some GPU kernels do."""
    tensors = source.file.tensors

    def change(name: str, kind: str, data: bytes) -> tuple[str, bytes] | None:
        if kind != "Q8_0":
            return None
        blocks = tensors[name].values().reshape(-1, 32)
        scale = (np.abs(blocks).max(axis=1) / 127).astype(np.float16)
        safe = np.where(scale > 0, scale, 1).astype(np.float32)[:, None]
        codes = np.clip(np.rint(blocks / safe), -127, 127).astype(np.int8)
        return kind, np.concatenate([scale[:, None].view(np.uint8), codes.view(np.uint8)], axis=1).tobytes()

    return rewritten(path, target, change)


def by_gguf(source: Source, path: Path, target: Path, to: str) -> Path:
    """Matrices by the gguf package's own quantiser, written in numpy: another program than llama.cpp's."""
    tensors = source.file.tensors

    def change(name: str, kind: str, data: bytes) -> tuple[str, bytes] | None:
        if kind in ("F32", "F16", "BF16"):
            return None
        return to, quantize(tensors[name].values(), GGMLQuantizationType[to]).tobytes()

    return rewritten(path, target, change)


def again(source: Source, path: Path, target: Path) -> Path:
    """Quantised from a Q8_0 file of the reference, as people do who have no float file."""
    tensors = source.file.tensors

    def change(name: str, kind: str, data: bytes) -> tuple[str, bytes] | None:
        if kind not in ("Q4_K", "Q6_K"):
            return None
        eight = quantised_bytes(tensors[name].values(), "Q8_0")
        assert eight is not None
        raw = quantised_bytes(GGUFTensor("", tensors[name].shape, "Q8_0", eight).values(), kind)
        assert raw is not None
        return kind, raw.tobytes()

    return rewritten(path, target, change)


Grid = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]  # step and lowest value of every weight's code 0


def q4_grid(kind: str, data: bytes, shape: tuple[int, ...]) -> Grid:
    """Step and value of code 0 of every weight, of Q4_0 or Q4_K blocks."""
    if kind == "Q4_0":
        blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, 18)
        step = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float64).repeat(32, axis=1)
        return step.reshape(shape), (-8 * step).reshape(shape)
    blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, 144)
    d, least = (np.ascontiguousarray(blocks[:, a : a + 2]).view("<f2").astype(np.float64) for a in (0, 2))
    s = blocks[:, 4:16].astype(np.int64)
    scales = np.concatenate([s[:, 0:4] & 63, (s[:, 8:12] & 15) | (s[:, 0:4] >> 6 << 4)], axis=1)
    mins = np.concatenate([s[:, 4:8] & 63, (s[:, 8:12] >> 4) | (s[:, 4:8] >> 6 << 4)], axis=1)
    return (d * scales).repeat(32, axis=1).reshape(shape), (-least * mins).repeat(32, axis=1).reshape(shape)


def q4_bytes(kind: str, data: bytes, codes: npt.NDArray[np.int64]) -> bytes:
    """The blocks with other codes (0 to 15), their scales kept."""
    if kind == "Q4_0":
        blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, 18).copy()
        half = codes.reshape(-1, 2, 16)
        blocks[:, 2:] = (half[:, 0] | half[:, 1] << 4).astype(np.uint8)
    else:
        blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, 144).copy()
        pairs = codes.reshape(-1, 4, 2, 32)
        blocks[:, 16:] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).astype(np.uint8).reshape(-1, 128)
    return blocks.tobytes()


def gptq(W: Array, X: Array, grid: Grid, *, damping: float = 0.01) -> npt.NDArray[np.int64]:
    """Codes by error feedback in the order of the columns (Frantar et al., GPTQ, algorithm 1), scales given."""
    H = X.T.astype(np.float64) @ X / len(X)
    H += damping * np.mean(np.diag(H)) * np.eye(len(H))
    upper = np.linalg.cholesky(np.linalg.inv(H)).T
    work, codes = W.astype(np.float64).copy(), np.zeros(W.shape, dtype=np.int64)
    step, least = grid
    for j in range(W.shape[1]):
        safe = np.where(step[:, j] == 0, 1, step[:, j])
        codes[:, j] = np.clip(np.rint((work[:, j] - least[:, j]) / safe), 0, 15)
        error = (work[:, j] - (codes[:, j] * step[:, j] + least[:, j])) / upper[j, j]
        work[:, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
    return codes


def rounding_search(W: Array, X: Array, grid: Grid, *, rounds: int = 60) -> npt.NDArray[np.int64]:
    """Codes by signed gradient steps on each weight's rounding offset (Cheng et al., SignRound), scales given."""
    H = X.T.astype(np.float64) @ X / len(X)
    step, least = grid
    safe = np.where(step == 0, 1, step)
    exact, offset = (W - least) / safe, np.zeros(W.shape)
    best, lowest = np.clip(np.rint(exact), 0, 15), np.inf
    for number in range(rounds):
        codes = np.clip(np.rint(exact + offset), 0, 15)
        E = codes * step + least - W
        gradient = E @ H
        loss = float(np.vdot(gradient, E))
        if loss < lowest:
            best, lowest = codes, loss
        offset = np.clip(offset - 0.02 * (1 - number / rounds) * np.sign(gradient) * np.sign(step), -0.5, 0.5)
    return best.astype(np.int64)


def searched(
    source: Source, path: Path, target: Path, search: Callable[[Array, Array, Grid], npt.NDArray[np.int64]]
) -> Path:
    """A copy whose Q4_0 and Q4_K matrices have their codes by `search` on the module's own inputs."""
    tensors = source.file.tensors

    def change(name: str, kind: str, data: bytes) -> tuple[str, bytes] | None:
        if kind not in ("Q4_0", "Q4_K") or name not in source.inputs:
            return None
        W = tensors[name].values()
        return kind, q4_bytes(kind, data, search(W, source.inputs[name], q4_grid(kind, data, W.shape)))

    return rewritten(path, target, change)


def files(source: Source, root: Path, *, every: bool) -> Iterator[tuple[str, Path]]:
    """Files by their makers, one at a time: each is overwritten by the next.

    `every`: all types, matrices and shares of last bits; otherwise one of each kind of maker, at Q4_K_M mostly.
    """
    whole, narrow = matrix(source, 1.0, 1), matrix(source, 0.5, 3)
    partial = {name: values for name, values in whole.items() if not name.startswith("blk.1.")}
    matrices = {
        "own text": own_text(source),
        "whole": whole,
        "narrow": narrow,
        "partial": partial,
        "wrong language": matrix(source, 1.5, 2),
    }
    kinds = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_M", "Q2_K", "IQ4_XS", "Q4_0", "Q5_1", "Q5_K_S", "Q5_0", "Q4_1", "IQ4_NL")
    for kind in (*kinds, "Q3_K_L") if every else ("Q4_K_M",):
        for name, values in matrices.items() if every else list(matrices.items())[1:4:2]:
            yield f"imatrix {name} {kind}", quantise(source.floats, root / "x.gguf", kind, imatrix=values)
    for kind in ("IQ2_XXS", "IQ3_XXS") if every else ():
        yield f"imatrix whole {kind}", quantise(source.floats, root / "x.gguf", kind, imatrix=matrix(source, 1.0, 4))
    plain = {kind: quantise(source.floats, root / f"{kind}.gguf", kind) for kind in ("Q4_K_M", "Q4_0", "Q8_0", "Q6_K")}
    yield (
        "_L",
        at_types(
            source,
            plain["Q4_K_M"],
            root / "x.gguf",
            lambda name, kind: "Q8_0" if name in ("token_embd.weight", "output.weight") else kind,
        ),
    )
    yield (
        "head kept in F16",
        at_types(
            source, plain["Q4_K_M"], root / "x.gguf", lambda name, kind: "F16" if name == "output.weight" else kind
        ),
    )
    yield (
        "embedding in F16, Q8_0",
        at_types(
            source, plain["Q8_0"], root / "x.gguf", lambda name, kind: "F16" if name == "token_embd.weight" else kind
        ),
    )
    yield "pure", at_types(source, plain["Q4_K_M"], root / "x.gguf", lambda name, kind: "Q4_K")
    yield (
        "another type per layer",
        at_types(
            source,
            plain["Q4_K_M"],
            root / "x.gguf",
            lambda name, kind: {"blk.0": "Q5_K", "blk.1": "IQ4_XS"}.get(name[:5], kind),
        ),
    )
    for kind, path in plain.items() if every else [("Q4_K_M", plain["Q4_K_M"])]:
        for share in (0.001, 0.05, 1.0) if kind == "Q8_0" else (0.02, 1.0):
            yield f"last bits {share:g} {kind}", last_bits(path, root / "x.gguf", share=share)
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0") if every else ("Q5_1",):
        yield f"gguf-py {kind}", by_gguf(source, plain["Q8_0"], root / "x.gguf", kind)
    yield "from a Q8_0", again(source, plain["Q4_K_M"], root / "x.gguf")
    yield "rounded scale first", rounded_scale_first(source, plain["Q8_0"], root / "x.gguf")
    for kind in ("Q4_0", "Q4_K_M"):
        yield f"GPTQ {kind}", searched(source, plain[kind], root / "x.gguf", gptq)
        if every or kind == "Q4_K_M":
            yield f"rounding search {kind}", searched(source, plain[kind], root / "x.gguf", rounding_search)


def unseen(source: Source, root: Path) -> Iterator[tuple[str, Path]]:
    """Thirty files that no threshold was looked at with: the other model, other matrices, other types."""
    matrices = {
        "own text": own_text(source),
        "spread 0.8": matrix(source, 0.8, 41),
        "spread 1.3": matrix(source, 1.3, 42),
    }
    wide, narrow = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q3_K_S", "Q2_K", "IQ4_XS"), ("Q5_0", "Q4_1", "IQ4_NL")
    for kind in (*wide, *narrow):
        for name in matrices if kind in wide[:4] else ("own text", "spread 1.3"):
            yield f"imatrix {name} {kind}", quantise(source.floats, root / "x.gguf", kind, imatrix=matrices[name])
    for kind in ("IQ3_XXS", "IQ3_S", "IQ2_XXS"):
        yield (
            f"imatrix own text {kind}",
            quantise(source.floats, root / "x.gguf", kind, imatrix=matrix(source, 0.8, 43)),
        )
    plain = {kind: quantise(source.floats, root / f"{kind}.gguf", kind) for kind in ("Q4_K_M", "Q4_0", "Q8_0")}
    for kind in ("Q4_0", "Q4_K_M"):
        yield f"GPTQ {kind}", searched(source, plain[kind], root / "x.gguf", gptq)
        yield f"rounding search {kind}", searched(source, plain[kind], root / "x.gguf", rounding_search)
    yield "gguf-py Q4_1", by_gguf(source, plain["Q8_0"], root / "x.gguf", "Q4_1")
