"""Stores the reference's logits on disk: written once, read back for every candidate, deleted afterwards.

Rows are float32, (rows, V), as the model gave them: half precision would add a KLD of about 1e-5, more than the KLD of
a healthy F16 file. Memory holds only the requested rows; the disk holds 4 V bytes a scored position (600 MB for 3,060
positions of a 49,152 token vocabulary).
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
LARGE = 1 << 30  # for more bytes of logits, hidden states are kept if the family allows it


def fits(directory: Path, *, rows: int, vocab: int) -> bool:
    """Whether the full logits take at most `LARGE` bytes and fit on the disk."""
    return 4 * rows * vocab <= min(LARGE, 0.95 * shutil.disk_usage(directory).free)


class LogitSpool(Closing):
    """A temporary file of logits; a context manager.

    Raises:
        InputError: the disk does not have enough room for `rows` rows.
    """

    recomputes = False  # whether each reading computes the logits again

    def __init__(self, directory: Path, *, rows: int, vocab: int) -> None:
        self.vocab, self.rows = vocab, 0
        need, free = 4 * rows * vocab, shutil.disk_usage(directory).free
        if need > 0.95 * free:
            raise InputError(
                f"the reference's logits need {need / 2**30:.1f} GiB in {directory}, which has {free / 2**30:.1f} GiB "
                "free; set TMPDIR (in a run: run_dir) to a larger disk, or score fewer chunks"
            )
        self._file = tempfile.TemporaryFile(dir=directory, prefix="so8t-logits-")  # noqa: SIM115  deleted on close

    def close(self) -> None:
        """Free the disk; safe to call twice."""
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
