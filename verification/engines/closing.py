"""Objects that hold a file, a process or memory outside Python, and give it back at the end of a `with` block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self


class Closing(ABC):
    """A context manager that is itself, and closes itself."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is held; safe to call twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
