"""Write a command's output: a result must reach standard output; lines for standard error may be lost.

An exit code of 0 means that somebody can read the result. So the command ends when standard output does not take the
result (closed or full: 2, reader gone: 141). A line that standard error does not take is lost and changes nothing: no
verification is thrown away and no exit code changes.
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

    Otherwise the next file that is opened, perhaps a report, would get the stream's number and the output of C
    libraries.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the smallest free number, this stream's


def say(text: str) -> None:
    """Write a result to standard output and make sure that it arrived.

    Raises:
        InputError: there is no standard output.
        OSError: standard output takes no more.
        typer.Exit: the reader of standard output went away; 141.
    """
    if sys.stdout is None:
        raise InputError("standard output is closed, so the result cannot be shown; open it, e.g. with `> result.txt`")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _to_nowhere(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(exit_codes.READER_GONE) from None  # typer would exit with 1
        raise


@contextlib.contextmanager
def page() -> Iterator[Console]:
    """A console whose text is written as one piece when the block has ended; raises the errors of `say`."""
    console = Console(highlight=False)
    console.width = min(max(console.width, _NARROW), _WIDE)  # COLUMNS=0 would show nothing at all
    with console.capture() as shown:
        yield console
    say(shown.get())


class _Spare:
    """A stream that may be full or closed: text that it cannot take is lost."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write as much as the stream takes; returns the number of characters given."""
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
    """Let standard error raise nothing, for any library that writes to it."""
    before = sys.stderr
    if before is not None:
        sys.stderr = cast(TextIO, _Spare(before))
    try:
        yield
    finally:
        sys.stderr = before


def _to_nowhere(stream: TextIO) -> None:
    """Send the rest of a stream's buffer to the null device; otherwise the interpreter would try it again at exit."""
    with contextlib.suppress(OSError, ValueError):  # no file behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
