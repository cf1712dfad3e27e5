"""Paths of the maker's computer that a file publishes; they often name people, customers and machines.

llama-quantize writes the importance matrix's path into `quantize.imatrix.file`; converters and merge tools have written
paths into `general.source.*` and `general.base_model.*`. A value that is an absolute path (/..., ~/..., C:\\..., file://)
counts, and a home directory inside any text but the tokenizer's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from verification.gguf.reader import GGUFFile

_WHOLE = re.compile(r"\s*(?:/(?!/)[^\s/]+(?:/|$)|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\[^\\]+\\|file:/)", re.IGNORECASE)
_INSIDE = re.compile(r"(?<![\w./-])(?:/(?:home|Users|root|mnt|media|tmp|private)/\S+|[A-Za-z]:\\\S+|file:/\S+)")


def local_paths(file: GGUFFile) -> dict[str, str]:
    """Key -> the first place on a computer that its value names."""
    found = ((key, next(_texts(key, value), None)) for key, value in file.metadata.items())
    return {key: path for key, path in found if path is not None}


def _texts(key: str, value: Any) -> Iterator[str]:
    """Paths in one value."""
    if key.startswith("tokenizer."):
        return
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            return
        if _WHOLE.match(text) and "\n" not in text:
            yield text
        elif inside := _INSIDE.search(text):
            yield inside[0]
