"""A set of 16-byte digests in 16 bytes each (a Python set of bytes takes about 110).

Open addressing with linear probing in one array of 64-bit words, at most two thirds full: a million digests need 32 MB.
Two different texts share a digest with probability n^2 / 2^129: 1e-27 for a million.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator


class DigestSet:
    """Add and look up digests of 16 bytes."""

    def __init__(self) -> None:
        self._slots = array("Q", [0]) * 2048  # pairs (high, low); (0, 0) is empty
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, digest: bytes) -> bool:
        high, low = _words(digest)
        return self._slots[self._find(high, low)] == high

    def __iter__(self) -> Iterator[bytes]:
        slots = self._slots
        for at in range(0, len(slots), 2):
            if slots[at]:
                yield slots[at].to_bytes(8, "big") + slots[at + 1].to_bytes(8, "big")

    def add(self, digest: bytes) -> bool:
        """True if `digest` is new."""
        high, low = _words(digest)
        at = self._find(high, low)
        if self._slots[at]:
            return False
        self._slots[at], self._slots[at + 1] = high, low
        self._count += 1
        if 3 * self._count > len(self._slots):  # more than two thirds of the pairs are taken
            self._grow()
        return True

    def _find(self, high: int, low: int) -> int:
        """Index of the digest's pair, or of the empty pair where it belongs."""
        slots = self._slots
        mask = len(slots) - 1
        at = 2 * low & mask
        while slots[at] and not (slots[at] == high and slots[at + 1] == low):
            at = (at + 2) & mask
        return at

    def _grow(self) -> None:
        old = self._slots
        self._slots = array("Q", [0]) * (2 * len(old))
        for at in range(0, len(old), 2):
            if old[at]:
                place = self._find(old[at], old[at + 1])
                self._slots[place], self._slots[place + 1] = old[at], old[at + 1]


def _words(digest: bytes) -> tuple[int, int]:
    """(high, low) words; a high word of 0, which marks an empty pair, becomes 1."""
    return int.from_bytes(digest[:8], "big") or 1, int.from_bytes(digest[8:16], "big")
