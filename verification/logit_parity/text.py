"""The scored text: the built-in text, a text file, or JSONL, cut into chunks of n_ctx token ids.

Ids come from the reference's tokenizer, and every model gets the same ids. So the candidate's tokenizer has no effect
here; `contract.tokens` compares it. JSONL rows hold `text`, or `messages` that go through the model's chat template.
The first token of a chunk is replaced by BOS only if the GGUF file says that llama.cpp adds BOS.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from so8t_core.errors import InputError
from so8t_core.files import read_regular

BASE_CHUNKS = 4  # chunks for the damage of the quantised base: only information, so a third of the usual text
_MAX_BYTES = 1 << 30
DEFAULT_CORPUS = Path(__file__).parent / "corpus" / "default.txt"
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """Chunks of token ids and their sources."""

    paths: tuple[Path, ...]
    chunks: tuple[Ids, ...]  # each (n_ctx,)
    sha256: str  # digest of the chunks' ids, which are scored


def read_corpus(
    source: str | Path | Sequence[str | Path] | None,
    tokenizer: Any,
    *,
    n_ctx: int = 512,
    chunks: int = 12,
    bos: int | None = None,
) -> Corpus:
    """Read, tokenise and cut a corpus.

    Args:
        source: a file, several files (a chunk of each in turn), or None for the built-in text, which may hold fewer
            than `chunks`.
        bos: id that replaces the first token of every chunk; None replaces nothing.

    Raises:
        InputError: missing, not UTF-8, broken JSONL line, or too short (the message gives the needed number of tokens).
    """
    given = [source] if isinstance(source, str | Path) else list(source or [DEFAULT_CORPUS])
    paths = tuple(Path(path) for path in given)
    if n_ctx < 8 or chunks < 1:
        raise InputError(f"n_ctx = {n_ctx} and chunks = {chunks}: need at least 8 tokens and 1 chunk")
    cuts = [_chunks(_read(path, tokenizer), tokenizer, n_ctx) for path in paths]
    if source is None:  # a tokenizer with a large vocabulary makes fewer chunks of the built-in text
        chunks = min(chunks, max(len(cuts[0]), 2))
    found = sum(map(len, cuts))
    if found < chunks:
        names = ", ".join(str(path) for path in paths)
        raise InputError(
            f"corpus {names} holds {found} whole chunks of {n_ctx} tokens, but {chunks} ({n_ctx * chunks} tokens) are "
            "wanted. Give more text" + (f", or ask for at most {found}." if found else ".")
        )
    turns = zip_longest(*cuts)  # one chunk of each file in turn, so that every file is scored
    cut = np.stack([chunk for turn in turns for chunk in turn if chunk is not None][:chunks])  # (chunks, n_ctx)
    if bos is not None:
        cut[:, 0] = bos
    return Corpus(paths, tuple(cut), hashlib.sha256(cut.astype("<i4").tobytes()).hexdigest())


def _chunks(text: str, tokenizer: Any, n_ctx: int) -> list[Ids]:
    """Whole chunks of a text; the rest at its end is dropped."""
    ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
    return [ids[start : start + n_ctx] for start in range(0, len(ids) - n_ctx + 1, n_ctx)]


def _read(path: Path, tokenizer: Any) -> str:
    try:
        text = read_regular(path, most=_MAX_BYTES).decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"corpus {path} does not exist; leave it out for the built-in text") from None
    except (OSError, ValueError) as error:
        raise InputError(f"corpus {path} cannot be read as UTF-8 text: {error}") from None
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        return text
    lines = enumerate(text.split("\n"), start=1)  # not splitlines: a JSON string may hold U+2028
    return "\n".join(_row(path, number, line, tokenizer) for number, line in lines if line.strip())


def _row(path: Path, number: int, line: str, tokenizer: Any) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"corpus {path}, line {number} is not JSON: {error}") from None
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        if not tokenizer.chat_template:
            raise InputError(f"corpus {path}, line {number} has messages, but the reference has no chat template")
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    raise InputError(f"corpus {path}, line {number} has neither `messages` nor `text`")
