"""The ways of running a file in which known faults show; one way (a "cell") is a set of tokens and llama.cpp settings.

A passage is a sequence of tokens and its first scored position; passages of the same text share the reference's logits.
Known faults behind the cells: LongRoPE factors chosen by the allocated n_ctx (llama.cpp) or by the actual length
(Hugging Face); wrong results for prompts longer than n_ubatch; differences between prefill and decoding; divergence
beyond a certain length; a missing or doubled BOS. A cell that does not apply says why.

Nothing runs twice: a cell takes the result of another cell with the same tokens and arithmetic, and a cell whose first
tokens are those of another cell starts from that cell's cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from verification.reference.rope import depends_on_length, head_dim, is_longrope, original_length

Ids = npt.NDArray[np.int64]
Level = Literal["quick", "full"]
Config = Mapping[str, Any]

PASSAGES, LENGTH, FIRST = 8, 40, 24  # eight clusters, 15 positions of each
SHORT = 12
DECODED = 12  # tokens decoded one by one at the end of a passage
CHAT_LENGTH, CHAT_TAIL = 96, 24
LONG = 1024
CONTEXT = 8192  # tokens of the one long passage: a length that people serve
TAIL = 128  # positions scored at the end of a long passage
KV_BLOCK = 32  # channels with one scale in q8_0 and q4_0
BLOCK = 32  # longer sequences of scored positions are cut into clusters of this many
CACHE_LIMIT = 4 << 30  # largest KV cache of a cell, in bytes


@dataclass(frozen=True)
class Passage:
    """Tokens (n,), scored at positions first .. n-2."""

    tokens: Ids
    first: int

    @property
    def rows(self) -> int:
        return len(self.tokens) - 1 - self.first


@dataclass(frozen=True)
class Cell:
    """One way of running a file; `passages` is a key into `Plan.passages`."""

    name: str
    title: str
    setting: str
    passages: str = ""
    n_ctx: int = 0  # allocated; 0 = as long as the longest passage
    n_ubatch: int | None = None
    kv: str | None = None  # type of the cached keys and values
    flash: bool | None = None  # whether to use the flash kernel; None: llama.cpp decides
    informs: bool = False  # the server chooses this setting, so its damage is shown without a bound
    singly: int = 0  # tokens at the end that are decoded one by one
    after: str = ""  # the cell whose cache has these passages' first tokens, which are not computed again
    same_as: str = ""  # the cell with the same tokens and arithmetic, whose result is taken
    note: str = ""  # the meaning of a difference; printed beside the measured value
    why: str = ""  # why the cell does not apply


@dataclass(frozen=True)
class Plan:
    """All cells of one verification and the passages they need."""

    cells: list[Cell]
    passages: dict[str, list[Passage]] = field(default_factory=dict)


def shipped_n_ctx(config: Config) -> int:
    """The default context that a file is shipped for: at most 4096, never more than the original length."""
    limits = [4096, config.get("max_position_embeddings") or 4096, original_length(config) or 4096]
    return int(min(limits))


def plan_cells(
    level: Level,
    text: Sequence[Ids],
    config: Config,
    *,
    chats: Sequence[Ids] = (),
    bos: int | None = None,
    n_ctx: int | None = None,
    long_context: int | None = None,
) -> Plan:
    """The cells of a model.

    Args:
        text: chunks of the corpus; passages are cut out of them.
        config: config.json of the reference.
        chats: token ids of rendered chats.
        bos: the tokenizer's BOS; None if it has none.
        n_ctx: the context that the files are shipped for; None takes `shipped_n_ctx`.
        long_context: tokens of one long passage, at most the model's context; None takes `CONTEXT`, in `full` only.
    """
    shipped = n_ctx or shipped_n_ctx(config)
    limit = int(config.get("max_position_embeddings") or 1 << 20)
    stream = np.concatenate(list(text))
    plain = _cut(stream, LENGTH, PASSAGES, FIRST)
    passages = {"plain": plain, "short": [Passage(p.tokens[:SHORT], 1) for p in plain]}
    passages["decode"] = [Passage(p.tokens, LENGTH - DECODED) for p in plain]
    allocated = _allocated("n_ctx_shipped", "Context allocated as shipped", shipped, config)
    # if the allocated context does not change the arithmetic, other cells can share this cell's run
    common = "" if allocated.why or allocated.note else allocated.name
    singly = f"the last {DECODED} tokens decoded one by one"
    cells = [
        Cell("short", "Short prompts", f"{PASSAGES} x {SHORT} tokens", "short"),
        allocated,
        _larger(shipped, limit, config),
        Cell("n_ubatch", "Prompt beyond n_ubatch", f"n_ubatch 16, {LENGTH} tokens", "plain", n_ubatch=16),
        Cell("decode", "Token by token", singly, "decode", singly=DECODED, after=common),
        Cell("no_bos", "Without BOS", "text as it is", "plain", same_as=common),
    ]
    if bos is None:
        cells.append(Cell("bos", "With BOS", "", why="the tokenizer has no BOS token"))
    else:
        cells.append(Cell("bos", "With BOS", f"BOS {bos} before the text", "bos"))
        passages["bos"] = [Passage(np.concatenate([[bos], p.tokens[:-1]]), FIRST) for p in plain]
    usable = [ids[:CHAT_LENGTH] for ids in chats if len(ids) >= 8]
    if usable:
        cells.append(Cell("chat", "Rendered chats", f"{len(usable)} chats through the model's template", "chat"))
        passages["chat"] = [Passage(ids, max(1, len(ids) - 1 - CHAT_TAIL)) for ids in usable]
    else:
        cells.append(Cell("chat", "Rendered chats", "", why="the tokenizer has no chat template that renders"))
    cells += [_served(cell, level, config) for cell in _SERVED]
    cells += _lengths(level, stream, config, limit, passages, long_context)
    return Plan(cells, passages)


_SERVED = (  # options of llama-server that people use: -ctk q8_0 -ctv q8_0, --flash-attn on and off
    Cell("kv_q8_0", "Keys and values kept in q8_0", "q8_0 cache", "plain", kv="q8_0", flash=True, informs=True),
    Cell("kv_q4_0", "Keys and values kept in q4_0", "q4_0 cache", "plain", kv="q4_0", flash=True, informs=True),
    Cell("flash_on", "Flash attention", "flash kernel", "plain", flash=True),
    Cell("flash_off", "Plain attention", "no flash kernel", "plain", flash=False),
)


def _served(cell: Cell, level: Level, config: Config) -> Cell:
    channels = head_dim(dict(config)) or 0
    if level == "quick":
        return replace(cell, passages="", why="measured with --cells full")
    if cell.kv and channels % KV_BLOCK:
        return replace(cell, passages="", why=f"heads of {channels} channels are no whole blocks of {KV_BLOCK}")
    return cell


def _allocated(name: str, title: str, n_ctx: int, config: Config) -> Cell:
    size = cache_bytes(config, n_ctx)
    if size > CACHE_LIMIT:
        why = f"a cache of {n_ctx} tokens takes {size / 2**30:.0f} GiB, the cells use {CACHE_LIMIT / 2**30:.0f} at most"
        return Cell(name, title, f"n_ctx {n_ctx}", why=why)
    original, note = original_length(config), ""
    if original and is_longrope(config) and n_ctx > original:
        note = (
            f"LongRoPE factor choice: llama.cpp takes the long factors because the allocated n_ctx {n_ctx} exceeds the "
            f"original length {original}, Hugging Face the short ones for texts of this length; allocate at most "
            f"{original}"
        )
    return Cell(name, title, f"n_ctx {n_ctx} allocated", "plain", n_ctx=n_ctx, note=note)


def _larger(shipped: int, limit: int, config: Config) -> Cell:
    """The cell of twice the shipped context, or of the first context beyond the original length if that is longer.

    It applies only if RoPE depends on the length: otherwise it would repeat `n_ctx_shipped` with a larger buffer.
    """
    wanted = max(2 * shipped, ((original_length(config) or 0) // 256 + 1) * 256)
    wanted = min(wanted, limit)
    name, title = "n_ctx_larger", "Context allocated larger"
    if not depends_on_length(config):
        return Cell(name, title, "", why="the model's RoPE is the same for every length and allocated context")
    if wanted <= shipped:
        return Cell(name, title, "", why=f"the model's context ends at the shipped {shipped}")
    return _allocated(name, title, wanted, config)


def _lengths(
    level: Level,
    stream: Ids,
    config: Config,
    limit: int,
    passages: dict[str, list[Passage]],
    long_context: int | None,
) -> list[Cell]:
    """Cells of long texts, where length-dependent faults show; they are slow, so only `full` or an option has them."""
    cells = []
    original, window = original_length(config), config.get("sliding_window") or 0
    cases = [("long", "Long text", min(LONG, limit), "")]
    if original is None:
        why = "the model's RoPE has no original length (original_max_position_embeddings)"
        cases += [("rope_straddle", "Across the original RoPE length", 0, why)]
        cases += [("rope_beyond", "Beyond the original RoPE length", 0, why)]
    else:
        cases += [("rope_straddle", "Across the original RoPE length", original + TAIL // 2, "")]
        cases += [("rope_beyond", "Beyond the original RoPE length", original + original // 4 + TAIL, "")]
    no_window = "" if 0 < window < limit else "the model has no sliding window shorter than its context"
    cases += [("window", "Beyond the sliding window", 0 if no_window else window + TAIL, no_window)]
    context = min(long_context or CONTEXT, limit)
    cases += [("context", "One long passage", context, "" if context > LONG else f"the model's context is {limit}")]
    for name, title, length, why in cases:
        count, asked = (1, long_context is not None) if name == "context" else (2, False)
        if not why and level == "quick" and not asked:
            why = "measured with --cells full" + (" or --long-context" if count == 1 else "")
        if not why and length > limit:
            why = f"{length} tokens are more than the model's context of {limit}"
        if not why and cache_bytes(config, length) > CACHE_LIMIT:
            why = f"a cache of {length} tokens takes more than {CACHE_LIMIT / 2**30:.0f} GiB"
        setting = f"{count} x {length} tokens, the last {TAIL} scored" if length else ""
        cells.append(Cell(name, title, setting, "" if why else name, why=why))
        if not why:
            passages[name] = _cut(stream, length, count, max(1, length - 1 - TAIL), repeat=True)
    return cells


def cache_bytes(config: Config, n_ctx: int) -> int:
    """Bytes of llama.cpp's float16 KV cache for `n_ctx` tokens of an ordinary decoder."""
    heads = config.get("num_attention_heads") or 1
    head = config.get("head_dim") or (config.get("hidden_size") or 0) // heads
    return int(4 * n_ctx * (config.get("num_hidden_layers") or 0) * (config.get("num_key_value_heads") or heads) * head)


def _cut(stream: Ids, length: int, count: int, first: int, *, repeat: bool = False) -> list[Passage]:
    """`count` passages spread evenly over the text; with `repeat`, a text that is too short is repeated."""
    if repeat and len(stream) < length:
        stream = np.resize(stream, length)
    starts = [round(i * (len(stream) - length) / max(1, count - 1)) for i in range(count)]
    return [Passage(np.array(stream[start : start + length]), first) for start in starts]
