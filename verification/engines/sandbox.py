"""Loads a file with llama.cpp in a child process, because a damaged file can make llama.cpp abort.

The child loads the vocabulary, and on request the whole file (mapped; no weight is read). While it loads, llama.cpp
checks every tensor's name and shape against the architecture, and names a missing tensor. Then the child answers
questions about tokens. The file of #24885 loads, but llama.cpp aborts while it tokenises: this ends only the child.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as the child: import from the package's root, not from this folder
    sys.path[0] = sys.argv[2]

from verification.engines.child import Child, ChildDied, Limits, Message, serve
from verification.engines.closing import Closing

# bytes of data. Measured: 60 MB for Python and llama.cpp, 28 MB more for 49,152 tokens in a header of 1.6 MB
_MEMORY, _A_BYTE, _HEADER = 1 << 28, 8, 1 << 25
# processor time a question: the cost of mapping a file grows with its pages; 262,144 tokens take a second
_SECONDS, _SECONDS_A_GIB, _WALL = 4.0, 10.0, 15.0
_SPECIAL_IDS = ("bos", "eos", "eot", "nl", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep")
_AT_ONCE = 4096  # tokens whose pieces make one text of `effects`


@dataclass(frozen=True)
class Probe:
    """Why llama.cpp refuses a file; empty texts if it does not."""

    vocabulary: str
    model: str


@dataclass(frozen=True)
class Token:
    """llama.cpp's data on one token."""

    text: str
    is_control: bool
    is_end: bool


class Vocabulary(Closing):
    """A file's vocabulary in llama.cpp, in a child process; a context manager.

    `refused` is llama.cpp's reason not to load the vocabulary; empty if it was loaded. If `refused` is not empty, the
    other methods may not be called.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        from verification.gguf.split_set import set_size, shard_paths  # imported here: see `require_loadable`

        size = set_size(shard_paths(self.path))
        seconds = _SECONDS + size / (1 << 30) * _SECONDS_A_GIB
        memory = _MEMORY + _A_BYTE * min(size, _HEADER)
        self._child = Child(Path(__file__), Limits(memory, seconds, _WALL * seconds), name="llama.cpp")
        self.refused, self._facts = "", dict[str, Any](template=None)
        self._tokens: dict[int, Token] = {}
        self.ended = False  # whether a crash or a limit ended the child: then it cannot answer
        try:
            self._facts = self._child.ask({"do": "vocabulary", "path": os.fspath(self.path)})
            self.refused = self._facts["reason"]
        except ChildDied as error:
            self.refused, self.ended = str(error), True

    def model_refused(self) -> str:
        """llama.cpp's reason not to load the whole file; empty if it loads. A crash of the child is a reason too."""
        if self.refused:
            return self.refused
        try:
            return str(self._child.ask({"do": "model", "path": os.fspath(self.path)})["reason"])
        except ChildDied as error:
            self.ended = True
            return str(error)

    @property
    def vocab_size(self) -> int:
        return int(self._facts["n_tokens"])

    @property
    def add_bos(self) -> bool:
        return bool(self._facts["add_bos"])

    @property
    def add_eos(self) -> bool:
        return bool(self._facts["add_eos"])

    @property
    def bos(self) -> int:
        return int(self._facts["bos"])

    @property
    def eos(self) -> int:
        return int(self._facts["eos"])

    def chat_template(self) -> str | None:
        """The template stored in the file, as llama.cpp reads it."""
        found: str | None = self._facts["template"]
        return found

    def token(self, token: int) -> Token:
        """One token.

        Raises:
            ChildDied: llama.cpp ended.
        """
        if token not in self._tokens:
            self._tokens[token] = Token(**self._child.ask({"do": "token", "token": token}))
        return self._tokens[token]

    def token_text(self, token: int) -> str:
        """A token's text; empty if there is no such token."""
        return self.token(token).text if 0 <= token < self.vocab_size else ""

    def is_end(self, token: int) -> bool:
        """Whether generation stops at this token (llama.cpp's end-of-generation set)."""
        return 0 <= token < self.vocab_size and self.token(token).is_end

    def is_control(self, token: int) -> bool:
        """Whether this token is a control token."""
        return 0 <= token < self.vocab_size and self.token(token).is_control

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """Token ids of a text, as llama.cpp's tools tokenise it.

        Raises:
            ChildDied: llama.cpp ended while it tokenised.
        """
        question = {"do": "tokenise", "text": text, "add_special": add_special, "parse_special": parse_special}
        return list(self._child.ask(question)["ids"])

    def effects(self, texts: Sequence[str]) -> dict[str, str]:
        """Digests of the vocabulary's behaviour, by name of the part: equal digests mean equal behaviour.

        Parts: every token's piece and flags, the ids of these texts and of texts made of every piece, the special ids,
        and the tokens that are added to a text.

        Raises:
            ChildDied: llama.cpp ended.
        """
        found: dict[str, str] = self._child.ask({"do": "effects", "texts": list(texts)})
        return found

    def close(self) -> None:
        """End the child; safe to call twice."""
        self._child.close()


def probe(path: Path) -> Probe:
    """Load `path` in a child process; a crash or a hang counts as a refusal."""
    with Vocabulary(path) as vocabulary:
        return Probe(vocabulary.refused, vocabulary.model_refused())


def require_loadable(path: Path) -> None:
    """Refuse a file that llama.cpp does not load: opened in this process, a damaged file could end the process.

    Raises:
        InputError: llama.cpp does not load the file; the message gives llama.cpp's reason.
    """
    from so8t_core.errors import InputError  # imported here: as a script, this file needs llama_cpp only

    answer = probe(path)
    if answer.vocabulary or answer.model:
        raise InputError(f"llama.cpp does not load {path}: {answer.vocabulary or answer.model}")


class _Engine:
    """The code that runs in the child: one file in llama.cpp."""

    def __init__(self) -> None:
        import llama_cpp

        self.cpp: Any = llama_cpp
        self.log: list[str] = []
        self.vocab: Any = None

        @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
        def remember(level: int, text: bytes, _user: object) -> None:
            if level >= 3 and len(self.log) < 10_000:
                self.log.append(text.decode("utf-8", errors="replace"))

        self.remember = remember  # a reference for Python: C holds only a pointer
        llama_cpp.llama_log_set(remember, None)
        llama_cpp.llama_backend_init()

    def answer(self, question: Message) -> Message:
        """Answer one question of `Vocabulary`."""
        answers = {
            "vocabulary": self.load,
            "model": self.load,
            "tokenise": self.tokenise,
            "token": self.token,
            "effects": self.effects,
        }
        return answers[question["do"]](question)

    def load(self, question: Message) -> Message:
        """Load and keep the vocabulary, or load and free the whole file."""
        self.log.clear()
        params = self.cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        params.use_extra_bufts = False  # no repacking: the weights are not used
        params.vocab_only = question["do"] == "vocabulary"
        model = self.cpp.llama_model_load_from_file(os.fsencode(question["path"]), params)
        if not model:
            words = [line.strip() for line in "".join(self.log).splitlines() if line.strip(" .")]
            return {"reason": " | ".join(words[-2:])[:600] or "no reason given"}
        if question["do"] == "model":
            self.cpp.llama_model_free(model)
            return {"reason": ""}
        self.vocab = self.cpp.llama_model_get_vocab(model)
        template = self.cpp.llama_model_chat_template(model, None)
        return {
            "reason": "",
            "n_tokens": self.cpp.llama_vocab_n_tokens(self.vocab),
            "add_bos": self.cpp.llama_vocab_get_add_bos(self.vocab),
            "add_eos": self.cpp.llama_vocab_get_add_eos(self.vocab),
            "bos": self.cpp.llama_vocab_bos(self.vocab),
            "eos": self.cpp.llama_vocab_eos(self.vocab),
            "template": template.decode("utf-8", errors="replace") if template else None,
        }

    def tokenise(self, question: Message) -> Message:
        """Token ids of a text."""
        data = question["text"].encode("utf-8", errors="replace")
        room = len(data) + 16
        buffer = (self.cpp.llama_token * room)()
        flags = question["add_special"], question["parse_special"]
        count = self.cpp.llama_tokenize(self.vocab, data, len(data), buffer, room, *flags)
        if count < 0:  # more tokens than bytes
            room = min(-count, 64 * room)
            buffer = (self.cpp.llama_token * room)()
            count = self.cpp.llama_tokenize(self.vocab, data, len(data), buffer, room, *flags)
        return {"ids": list(buffer[: max(count, 0)])}

    def effects(self, question: Message) -> Message:
        """Digests of the vocabulary's behaviour; see `Vocabulary.effects`."""
        cpp, vocab = self.cpp, self.vocab
        count = cpp.llama_vocab_n_tokens(vocab)
        flags = [(cpp.llama_vocab_get_attr(vocab, t), cpp.llama_vocab_is_eog(vocab, t)) for t in range(count)]
        pieces = [self._piece(token) for token in range(count)]
        texts = list(question["texts"])
        for start in range(0, count, _AT_ONCE):  # every token once, with other neighbours than in the vocabulary
            part = pieces[start : start + _AT_ONCE]
            texts.append(b" ".join(part[::2] + part[1::2]).decode("utf-8", errors="replace"))
        ids = [
            self.tokenise({"text": text, "add_special": special, "parse_special": parsed})["ids"]
            for text in texts
            for special, parsed in ((False, False), (True, True))
        ]
        special = [getattr(cpp, f"llama_vocab_{name}")(vocab) for name in _SPECIAL_IDS]
        adds = [cpp.llama_vocab_get_add_bos(vocab), cpp.llama_vocab_get_add_eos(vocab)]
        parts = {"pieces": pieces, "flags": flags, "ids": ids, "special ids": special, "added": adds}
        return {name: hashlib.sha256(repr(part).encode()).hexdigest() for name, part in parts.items()}

    def _piece(self, token: int) -> bytes:
        """The bytes of a token in a text; a control token's bytes are its name."""
        room = 64
        while True:
            buffer = (ctypes.c_char * room)()
            size = self.cpp.llama_token_to_piece(self.vocab, token, buffer, room, 0, True)
            if size >= 0:
                return buffer.raw[:size]
            room = -size

    def token(self, question: Message) -> Message:
        """Text and kinds of one token."""
        token = question["token"]
        text: bytes = self.cpp.llama_vocab_get_text(self.vocab, token)
        return {
            "text": text.decode("utf-8", errors="replace"),
            "is_control": bool(self.cpp.llama_vocab_is_control(self.vocab, token)),
            "is_end": bool(self.cpp.llama_vocab_is_eog(self.vocab, token)),
        }


if __name__ == "__main__":
    serve(lambda: _Engine().answer)
