"""What a command says: its result on standard output has to arrive, its errors and progress on standard error need not.

An exit code of 0 stands for a result that somebody can read. So a result that standard output does not take ends the
command (closed or full: 2, reader gone: 141), while a line that standard error does not take is lost and changes
nothing: no verification is thrown away and no exit code changes for it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

import typer
from rich.console import Console

from pipeline.cli import exit_codes
from so8t_core.errors import InputError

_NARROW, _WIDE = 20, 1000  # columns


def occupy_standard_streams() -> None:
    """Put the null device where the caller closed a standard stream.

    Otherwise the next file that is opened, a report perhaps, would get its number, and what a C library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the smallest free number, which is this one


def say(text: str) -> None:
    """Write a result to standard output and make sure that it went there.

    Raises:
        InputError: there is no standard output.
        OSError: it takes no more.
        typer.Exit: its reader went away; 141.
    """
    if sys.stdout is None:
        raise InputError("standard output is closed, so the result cannot be shown; open it, e.g. with `> result.txt`")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _to_nowhere(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(exit_codes.READER_GONE) from None  # typer makes a 1 of it
        raise


@contextlib.contextmanager
def page() -> Iterator[Console]:
    """A console whose text is said as one piece when the block has ended; raises what `say` does."""
    console = Console(highlight=False)
    console.width = min(max(console.width, _NARROW), _WIDE)  # COLUMNS=0 would show nothing at all
    with console.capture() as shown:
        yield console
    say(shown.get())


class _Spare:
    """A stream whose place may be full or gone: what it cannot take is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write as far as the stream takes it; the number of characters given."""
        try:
            self._stream.write(text)
        except OSError:
            _to_nowhere(self._stream)
        return len(text)

    def flush(self) -> None:
        """Send on what was written."""
        try:
            self._stream.flush()
        except OSError:
            _to_nowhere(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def spare_standard_error() -> Iterator[None]:
    """Standard error that raises nothing, for every library that writes to it."""
    before = sys.stderr
    if before is not None:
        sys.stderr = cast(TextIO, _Spare(before))
    try:
        yield
    finally:
        sys.stderr = before


def _to_nowhere(stream: TextIO) -> None:
    """Let the null device take what a stream still holds, or the interpreter would try again at its end."""
    with contextlib.suppress(OSError, ValueError):  # no file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
