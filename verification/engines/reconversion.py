"""The verifier's own conversion of a checkpoint, and its quantisation with this machine's build (the oracle).

llama.cpp's quantiser is a function of the source's bytes, the type, the importance matrix and the build. The bytes also
depend on the float file that a candidate was quantised from (F16, BF16, F32); every form is tried for each tensor.
Files are named by the digests of the checkpoint and of the programs that made them, and are used again if a work
directory is kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from so8t_core.errors import InputError
from so8t_core.files import sha256_file
from verification.engines.convert import OUT_TYPES, convert, find_converter
from verification.engines.program_digests import makers_digest
from verification.engines.quantise import Importance, quantise
from verification.gguf.imatrix import read_imatrix
from verification.gguf.reader import GGUFFile, GGUFTensor, read_gguf

INTERMEDIATES = ("F16", "BF16", "F32")  # float files that quantised files are made from, the most frequent first


class FloatFiles:
    """The reference's conversions to float types; each is made at its first use and kept open."""

    def __init__(self, make: Callable[[str], GGUFFile | None]) -> None:
        """`make` returns the conversion to "F16", "BF16" or "F32"; None if there is none."""
        self._make, self._known, self._lock = make, dict[str, GGUFFile | None](), threading.Lock()

    def file(self, kind: str) -> GGUFFile | None:
        """The conversion to one type.

        Raises:
            InputError: the converter refuses the reference.
        """
        with self._lock:  # several threads examine tensors
            if kind not in self._known:
                self._known[kind] = self._make(kind)
            return self._known[kind]

    def tensor(self, kind: str, name: str) -> GGUFTensor | None:
        """One tensor of one conversion."""
        file = self.file(kind)
        return None if file is None else file.tensors.get(name)


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
        """Digest of the programs: another converter, build of llama.cpp or release of its readers makes other files."""
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
            InputError: a file type that this build of llama.cpp does not know, or that needs an importance matrix.
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

    def conversions(self, checkpoint: Path, digest: str) -> FloatFiles:
        """The checkpoint in every float type that a quantiser may have started from."""
        return FloatFiles(lambda kind: read_gguf(self.converted(checkpoint, digest, kind)))
