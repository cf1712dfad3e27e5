"""A checkpoint directory's tokenizer for the server; see `pipeline.serve.counter`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.serve.counter import Counter
from so8t_core.errors import InputError
from verification.reference.tokenizer import load_tokenizer


class CheckpointTokens(Counter):
    """The tokenizer and the chat template of a Hugging Face directory; reads no weights and runs none of its code.

    Raises:
        InputError: transformers has no fast tokenizer for the directory.
    """

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer

        loaded = load_tokenizer(directory)
        if not loaded.is_fast:
            raise InputError(f"{directory}: its tokenizer cannot say where a token ends; give a GGUF of the model")
        rules = json.loads(loaded.backend_tokenizer.to_str())
        rules["post_processor"] = None  # it adds BOS, and trims spaces from the offsets of tokens
        self._whole, self._plain = (Tokenizer.from_str(json.dumps(rules)) for _ in range(2))
        self._plain.encode_special_tokens = True
        special = {token for token, added in loaded.added_tokens_decoder.items() if added.special}
        self._steering = special | set(loaded.all_special_ids)
        self.chat_template = _template(loaded.chat_template)

    def ids(self, text: str) -> list[int]:
        """See `Counter`."""
        return list(self._whole.encode(text, add_special_tokens=False).ids)

    def steers(self, token: int) -> bool:
        """See `Counter`."""
        return token in self._steering

    def count(self, text: str) -> int:
        """See `Counter`."""
        return len(self._plain.encode(text, add_special_tokens=False).ids)

    def cut(self, text: str, limit: int) -> str:
        """See `Counter`."""
        places = self._plain.encode(text, add_special_tokens=False).offsets
        if len(places) <= limit:
            return text
        return text[: min(places[limit - 1][1], places[limit][0])]  # a character may be several tokens


def _template(found: Any) -> str:
    """The chat template, or all of several in one text: a form in any of them is the model's form."""
    return "\n".join(found.values()) if isinstance(found, dict) else found or ""
