"""The reference's logits on disk: written once, read back for every candidate, deleted afterwards.

Rows are float32, (rows, V), as the model gave them: half precision would add a KLD of about 1e-5, more than a healthy
F16 file has. Memory holds the rows that are asked for, whatever the length of the run; the disk holds 4 V bytes a
scored position (600 MB for 3,060 positions of a 49,152 token vocabulary).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from so8t_core.errors import InputError
from verification.engines.closing import Closing

Array = npt.NDArray[np.float32]
LARGE = 1 << 30  # bytes of logits above which hidden states are kept instead, where the family allows it


def fits(directory: Path, *, rows: int, vocab: int) -> bool:
    """Whether full logits are no large file for this disk."""
    return 4 * rows * vocab <= min(LARGE, 0.95 * shutil.disk_usage(directory).free)


class LogitSpool(Closing):
    """A temporary file of logits; a context manager.

    Raises:
        InputError: the disk has not enough room for `rows` rows.
    """

    recomputes = False  # whether a reading costs more than that

    def __init__(self, directory: Path, *, rows: int, vocab: int) -> None:
        self.vocab, self.rows = vocab, 0
        need, free = 4 * rows * vocab, shutil.disk_usage(directory).free
        if need > 0.95 * free:
            raise InputError(
                f"the reference's logits need {need / 2**30:.1f} GiB in {directory}, which has {free / 2**30:.1f} GiB "
                "free; set TMPDIR (in a run: run_dir) to a larger disk, or score fewer chunks"
            )
        self._file = tempfile.TemporaryFile(dir=directory, prefix="so8t-logits-")  # noqa: SIM115  nameless: gone with us

    def close(self) -> None:
        """Give the disk back; safe to call twice."""
        self._file.close()

    def append(self, logits_TV: Array) -> None:
        """Write the next rows."""
        if logits_TV.shape[1] != self.vocab:
            raise InputError(f"the reference gave {logits_TV.shape[1]} logits a token, then {self.vocab}")
        self._file.seek(4 * self.rows * self.vocab)
        try:
            self._file.write(np.ascontiguousarray(logits_TV, dtype="<f4").data)
            self._file.flush()
        except OSError as error:
            raise InputError(f"the reference's logits cannot be written: {error.strerror}; set TMPDIR") from None
        self.rows += len(logits_TV)

    def read(self, start: int, stop: int) -> Array:
        """Rows start .. stop-1, (stop - start, V)."""
        if not 0 <= start <= stop <= self.rows:
            raise IndexError(f"rows {start}..{stop} of {self.rows}")
        result = np.empty((stop - start, self.vocab), dtype="<f4")
        self._file.seek(4 * start * self.vocab)
        if self._file.readinto(result.data) != result.nbytes:
            raise OSError("the spool of the reference's logits was cut off")
        return result
