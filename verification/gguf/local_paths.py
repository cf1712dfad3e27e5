"""Paths of the maker's computer in a file's metadata; they often name people, customers and machines.

llama-quantize writes the importance matrix's path into `quantize.imatrix.file`; converters and merge tools have written
paths into `general.source.*` and `general.base_model.*`. Two kinds are found, in all keys but the tokenizer's: a value
that is an absolute path, and a path to people's files inside a text (/home/..., ~/..., C:\\..., \\\\host\\..., file:/).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from verification.gguf.reader import GGUFFile

_PATH = re.compile(
    r"\A\s*/(?!/)[^\s/]+(?:/[^\n]*)?\Z"  # the whole value is an absolute path
    r"|(?<![\w./-])(?:/(?:home|Users|root|mnt|media|tmp|private)/|~(?:[a-z_][\w.-]*)?/|[a-z]:[\\/]|\\\\[^\\\s]+\\|file:/)\S*",
    re.IGNORECASE,
)


def local_paths(file: GGUFFile) -> dict[str, str]:
    """Key -> the first path of a computer in its value."""
    found = ((key, next(_texts(key, value), None)) for key, value in file.metadata.items())
    return {key: path for key, path in found if path is not None}


def _texts(key: str, value: Any) -> Iterator[str]:
    """The first path in each text of one value."""
    if key.startswith("tokenizer."):
        return
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            return
        if found := _PATH.search(text):
            yield found[0].strip()
