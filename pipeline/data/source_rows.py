"""The rows of a source, streaming: JSON Lines, Parquet, or a directory that `datasets` wrote (`save_to_disk`).

pyarrow reads Parquet batch by batch and datasets maps a directory into memory (both are in the extra `data`); neither
copies anything into a cache. A row's number is its line in JSON Lines, and elsewhere its place, counted from 1.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.data.think_form import BrokenLine
from so8t_core.errors import InputError

MAX_LINE = 1 << 23  # bytes; a file without line ends must not fill the memory
BATCH = 256  # rows of a Parquet file held at a time
Numbered = Iterator[tuple[int, dict[str, Any] | BrokenLine]]


def read_rows(path: Path) -> Numbered:
    """(number, row or an error that says why it is broken) of a source.

    Raises:
        InputError: the source is missing or cannot be opened, a directory is no data set or holds several splits, or a
            package is not installed.
    """
    if path.is_dir():
        return _plain_rows(iter(_directory(path)))
    if path.suffix.lower() == ".parquet" and path.is_file():
        return _plain_rows(_parquet_rows(path))
    return read_lines(path)


def count_rows(path: Path) -> int:
    """Rows of a source, for the progress bar: the number of line ends, or the count that the file states.

    Raises:
        InputError: see `read_rows`.
    """
    if path.is_dir():
        return len(_directory(path))
    if path.suffix.lower() == ".parquet":
        return int(_parquet(path).metadata.num_rows)
    _require_file(path)
    with path.open("rb") as stream:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: stream.read(1 << 20), b""))


def _require_file(path: Path, what: str = "data source") -> None:
    """Refuse a pipe (reading it may wait for ever) or a device; a path that does not exist passes."""
    if path.exists() and not path.is_file():
        raise InputError(f"{what} {path} is not a regular file; write the rows into one")


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    _require_file(path)
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"data source {path} is no Parquet file that can be read: {str(error).splitlines()[0]}"
        ) from None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow

    try:
        for batch in _parquet(path).iter_batches(batch_size=BATCH):
            yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"data source {path} is damaged: {str(error).splitlines()[0]}") from None


def _directory(path: Path) -> Any:
    """The data set in a directory, which must hold one split."""
    if (path / "dataset_dict.json").is_file():
        try:
            names = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        except (ValueError, KeyError, TypeError, OSError):
            raise InputError(f"data source {path}: dataset_dict.json is damaged") from None
        raise InputError(
            f"data source {path} holds the splits {', '.join(map(str, names))}; name one, as {path / str(names[0])}"
        )
    if not (path / "dataset_info.json").is_file() or not (path / "state.json").is_file():
        raise InputError(
            f"data source {path} is a directory, but not one that datasets' save_to_disk writes; name a file"
        )
    from datasets import load_from_disk

    try:
        return load_from_disk(str(path))
    except Exception as error:  # datasets raises errors of arrow, of json, and its own
        raise InputError(f"data source {path} cannot be read: {str(error).splitlines()[0]}") from None


def _plain_rows(rows: Iterator[Any]) -> Numbered:
    for number, row in enumerate(rows, start=1):
        try:
            made = _plain(row)
            json.dumps(made, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            yield number, BrokenLine("not UTF-8", "half of a surrogate pair")
        except (TypeError, ValueError):
            yield number, BrokenLine("wrong type", "a column holds neither text nor numbers")
        else:
            yield number, made


def _plain(value: Any) -> Any:
    """A value in JSON's types; a struct's null fields are dropped, because this row does not have them."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return None if isinstance(value, bytes) else value  # pictures and sounds are no text


def read_lines(path: Path, *, what: str = "data source") -> Numbered:
    """(1-based line number, row or an error that says why it is broken) of a JSONL file, streaming; skips blank lines.

    Args:
        what: the file's name in an error.
    Raises:
        InputError: the file is missing or cannot be opened.
    """
    try:
        _require_file(path, what)
        stream = open(path, "rb")  # noqa: SIM115  (closed below; only the opening is the user's mistake)
    except FileNotFoundError:
        hint = "check data.sources and data.heldout_sources" if what == "data source" else "check the path"
        raise InputError(f"{what} {path} does not exist; {hint}") from None
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read: {error.strerror}") from None
    with stream:
        number = 0
        while line := stream.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_LINE)
                yield number, BrokenLine("line too long", f"more than {MAX_LINE} bytes")
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # some editors write a BOM
            if line.strip():
                yield number, _parse_line(line)


def _parse_line(line: bytes) -> dict[str, Any] | BrokenLine:
    try:
        row = json.loads(line.decode("utf-8"))
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        return BrokenLine("not UTF-8", f"byte 0x{line[error.start]:02x} at column {error.start + 1}")
    except UnicodeEncodeError:
        return BrokenLine("not UTF-8", "a \\u escape is half of a surrogate pair")
    except json.JSONDecodeError as error:
        return BrokenLine("bad JSON", f"{error.msg} at column {error.colno}")
    except (ValueError, RecursionError):
        return BrokenLine("bad JSON", "a number or a nesting beyond what can be read")
    if not isinstance(row, dict):
        return BrokenLine("not an object", f"a row must be a JSON object, got {type(row).__name__}")
    return row
