"""Folders of test files that are made once a run, by whichever worker asks first, and read by all.

`made(make, *given)` calls `make(folder, *given)` and gives the folder; the next call with the same function and the
same arguments, in this worker or another, finds it. A marker beside the folder is written when the maker has returned,
so a maker that fails or is killed leaves nothing that counts. Nobody changes what is made: a test that wants to change
a file copies it, and the session ends with an error if a file was changed all the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock


class Made:
    """The made folders below `root`, which all workers of a run name alike."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(self, make: Callable[..., Any], *given: str | int | float | Path | None) -> Path:
        """The folder into which `make(folder, *given)` wrote; `make` is a function of a module, found by its name."""
        assert "<" not in make.__qualname__, f"{make.__qualname__} is no function of a module: its name tells nothing"
        identity = repr((make.__code__.co_filename, make.__qualname__, given))
        folder = self.root / f"{make.__name__.strip('_')}-{hashlib.sha256(identity.encode()).hexdigest()[:10]}"
        if not self._marker(folder).is_file():
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f"{folder.name}.lock")):
                if not self._marker(folder).is_file():
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
                    make(folder, *given)
                    part = folder.with_name(f"{folder.name}.part")
                    part.write_text(json.dumps(_listing(folder)), encoding="utf-8")
                    part.rename(self._marker(folder))
        return folder

    def changed(self) -> list[str]:
        """Folders whose files are not those that their maker left."""
        markers = sorted(self.root.glob("*.made"))
        return [
            marker.stem
            for marker in markers
            if json.loads(marker.read_text(encoding="utf-8")) != _listing(marker.with_suffix(""))
        ]

    @staticmethod
    def _marker(folder: Path) -> Path:
        return folder.with_name(f"{folder.name}.made")


def _listing(folder: Path) -> list[list[str | int]]:
    """Path, size (bytes) and time of the last change (ns) of each file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
