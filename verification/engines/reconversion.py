"""The verifier's own conversion of a checkpoint, quantised with this machine's build: the exact oracle for a file.

llama.cpp's quantiser is a function of the source's bytes, the type, the importance matrix and the build; so a candidate
made the same way from the same weights has the same tensor bytes. Which float file it was quantised from (F16, BF16,
F32) changes bytes, and is found by trying. Files are named by the digests of the checkpoint and of the programs that
made them, and reused when a work directory is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from so8t_core.errors import InputError
from so8t_core.files import sha256_file
from verification.engines.convert import OUT_TYPES, convert, find_converter
from verification.engines.digests import makers_digest
from verification.engines.quantise import Importance, quantise
from verification.gguf.imatrix import read_imatrix
from verification.gguf.reader import GGUFFile, read_gguf

INTERMEDIATES = ("F16", "BF16", "F32")  # the float files a quant is usually made from, the most frequent first


@dataclass(frozen=True)
class Twin:
    """The reference in a candidate's file type, and how it was made."""

    file: GGUFFile
    source: GGUFFile  # the float file it was quantised from; itself for a float candidate
    imatrix: bool

    @property
    def made(self) -> str:
        return f"from {self.source.file_type}" + (" with the imatrix" if self.imatrix else "")


class Oracle:
    """Makes and keeps reference files in one directory."""

    def __init__(
        self,
        directory: Path,
        *,
        converter: str | Path | None = None,
        threads: int | None = None,
        imatrix: str | Path | None = None,
    ) -> None:
        self.directory, self.converter, self.threads = directory, converter, threads
        self.imatrix: Importance = read_imatrix(imatrix) if imatrix is not None else {}
        self._importance = f"-imatrix{sha256_file(imatrix)[:8]}" if imatrix is not None else ""

    def _makers(self) -> str:
        """Another converter, build of llama.cpp or release of its readers makes other files."""
        return makers_digest(find_converter(self.converter))[:16]

    def converted(self, checkpoint: Path, digest: str, kind: str = "F16") -> Path:
        """The checkpoint as a float GGUF file."""
        path = self.directory / f"oracle-{digest[:16]}-{self._makers()}-{kind}.gguf"
        if not path.is_file():
            convert(checkpoint, path, outtype=kind.lower(), converter=self.converter)
        return path

    def of_type(self, source: Path, kind: str, checkpoint: Path, digest: str) -> Path:
        """The oracle in a candidate's file type, quantised from `source`.

        Raises:
            InputError: a file type this build of llama.cpp cannot name, or one that needs an importance matrix.
        """
        if kind.lower() in OUT_TYPES:
            return self.converted(checkpoint, digest, kind)
        if kind == "unknown":
            raise InputError("the candidate's general.file_type is missing or newer than this version of so8t")
        path = source.with_name(f"{source.stem}{self._importance}-{kind}.gguf")
        if not path.is_file():
            quantise(source, path, kind, threads=self.threads, imatrix=self.imatrix)
        read_gguf(path)
        return path

    def twin(self, candidate: GGUFFile, checkpoint: Path, digest: str) -> Twin:
        """The reference in the candidate's type, from the float type that gives the candidate's bytes.

        Where none does, the one that gives most of its tensors.

        Raises:
            InputError: see `of_type`.
        """
        if candidate.is_float:
            file = read_gguf(self.converted(checkpoint, digest, candidate.file_type))
            return Twin(file, file, imatrix=False)
        best: Twin | None = None
        fewest = len(candidate.tensors) + 1
        for middle in INTERMEDIATES:
            source = self.converted(checkpoint, digest, middle)
            file = read_gguf(self.of_type(source, candidate.file_type, checkpoint, digest))
            differing = sum(not same_bytes(candidate, file, name) for name in candidate.tensors)
            if best is None or differing < fewest:
                best, fewest = Twin(file, read_gguf(source), imatrix=bool(self.imatrix)), differing
            if fewest == 0:
                break
        assert best is not None  # INTERMEDIATES is not empty
        return best


def same_bytes(candidate: GGUFFile, oracle: GGUFFile, name: str) -> bool:
    """Whether a tensor of the candidate is the oracle's in type, shape and bytes."""
    mine, twin = candidate.tensors[name], oracle.tensors.get(name)
    if twin is None or (twin.type, twin.shape) != (mine.type, mine.shape):
        return False
    return bool(np.array_equal(mine.raw, twin.raw))
