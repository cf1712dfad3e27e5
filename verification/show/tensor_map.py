"""A picture of the drawers of a file's tensors: layers across, roles downwards, one cell for each tensor.

A role is a tensor's name without its layer: `blk.3.attn_q.weight` is `attn_q.weight` in layer 3. Tensors outside the
layers have a separate column, to the left of layer 0.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from verification.gate.report import Report, TensorRow
from verification.show.words import number, visible

DRAWERS = {  # in the order of the legend
    "proven": "the bytes or values are the reference's at this type",
    "judged": "other bytes; the difference looks like rounding of this type",
    "unexplained": "the difference is no rounding",
    "not compared": "nothing of the reference belongs to it",
}
_LAYERED = re.compile(r"(?P<before>(?:.*?\.)?)blk\.(?P<layer>\d+)\.(?P<after>.+)")
_MOST_LAYERS, _MOST_ROLES, _MOST_ROWS = 256, 120, 40
_LETTER = 6.7  # units of width of a letter of a role's name


@dataclass(frozen=True)
class Cell:
    """One tensor: its place in the picture, its drawer, and the text under the mouse pointer."""

    x: float
    y: float
    drawer: str
    words: str


@dataclass(frozen=True)
class TensorMap:
    """The picture of one file."""

    candidate: str
    counts: list[tuple[str, int, str]]  # drawer, number of tensors, meaning of the drawer
    roles: list[tuple[float, str]]  # y, name
    layers: list[tuple[float, str]]  # x, number
    cells: list[Cell]
    size: float  # side of a cell
    width: float
    height: float

    @property
    def label(self) -> str:
        """The picture in words, for screen readers."""
        found = ", ".join(f"{count} {drawer}" for drawer, count, _ in self.counts)
        return f"Tensors of {self.candidate} by layer and role: {found}"


def tensor_maps(report: Report) -> list[TensorMap]:
    """One picture for each candidate whose tensors have drawers."""
    by_file: dict[str, list[TensorRow]] = {}
    for row in report.tensors:
        if row.drawer is not None:  # None in reports before schema 1.3
            by_file.setdefault(row.candidate, []).append(row)
    return [_tensor_map(candidate, rows) for candidate, rows in by_file.items()]


def unproven(report: Report) -> list[TensorRow]:
    """Tensors that are not proven: first the unexplained, then those with the most different blocks."""
    order = ("unexplained", "judged", "not compared")
    rows = [row for row in report.tensors if row.drawer in order]
    return sorted(rows, key=lambda row: (order.index(str(row.drawer)), -_share(row)))


def shown(rows: Sequence[TensorRow]) -> Sequence[TensorRow]:
    """The first rows, as many as a page can hold."""
    return rows[:_MOST_ROWS]


def differing(row: TensorRow) -> str:
    """Blocks of a tensor that differ from llama.cpp's quantiser: "12 of 4608 blocks (0.3 %)"; "" if unknown."""
    if not row.blocks:
        return ""
    return f"{number(row.blocks_differ)} of {number(row.blocks)} blocks ({number(100 * _share(row), 2)} %)"


@dataclass(frozen=True)
class Strip:
    """The error along one axis of a tensor: bars of equal width, the highest of height 1."""

    axis: str  # "rows"
    bars: list[tuple[float, float]]  # x from 0 to 1, height from 0 to 1
    width: float  # width of a bar
    words: str


def strips(row: TensorRow) -> list[Strip]:
    """The error of a tensor along its rows and its columns; empty if it was not measured."""
    columns = row.shape[-1] if row.shape else 1
    rows = math.prod(row.shape[:-1])
    found = []
    for axis, errors, size in (("rows", row.rows, rows), ("columns", row.columns, columns)):
        if not errors or not max(errors) > 0:
            continue
        sizes = [size // len(errors) + (at < size % len(errors)) for at in range(len(errors))]  # as numpy splits
        at = max(range(len(errors)), key=errors.__getitem__)
        first, share = sum(sizes[:at]), errors[at] ** 2 / sum(error**2 for error in errors)
        words = f"most in {axis} {first} to {first + sizes[at] - 1} of {size}: {100 * share:.0f} % of the squared error"
        width = 1 / len(errors)
        bars = [(number * width, error / max(errors)) for number, error in enumerate(errors)]
        found.append(Strip(axis, bars, width, words))
    return found


def _share(row: TensorRow) -> float:
    return row.blocks_differ / row.blocks if row.blocks else 0.0


def _tensor_map(candidate: str, rows: Sequence[TensorRow]) -> TensorMap:
    places = [_place(row.name) for row in rows]
    roles = list(dict.fromkeys(role for _, role in places))[:_MOST_ROLES]
    layers = sorted({layer for layer, _ in places if layer is not None})[:_MOST_LAYERS]
    size = 15.0 if len(layers) <= 48 else 10.0
    left, top = 12 + _LETTER * max((len(_short(role)) for role in roles), default=0), 20.0
    x_of = {None: left} | {layer: left + size * (1.5 + column) for column, layer in enumerate(layers)}
    y_of = {role: top + size * line for line, role in enumerate(roles)}
    cells = [
        Cell(x_of[layer], y_of[role], row.drawer or "", _words(row))
        for row, (layer, role) in zip(rows, places, strict=True)
        if layer in x_of and role in y_of
    ]
    every = max(1, round(len(layers) / 12))
    counts = Counter(str(row.drawer) for row in rows)
    return TensorMap(
        candidate=candidate,
        counts=[(drawer, counts[drawer], meaning) for drawer, meaning in DRAWERS.items() if counts[drawer]],
        roles=[(y + size / 2, _short(role)) for role, y in y_of.items()],
        layers=[(x_of[layer] + size / 2, str(layer)) for layer in layers[::every]],
        cells=cells,
        size=size,
        width=left + size * (2 + len(layers)),
        height=top + size * len(roles) + 4,
    )


def _place(name: str) -> tuple[int | None, str]:
    """(layer, role) of a tensor."""
    found = _LAYERED.fullmatch(name)
    if found is None:
        return None, name
    return int(found["layer"]), found["before"] + found["after"]


def _short(role: str) -> str:
    text = visible(role.removesuffix(".weight"))
    return text if len(text) <= 30 else f"{text[:27]}..."


def _words(row: TensorRow) -> str:
    error = "" if row.rel_error is None else f", relative error {number(row.rel_error)}"
    own = "" if row.own_error is None else f" (own quantiser {number(row.own_error)})"
    why = row.found or row.why
    blocks = differing(row)
    return f"{row.name}, {row.actual_type}: {row.drawer}{', ' + why if why else ''}{error}{own}" + (
        f", {blocks} differ" if blocks and row.blocks_differ else ""
    )
