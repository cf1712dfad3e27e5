"""Remove an earlier run's results from the folder of --out before this run can stop.

So every result in the folder belongs to this run.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from so8t_core.errors import InputError
from so8t_core.files import explain_os_errors
from verification.engines import distributed
from verification.gate.stored import REPORT_FILES, clear_report

RESULTS = {  # verb: files that it writes into its --out
    "verify": (*REPORT_FILES, "self_test.json", "self_test.md", "self_test.html"),
    "lint": ("lint.json",),
}


def take_away(verb: str, out: Path | None) -> None:
    """Remove a verb's earlier results; in a launch, only the first process does it.

    Raises:
        InputError: the launch's variables contradict one another, or the folder cannot be written.
    """
    if out is None:
        return
    try:
        first = distributed.is_first()
    except InputError:
        _clear(verb, out)  # refused for its launch variables: no process will write
        raise
    if first:
        _clear(verb, out)


def take_away_named(arguments: Sequence[str]) -> None:
    """Do the same for a command line that was refused before its verb could begin.

    It removes files only and makes no folder.
    """
    verb, given = next(iter(arguments), ""), list(arguments)
    behind = [value for name, value in pairwise(given) if name == "--out"]
    behind += [word.removeprefix("--out=") for word in given if word.startswith("--out=")]
    for folder in map(Path, behind):
        if verb in RESULTS and folder.is_dir():
            _clear(verb, folder)


def _clear(verb: str, out: Path) -> None:
    if verb == "verify":
        clear_report(out)
    with explain_os_errors(out):
        for name in RESULTS[verb]:
            (out / name).unlink(missing_ok=True)
