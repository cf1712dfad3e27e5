"""Laws of the guard (tests/serve/guard_laws.py), and for each of them a broken guard that it catches."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import guard_laws
import pytest
from guard_laws import LAWS, canonical, pieces
from mutation import load

from pipeline.data.think_form import ANSWER_MARKER, parse
from pipeline.serve import guard


@pytest.mark.parametrize("name", LAWS)
def test_law_holds(name: str) -> None:
    LAWS[name](guard)


def test_five_thousand_fuzzed_generations_show_no_thinking() -> None:
    guard_laws.law_fuzz(guard, range(10_000, 15_000))


@pytest.mark.soak
def test_a_million_fuzzed_generations_show_no_thinking() -> None:
    guard_laws.law_fuzz(guard, range(1_000_000))


def variant(**changes: Any) -> ModuleType:
    """The guard with some names replaced; `judge` is what the streaming form gives unless it is replaced as well."""
    broken: Any = SimpleNamespace(**{name: getattr(guard, name) for name in dir(guard) if not name.startswith("__")})
    for name, value in changes.items():
        setattr(broken, name, value)
    return broken  # type: ignore[no-any-return]


def judging(judge: Callable[[bytes, str | None], Any]) -> ModuleType:
    """A guard whose verdict is another function."""

    class Streaming(guard.Guard):
        def close(self, finish: str | None) -> Any:
            return judge(bytes(self._data), finish)

    return variant(judge=judge, Guard=Streaming)


class ByChunk(guard.Guard):
    """Looks for the marker within single chunks, as servers do that filter deltas."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def feed(self, piece: bytes) -> None:
        super().feed(piece)
        self.seen = self.seen or ANSWER_MARKER.encode() in piece

    def close(self, finish: str | None) -> guard.Verdict:
        verdict = super().close(finish)
        return verdict if self.seen else guard.Verdict(None, "odd marker", verdict.thinking)


def after_last_marker(data: bytes, finish: str | None) -> guard.Verdict:
    """The common rule: everything after the marker is the answer, everything without one too."""
    text = data.decode("utf-8", "replace")
    return guard.Verdict(text.rpartition(ANSWER_MARKER)[2].strip(), "released", b"")


def ignores_finish(data: bytes, finish: str | None) -> guard.Verdict:
    return guard.judge(data, "stop")


def forgives_encoding(data: bytes, finish: str | None) -> guard.Verdict:
    return guard.judge(data.decode("utf-8", "ignore").replace("\ufffd", "").encode(), finish)


def form_only(data: bytes, finish: str | None) -> guard.Verdict:
    """The parser of the data step: right for data, too narrow to close."""
    thought = parse(data.decode("utf-8", "replace")) if finish == "stop" else None
    return guard.Verdict(thought.answer if thought else None, "released", b"")


def tells_length(data: bytes, finish: str | None) -> guard.Verdict:
    verdict = guard.judge(data, finish)
    return guard.Verdict(verdict.answer and f"{verdict.answer} {len(data)}", verdict.reason, verdict.thinking)


class Bottomless(guard.Guard):
    def feed(self, piece: bytes) -> None:
        self._data += piece


class Talkative(guard.TooLong):
    def __str__(self) -> str:
        return "canary"


def rewritten(old: str, new: str) -> ModuleType:
    """The guard with a piece of its source replaced."""
    source = Path(str(guard.__file__)).read_text(encoding="utf-8")
    assert old in source
    return load(source.replace(old, new), "rewritten_guard")


BROKEN = {
    "law_fuzz": [variant(Guard=ByChunk), judging(after_last_marker), judging(form_only), judging(tells_length)],
    "law_finish": [judging(ignores_finish), judging(after_last_marker)],
    "law_utf8": [judging(forgives_encoding)],
    "law_variants": [judging(form_only), judging(after_last_marker)],
    "law_form": [judging(after_last_marker), judging(lambda data, finish: guard.Verdict(None, "no", data))],
    "law_copies": [variant(copies=lambda steps, answer: False), variant(copies=lambda steps, answer: steps in answer)],
    "law_size": [variant(Guard=Bottomless)],
    "law_interference": [judging(tells_length)],
    "law_time": [rewritten(r"[^\w<]*", r"\W*"), rewritten("{1,128}", "{1,99999}")],
    "law_silence": [variant(TooLong=Talkative)],
}


@pytest.mark.parametrize(("law", "broken"), [(law, one) for law, many in BROKEN.items() for one in many])
def test_each_law_catches_a_broken_guard(law: str, broken: ModuleType) -> None:
    with pytest.raises(AssertionError):
        LAWS[law](broken)


def test_every_law_has_a_broken_guard() -> None:
    assert set(BROKEN) == set(LAWS)


def test_all_cuts_of_one_text_in_two_give_one_verdict() -> None:
    data = canonical("α = β\nγ", "四十二 \U0001f600").encode()
    for at in range(len(data) + 1):
        assert guard_laws.stream(guard, [data[:at], data[at:]], "stop").answer == "四十二 \U0001f600"


def test_chunkings_are_chunkings() -> None:
    rng = random.Random(0)
    for _ in range(200):
        data = bytes(range(rng.randrange(1, 60)))
        assert b"".join(pieces(rng, data)) == data
