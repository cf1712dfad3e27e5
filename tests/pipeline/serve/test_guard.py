"""Laws of the guard (tests/pipeline/serve/guard_laws.py), and for each of them a broken guard that it catches."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import guard_laws
import pytest
from guard_kits import KITS
from guard_laws import LAWS, canonical, pieces
from test_guard_mutants import exchanged

from pipeline.data.think_form import parse
from pipeline.serve import guard
from pipeline.serve import text_folding as folding
from pipeline.serve.forms.registry import SO8T


@pytest.mark.parametrize("form", KITS)
@pytest.mark.parametrize("name", LAWS)
def test_law_holds(name: str, form: str) -> None:
    LAWS[name](guard, KITS[form])


@pytest.mark.parametrize("form", KITS)
def test_five_thousand_fuzzed_generations_show_no_thinking(form: str) -> None:
    guard_laws.law_fuzz(guard, KITS[form], range(10_000, 15_000))


@pytest.mark.soak
@pytest.mark.parametrize("form", KITS)
def test_a_million_fuzzed_generations_show_no_thinking(form: str) -> None:
    guard_laws.law_fuzz(guard, KITS[form], range(int(os.environ.get("SO8T_SOAK_GENERATIONS", "1000000"))))


def variant(**changes: Any) -> ModuleType:
    """The guard with some names replaced; `judge` is what the streaming form gives unless it is replaced as well."""
    broken: Any = SimpleNamespace(**{name: getattr(guard, name) for name in dir(guard) if not name.startswith("__")})
    for name, value in changes.items():
        setattr(broken, name, value)
    return broken  # type: ignore[no-any-return]


def judging(judge: Callable[..., Any]) -> ModuleType:
    """A guard whose verdict is another function."""

    class Streaming(guard.Guard):
        def close(self, finish: str | None) -> Any:
            more = {"form": self.form, "reasoning": bytes(self._reasoning), "mixed": self._mixed}
            return judge(bytes(self._data), finish, **more)

    return variant(judge=judge, Guard=Streaming)


class ByChunk(guard.Guard):
    """Looks for the marker within single chunks, as servers do that filter deltas."""

    def __init__(self, form: Any = SO8T) -> None:
        super().__init__(form)
        self.seen = False

    def feed(self, piece: bytes, *, reasoning: bool = False) -> None:
        super().feed(piece, reasoning=reasoning)
        self.seen = self.seen or any(marker.encode() in piece for marker in self.form.markers[1:])

    def close(self, finish: str | None) -> guard.Verdict:
        verdict = super().close(finish)
        return verdict if self.seen else guard.Verdict(None, "odd marker", verdict.thinking)


def after_last_marker(data: bytes, finish: str | None, *, form: Any = SO8T, **_: Any) -> guard.Verdict:
    """The common rule: everything after the marker is the answer, everything without one too."""
    text = data.decode("utf-8", "replace")
    marker = {"harmony": "<|message|>"}.get(form.name, form.markers[-1] if form.markers else "</think>")
    return guard.Verdict(text.rpartition(marker)[2].strip(), "released", b"")


def ignores_finish(data: bytes, finish: str | None, **more: Any) -> guard.Verdict:
    return guard.judge(data, "stop", **more)


def forgives_encoding(data: bytes, finish: str | None, **more: Any) -> guard.Verdict:
    return guard.judge(data.decode("utf-8", "ignore").replace("\ufffd", "").encode(), finish, **more)


def form_only(data: bytes, finish: str | None, **_: Any) -> guard.Verdict:
    """The parser of the data step: right for data, too narrow to close."""
    thought = parse(data.decode("utf-8", "replace")) if finish == "stop" else None
    return guard.Verdict(thought.answer if thought else None, "released", b"")


def tells_length(data: bytes, finish: str | None, **more: Any) -> guard.Verdict:
    verdict = guard.judge(data, finish, **more)
    length = len(data) + len(more.get("reasoning", b""))
    return guard.Verdict(verdict.answer and f"{verdict.answer} {length}", verdict.reason, verdict.thinking)


def forgets_what_is_apart(data: bytes, finish: str | None, **more: Any) -> guard.Verdict:
    return guard.judge(data, finish, form=more["form"])


class Bottomless(guard.Guard):
    def feed(self, piece: bytes, *, reasoning: bool = False) -> None:
        self._data += piece


class Talkative(guard.TooLong):
    def __str__(self) -> str:
        return "canary"


BROKEN = {
    "law_fuzz": [variant(Guard=ByChunk), judging(after_last_marker), judging(form_only), judging(tells_length)],
    "law_finish": [judging(ignores_finish), judging(after_last_marker)],
    "law_utf8": [judging(forgives_encoding)],
    "law_variants": [judging(form_only), judging(after_last_marker)],
    "law_form": [judging(after_last_marker), judging(lambda data, finish, **_: guard.Verdict(None, "no", data))],
    "law_apart": [judging(forgets_what_is_apart)],
    "law_copies": [variant(copies=lambda steps, answer: False), variant(copies=lambda steps, answer: steps in answer)],
    "law_size": [variant(Guard=Bottomless)],
    "law_interference": [judging(tells_length)],
    "law_time": [],  # below: its fault lies in the folding
    "law_silence": [variant(TooLong=Talkative)],
}


@pytest.mark.parametrize("fault", [("{1,128}", "{1,99999}"), (r"<[|\[\]]*", r"<.*?")])
def test_the_law_of_time_catches_a_folding_that_is_slow(fault: tuple[str, str]) -> None:
    source = Path(str(folding.__file__)).read_text(encoding="utf-8")
    assert fault[0] in source
    with exchanged(folding, source.replace(*fault)), pytest.raises(AssertionError):
        guard_laws.law_time(guard)


@pytest.mark.parametrize("form", [name for name in KITS if name != "so8t"])
@pytest.mark.parametrize("judge", [after_last_marker, tells_length, ignores_finish])
def test_the_fuzzing_of_each_form_catches_a_broken_guard(form: str, judge: Any) -> None:
    with pytest.raises(AssertionError):
        guard_laws.law_fuzz(judging(judge), KITS[form])


@pytest.mark.parametrize(("law", "broken"), [(law, one) for law, many in BROKEN.items() for one in many])
def test_each_law_catches_a_broken_guard(law: str, broken: ModuleType) -> None:
    with pytest.raises(AssertionError):
        LAWS[law](broken)


def test_every_law_has_a_broken_guard() -> None:
    assert set(BROKEN) == set(LAWS)


def test_all_cuts_of_one_text_in_two_give_one_verdict() -> None:
    data = canonical("α = β\nγ", "四十二 \U0001f600").encode()
    for at in range(len(data) + 1):
        assert guard_laws.stream(guard, [(False, data[:at]), (False, data[at:])], "stop").answer == "四十二 \U0001f600"


def test_chunkings_are_chunkings() -> None:
    rng = random.Random(0)
    for _ in range(200):
        data = bytes(range(rng.randrange(1, 60)))
        assert b"".join(pieces(rng, data)) == data
