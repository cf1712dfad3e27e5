"""Logits of a chunk of tokens from the Hugging Face model, at the scored positions (`positions`)."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from so8t_core.checkpoint_admission import admit_checkpoint
from so8t_core.errors import InputError
from so8t_core.weight_files import weight_files
from verification.engines.model_head import body_runs_once
from verification.engines.positions import Array, Ids, joined, scored

PIECE_ELEMENTS = 1 << 27  # logits held at once: 512 MiB of float32
SHARE = 0.7  # of the free memory, for a whole model's float32 weights; logits and activations need the rest


def load_hf(directory: str | Path) -> Any:
    """A causal LM from a local directory in float32, ready for evaluation; never remote code.

    Raises:
        InputError: no such directory, a refused checkpoint (`admit_checkpoint`), or transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM

    directory = Path(directory)
    admit_checkpoint(directory)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(directory), dtype="float32", trust_remote_code=False, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"transformers cannot load {directory}: {' '.join(str(error).split())[:300]}") from None
    return model.eval()


def open_reference(
    directory: str | Path, *, stream: bool | None = None, adapter: Path | None = None, keep: Path | None = None
) -> Any:
    """A checkpoint for `hf_rows`, whole or streamed layer by layer; with an adapter attached if one is given.

    Args:
        stream: None streams a checkpoint that would not fit into the free memory.
        keep: see `StreamedModel`.

    Raises:
        InputError: as `load_hf`, or the family cannot be streamed.
    """
    from verification.engines.streamed import StreamedModel

    if must_stream(directory) if stream is None else stream:
        return StreamedModel(directory, adapter=adapter, keep=keep)
    model = load_hf(directory)
    if adapter is not None:
        from so8t_core import load_adapter

        model = load_adapter(model, adapter)
    return model


def must_stream(directory: str | Path) -> bool:
    """Whether a checkpoint's weights in float32 would not fit into the free memory."""
    return float32_bytes(directory) > SHARE * free_memory()


def float32_bytes(directory: str | Path) -> int:
    """Bytes of a checkpoint's weights in float32."""
    return sum(4 * math.prod(entry.shape) for entry in weight_files(directory).entries.values())


def free_memory() -> int:
    """Bytes that this process may still use: on the machine, or in its control group if that is less."""
    found = [1 << 62]
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        found.append(limit - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8")))
    return min(found)


def hf_rows(model: Any, tokens: Ids, *, first: int | None = None, piece: int = PIECE_ELEMENTS) -> Iterator[Array]:
    """Yield (rows, V) float32 logits of the scored positions `first` .. len-2, at most `piece` elements at a time.

    The model's body runs once, and its head once for each piece, so that memory does not grow with the length. A model
    without `logits_to_keep` gives all of its logits at once.
    """
    import torch  # imported here: a command that runs only llama.cpp starts two seconds sooner without it

    from verification.engines.streamed import StreamedModel

    if isinstance(model, StreamedModel):
        with model.known(tokens) as inner:
            yield from hf_rows(inner, tokens, first=first, piece=piece)
        return
    start, stop = scored(len(tokens))
    start = start if first is None else first
    ids_1T = torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None].to(model.device)
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        with torch.inference_mode():
            yield _numpy(model(input_ids=ids_1T, use_cache=False).logits[0, start:stop])
        return
    rows = max(1, piece // int(model.config.get_text_config().vocab_size))
    with body_runs_once(model) if stop - start > rows else contextlib.nullcontext():
        for begin in range(start, stop, rows):
            keep = torch.arange(begin, min(begin + rows, stop), device=ids_1T.device)
            with torch.inference_mode():
                logits = model(input_ids=ids_1T, use_cache=False, logits_to_keep=keep).logits[0]
            yield _numpy(logits)


def _numpy(logits: Any) -> Array:
    result: Array = logits.float().cpu().numpy()
    return result


def hf_chunk(model: Any, tokens: Ids, *, first: int | None = None) -> Array:
    """(T, V) float32 logits of one chunk; the head is applied to the scored positions only."""
    return joined(list(hf_rows(model, tokens, first=first)))
