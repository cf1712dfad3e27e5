"""The forms as the guard's laws see them: how each writes a generation, and what dresses its markers can have.

A generation is bytes; where the upstream separates the thinking, `BORDER` in them stands for a change between the
reasoning and the content (the first part is reasoning). Every other form has no border.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.think_form import ANSWER_MARKER, THINK_MARKER
from pipeline.serve.forms.form import Form
from pipeline.serve.forms.registry import FORMS, form_named

BORDER = "\ue000"
Dress = Callable[[str], str]

# Ways of writing a marker of the pipeline's own form that are not the one canonical line.
HEADINGS: dict[str, Dress] = {
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
    "decomposed": lambda m: unicodedata.normalize("NFD", m),
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

# Ways of writing a tag that are not the canonical one.
TAGS: dict[str, Dress] = {
    "upper case": lambda m: m.swapcase(),
    "full-width": lambda m: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in m),
    "spaces inside": lambda m: " ".join(m),
    "space behind the bracket": lambda m: m[0] + " " + m[1:],
    "zero-width space": lambda m: m[:3] + "\u200b" + m[3:],
    "word joiner": lambda m: m[:4] + "\u2060" + m[4:],
    "soft hyphen": lambda m: m[:-3] + "\u00ad" + m[-3:],
    "combining mark": lambda m: m[:4] + "\u0301" + m[4:],
    "Hangul filler": lambda m: m[:4] + "\u3164" + m[4:],
    "split over lines": lambda m: m[:4] + "\n" + m[4:],
    "dashed": lambda m: "-".join(m),
    "underscores": lambda m: "_".join(m),
    "escaped": lambda m: m[0] + "\\" + m[1:],
    "mathematical letters": lambda m: "".join(chr(0x1D41A + ord(c) - 97) if "a" <= c <= "z" else c for c in m.lower()),
}
ANGLES: dict[str, Dress] = {  # for tags in angle brackets
    "character references": lambda m: m.replace("<", "&lt;").replace(">", "&gt;"),
    "numeric references": lambda m: m.replace("<", "&#60;").replace(">", "&#x3e;"),
    "mathematical brackets": lambda m: m.replace("<", "⟨").replace(">", "⟩"),
    "guillemets": lambda m: m.replace("<", "‹").replace(">", "›"),
    "cut off": lambda m: m.rstrip(">|"),
}
SQUARES: dict[str, Dress] = {  # for tags in square brackets
    "lenticular": lambda m: m.replace("[", "【").replace("]", "】"),
    "curly": lambda m: m.replace("[", "{").replace("]", "}"),
    "angles": lambda m: m.replace("[", "<").replace("]", ">"),
}


def any_of(rng: random.Random, *texts: str) -> str:
    return rng.choice(texts)


class First(random.Random):
    """Not random: always the first choice."""

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def random(self) -> float:
        return 0.0


@dataclass(frozen=True)
class Kit:
    """One form under test."""

    name: str
    form: Form
    markers: tuple[str, ...]  # each with its dresses in `dresses`
    dresses: dict[str, Dress]
    write: Callable[[random.Random, str, str], str]  # canonical text of steps and answer
    odd: Callable[[random.Random, str, str, str], list[str]]  # other texts without the form: steps, answer, odd marker
    reasons: dict[str, list[str]] = field(repr=False)  # reason -> texts withheld for it

    def canonical(self, steps: str, answer: str) -> str:
        """The plainest way to write it."""
        return self.write(First(), steps, answer)

    def odds(self, marker: str) -> dict[str, str]:
        """Every dress of a marker in which the canonical one no longer stands."""
        found = {name: dress(marker) for name, dress in self.dresses.items()}
        return {name: text for name, text in found.items() if self.name == "so8t" or marker not in text}

    def arguments(self, data: bytes) -> tuple[bytes, dict[str, Any]]:
        """What `judge` gets: the content, and the keywords."""
        parts = self.parts(data)
        content, begun, mixed = b"".join(part for apart, part in parts if not apart), False, False
        for apart, part in parts:
            mixed = mixed or (apart and begun and part != b"")
            begun = begun or (not apart and part.strip() != b"")
        return content, {
            "form": self.form,
            "reasoning": b"".join(part for apart, part in parts if apart),
            "mixed": mixed,
        }

    def parts(self, data: bytes) -> list[tuple[bool, bytes]]:
        """(whether it is reasoning, bytes) in the order in which they come."""
        if self.name != "separated":
            return [(False, data)]
        return [(number % 2 == 0, part) for number, part in enumerate(data.split(BORDER.encode()))]

    def everything(self, data: bytes) -> bytes:
        """All of a generation, reasoning first."""
        content, more = self.arguments(data)
        return bytes(more["reasoning"]) + content


def own(rng: random.Random, steps: str, answer: str) -> str:
    return f"{THINK_MARKER}\n{steps}\n\n{ANSWER_MARKER}\n{answer}"


OWN = Kit(
    "so8t",
    FORMS["so8t"],
    (THINK_MARKER, ANSWER_MARKER),
    HEADINGS,
    own,
    lambda rng, steps, answer, odd: [
        f"{ANSWER_MARKER}\n{steps}\n\n{THINK_MARKER}\n{steps}",
        f"{THINK_MARKER}\n{steps}",
        f"{THINK_MARKER}\n{steps}\n\n{ANSWER_MARKER}\n",
        f"{THINK_MARKER}\n\n{ANSWER_MARKER}\n{steps}",
        f"{THINK_MARKER}\n{THINK_MARKER}\n{steps}\n{ANSWER_MARKER}\n{steps}",
        steps,
        "",
        f"{steps}\n\n{ANSWER_MARKER}\n{steps}",
        f"<think>{steps}</think>{steps}",
    ],
    {
        "thinking marker not first": ["", "abc", f"x\n{own(random.Random(0), 'α', 'b')}", f"{ANSWER_MARKER}\nabc"],
        "answer marker missing or repeated": [
            f"{THINK_MARKER}\nα",
            f"{THINK_MARKER}\nα\n{ANSWER_MARKER} \nabc",
            own(random.Random(0), "α", f"b\n{ANSWER_MARKER}\nc"),
        ],
        "odd marker": [
            own(random.Random(0), f"α\n{THINK_MARKER}", "b"),
            own(random.Random(0), "α", f"b {ANSWER_MARKER[2:]}"),
        ],
        "empty part": [
            own(random.Random(0), "", "abc"),
            own(random.Random(0), "α", " \u3000\n"),
            own(random.Random(0), "\u200b", "b"),
        ],
        "copied run": [own(random.Random(0), "α" * 40, "α" * 40)],
    },
)


def pair(form: Form, dresses: dict[str, Dress]) -> Kit:
    opening, closing = form.markers

    def write(rng: random.Random, steps: str, answer: str) -> str:
        space = rng.choice(["", "\n", " ", "\r\n"])
        return f"{any_of(rng, opening, opening, '')}{space}{steps}{space}{closing}{space}{answer}"

    return Kit(
        form.name,
        form,
        (opening, closing),
        dresses,
        write,
        lambda rng, steps, answer, odd: [
            f"{opening}{steps}",
            steps,
            "",
            f"{opening}{steps}{closing}",
            f"{steps}{opening}{steps}{closing}{answer}",
            f"{closing}{steps}{opening}",
            f"{opening}{opening}{steps}{closing}{answer}",
            f"{opening}{steps}{closing}{closing}{answer}",
            f"{opening}{steps}{odd}{steps}",
            f"{steps}{opening}{steps}{closing}{steps}",
            own(rng, steps, answer),
        ],
        {
            "closing tag missing or repeated": ["", "abc", f"{opening}α", f"{opening}α{closing}b{closing}c"],
            "odd marker": [
                f"x{opening}α{closing}b",
                f"{opening}{opening}α{closing}b",
                f"{opening}α{closing}b{opening}",
                f"{opening}α{closing.swapcase()}β{closing}b",
                f"α{closing}b <|channel|>",
            ],
            "empty part": [f"{opening}α{closing}", f"{opening}α{closing} \u3000\n", f"{closing}\u200b"],
            "copied run": [f"{opening}{'α' * 40}{closing}{'α' * 40}"],
        },
    )


def harmony(rng: random.Random, steps: str, answer: str) -> str:
    def message(channel: str, text: str) -> str:
        return f"<|channel|>{channel}<|message|>{text}"

    head, tail = any_of(rng, "", "", "<|start|>assistant"), any_of(rng, "", "", "<|return|>", "<|end|>")
    thoughts = [steps] if len(steps) < 2 or rng.random() < 0.7 else [steps[: len(steps) // 2], steps[len(steps) // 2 :]]
    found = [message(any_of(rng, "analysis", "analysis", "commentary"), text) for text in thoughts]
    return head + "<|end|><|start|>assistant".join([*found, message("final", answer)]) + tail


THOUGHT = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"
NEXT = "<|end|><|start|>assistant"
HARMONY = Kit(
    "harmony",
    FORMS["harmony"],
    FORMS["harmony"].markers,
    {**TAGS, **ANGLES},
    harmony,
    lambda rng, steps, answer, odd: [
        f"{THOUGHT}{steps}",
        steps,
        "",
        f"{THOUGHT}{steps}{NEXT}{FINAL}",
        f"{FINAL}{answer}{NEXT}{THOUGHT}{steps}",
        f"analysis{steps}assistantfinal{steps}",
        f"{steps}{NEXT}{FINAL}{steps}",
        f"{steps}{FINAL}{steps}",
        f"{THOUGHT}{steps}{NEXT}{FINAL}{answer}{NEXT}{FINAL}{steps}",
        f"{THOUGHT}{steps}{NEXT}<|channel|>final to=x<|message|>{steps}",
        f"{THOUGHT}{steps}{NEXT}<|channel|>commentary<|message|>{steps}",
        f"{THOUGHT}{steps}{NEXT}<|channel|>final <|constrain|>json<|message|>{steps}",
        f"{THOUGHT}{steps}{NEXT}{FINAL}{answer} assistantanalysis {steps}",
        f"{THOUGHT}{steps}{NEXT}{FINAL}{answer}<|call|>{steps}",
        f"<think>{steps}</think>{FINAL}{answer}",
        f"{THOUGHT}{steps}<|end|><|start|>user{FINAL}{steps}",
        own(rng, steps, answer),
    ],
    {
        "no final channel at the end": [
            "",
            "abc",
            f"{THOUGHT}α",
            f"x{FINAL}b",
            f"{FINAL}b{NEXT}{THOUGHT}α",
            f"{THOUGHT}α{NEXT}",
            f"{THOUGHT}α{NEXT}<|channel|>final x<|message|>b",
            f"{FINAL}a{NEXT}{FINAL}b",
        ],
        "odd marker": [
            f"{THOUGHT}α{NEXT}{FINAL}b<|channel|>c",
            f"{THOUGHT}α<|end|>β{NEXT}{FINAL}b",
            f"{FINAL}b</think>c",
            f"{THOUGHT}α{NEXT}{FINAL}b <|call|>",
            f"{FINAL}b<|constrain|>",
            f"{FINAL}b assistant analysis c",
            f"{FINAL}b<|return|><|return|>",
        ],
        "empty part": [f"{THOUGHT}α{NEXT}{FINAL}", f"{FINAL} \u3000<|return|>"],
        "copied run": [f"{THOUGHT}{'α' * 40}{NEXT}{FINAL}{'α' * 40}"],
    },
)

SEPARATED = Kit(
    "separated",
    FORMS["separated"],
    ("<think>", "</think>", "[THINK]", "<|channel|>"),
    TAGS,
    lambda rng, steps, answer: any_of(rng, "", f"{BORDER}{BORDER}", f"{BORDER}\n{BORDER}") + steps + BORDER + answer,
    lambda rng, steps, answer, odd: [
        f"{steps}{BORDER}",
        f"{BORDER}{steps}",
        "",
        f"{BORDER}{answer}{BORDER}{steps}",
        f"{steps}{BORDER}{answer}{BORDER}{steps}",
        f"{BORDER}<think>{steps}</think>{answer}",
        steps,
        f"{steps}{BORDER}{odd}{steps}{BORDER}",
        f"{steps}{odd}{steps}{BORDER}{answer}",
    ],
    {
        "upstream separated no thinking": ["", f"{BORDER}abc", f" \u3000{BORDER}abc"],
        "thinking after the answer began": [f"{BORDER}abc{BORDER}α", f"α{BORDER}abc{BORDER}β{BORDER}"],
        "odd marker": [f"α{BORDER}b</think>", f"α<think>{BORDER}b", f"α{BORDER}[THINK]"],
        "empty part": [f"α{BORDER}", f"α{BORDER} \u3000"],
        "copied run": [f"{'α' * 40}{BORDER}{'α' * 40}"],
    },
)

KITS = {
    kit.name: kit
    for kit in (
        OWN,
        pair(FORMS["think"], {**TAGS, **ANGLES}),
        pair(FORMS["mistral"], {**TAGS, **SQUARES}),
        pair(FORMS["gemma"], {**TAGS, **ANGLES}),
        pair(FORMS["kimi"], TAGS),
        HARMONY,
        SEPARATED,
        pair(form_named("<scratchpad>...</scratchpad>"), {**TAGS, **ANGLES}),
    )
}
