"""Token ids, special ids and stop set: the parts of a tokenizer that must be equal, compared without weights.

Ids are compared on plain text, on text with the tokenizer's special tokens inside, and on rendered chats (see `chat`).
Chats are needed because llama.cpp has special rules for spaces after special tokens, and only a rendered chat shows
their effect. Each function returns findings; an empty list means agreement. U+3000 occurs inside plain texts, never at
their ends: transformers and llama.cpp strip it differently at the ends by design (data is stripped).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from verification.contract.finding import Finding
from verification.engines.stop_keys import listed_stops
from verification.gguf.reader import GGUFFile

PLAIN = (
    "The quick test of a plain sentence.",
    "Two  spaces,   three; a tab\there.",
    "line one\nline two\r\nline three\n\n\nend",
    "東京の気温は二十三度で、風は弱い。",
    "全角　スペースと、カタカナ・ひらがな「かぎ括弧」。",
    "１２３４５ と 12345、そして 3.14159 は -2.5e-10 ではない。",
    "0 00 000 0000 00000 1234567890 1,234,567.89",
    "e\u0301 vs \u00e9, か\u3099 vs が, n\u0303",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5 \u2764\ufe0f",
    "def f(x: int) -> int:\n    return x ** 2  # 二乗\n",
    "if (a<b && c!=d) { x[i] += y->z; } // \\n",
    "It's we'll they've I'M DON'T",
    "Привет, мир! مرحبا Γειά שלום",
    "a\u200bb\u00a0c\u2028d",
    "<b>not special</b> [INST] <<SYS>> </s> <|end|> <|im_end|> <|endoftext|>",
    "# 思考ステップ\n1. 3 + 4 = 7\n\n# 最終回答\n7",
    " leading and trailing ",
    "",
)
_SPECIALS = 12  # special tokens of a tokenizer that are placed inside text: enough for every role and end marker
_CONTROL = 3  # llama.cpp's token type
_EVERY_BYTE = "".join(map(chr, range(1, 0x180))) + "\U000e0001\ue000\uffff"  # every first byte of UTF-8's short forms
_CONVERT = "convert again with a converter that knows this tokenizer's pre-tokenizer"


class Tokens(Protocol):
    """llama.cpp's vocabulary: in a child process (`sandbox.Vocabulary`), or of a trusted model in this process."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def add_bos(self) -> bool: ...
    @property
    def add_eos(self) -> bool: ...
    @property
    def bos(self) -> int: ...
    @property
    def eos(self) -> int: ...
    def chat_template(self) -> str | None:
        """The file's template; None if the file has no template."""

    def token_text(self, token: int) -> str:
        """The text that the file lists for a token."""

    def is_end(self, token: int) -> bool:
        """Whether llama.cpp stops at this token."""

    def is_control(self, token: int) -> bool:
        """Whether the file lists this token as a control token."""

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = True) -> list[int]:
        """The ids of a text.

        `add_special` adds BOS and EOS as the file asks; `parse_special` reads control tokens written in the text.
        """


def use(model: Tokens, file: GGUFFile) -> None:
    """Check that llama.cpp can tokenise the adversarial texts, and texts with the file's control tokens inside.

    Raises:
        ChildDied: llama.cpp ended during the work.
    """
    tokens = file.metadata.get("tokenizer.ggml.tokens") or []
    kinds = file.metadata.get("tokenizer.ggml.token_type") or []
    names = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL][:_SPECIALS]
    for text in (*PLAIN, *(f"a{name}b {name} c\n{name}\nd" for name in names), _EVERY_BYTE):
        for special in (False, True):
            model.tokenize(text, add_special=special, parse_special=special)


def corpus(tokenizer: Any) -> tuple[str, ...]:
    """The adversarial texts, and texts with the tokenizer's special tokens in the middle of words, lines and spaces."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    names = [str(token.content) for _, token in sorted(added.items())][:_SPECIALS]
    return (*PLAIN, *(f"a{name}b {name} c\n{name}\nd" for name in names))


def token_ids(tokenizer: Any, model: Tokens, texts: Sequence[str]) -> list[Finding]:
    """Texts whose ids differ between the reference's tokenizer and llama.cpp's."""
    found = []
    for text in texts:
        for special in (False, True):
            wanted = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
            actual = model.tokenize(text, add_special=special)
            if wanted != actual:
                found.append(first_difference(repr(text[:40]), wanted, actual))
                break
    return found


def first_difference(where: str, wanted: list[int], actual: list[int]) -> Finding:
    """The first place at which two lists of ids differ."""
    pairs = zip([*wanted, None], [*actual, None], strict=False)
    at = next(i for i, (a, b) in enumerate(pairs) if a != b)
    return Finding(
        f"text {where}, token {at}",
        f"{wanted[at : at + 3]} ({len(wanted)} tokens) in the reference",
        f"{actual[at : at + 3]} ({len(actual)} tokens) in llama.cpp",
        _CONVERT,
    )


def special_ids(tokenizer: Any, file: GGUFFile) -> list[Finding]:
    """BOS, EOS, UNK and padding ids that differ between tokenizer and file; only BOS and EOS may not be missing."""
    pairs = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = []
    for ours, theirs in pairs.items():
        key = f"tokenizer.ggml.{theirs}_token_id"
        wanted, actual = getattr(tokenizer, f"{ours}_token_id"), file.metadata.get(key)
        if wanted is not None and wanted != actual and (actual is not None or ours in ("bos", "eos")):
            action = f"set {key} to {wanted} with gguf's gguf-set-metadata, or convert again"
            found.append(Finding(key, str(wanted), "nothing" if actual is None else str(actual), action))
    return found


def added_specials(tokenizer: Any, model: Tokens) -> list[Finding]:
    """BOS or EOS that only one of tokenizer and file adds to a plain text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    wanted = {"bos": at > 0, "eos": len(full) > at + len(bare)}
    actual = {"bos": model.add_bos, "eos": model.add_eos}
    return [
        Finding(
            f"tokenizer.ggml.add_{name}_token",
            f"{name.upper()} {'added' if wanted[name] else 'not added'}, as the reference does",
            f"llama.cpp {'adds it' if actual[name] else 'does not add it'}",
            f"set the key to {str(wanted[name]).lower()}",
            "double or missing BOS" if name == "bos" else "",
        )
        for name in wanted
        if wanted[name] != actual[name]
    ]


def wanted_stops(directory: Path, tokenizer: Any) -> set[int]:
    """Tokens at which the reference stops: the stop tokens in its configuration, and the tokenizer's EOS."""
    wanted = listed_stops(directory)
    if tokenizer.eos_token_id is not None:
        wanted.add(int(tokenizer.eos_token_id))
    return wanted


def stop_set(directory: Path, tokenizer: Any, model: Tokens) -> list[Finding]:
    """Tokens at which the reference stops and llama.cpp does not."""
    found = []
    for token in sorted(wanted_stops(directory, tokenizer)):
        if not 0 <= token < model.vocab_size or not model.is_end(token):
            name = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else "?"
            action = f"gguf-new-metadata --special-token-by-id eot {token} OLD.gguf NEW.gguf (gguf's), or convert again"
            found.append(Finding(f"token {token} {name!r}", "an end of generation", "llama.cpp goes on", action))
    return found
