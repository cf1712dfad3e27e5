"""A file under test: what the rooms of the verification hand to each other."""

from __future__ import annotations

from dataclasses import dataclass

from verification.gguf.reader import GGUFFile


@dataclass(frozen=True)
class Candidate:
    """A file under test and the name it has in the report."""

    label: str
    file: GGUFFile
