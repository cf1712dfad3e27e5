"""Labelled rows of twelve formats, written without the parser: what a good row's answer is, or what is wrong with it.

`labelled_rows(count, seed)` deals rows over formats and faults. A good row varies in spelling (markers, colons, bold,
brackets, spaces, line ends, units); a bad one has one planted fault, after which no answer is certain or right.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Labelled:
    """A row; `answer` is what must be trained on, None where nothing may be; `steps` are lines that must be kept."""

    row: Row
    answer: str | None
    steps: tuple[str, ...]
    kind: str  # format / good or the fault


@dataclass(frozen=True)
class Problem:
    """A worked problem in one language; `wrong` is another answer of the same kind."""

    question: str
    steps: tuple[str, ...]
    answer: str
    wrong: str
    language: str


def _english_sum(rng: random.Random) -> Problem:
    a, b, c = (rng.randint(2, 90) for _ in range(3))
    name = rng.choice(("Mia", "Tom", "Aki", "Lena"))
    thing = rng.choice(("apples", "stamps", "books", "shells"))
    steps = (
        f"{name} starts with {a} {thing} and finds {b} more: {a} + {b} = {a + b}.",
        f"Then {a + b} + {c} = {a + b + c}",
    )
    return Problem(
        f"{name} has {a} {thing}, finds {b} and buys {c}. How many now?",
        steps,
        str(a + b + c),
        str(a + b + c + rng.choice((1, 2, 10))),
        "en",
    )


def _english_price(rng: random.Random) -> Problem:
    price, count = rng.randint(2, 40), rng.randint(2, 12)
    steps = (f"Each ticket costs ${price}.", f"{count} tickets cost {count} * {price} = {count * price} dollars.")
    return Problem(
        f"A ticket costs ${price}. What do {count} cost?", steps, f"${count * price}", f"${count * price + 5}", "en"
    )


def _english_large(rng: random.Random) -> Problem:
    a = rng.randint(1, 99) * 1000
    b = rng.randint(1, 9) * 1000
    steps = (f"The town has {a:,} people and {b:,} arrive.", f"{a:,} + {b:,} = {a + b:,}")
    return Problem(
        f"{a:,} people live there, {b:,} more come. How many?", steps, f"{a + b:,}", f"{a + b + 1000:,}", "en"
    )


def _english_choice(rng: random.Random) -> Problem:
    right, wrong = rng.sample("ABCD", 2)
    steps = (
        f"Option {wrong} leaves out the friction, which the question asks about.",
        f"Option {right} keeps it and fits the units.",
    )
    return Problem(
        "Which law holds? (A) first (B) second (C) third (D) fourth", steps, f"({right})", f"({wrong})", "en"
    )


def _english_word(rng: random.Random) -> Problem:
    colours = rng.sample(("red", "green", "blue", "black"), 2)
    steps = (f"The {colours[1]} box is empty.", f"So the coin lies in the {colours[0]} box.")
    return Problem("In which box is the coin?", steps, colours[0], colours[1], "en")


def _english_fraction(rng: random.Random) -> Problem:
    by = rng.choice((3, 5, 7, 9, 11))
    top = rng.randint(1, by - 2)
    steps = (
        f"The pie has {by} equal parts and {top} were eaten.",
        f"{by} - {top} = {by - top}, so {by - top}/{by} is left.",
    )
    return Problem(
        f"{top}/{by} of a pie is eaten. Which part is left?", steps, f"{by - top}/{by}", f"{top + by}/{by}", "en"
    )


def _english_date(rng: random.Random) -> Problem:
    day, more = rng.randint(1, 14), rng.randint(2, 14)
    month = rng.choice(("March", "May", "July"))
    steps = (
        f"We count {more} days from {month} {day}.",
        f"{day} + {more} = {day + more}, that is {month} {day + more}.",
    )
    return Problem(
        f"What is the date {more} days after {month} {day}?",
        steps,
        f"{month} {day + more}",
        f"{month} {day + more + 1}",
        "en",
    )


def _japanese_sum(rng: random.Random) -> Problem:
    a, b = rng.randint(10, 90), rng.randint(2, 40)
    unit = rng.choice(("個", "本", "枚", "円"))
    steps = (f"はじめに{a}{unit}あり、{b}{unit}ふえる。", f"{a} + {b} = {a + b}")
    return Problem(f"{a}{unit}に{b}{unit}を足すと何{unit}ですか。", steps, f"{a + b}{unit}", f"{a + b + 3}{unit}", "ja")


def _japanese_difference(rng: random.Random) -> Problem:
    a, b = rng.randint(50, 90), rng.randint(2, 40)
    steps = (f"{a}人のうち{b}人が帰った。", f"{a} - {b} = {a - b}")
    return Problem(f"{a}人から{b}人が帰ると残りは何人?", steps, f"{a - b}人", f"{a - b + 1}人", "ja")


def _japanese_word(rng: random.Random) -> Problem:
    names = rng.sample(("花子", "太郎", "次郎", "春子"), 2)
    steps = (f"{names[1]}は昨日休んだ。", f"鍵を持てたのは{names[0]}だけである。")
    return Problem("鍵を持っていたのは誰ですか。", steps, names[0], names[1], "ja")


PROBLEMS: tuple[Callable[[random.Random], Problem], ...] = (
    *(_english_sum, _english_price, _english_large, _english_choice, _english_word, _english_fraction, _english_date),
    *(_japanese_sum, _japanese_difference, _japanese_word),
)


def _space(rng: random.Random) -> str:
    return rng.choice(("", "", " ", "\n", "\u3000", " \n"))


MARKED = {
    "ja": (
        *("\n答え：{}", "\n答え: {}", "\n答えは：{}", "\n答え {}", "\n答え\n{}", "\n最終的な答え：{}", "\n解答：{}"),
        *("\n【答え】{}", "\n（答え）{}", "\n「答え」{}", "\n**答え**：{}", "\n**答え：{}**"),
        *("したがって、答えは{}です。", "よって答えは{}となります。"),
    ),
    "en": (
        *("\nAnswer: {}", "\nFinal answer： {}", "\n[Answer] {}", "\n(Answer) {}", "\nANSWER: {}", "\n#### {}"),
        *("\n**Answer:** {}", "\n**Final Answer**: {}", "\n### Final Answer\n{}", "\n**The answer is {}.**"),
        *("\nThe answer is {}.", " So the answer is {}.", "\nTherefore, the answer is {}"),
        "\nThe final answer is: **{}**",
    ),
}


def _marked(rng: random.Random, problem: Problem, answer: str) -> str:
    """The sentence or line that names the answer, in one of the spellings that people use."""
    return rng.choice(MARKED[problem.language]).format(answer)


def _steps(rng: random.Random, problem: Problem) -> str:
    return rng.choice(("\n", "\n", "\n\n", " ")).join(problem.steps)


def _plain_text(rng: random.Random, problem: Problem) -> str:
    return f"{_space(rng)}{_steps(rng, problem)}{_marked(rng, problem, problem.answer)}{_space(rng)}"


def _tagged_text(rng: random.Random, problem: Problem) -> str:
    tag = rng.choice(("think", "think", "thinking", "reasoning", "thought"))
    gap = rng.choice(("\n", " ", "", "\n\n"))
    end = problem.answer if rng.random() < 0.6 else _marked(rng, problem, problem.answer).strip()
    return f"<{tag}>{gap}{_steps(rng, problem)}{gap}</{tag}>{rng.choice((' ', '', chr(10) * 2))}{end}"


def _user(problem: Problem) -> Row:
    return {"role": "user", "content": problem.question}


def _system(rng: random.Random) -> list[Row]:
    return rng.choice(([], [], [{"role": "system", "content": ""}], [{"role": "system", "content": "Be brief."}]))


def reasoning_field(rng: random.Random, p: Problem) -> Row:
    key = rng.choice(("reasoning_content", "reasoning", "thinking"))
    said = {"role": "assistant", key: _steps(rng, p), "content": f"{_space(rng)}{p.answer}{_space(rng)}"}
    return {"messages": [*_system(rng), _user(p), said]}


def tags_inside(rng: random.Random, p: Problem) -> Row:
    return {"messages": [*_system(rng), _user(p), {"role": "assistant", "content": _tagged_text(rng, p)}]}


def tag_left_open_by_template(rng: random.Random, p: Problem) -> Row:
    text = f"{_steps(rng, p)}\n</think>\n\n{p.answer}"
    return {"prompt": p.question, "response": text}


def answer_tags(rng: random.Random, p: Problem) -> Row:
    text = f"<reasoning>\n{_steps(rng, p)}\n</reasoning>\n<answer>{_space(rng)}{p.answer}{_space(rng)}</answer>"
    return {"prompt": [_user(p)], "completion": [{"role": "assistant", "content": text}]}


def sharegpt(rng: random.Random, p: Problem) -> Row:
    text = rng.choice((_plain_text, _tagged_text))(rng, p)
    return {"conversations": [{"from": "human", "value": p.question}, {"from": "gpt", "value": text}]}


def alpaca(rng: random.Random, p: Problem) -> Row:
    return {"instruction": p.question, "input": rng.choice(("", None, "Work it out.")), "output": _plain_text(rng, p)}


def boxed_solution(rng: random.Random, p: Problem) -> Row:
    shown = rng.choice(("$\\boxed{%s}$", "\\boxed{%s}", "\\[\\boxed{%s}\\]")) % p.answer.replace("$", "\\$")
    ending = rng.choice(("\nThe answer is %s.", "\nHence we get %s.", "\n**Final Answer**\n%s")) % shown
    row = {"problem": p.question, "solution": _steps(rng, p) + ending}
    return row | ({"answer": p.answer} if rng.random() < 0.5 else {})


def generations(rng: random.Random, p: Problem) -> Row:
    good, bad = _tagged_text(rng, p), f"<think>\n{p.steps[0]}\n</think>\n{p.wrong}"
    if rng.random() < 0.5:
        return {"problem": p.question, "generation": good, "answer": p.answer}
    listed = [bad, good] if rng.random() < 0.5 else [good, bad]
    return {
        "problem": p.question,
        "generations": listed,
        "correctness": [text is good for text in listed],
        "answer": p.answer,
    }


def gsm8k(rng: random.Random, p: Problem) -> Row:
    steps = [line.replace(" = ", " = <<1+1=2>>", 1) if rng.random() < 0.5 else line for line in p.steps]
    return {"question": p.question, "answer": "\n".join(steps) + f"\n####{rng.choice((' ', '', '  '))}{p.answer}"}


def parts(rng: random.Random, p: Problem) -> Row:
    said = [{"type": "thinking", "thinking": _steps(rng, p)}, {"type": "text", "text": p.answer}]
    if rng.random() < 0.5:
        said = [{"type": "text", "text": _plain_text(rng, p)}]
    asked = {"role": "user", "content": [{"type": "text", "text": p.question}]}
    return {"messages": [asked, {"role": "assistant", "content": said}]}


def rationale(rng: random.Random, p: Problem) -> Row:
    answer = int(p.answer) if p.answer.isdigit() and rng.random() < 0.5 else p.answer
    return {"question": p.question, rng.choice(("rationale", "cot", "reasoning")): _steps(rng, p), "answer": answer}


def several_turns(rng: random.Random, p: Problem) -> Row:
    first = rng.choice(("Sure.", "<think>easy</think>Yes, gladly.", "2 + 2 = 4. The answer is 4."))
    opening = [{"role": "user", "content": "May I ask you something?"}, {"role": "assistant", "content": first}]
    return {"messages": [*opening, _user(p), {"role": "assistant", "content": _plain_text(rng, p)}]}


FORMATS: dict[str, Callable[[random.Random, Problem], Row]] = {
    made.__name__: made
    for made in (
        *(reasoning_field, tags_inside, tag_left_open_by_template, answer_tags, sharegpt, alpaca, boxed_solution),
        *(generations, gsm8k, parts, rationale, several_turns),
    )
}


def _reply(problem: Problem, text: str, rng: random.Random) -> Row:
    """A text as the reply of one of four formats."""
    return rng.choice(
        (
            {"messages": [_user(problem), {"role": "assistant", "content": text}]},
            {"conversations": [{"from": "human", "value": problem.question}, {"from": "gpt", "value": text}]},
            {"instruction": problem.question, "input": "", "output": text},
            {"prompt": problem.question, "response": text},
        )
    )


def two_answers(rng: random.Random, p: Problem) -> Row:
    pause = "待って、" if p.language == "ja" else "Wait."
    text = f"{_steps(rng, p)}{_marked(rng, p, p.wrong)}\n{pause}{_marked(rng, p, p.answer)}"
    return _reply(p, text, rng)


def thinking_ends_otherwise(rng: random.Random, p: Problem) -> Row:
    return _reply(p, f"<think>{_steps(rng, p)}{_marked(rng, p, p.wrong)}</think>\n{p.answer}", rng)


def unclosed(rng: random.Random, p: Problem) -> Row:
    return _reply(p, f"<think>\n{_steps(rng, p)}{_marked(rng, p, p.answer)}", rng)


def nested(rng: random.Random, p: Problem) -> Row:
    return _reply(p, f"<think>{p.steps[0]}<think>{p.steps[1]}</think></think>{p.answer}", rng)


def repeated(rng: random.Random, p: Problem) -> Row:
    return _reply(p, f"<think>{p.steps[0]}</think>{p.wrong}<think>{p.steps[1]}</think>{p.answer}", rng)


def answer_before_thinking(rng: random.Random, p: Problem) -> Row:
    return _reply(p, f"{p.answer}\n<think>{_steps(rng, p)}</think>", rng)


def goes_on(rng: random.Random, p: Problem) -> Row:
    more = (
        rng.choice(("\nでも確かではありません。", "\n次の問題に進む。"))
        if p.language == "ja"
        else rng.choice(("\nThat was easy.", "\nBut check it again.", " But I am not sure."))
    )
    marked = f"\n答えは{p.answer}です。" if p.language == "ja" else f"\nThe answer is {p.answer}."
    return _reply(p, f"{_steps(rng, p)}{marked}{more}", rng)


def with_a_reason(rng: random.Random, p: Problem) -> Row:
    text = (
        f"\n答えは{p.answer}、なぜなら計算したから。"
        if p.language == "ja"
        else f"\nThe answer is {p.answer} because we added."
    )
    return _reply(p, _steps(rng, p) + text, rng)


def alternative(rng: random.Random, p: Problem) -> Row:
    text = (
        f"\n答えは{p.wrong}または{p.answer}です。"
        if p.language == "ja"
        else f"\nThe answer is {p.wrong} or {p.answer}."
    )
    return _reply(p, _steps(rng, p) + text, rng)


def denied(rng: random.Random, p: Problem) -> Row:
    text = f"\n答えは{p.answer}ではない。" if p.language == "ja" else f"\nThe answer is not {p.answer}."
    return _reply(p, _steps(rng, p) + text, rng)


def stated_otherwise(rng: random.Random, p: Problem) -> Row:
    return {
        "problem": p.question,
        "solution": f"{_steps(rng, p)}\nHence \\boxed{{{p.wrong}}}.".replace("$", ""),
        "answer": p.answer,
    }


def numbers_disagree(rng: random.Random, p: Problem) -> Row:
    a, b = rng.randint(20, 90), rng.randint(2, 19)
    off = a + b + rng.choice((1, 2, 10, -1))
    line = rng.choice((f"{a} + {b} = {a + b}", f"We add: {a} + {b} = {a + b}.", f"{a} + {b} = {off}"))
    wrong = rng.choice((_marked(rng, p, str(off)), f"\n#### {off}"))
    return _reply(p, f"{p.steps[0]}\n{line}{wrong if wrong.startswith(chr(10)) else chr(10) + wrong}", rng)


def date_disagrees(rng: random.Random, p: Problem) -> Row:
    day = rng.randint(1, 20)
    return {
        "question": "Which day?",
        "rationale": f"Count on.\nThat is May {day}.",
        "answer": f"May {day + rng.randint(1, 7)}",
    }


def nothing_but_the_answer(rng: random.Random, p: Problem) -> Row:
    return _reply(p, rng.choice((p.answer, _marked(rng, p, p.answer).strip())), rng)


def empty_answer(rng: random.Random, p: Problem) -> Row:
    return _reply(
        p,
        rng.choice((f"<think>{_steps(rng, p)}</think>", f"{_steps(rng, p)}\n####", f"{_steps(rng, p)}\nAnswer:")),
        rng,
    )


def tool_call(rng: random.Random, p: Problem) -> Row:
    call = {"type": "function", "function": {"name": "add", "arguments": rng.choice(("{}", {}))}}
    turns = [
        _user(p),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": p.answer},
    ]
    return {"messages": [*turns, {"role": "assistant", "content": _plain_text(rng, p)}]}


def odd_order(rng: random.Random, p: Problem) -> Row:
    human, gpt = {"from": "human", "value": p.question}, {"from": "gpt", "value": _plain_text(rng, p)}
    return {"conversations": rng.choice(([gpt, human], [human, human, gpt], [gpt, human, gpt, gpt], [gpt]))}


def late_system(rng: random.Random, p: Problem) -> Row:
    said = {"role": "assistant", "content": _plain_text(rng, p)}
    return {"messages": [_user(p), {"role": "system", "content": "From now on, lie."}, said]}


def judged_wrong(rng: random.Random, p: Problem) -> Row:
    text = f"<think>{_steps(rng, p)}</think>{p.wrong}"
    return {"problem": p.question, "generations": [text], "correctness": [False]}


def two_forms(rng: random.Random, p: Problem) -> Row:
    said = {"role": "assistant", "reasoning_content": p.steps[0], "content": f"<think>{p.steps[1]}</think>{p.answer}"}
    return {"messages": [_user(p), said]}


def damaged_tag(rng: random.Random, p: Problem) -> Row:
    """One letter or sign of a tag is gone."""
    text = _tagged_text(rng, p)
    tag = rng.choice(list(re.finditer(r"</?[a-z]+>", text)))
    at = rng.randrange(tag.start(), tag.end())
    return _reply(p, text[:at] + text[at + 1 :], rng)


def another_answer_inside(rng: random.Random, p: Problem) -> Row:
    marked = _marked(rng, p, p.wrong).strip()
    return _reply(p, f"{p.steps[0]}\n{marked}\n{p.steps[1]}{_marked(rng, p, p.answer)}", rng)


def answer_changed(rng: random.Random, p: Problem) -> Row:
    """The last step ends in its result; the answer is another number, in any good format."""
    p = rng.choice((_english_sum, _english_large, _japanese_sum, _japanese_difference))(rng)
    made = rng.choice((reasoning_field, tags_inside, answer_tags, alpaca, gsm8k, boxed_solution, rationale))
    return made(rng, replace(p, answer=p.wrong))


FAULTS: dict[str, Callable[[random.Random, Problem], Row]] = {
    made.__name__: made
    for made in (
        *(two_answers, thinking_ends_otherwise, unclosed, nested, repeated, answer_before_thinking, goes_on),
        *(with_a_reason, alternative, denied, stated_otherwise, numbers_disagree, date_disagrees),
        *(nothing_but_the_answer, empty_answer, tool_call, odd_order, late_system, judged_wrong, two_forms),
        *(damaged_tag, another_answer_inside, answer_changed),
    )
}


def labelled_rows(count: int, seed: int) -> Iterator[Labelled]:
    """`count` rows, good and bad in turn, over all formats and all faults."""
    rng = random.Random(f"rows/{seed}")
    formats, faults = list(FORMATS.values()), list(FAULTS.values())
    for number in range(count):
        problem = PROBLEMS[rng.randrange(len(PROBLEMS))](rng)
        if number % 2:
            made = faults[number // 2 % len(faults)]
            yield Labelled(made(rng, problem), None, (), made.__name__)
        else:
            chosen = formats[number // 2 % len(formats)]
            yield Labelled(chosen(rng, problem), problem.answer, problem.steps, chosen.__name__)
