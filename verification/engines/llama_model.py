"""llama.cpp through llama-cpp-python's low-level API: one loaded model, its vocabulary, and llama.cpp's log.

llama.cpp logs to stderr from C. Here its lines go to a bounded buffer, so that an error can quote the last lines and a
success prints nothing. Models are loaded on the CPU with mmap.
"""

from __future__ import annotations

import collections
import ctypes
import os
from pathlib import Path
from typing import Any

import llama_cpp

from so8t_core.errors import InputError
from verification.engines.closing import Closing

_LOG: collections.deque[str] = collections.deque(maxlen=200)
_WARNING = 3  # ggml_log_level: 1 debug, 2 info, 3 warn, 4 error, 5 continuation of the line before
_callback: Any = None  # a reference for Python: C holds only a pointer


def quiet() -> None:
    """Send llama.cpp's log to the buffer and start its backend; idempotent."""
    global _callback
    if _callback is None:
        _callback = llama_cpp.llama_log_callback(_remember)
        llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))  # every time: importing llama_cpp.Llama sets another one


def _remember(level: int, text: bytes, _user: Any) -> None:
    if level >= _WARNING:
        _LOG.append(text.decode("utf-8", errors="replace"))


def last_words(lines: int = 3) -> str:
    """The last warnings and errors of llama.cpp, on one line."""
    words = [line.strip() for line in "".join(_LOG).splitlines() if line.strip(" .\n")]
    return " | ".join(words[-lines:]) or "llama.cpp logged nothing"


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LlamaModel(Closing):
    """A GGUF file loaded by llama.cpp; a context manager.

    Args:
        vocab_only: load the tokenizer only (fast, no weights).

    Raises:
        InputError: llama.cpp refuses the file; the message gives llama.cpp's reason.
    """

    def __init__(self, path: str | Path, *, vocab_only: bool = False) -> None:
        quiet()
        _LOG.clear()
        self.path = Path(path)
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise InputError(f"llama.cpp cannot load {path}: {last_words()}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def close(self) -> None:
        """Free the model; safe to call twice."""
        if self.model:
            llama_cpp.llama_model_free(self.model)
            self.model = None

    @property
    def vocab_size(self) -> int:
        return int(llama_cpp.llama_vocab_n_tokens(self.vocab))

    @property
    def add_bos(self) -> bool:
        return bool(llama_cpp.llama_vocab_get_add_bos(self.vocab))

    @property
    def add_eos(self) -> bool:
        return bool(llama_cpp.llama_vocab_get_add_eos(self.vocab))

    @property
    def bos(self) -> int:
        return int(llama_cpp.llama_vocab_bos(self.vocab))

    @property
    def eos(self) -> int:
        return int(llama_cpp.llama_vocab_eos(self.vocab))

    def token_text(self, token: int) -> str:
        """A token's text; empty if there is no such token."""
        if not 0 <= token < self.vocab_size:
            return ""
        text: bytes = llama_cpp.llama_vocab_get_text(self.vocab, token)
        return text.decode("utf-8", errors="replace")

    def is_control(self, token: int) -> bool:
        """Whether this token is a control token."""
        return bool(llama_cpp.llama_vocab_is_control(self.vocab, token))

    def is_end(self, token: int) -> bool:
        """Whether generation stops at this token (llama.cpp's end-of-generation set)."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text, as llama.cpp's tools tokenise it."""
        data = text.encode("utf-8")
        room = len(data) + 16
        buffer = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), buffer, room, add_special, parse_special)
        if count < 0:
            raise InputError(
                f"llama.cpp cannot tokenise {len(data)} bytes with {self.path}: it asks for {-count} tokens"
            )
        return list(buffer[:count])

    def chat_template(self) -> str | None:
        """The template stored in the file, as llama.cpp reads it."""
        raw = llama_cpp.llama_model_chat_template(self.model, None)
        return raw.decode("utf-8") if raw else None
