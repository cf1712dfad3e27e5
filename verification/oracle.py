"""The verifier's own conversion of a checkpoint, quantised with this machine's build: the exact oracle for a file.

llama.cpp's quantiser is a function of the source's bytes, the type and the build; so a candidate made the same way from
the same weights has the same tensor bytes. Files are named by the checkpoint's digest and their makers' versions, and
reused when a work directory is kept.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path

from so8t_core.errors import InputError
from verification.converter import CONVERTER_VERSION, OUT_TYPES, convert
from verification.gguf_file import read_gguf
from verification.quantise import quantise


class Oracle:
    """Makes and keeps reference files in one directory."""

    def __init__(self, directory: Path, *, converter: str | Path | None = None, threads: int | None = None) -> None:
        self.directory, self.converter, self.threads = directory, converter, threads

        makers = f"{CONVERTER_VERSION} {converter} {importlib.metadata.version('llama-cpp-python')}"
        self._makers = hashlib.sha256(makers.encode()).hexdigest()[:8]  # another build makes other files

    def _path(self, digest: str, kind: str) -> Path:
        return self.directory / f"oracle-{digest[:16]}-{self._makers}-{kind}.gguf"

    def converted(self, checkpoint: Path, digest: str, kind: str = "F16") -> Path:
        """The checkpoint as a float GGUF file."""
        path = self._path(digest, kind)
        if not path.is_file():
            convert(checkpoint, path, outtype=kind.lower(), converter=self.converter)
        return path

    def of_type(self, source: Path, kind: str, checkpoint: Path, digest: str) -> Path:
        """The oracle in a candidate's file type, quantised from `source`.

        Raises:
            InputError: a file type this build of llama.cpp cannot name.
        """
        if kind.lower() in OUT_TYPES:
            return self.converted(checkpoint, digest, kind)
        if kind == "unknown":
            raise InputError("the candidate's general.file_type is missing or newer than this version of so8t")
        path = self._path(digest, kind)
        if not path.is_file():
            quantise(source, path, kind, threads=self.threads)
        read_gguf(path)
        return path
