"""The guard's laws, each a function of the module under test and of a form, so that broken ones can be held against it.

Texts are made of two alphabets: thinking of Greek letters, answers of Latin ones. A Greek letter in a released answer
is a byte of thinking that left, whatever the guard believes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from guard_kits import BORDER, KITS, OWN, Kit

GREEK = "αβγδεζηθλμξπρσφχψω"
LATIN = "abcdefghijklmnopqrstuvwxyz "

# Tags of every family, which no form's answer may hold.
TAGS = [
    "<think>",
    "</think>",
    "<Think>",
    "＜think＞",
    "< / thinking >",
    "<|thinking|>",
    "<\u200bthought>",
    "<th\u200bink>",
    "<reasoning>",
    "[THINK]",
    "【/think】",
    "◁think▷",
    "<seed:think>",
    "<|START_THINKING|>",
    "<|begin_of_thought|>",
    "<|channel|>",
    "<channel|>",
    "&lt;think&gt;",
    "[thinking]",
    "[|reasoning|]",
    "⟨thought⟩",
    "{think}",
    "‹/THINK›",
    "〔think〕",
    "〖think〗",
    "<|end_of_thought|>",
    "<[think]>",
]


def greek(rng: random.Random, low: int = 1, high: int = 30) -> str:
    return "".join(rng.choice(GREEK) for _ in range(rng.randint(low, high)))


def latin(rng: random.Random, low: int = 1, high: int = 30) -> str:
    return rng.choice(LATIN[:-1]) + "".join(rng.choice(LATIN) for _ in range(rng.randint(low - 1, high)))


def canonical(steps: str, answer: str) -> str:
    return OWN.canonical(steps, answer)


def pieces(rng: random.Random, data: bytes) -> list[bytes]:
    """A random chunking, down to single bytes."""
    if rng.random() < 0.2:
        return [data[i : i + 1] for i in range(len(data))]
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randint(0, 8)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def stream(guard: ModuleType, parts: list[tuple[bool, bytes]], finish: str | None, kit: Kit = OWN) -> Any:
    """The streaming form's verdict on pieces, each with whether it is reasoning."""
    streaming = guard.Guard(kit.form)
    try:
        for apart, part in parts:
            streaming.feed(part, reasoning=True) if apart else streaming.feed(part)
    except guard.TooLong:
        return guard.judge(b"", None)
    return streaming.close(finish)


def judged(guard: ModuleType, kit: Kit, text: str | bytes, finish: str | None = "stop") -> Any:
    """The verdict on a whole generation."""
    content, more = kit.arguments(text.encode() if isinstance(text, str) else text)
    return guard.judge(content, finish, **more)


def generation(rng: random.Random, kit: Kit) -> tuple[str, str | None]:
    """(text, its answer, None where it is not canonical): thinking anywhere, answers only where an answer may stand."""
    steps, answer = greek(rng), latin(rng)
    kind = rng.randrange(10)
    if kind < 3:
        lead = rng.choice(["", "", " ", "\n", "\ufeff", "\u3000"])
        return lead + kit.write(rng, steps, answer) + rng.choice(["", "\n", "  "]), answer.strip()
    marker = rng.choice(kit.markers)
    odd = rng.choice(list(kit.odds(marker).values())) if rng.random() < 0.8 else marker
    if kind == 3:  # a second round of thinking after the answer
        return f"{kit.canonical(steps, answer)}\n{odd}\n{greek(rng)}", None
    if kind == 4:  # a draft inside the thinking
        return kit.canonical(f"{steps}\n{odd}\n{greek(rng)}", answer), None
    if kind == 5:  # an odd marker instead of the right one
        text = kit.canonical(steps, greek(rng))
        dressed = text.replace(marker, rng.choice(list(kit.odds(marker).values())), 1)
        return (dressed, None) if dressed.strip() != text else ("", None)  # indented at the very start is no variant
    if kind == 6:  # a preamble
        text = f"{greek(rng)}\n{kit.markers[0]}{greek(rng)}\n{kit.canonical(steps, answer)}"
        return (text if kit is not OWN else f"{greek(rng)}\n{kit.canonical(steps, answer)}"), None
    if kind == 7:  # swapped, repeated or missing parts
        dress = rng.choice(list(kit.odds(marker).values()))
        return rng.choice(kit.odd(rng, steps, answer, dress)), None
    if kind == 8:  # a tag of some family after the answer
        return kit.canonical(steps, f"{answer}\n{rng.choice(TAGS)}{greek(rng)}"), None
    steps = greek(rng, 40, 80)
    run = steps[4 : 4 + 32]
    copied = rng.choice([run, run.upper(), "-".join(run), " ".join(run)])
    return kit.canonical(steps, f"{answer} {copied}"), None  # a long run of the thinking, dressed up


def law_fuzz(guard: ModuleType, kit: Kit = OWN, seeds: range = range(1500)) -> None:
    """No letter of the thinking leaves, whatever the chunks; canonical texts are released, whole and unchanged."""
    released = 0
    for seed in seeds:
        rng = random.Random(seed)
        text, answer = generation(rng, kit)
        data = text.encode()
        finish = "stop" if rng.random() < 0.9 else rng.choice(["length", None, "tool_calls", "", "Stop"])
        broken = rng.random() < 0.05 and len(data) > 4
        if broken:
            at = rng.randrange(len(data))
            data = data[:at] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbf\xbd"]) + data[at:]
        chunks = [(apart, piece) for apart, part in kit.parts(data) for piece in pieces(rng, part)]
        verdict = stream(guard, chunks, finish, kit)
        assert verdict == judged(guard, kit, data, finish), "the chunks made a difference"
        shown = verdict.answer or ""
        assert not any(letter in shown.casefold() for letter in GREEK), "thinking left"
        if answer is not None and finish == "stop" and not broken:
            assert verdict.answer == answer, "a good answer was withheld or changed"
            released += 1
        else:
            assert verdict.answer is None, ("something odd was let through", text)
    assert released > len(seeds) // 10 or len(seeds) == 1


def law_finish(guard: ModuleType, kit: Kit = OWN) -> None:
    """Only a turn that the model ended itself is shown."""
    data = kit.canonical("αβγ", "abc").encode()
    assert judged(guard, kit, data, "stop").answer == "abc"
    for finish in (None, "", "length", "content_filter", "tool_calls", "STOP", "stop "):
        verdict = judged(guard, kit, data, finish)
        assert verdict.answer is None
        assert verdict.thinking == kit.everything(data)
        assert verdict.reason == "not ended by the model"


def law_utf8(guard: ModuleType, kit: Kit = OWN) -> None:
    """What is not UTF-8, or was replaced because it was not, is withheld, wherever it stands."""
    good = kit.canonical("αβγ", "abc").encode()
    for bad in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xef\xbf\xbd", b"\xc0\xaf"):
        for at in (0, 5, len(good) - 1, len(good)):
            data = good[:at] + bad + good[at:]
            verdict = judged(guard, kit, data)
            assert (verdict.answer, verdict.reason, verdict.thinking) == (None, "not UTF-8", kit.everything(data))


def law_variants(guard: ModuleType, kit: Kit = OWN) -> None:
    """A second marker in any dress, in the thinking or after the answer, withholds; so does an odd one in its place."""
    good = kit.canonical("αβ", "abc")
    for marker in kit.markers:
        for name, odd in {**kit.odds(marker), "itself": marker}.items():
            for text in (
                kit.canonical(f"αβ\n{odd}\nγδ", "abc"),
                kit.canonical("αβ", f"abc\n{odd}\nγδ"),
                kit.canonical("αβ", f"abc {odd} d"),
                good.replace(marker, odd),
                good.replace(marker, odd, 1),
            ):
                verdict = judged(guard, kit, text)
                assert (verdict.answer == "abc") if text.strip() == good else (verdict.answer is None), (name, text)
    for tag in TAGS:
        for text in (kit.canonical("αβ", f"abc {tag} γδ"), kit.canonical(f"αβ {tag} γ", "abc")):
            verdict = judged(guard, kit, text)
            assert verdict.answer is None, tag
            repeats = tag in kit.form.markers and kit.form.name == "think"
            assert verdict.reason == "odd marker" or repeats, (tag, verdict.reason)


def law_form(guard: ModuleType, kit: Kit = OWN) -> None:
    """Each way to miss the form has its reason, and everything generated is accounted for."""
    assert (kit.form.name, kit.form.instructs) == (kit.name, kit.name == "so8t")
    assert kit.form.markers in (kit.markers, ())
    for reason, texts in kit.reasons.items():
        for text in texts:
            verdict = judged(guard, kit, text)
            assert (verdict.answer, verdict.reason) == (None, reason), (text, verdict.reason)
            assert verdict.thinking == kit.everything(text.encode())
    for seed in range(20):  # every way in which the form may be written
        kept = judged(guard, kit, kit.write(random.Random(seed), "  αβ\nγ ", " abc\n\ndef \n"))
        assert (kept.answer, kept.reason) == ("abc\n\ndef", "released")
        assert "".join(kept.thinking.decode().split()) == "αβγ"
    kept = judged(guard, kit, kit.canonical("  αβ\nγ ", " abc\n\ndef \n"))
    assert (kept.answer, kept.thinking) == ("abc\n\ndef", "αβ\nγ".encode())
    plain = ("a < b, think", "a thinking cap", "[thinking about it", "<b>think</b>", "a channel", "{ think: 1 }")
    for answer in plain:
        assert judged(guard, kit, kit.canonical("α", answer)).answer == answer
    skipped = judged(guard, kit, kit.canonical("", "abc"))
    assert skipped.answer == (None if kit.name in ("so8t", "separated") else "abc")


def law_apart(guard: ModuleType, kit: Kit = OWN) -> None:
    """Reasoning that an upstream separates although the form has markers is named, accounted for and not copied."""
    assert guard.SEPARATES == "upstream separates the thinking itself: start with --think-form separated"
    if not kit.form.markers:
        assert guard.judge(b"abc", "stop", form=kit.form, reasoning="α".encode()).answer == "abc"
        return
    apart = "ψχφ".encode() * 20
    for text, reason in (("abc", guard.SEPARATES), ("", guard.SEPARATES)):
        verdict = guard.judge(text.encode(), "stop", form=kit.form, reasoning=apart)
        assert (verdict.answer, verdict.reason, verdict.thinking) == (None, reason, apart + text.encode())
        assert guard.judge(text.encode(), "stop", form=kit.form).reason != guard.SEPARATES
    good = kit.canonical("αβ", "abc")
    for mixed in (False, True):
        verdict = guard.judge(good.encode(), "stop", form=kit.form, reasoning=apart, mixed=mixed)
        assert (verdict.answer, verdict.reason) == ("abc", "released")
    copied = kit.canonical("αβ", apart.decode()).encode()
    assert guard.judge(copied, "stop", form=kit.form, reasoning=apart).reason == "copied run"
    assert guard.judge(good.encode(), "stop", form=kit.form, reasoning=b"\xff").reason == "not UTF-8"
    assert guard.judge(good.encode(), "stop", form=kit.form, reasoning="\ufffd".encode()).reason == "not UTF-8"
    assert guard.judge(good.encode(), "stop", form=kit.form, reasoning=b"a" * guard.MAX_BYTES).reason == "too long"
    streaming = guard.Guard(kit.form)
    streaming.feed(apart, reasoning=True)
    streaming.feed(b"abc")
    assert len(streaming) == len(apart) + 3
    assert streaming.close("stop").thinking == apart + b"abc"


def law_copies(guard: ModuleType, kit: Kit = OWN) -> None:
    """A run of 32 folded characters is withheld, of 31 it is not; a whole thinking of 12 is, of 11 it is not."""
    run = "".join(chr(0x3B1 + i % 17) + chr(0x43A + i % 21) for i in range(40))  # no run repeats within itself
    for length in range(1, 60):
        for at in (0, 3, len(run) - length):
            copied = run[at : at + length]
            dressed = (copied, copied.upper(), "-".join(copied), f"x{copied}", f"{copied}y")
            for answer in dressed:
                assert guard.copies(run, answer) == (length >= 32), (length, at)
    for length in range(1, 32):
        whole = run[:length]
        assert guard.copies(whole, f"so {whole} it is") == (length >= 12), length
        assert not guard.copies(whole, "so " + whole[:-1]), length
    assert guard.copies(run, run[:40], run=40)
    assert not guard.copies(run, run[:39], run=40)
    for allowed, answer in ((32, None), (40, "x" + run[:32])):
        text = kit.canonical(run + "α", "x" + run[:32]).encode()
        content, more = kit.arguments(text)
        assert guard.judge(content, "stop", run=allowed, **more).answer == answer
        streaming = guard.Guard(kit.form, run=allowed)
        for apart, part in kit.parts(text):
            streaming.feed(part, reasoning=apart)
        assert streaming.close("stop").answer == answer
    assert not guard.copies("", "anything at all, however long it may be")
    assert not guard.copies("37", "37")
    assert guard.copies("13 + 4 = 17\n17 + 6 = 23", "Because 13+4=17 17+6=23.")  # ten digits, but fifteen signs
    assert guard.copies("13 + 4 = 17\n17 + 6 = 23", "１３＋４＝１７１７＋６＝２３")
    assert guard.copies("13 + 4 = A\n17 + 6 = B", "13 + 4 = a 17 + 6 = b")
    assert guard.copies("-".join(run).upper(), run)
    assert not guard.copies(run[:11], run[:11])
    assert not guard.copies("13 + 4 = 17\n17 + 6 = 23", "It is 23 because 17 + 6 = 23.")


def law_size(guard: ModuleType, kit: Kit = OWN) -> None:
    """A generation of MAX_BYTES is judged, one of a byte more is not, and the streaming form stops there."""
    assert guard.MAX_BYTES == 1 << 18
    head = kit.canonical("αβγ", "")
    tail = "a" * (guard.MAX_BYTES - len(kit.everything(head.encode())))
    full = (head + tail).encode()
    assert judged(guard, kit, full).answer is not None
    over = judged(guard, kit, full + b"a")
    assert (over.answer, over.reason, over.thinking) == (None, "too long", kit.everything(full + b"a"))
    streaming = guard.Guard(kit.form)
    assert len(streaming) == 0
    for apart, part in kit.parts(full):
        streaming.feed(part, reasoning=apart)
    assert len(streaming) == guard.MAX_BYTES
    assert streaming.close("stop").answer is not None
    assert isinstance(streaming.close(None).thinking, bytes)  # a copy: what comes later does not change it
    for apart in (False, True):
        try:
            streaming.feed(b"a", reasoning=apart)
        except guard.TooLong:
            continue
        raise AssertionError("the streaming form took more than MAX_BYTES")


# Repeated so many bytes long, these took a second or more: a search from each `<`, marks put in order pair by pair.
SLOW = {
    "<": 9_000,
    "< ": 14_000,
    "\u0301\u0316": 32_000,
    "\u0316\u0345": 32_000,
    " \u200b": 64_000,
    "\ufdfa": 8_000,
    "<[|": 32_000,
    "[|": 32_000,
    "&lt": 32_000,
    "&": 64_000,
    "<|end|>": 32_000,
    "&#60": 32_000,
}


def law_time(guard: ModuleType, kit: Kit = OWN, seconds: float = 2.0) -> None:
    """Time grows with the length, not with its square, whatever a model repeats (a fortieth of the bound is usual)."""
    for unit, size in SLOW.items():
        long = unit * (size // len(unit.encode()))
        for text in (kit.canonical(f"α{long}", "abc"), kit.canonical("αβ", f"abc{long}x")):
            began = time.process_time()
            judged(guard, kit, text)
            assert time.process_time() - began < seconds, unit


def law_interference(guard: ModuleType, kit: Kit = OWN, seeds: range = range(300)) -> None:
    """Two thinkings with the same answer give the same shown bytes; what is shown never holds the thinking."""
    for seed in seeds:
        rng = random.Random(seed)
        answer = latin(rng)
        shown = {judged(guard, kit, kit.write(rng, greek(rng, 1, 400), answer)).answer for _ in range(3)}
        assert shown == {answer.strip()}


def law_silence(guard: ModuleType, kit: Kit = OWN) -> None:
    """A verdict prints neither thinking nor answer."""
    verdict = judged(guard, kit, kit.canonical("αβγ", "canary"))
    assert verdict.answer == "canary"
    assert "canary" not in repr(verdict)
    assert "\\x" not in repr(verdict)
    assert "α" not in repr(verdict)
    assert "canary" not in str(guard.TooLong())
    content, more = kit.arguments(kit.canonical("αβγ", "canary").encode())
    parts = kit.form.split(content.decode(), more["reasoning"].decode(), mixed=False)
    assert "canary" not in repr(parts)
    assert "α" not in repr(parts)
    try:
        verdict.answer = "another"
    except AttributeError:
        return
    raise AssertionError("a verdict can be changed afterwards")


LAWS: dict[str, Callable[[ModuleType, Kit], None]] = {
    name: law for name, law in list(globals().items()) if name.startswith("law_")
}
assert BORDER not in GREEK + LATIN
assert set(KITS) >= {"so8t", "think", "mistral", "harmony", "separated"}
