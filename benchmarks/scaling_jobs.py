"""The jobs that `scaling` measures: one training step, one bake, one verification, one quantisation at a given shape.

All models are random Llamas (float32 in training and verification, like the verifier's reference), all on one thread.
GGUF files get random weights and are not converted: the cost of a verification does not depend on its result.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.bench_bake import make_adapter, make_checkpoint
from benchmarks.peak import forked, peak
from so8t_core import SO8TConfig, attach, bake_checkpoint
from verification.engines.quantise import quantise
from verification.logit_parity.compare import measure_file, passages_of, run_reference
from verification.logit_parity.text import Corpus


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder and of its job."""

    layers: int = 4
    width: int = 256
    inner: int = 512
    kv_width: int = 256
    vocab: int = 4096
    context: int = 256
    files: int = 2  # of the checkpoint, or GGUF files to verify

    @property
    def layer_weights(self) -> int:
        """Parameters of one layer's projections."""
        return 2 * self.width**2 + 2 * self.width * self.kv_width + 3 * self.width * self.inner

    @property
    def weights(self) -> int:
        """Parameters: projections, embedding and head."""
        return self.layers * self.layer_weights + 2 * self.vocab * self.width


def resized(shape: Shape, axis: str, value: int) -> Shape:
    """The shape with one axis changed; a new width also changes the inner and the key width."""
    if axis == "width":
        return replace(shape, width=value, inner=2 * value, kv_width=value)
    return replace(shape, **{axis: value})


def _model(shape: Shape) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=shape.kv_width // 64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def _ids(shape: Shape) -> np.ndarray:
    return np.random.default_rng(0).integers(3, shape.vocab, shape.context)


def _fastest(work: Callable[[], Any], times: int) -> float:
    """CPU seconds, user and system, of the fastest run: other programs hardly change them.

    They do not include waiting for a disk.
    """
    taken = []
    for _ in range(times):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def train_step(shape: Shape) -> float:
    """CPU seconds of forward, backward and the rotation's update, with a frozen base and a sequence of `context`
    tokens."""
    torch.set_num_threads(1)
    model = attach(_model(shape).requires_grad_(False), SO8TConfig(init_scale=0.05))
    ids = torch.tensor(_ids(shape))[None]
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    step()
    return _fastest(step, 2)


def bake(shape: Shape) -> float:
    """CPU seconds of `bake_checkpoint` over `files` bfloat16 files."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sizes = {"layers": shape.layers, "hidden": shape.width, "intermediate": shape.inner, "vocab": shape.vocab}
        make_checkpoint(root / "base", **sizes, files=shape.files)
        make_adapter(root / "adapter", layers=shape.layers, hidden=shape.width)
        return _fastest(lambda: bake_checkpoint(root / "base", root / "adapter", root / "out"), 2)


def verify(shape: Shape) -> float:
    """CPU seconds to write the reference's logits of two chunks to the disk and to compare `files` files with them."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root, model = Path(folder), _model(shape).eval()
        path = write_gguf(root / "m.gguf", shape)
        ids = _ids(shape)
        text = Corpus((), (ids, ids[::-1].copy()), hashlib.sha256(ids.tobytes()).hexdigest())

        def work() -> None:
            stored = run_reference(model, passages_of(text.chunks), root, name="r", tell=_silent)
            with stored.spool:
                for number in range(shape.files):
                    measure_file(f"f{number}", path, text, stored, seed="s", threads=1, tell=_silent)

        return _fastest(work, 2)


def quantising(shape: Shape) -> float:
    """CPU seconds of llama.cpp's quantiser to Q4_K_M on one thread: the cost of the exact oracle for each candidate."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_gguf(Path(folder) / "m.gguf", shape)
        return _fastest(lambda: quantise(path, Path(folder) / "q.gguf", "Q4_K_M", threads=1), 2)


def _silent(stage: str, done: int, total: int) -> None:
    pass


def write_gguf(path: Path, shape: Shape) -> Path:
    """A random F16 Llama of this shape."""
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.width // 64)
    writer.add_head_count_kv(shape.kv_width // 64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_file_type(1)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(shape.vocab)])
    writer.add_token_types([1] * shape.vocab)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    w, kv, inner = shape.width, shape.kv_width, shape.inner
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (shape.vocab, w),
        "output": (shape.vocab, w),
        "output_norm": (w,),
    }
    for k in range(shape.layers):
        block = {"attn_q": (w, w), "attn_k": (kv, w), "attn_v": (kv, w), "attn_output": (w, w), "attn_norm": (w,)}
        block |= {"ffn_gate": (inner, w), "ffn_up": (inner, w), "ffn_down": (w, inner), "ffn_norm": (w,)}
        shapes |= {f"blk.{k}.{name}": size for name, size in block.items()}
    random = np.random.default_rng(0)
    for name, size in shapes.items():
        values = 0.02 * random.standard_normal(size, dtype=np.float32) if len(size) > 1 else np.ones(size, np.float32)
        writer.add_tensor(f"{name}.weight", values.astype(np.float16) if len(size) > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


JOBS: dict[str, tuple[Callable[[Shape], float], Shape, dict[str, tuple[int, ...]]]] = {
    "train step": (
        train_step,
        Shape(),
        {
            "layers": (2, 4, 8, 16),
            "width": (128, 256, 512, 768),
            "vocab": (1024, 4096, 16384, 49152),
            "context": (64, 128, 256, 512, 1024),
        },
    ),
    "bake": (
        bake,
        Shape(layers=8, width=512, inner=1024, kv_width=512, vocab=8192),
        {
            "layers": (4, 8, 16, 32),
            "width": (256, 512, 1024, 1536),
            "vocab": (2048, 8192, 32768),
            "files": (1, 4, 16, 64),
        },
    ),
    "verify": (
        verify,
        Shape(context=256, files=1),
        {
            "layers": (2, 4, 8, 16),
            "width": (128, 256, 512, 768),
            "vocab": (1024, 4096, 16384, 49152),
            "context": (64, 128, 256, 512),
            "files": (1, 2, 4),
        },
    ),
    "quantise": (
        quantising,
        Shape(),
        {
            "layers": (2, 4, 8, 16),
            "width": (256, 512, 768),
            "vocab": (1024, 4096, 16384),
        },
    ),
}


@dataclass(frozen=True)
class Point:
    """One measurement."""

    job: str
    axis: str
    value: int
    seconds: float
    megabytes: float  # peak growth of the process, with the model's weights
    shape: Shape

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 5), "megabytes": round(self.megabytes, 1)}


def measure(job: str, axis: str, value: int) -> Point:
    """One point: seconds in one fork, memory in another, because measuring memory takes time."""
    work, base, _ = JOBS[job]
    shape = resized(base, axis, value)
    return Point(job, axis, value, float(forked(lambda: work(shape))), peak(lambda: work(shape)), shape)
