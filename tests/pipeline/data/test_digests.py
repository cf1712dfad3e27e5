"""Laws of the digest set: it behaves as a set of bytes, and takes 32 bytes a digest at most."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.digest_set import DigestSet


@given(st.lists(st.binary(min_size=16, max_size=16) | st.sampled_from([bytes(16), b"\xff" * 16, b"\1" * 16])))
def test_it_is_a_set(digests: list[bytes]) -> None:
    mine, plain = DigestSet(), set[bytes]()
    for digest in digests:
        known = (digest[:8] if any(digest[:8]) else bytes(7) + b"\1") + digest[8:]  # a high word of 0 counts as 1
        assert (digest in mine) == (known in plain)
        assert mine.add(digest) == (known not in plain)
        plain.add(known)
    assert len(mine) == len(plain)
    assert set(mine) == plain


def test_it_grows_and_stays_small() -> None:
    mine = DigestSet()
    for number in range(50_000):
        assert mine.add(hashlib.sha256(str(number).encode()).digest()[:16])
    assert all(not mine.add(hashlib.sha256(str(number).encode()).digest()[:16]) for number in range(0, 50_000, 100))
    assert len(mine) == 50_000
    assert len(mine._slots) * 8 <= 50_000 * 16 * 3  # between 3/2 and 3 pairs a digest


def test_colliding_places_are_told_apart() -> None:
    """The planted case: one low word, so that all of them start their search at the same place."""
    mine = DigestSet()
    digests = [number.to_bytes(8, "big") + bytes(8) for number in range(1, 400)]
    assert all(mine.add(digest) for digest in digests)
    assert not any(mine.add(digest) for digest in digests)
    assert (500).to_bytes(8, "big") + bytes(8) not in mine
