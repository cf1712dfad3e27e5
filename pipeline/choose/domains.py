"""The texts for a choice: built-in English, Japanese, code, chat and mathematics, or the user's files.

Each domain is cut in two by whole paragraphs: one half ranks the files, the other half proves the chosen file. Prose
comes from the built-in text, code is the source of `so8t_core`, chats and mathematics are generated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import so8t_core
from pipeline.data.generator import generate
from so8t_core.errors import InputError
from verification.logit_parity.text import DEFAULT_CORPUS

_JAPANESE = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
_PROSE = 60  # characters; a shorter line is no paragraph of prose
_ROWS = 160  # generated problems in a domain


@dataclass(frozen=True)
class Domain:
    """One kind of text: paragraphs, or rows of messages for the model's own chat template."""

    name: str
    paragraphs: list[str]
    is_chat: bool = False

    def halves(self) -> tuple[str, str]:
        """(text that ranks, text that proves): the odd and the even paragraphs, so that both have all subjects."""
        joint = "\n" if self.is_chat else "\n\n"
        return joint.join(self.paragraphs[0::2]), joint.join(self.paragraphs[1::2])

    @property
    def suffix(self) -> str:
        return ".jsonl" if self.is_chat else ".txt"


def built_in(*, chat: bool) -> list[Domain]:
    """The five domains; without `chat` (a model without a chat template) there are four."""
    lines = DEFAULT_CORPUS.read_text(encoding="utf-8").splitlines()
    prose = [line for line in lines if len(line) >= _PROSE or (_JAPANESE.search(line) and len(line) >= 30)]
    japanese = [line for line in prose if _JAPANESE.search(line)] + [_plain(row) for row in _problems("ja", 1)]
    english = [line for line in prose if not _JAPANESE.search(line)]
    sources = sorted(Path(so8t_core.__file__).parent.glob("*.py"))
    code = [part for path in sources for part in path.read_text(encoding="utf-8").split("\n\n\n")]
    mathematics = [_plain(row) for row in _problems("en", 2)]
    found = [
        Domain("English", english),
        Domain("Japanese", japanese),
        Domain("code", code),
        Domain("mathematics", mathematics),
    ]
    if chat:
        rows = [json.dumps({"messages": _messages(row)}, ensure_ascii=False) for row in _problems("en", 3)]
        found.append(Domain("chat", rows, is_chat=True))
    return found


def given(files: Mapping[str, Path]) -> list[Domain]:
    """Domains of the user's own files, UTF-8 text in paragraphs or JSONL.

    Raises:
        InputError: a file that cannot be read, or with too little to cut in two.
    """
    found = []
    for name, path in files.items():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"corpus {path} cannot be read as UTF-8 text: {error}") from None
        is_chat = path.suffix.lower() in (".jsonl", ".ndjson")
        parts = text.split("\n" if is_chat else "\n\n")
        parts = list(dict.fromkeys(part for part in parts if part.strip()))  # no part may rank and prove
        if len(parts) < 2:
            raise InputError(
                f"corpus {path} has {len(parts)} paragraphs; at least 2, one to rank by and one to prove by"
            )
        found.append(Domain(name, parts, is_chat=is_chat))
    return found


def _problems(language: str, seed: int) -> list[Any]:
    rows, _ = generate(_ROWS, 0, [language], seed)
    return list(rows)


def _plain(row: Any) -> str:
    return f"{row['prompt']}\n{row['steps']}\n{row['answer']}"


def _messages(row: Any) -> list[dict[str, str]]:
    answer = f"{row['steps']}\n{row['answer']}"
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
