"""Writes and reads the bytes of a `reference.so8t`: little endian, every length follows from the header.

    "SO8TREF\\n" | u32 version = 1 | u32 bytes of the header | header (JSON, UTF-8) | arrays | sha256 of all before

Arrays in this order, without padding; T tokens, R rows, K top, S samples, M tensors, W sketch; ids are u16 if the
vocabulary has at most 65,536 tokens, otherwise u32:
    tokens u32 (T) | top_ids (R, K) | top_codes u16 (R, K) | lowest f32 (R) | tail_mass f32 (R) | tail_entropy f32 (R) |
    target f32 (R) | tail_ids (R, S) | tail_log_p f32 (R, S) | norms f32 (M) | sketches f32 (M, W)
A top token's log p is lowest x code / 65535. docs/reference_file.md specifies the format and what `read` refuses.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from so8t_core.errors import InputError
from so8t_core.files import atomic_file, explain_os_errors, read_regular
from verification.gate.strict_json import parse
from verification.reference_file.header import Header

MAGIC, VERSION = b"SO8TREF\n", 1
MAX_BYTES, MAX_HEADER = 1 << 28, 1 << 23
STEPS = 65535  # number of steps of the fixed-point log probabilities
_MASS = 1e-6  # float32's rounding of tail mass and lowest, added to half a step of the codes
_AGAIN = "fetch it again, or make it again with `so8t reference`"
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """The stored distributions of R scored positions."""

    top_ids: Array  # (R, K), the most likely first; of equally likely ids the lower first
    top_codes: Array  # (R, K) u16
    lowest: Array  # (R,) f32, log p of the last top token
    tail_mass: Array  # (R,) f32, log of the mass of all other tokens; -inf if there are none
    tail_entropy: Array  # (R,) f32, nats, entropy of the tail as a distribution
    target: Array  # (R,) f32, log p of the next token
    tail_ids: Array  # (R, S) drawn from the tail with replacement
    tail_log_p: Array  # (R, S) f32

    def __len__(self) -> int:
        return len(self.top_ids)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(*(array[rows] for array in vars(self).values()))

    @property
    def top_log_p(self) -> npt.NDArray[np.float64]:
        """(R, K) log probabilities of the top tokens."""
        return self.lowest.astype(np.float64)[:, None] * (self.top_codes.astype(np.float64) / STEPS)


@dataclass(frozen=True)
class ReferenceFile:
    """A whole reference file."""

    header: Header
    tokens: Array  # (T,) u32, passage after passage
    rows: Rows  # passage after passage
    norms: Array  # (M,) f32, Frobenius norms
    sketches: Array  # (M, W) f32

    def passage(self, number: int) -> npt.NDArray[np.int64]:
        """The token ids of one passage."""
        start = sum(passage.length for passage in self.header.passages[:number])
        return np.asarray(self.tokens[start : start + self.header.passages[number].length], dtype=np.int64)

    def targets(self) -> npt.NDArray[np.int64]:
        """The token after each stored position, (R,)."""
        parts = [self.passage(number)[p.first + 1 :] for number, p in enumerate(self.header.passages)]
        return np.concatenate(parts)

    def rows_of(self, number: int, first: int) -> Rows:
        """The rows of one passage from position `first` on."""
        start = sum(passage.rows for passage in self.header.passages[:number])
        passage = self.header.passages[number]
        return self.rows[start + first - passage.first : start + passage.rows]


def id_type(vocab: int) -> str:
    """The stored type of token ids."""
    return "<u2" if vocab <= 1 << 16 else "<u4"


def _layout(header: Header) -> dict[str, tuple[str, tuple[int, ...]]]:
    ids, rows, tensors = id_type(header.vocab), header.rows, len(header.tensors)
    return {
        "tokens": ("<u4", (header.tokens,)),
        "top_ids": (ids, (rows, header.top)),
        "top_codes": ("<u2", (rows, header.top)),
        "lowest": ("<f4", (rows,)),
        "tail_mass": ("<f4", (rows,)),
        "tail_entropy": ("<f4", (rows,)),
        "target": ("<f4", (rows,)),
        "tail_ids": (ids, (rows, header.samples)),
        "tail_log_p": ("<f4", (rows, header.samples)),
        "norms": ("<f4", (tensors,)),
        "sketches": ("<f4", (tensors, header.sketch)),
    }


def to_bytes(file: ReferenceFile) -> bytes:
    """The bytes of a file; the same content gives the same bytes."""
    head = json.dumps(file.header.model_dump(mode="json"), ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    parts = [MAGIC, struct.pack("<II", VERSION, len(head)), head.encode()]
    given = {"tokens": file.tokens, **vars(file.rows), "norms": file.norms, "sketches": file.sketches}
    for name, (kind, shape) in _layout(file.header).items():
        array = np.ascontiguousarray(given[name], dtype=kind)
        assert array.shape == shape, f"{name} has shape {array.shape}, the header says {shape}"
        parts.append(array.tobytes())
    body = b"".join(parts)
    return body + hashlib.sha256(body).digest()


def write(file: ReferenceFile, path: Path) -> None:
    """Write a file, whole or not at all.

    Raises:
        InputError: the file cannot be written, or is larger than a reader accepts.
    """
    data = to_bytes(file)
    if len(data) > MAX_BYTES:
        raise InputError(f"{path} would have {len(data)} bytes, {MAX_BYTES} are read at most; score fewer chunks")
    from_bytes(data, str(path))  # raises if this version cannot read the file
    with explain_os_errors(path), atomic_file(path) as temporary:
        temporary.write_bytes(data)


def read(path: str | Path) -> ReferenceFile:
    """Read a file, or refuse it.

    Raises:
        InputError: missing, cut off, of another version, or not what the format allows; the message names the place.
    """
    path = Path(path)
    try:
        data = read_regular(path, most=MAX_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; a reference.so8t is expected here") from None
    except ValueError:
        raise InputError(f"{path} has more than {MAX_BYTES} bytes, no reference file has; {_AGAIN}") from None
    return from_bytes(data, str(path))


def from_bytes(data: bytes, name: str) -> ReferenceFile:
    """The reference file in these bytes.

    Raises:
        InputError: cut off, of another version, or not what the format allows; the message names the place.
    """
    start = len(MAGIC) + 8
    if not data.startswith(MAGIC) or len(data) < start + 32:
        raise InputError(f"{name} is not a reference file: it begins with {data[:8]!r}, expected {MAGIC!r}")
    version, size = struct.unpack_from("<II", data, len(MAGIC))
    if version != VERSION:
        raise InputError(f"{name} has format version {version}, this so8t reads {VERSION}; use the so8t that made it")
    if size > MAX_HEADER or start + size + 32 > len(data):
        raise InputError(f"{name}: the header states {size} bytes, the file has {len(data)}; {_AGAIN}")
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise InputError(f"{name} is damaged: its bytes are not those that its own sha256 was made of; {_AGAIN}")
    header = _header(data[start : start + size], name)
    layout = _layout(header)
    wanted = start + size + 32 + sum(np.dtype(kind).itemsize * int(np.prod(shape)) for kind, shape in layout.values())
    if wanted != len(data):
        raise InputError(f"{name} has {len(data)} bytes, by its header {wanted}; {_AGAIN}")
    arrays: dict[str, Array] = {}
    at = start + size
    for key, (kind, shape) in layout.items():
        count = int(np.prod(shape))
        arrays[key] = np.frombuffer(data, dtype=kind, count=count, offset=at).reshape(shape)
        at += arrays[key].nbytes
    rows = Rows(**{key: arrays[key] for key in Rows.__dataclass_fields__})
    file = ReferenceFile(header, arrays["tokens"], rows, arrays["norms"], arrays["sketches"])
    if problem := next(_problems(file), ""):
        raise InputError(f"{name} is not a distribution that a model gives: {problem}; {_AGAIN}")
    return file


def _header(data: bytes, name: str) -> Header:
    try:
        return Header.model_validate(parse(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = " ".join(".".join(str(part) for part in first["loc"]).split())[:100]
        what = " ".join(first["msg"].removeprefix("Value error, ").split())[:200]
        raise InputError(f"{name}: header: {where or 'fields'}: {what.encode('ascii', 'replace').decode()}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}: the header is not JSON: {str(error)[:200]}; {_AGAIN}") from None


def _problems(file: ReferenceFile) -> Any:
    """Faults in the arrays, which must be distributions over the vocabulary; NaN fails each comparison."""
    header, rows = file.header, file.rows
    vocab, has_tail = header.vocab, header.vocab > header.top
    if not (file.tokens < vocab).all():
        yield "a token beyond the vocabulary"
    if not ((rows.top_ids < vocab).all() and (rows.tail_ids < vocab).all()):
        yield "a stored id beyond the vocabulary"
    for name in ("lowest", "tail_entropy", "target", "tail_log_p"):
        if not np.isfinite(getattr(rows, name)).all():
            yield f"{name} is not finite"
            return
    if not ((rows.lowest <= 0).all() and (rows.lowest > -1e4).all() and (rows.target <= 1e-6).all()):
        yield "a log probability above zero or below -10,000"
        return
    ordered = np.sort(rows.top_ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        yield "a top token stands twice"
    if (rows.top_codes[:, 1:] < rows.top_codes[:, :-1]).any():
        yield "top tokens out of order"
    if not (
        np.isfinite(rows.tail_mass).all() and (rows.tail_mass <= 1e-6).all()
        if has_tail
        else np.isneginf(rows.tail_mass).all()
    ):
        yield "the tail's mass is no log probability"
        return
    half_step = -rows.lowest.astype(np.float64) / STEPS / 2
    total = np.exp(rows.top_log_p).sum(axis=1) + np.exp(rows.tail_mass.astype(np.float64))
    if not (np.abs(total - 1) <= np.expm1(half_step) + _MASS).all():
        yield "probabilities that do not add up to one"
    tail_size = max(vocab - header.top, 1)
    if not ((rows.tail_entropy >= -1e-6).all() and (rows.tail_entropy <= np.log(tail_size) + 1e-5).all()):
        yield "the tail's entropy is not between 0 and ln of its tokens"
    if has_tail:
        slack = 1e-4  # float32's rounding of log p down to -1000
        above = rows.tail_log_p > np.minimum(rows.lowest, rows.tail_mass)[:, None] + slack
        inside = np.array([np.isin(a, b).any() for a, b in zip(rows.tail_ids, rows.top_ids, strict=True)])
        if above.any() or inside.any():
            yield "a token of the tail that is among the top, or more likely than it"
    top = rows.top_ids == file.targets()[:, None]  # (R, K)
    stated = np.where(top, rows.top_log_p, 0).sum(axis=1)
    wrong = np.where(top.any(axis=1), np.abs(rows.target - stated) > half_step + 1e-4, rows.target > rows.lowest + 1e-4)
    if wrong.any():
        yield "a target's log probability contradicts the top tokens"
    yield from _statistics(file)


def _statistics(file: ReferenceFile) -> Any:
    if not (np.isfinite(file.norms).all() and (file.norms >= 0).all() and np.isfinite(file.sketches).all()):
        yield "a tensor's statistics are not finite"
        return
    # |u W v| <= sum |W| <= sqrt(elements) ||W||, plus float32's rounding
    elements = np.array([float(np.prod(tensor.shape, dtype=float)) for tensor in file.header.tensors])
    if (np.abs(file.sketches) > (1.001 * np.sqrt(elements) * file.norms + 1e-30)[:, None]).any():
        yield "a tensor's projections are larger than its norm allows"
