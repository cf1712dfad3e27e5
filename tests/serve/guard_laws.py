"""The guard's laws, each a function of the module under test, so that broken guards can be held against them too.

Texts are made of two alphabets: thinking of Greek letters, answers of Latin ones. A Greek letter in a released answer
is a byte of thinking that left, whatever the guard believes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from pipeline.data.think_form import ANSWER_MARKER, THINK_MARKER

GREEK = "αβγδεζηθλμξπρσφχψω"
LATIN = "abcdefghijklmnopqrstuvwxyz "

# Ways of writing a marker that are not the one canonical line.
VARIANTS: dict[str, Callable[[str], str]] = {
    "two hashes": lambda m: "#" + m,
    "no space": lambda m: m.replace("# ", "#"),
    "two spaces": lambda m: m.replace("# ", "#  "),
    "bold": lambda m: f"**{m[2:]}**",
    "bold in the heading": lambda m: f"# **{m[2:]}**",
    "full-width hash": lambda m: m.replace("#", "＃"),
    "ideographic space": lambda m: m.replace(" ", "\u3000"),
    "zero-width space": lambda m: m[:3] + "\u200b" + m[3:],
    "word joiner": lambda m: m[:4] + "\u2060" + m[4:],
    "soft hyphen": lambda m: m[:3] + "\u00ad" + m[3:],
    "combining mark": lambda m: m[:3] + "\u0301" + m[3:],
    "variation selector": lambda m: m[:3] + "\ufe00" + m[3:],
    "Hangul filler": lambda m: m[:3] + "\u3164" + m[3:],
    "Hangul lead filler": lambda m: m[:3] + "\u115f" + m[3:],
    "split by spaces": lambda m: " ".join(m),
    "split over lines": lambda m: m[:4] + "\n" + m[4:],
    "dashed": lambda m: "-".join(m),
    "underscores": lambda m: "_".join(m),
    "decomposed": lambda m: __import__("unicodedata").normalize("NFD", m),
    "half-width kana": lambda m: m.replace("ステップ", "ｽﾃｯﾌﾟ") if "ステップ" in m else m + ":",
    "compatibility ideograph": lambda m: m.replace("考", "⽼".replace("⽼", "考")) + "：",
    "trailing space": lambda m: m + " ",
    "carriage return": lambda m: m + "\r",
    "indented": lambda m: "  " + m,
    "quoted": lambda m: "> " + m,
    "in prose": lambda m: f"αβ {m[2:]} γδ",
    "colon": lambda m: m[2:] + ":",
    "bare": lambda m: m[2:],
    "tabbed": lambda m: m.replace(" ", "\t"),
    "line separator": lambda m: "\u2028" + m + "\u2028",
    "no-break space": lambda m: m.replace(" ", "\u00a0"),
}
TAGS = [
    "<think>",
    "</think>",
    "<Think>",
    "＜think＞",
    "< / thinking >",
    "<|thinking|>",
    "<\u200bthought>",
    "<reasoning>",
]


def greek(rng: random.Random, low: int = 1, high: int = 30) -> str:
    return "".join(rng.choice(GREEK) for _ in range(rng.randint(low, high)))


def latin(rng: random.Random, low: int = 1, high: int = 30) -> str:
    return rng.choice(LATIN[:-1]) + "".join(rng.choice(LATIN) for _ in range(rng.randint(low - 1, high)))


def canonical(steps: str, answer: str) -> str:
    return f"{THINK_MARKER}\n{steps}\n\n{ANSWER_MARKER}\n{answer}"


def pieces(rng: random.Random, data: bytes) -> list[bytes]:
    """A random chunking, down to single bytes."""
    if rng.random() < 0.2:
        return [data[i : i + 1] for i in range(len(data))]
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randint(0, 8)))
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def stream(guard: ModuleType, parts: list[bytes], finish: str | None) -> Any:
    streaming = guard.Guard()
    try:
        for part in parts:
            streaming.feed(part)
    except guard.TooLong:
        return guard.judge(b"", None)
    return streaming.close(finish)


def generation(rng: random.Random) -> tuple[str, bool]:
    """(text, whether it is canonical): thinking stands anywhere, answers only where an answer may stand."""
    steps, answer = greek(rng), latin(rng)
    kind = rng.randrange(10)
    if kind < 3:
        lead = rng.choice(["", "", " ", "\n", "\ufeff", "\u3000"])
        return lead + canonical(steps, answer) + rng.choice(["", "\n", "  "]), True
    variant = VARIANTS[rng.choice(list(VARIANTS))]
    marker = rng.choice([THINK_MARKER, ANSWER_MARKER])
    odd = variant(marker) if rng.random() < 0.8 else marker
    if kind == 3:  # a second round of thinking after the answer
        return f"{canonical(steps, answer)}\n{odd}\n{greek(rng)}", False
    if kind == 4:  # a draft inside the thinking
        return canonical(f"{steps}\n{odd}\n{greek(rng)}", answer), False
    if kind == 5:  # an odd marker instead of the right one
        text = canonical(steps, greek(rng))
        dressed = text.replace(marker, variant(marker))
        return (dressed, False) if dressed.strip() != text else ("", False)  # indented at the very start is no variant
    if kind == 6:  # a preamble, or no thinking marker at all
        return rng.choice(
            [f"{greek(rng)}\n{canonical(steps, answer)}", f"{steps}\n\n{ANSWER_MARKER}\n{greek(rng)}"]
        ), False
    if kind == 7:  # swapped, repeated or missing parts
        return rng.choice([
            f"{ANSWER_MARKER}\n{steps}\n\n{THINK_MARKER}\n{steps}", f"{THINK_MARKER}\n{steps}",
            f"{THINK_MARKER}\n{steps}\n\n{ANSWER_MARKER}\n", f"{THINK_MARKER}\n\n{ANSWER_MARKER}\n{greek(rng)}",
            f"{THINK_MARKER}\n{THINK_MARKER}\n{steps}\n{ANSWER_MARKER}\n{greek(rng)}", steps, "",
        ]), False  # fmt: skip
    if kind == 8:  # a native tag after the answer
        return canonical(steps, f"{answer}\n{rng.choice(TAGS)}{greek(rng)}"), False
    return canonical(greek(rng, 40, 80), "{0}").replace("{0}", f"{answer} " + "COPY"), False


def law_fuzz(guard: ModuleType, seeds: range = range(1500)) -> None:
    """No letter of the thinking leaves, whatever the chunks; canonical texts are released, whole and unchanged."""
    released = 0
    for seed in seeds:
        rng = random.Random(seed)
        text, is_canonical = generation(rng)
        if text.endswith("COPY"):  # a long run of the thinking, dressed up
            steps = text.split("\n")[1]
            run = steps[4 : 4 + guard.COPY_RUN]
            text = text.replace("COPY", rng.choice([run, run.upper(), "-".join(run), " ".join(run)]))
        data = text.encode()
        finish = "stop" if rng.random() < 0.9 else rng.choice(["length", None, "tool_calls", "", "Stop"])
        broken = rng.random() < 0.05 and len(data) > 4
        if broken:
            at = rng.randrange(len(data))
            data = data[:at] + rng.choice([b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbf\xbd"]) + data[at:]
        verdict = stream(guard, pieces(rng, data), finish)
        assert verdict == guard.judge(data, finish), "the chunks made a difference"
        shown = verdict.answer or ""
        assert not any(letter in shown.casefold() for letter in GREEK), "thinking left"
        if is_canonical and finish == "stop" and not broken:
            assert verdict.answer == text.split(ANSWER_MARKER)[1].strip(), "a good answer was withheld or changed"
            released += 1
        else:
            assert verdict.answer is None, "something odd was let through"
    assert released > len(seeds) // 10


def law_finish(guard: ModuleType) -> None:
    """Only a turn that the model ended itself is shown."""
    data = canonical("αβγ", "abc").encode()
    assert guard.judge(data, "stop").answer == "abc"
    for finish in (None, "", "length", "content_filter", "tool_calls", "STOP", "stop "):
        verdict = guard.judge(data, finish)
        assert verdict.answer is None
        assert verdict.thinking == data
        assert verdict.reason == "not ended by the model"


def law_utf8(guard: ModuleType) -> None:
    """What is not UTF-8, or was replaced because it was not, is withheld, wherever it stands."""
    good = canonical("αβγ", "abc").encode()
    for bad in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xef\xbf\xbd", b"\xc0\xaf"):
        for at in (0, 5, len(good) - 1, len(good)):
            data = good[:at] + bad + good[at:]
            verdict = guard.judge(data, "stop")
            assert (verdict.answer, verdict.reason, verdict.thinking) == (None, "not UTF-8", data)


def law_variants(guard: ModuleType) -> None:
    """A second marker in any dress, in the thinking or after the answer, withholds; so does an odd one in its place."""
    for name, variant in VARIANTS.items():
        for marker in (THINK_MARKER, ANSWER_MARKER):
            odd = variant(marker)
            for text in (
                canonical(f"αβ\n{odd}\nγδ", "abc"),
                canonical("αβ", f"abc\n{odd}\nγδ"),
                canonical("αβ", f"abc {odd}"),
                canonical("αβ", "abc").replace(marker + "\n", odd + "\n"),
            ):
                allowed = odd.strip() == marker and text.strip() == canonical("αβ", "abc")
                verdict = guard.judge(text.encode(), "stop")
                assert (verdict.answer == "abc") if allowed else (verdict.answer is None), (name, text)
    for tag in TAGS:
        for text in (canonical("αβ", f"abc {tag} γδ"), canonical(f"αβ {tag}", "abc")):
            verdict = guard.judge(text.encode(), "stop")
            assert (verdict.answer, verdict.reason) == (None, "odd marker"), tag


def law_form(guard: ModuleType) -> None:
    """Each way to miss the form has its reason, and everything generated is accounted for."""
    cases = {
        "thinking marker not first": ["", "abc", f"x\n{canonical('α', 'b')}", f"{ANSWER_MARKER}\nabc"],
        "answer marker missing or repeated": [
            f"{THINK_MARKER}\nα", f"{THINK_MARKER}\nα\n{ANSWER_MARKER} \nabc", canonical("α", f"b\n{ANSWER_MARKER}\nc"),
        ],
        "odd marker": [canonical(f"α\n{THINK_MARKER}", "b"), canonical("α", f"b {ANSWER_MARKER[2:]}")],
        "empty part": [canonical("", "abc"), canonical("α", " \u3000\n"), canonical("\u200b", "b")],
        "copied run": [canonical("α" * 40, "α" * 40)],
    }  # fmt: skip
    for reason, texts in cases.items():
        for text in texts:
            verdict = guard.judge(text.encode(), "stop")
            assert (verdict.answer, verdict.reason) == (None, reason), (text, verdict.reason)
            assert verdict.thinking == text.encode()
    kept = guard.judge(canonical("  αβ\nγ ", " abc\n\ndef \n").encode(), "stop")
    assert (kept.answer, kept.reason, kept.thinking) == ("abc\n\ndef", "released", "αβ\nγ".encode())
    assert guard.judge(canonical("α", "a < b, think").encode(), "stop").answer == "a < b, think"
    assert guard.judge(canonical("α", "a thinking cap").encode(), "stop").answer == "a thinking cap"


def law_copies(guard: ModuleType) -> None:
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
    assert not guard.copies("", "anything at all, however long it may be")
    assert not guard.copies("37", "37")
    assert guard.copies("13 + 4 = 17\n17 + 6 = 23", "Because 13+4=17 17+6=23.")  # ten digits, but fifteen signs
    assert guard.copies("13 + 4 = 17\n17 + 6 = 23", "１３＋４＝１７１７＋６＝２３")
    assert guard.copies("13 + 4 = A\n17 + 6 = B", "13 + 4 = a 17 + 6 = b")
    assert guard.copies("-".join(run).upper(), run)
    assert not guard.copies(run[:11], run[:11])
    assert not guard.copies("13 + 4 = 17\n17 + 6 = 23", "It is 23 because 17 + 6 = 23.")


def law_size(guard: ModuleType) -> None:
    """A generation of MAX_BYTES is judged, one of a byte more is not, and the streaming form stops there."""
    assert guard.MAX_BYTES == 1 << 18
    head = canonical("αβγ", "")
    full = (head + "a" * (guard.MAX_BYTES - len(head.encode()))).encode()
    assert guard.judge(full, "stop").answer is not None
    over = guard.judge(full + b"a", "stop")
    assert (over.answer, over.reason, over.thinking) == (None, "too long", full + b"a")
    streaming = guard.Guard()
    assert len(streaming) == 0
    streaming.feed(full)
    assert len(streaming) == guard.MAX_BYTES
    assert streaming.close("stop").answer is not None
    assert isinstance(streaming.close(None).thinking, bytes)  # a copy: what comes later does not change it
    try:
        streaming.feed(b"a")
    except guard.TooLong:
        return
    raise AssertionError("the streaming form took more than MAX_BYTES")


# Repeated so many bytes long, these took a second or more: a search from each `<`, marks put in order pair by pair.
SLOW = {"<": 9_000, "< ": 14_000, "\u0301\u0316": 32_000, "\u0316\u0345": 32_000, " \u200b": 64_000, "\ufdfa": 8_000}


def law_time(guard: ModuleType, seconds: float = 0.5) -> None:
    """Time grows with the length, not with its square, whatever a model repeats (a tenth of the bound is usual)."""
    for unit, size in SLOW.items():
        long = unit * (size // len(unit.encode()))
        for text in (canonical(f"α{long}", "abc"), canonical("αβ", f"abc{long}x")):
            began = time.process_time()
            guard.judge(text.encode(), "stop")
            assert time.process_time() - began < seconds, unit


def law_interference(guard: ModuleType, seeds: range = range(300)) -> None:
    """Two thinkings with the same answer give the same shown bytes; what is shown never holds the thinking."""
    for seed in seeds:
        rng = random.Random(seed)
        answer = latin(rng)
        shown = {guard.judge(canonical(greek(rng, 1, 400), answer).encode(), "stop").answer for _ in range(3)}
        assert shown == {answer.strip()}


def law_silence(guard: ModuleType) -> None:
    """A verdict prints neither thinking nor answer."""
    verdict = guard.judge(canonical("αβγ", "canary").encode(), "stop")
    assert "canary" not in repr(verdict)
    assert "\\x" not in repr(verdict)
    assert "α" not in repr(verdict)
    assert "canary" not in str(guard.TooLong())
    try:
        verdict.answer = "another"
    except AttributeError:
        return
    raise AssertionError("a verdict can be changed afterwards")


LAWS: dict[str, Callable[[ModuleType], None]] = {
    name: law for name, law in list(globals().items()) if name.startswith("law_")
}
