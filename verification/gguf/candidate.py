"""A file under test, as the parts of the verification pass it to each other."""

from __future__ import annotations

from dataclasses import dataclass

from verification.gguf.reader import GGUFFile


@dataclass(frozen=True)
class Candidate:
    """A file under test and the name it has in the report."""

    label: str
    file: GGUFFile
