"""Row shapes of the reasoning data sets of 2024 to 2026, and what other programs leave in a text."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.data.rows import OTHER_FORM, to_think_row
from pipeline.data.think_form import RowError

Row = dict[str, Any]
Q, STEPS = "What is 6 x 7?", "6 x 7 = 42."
ASK = {"role": "user", "content": Q}


def said(content: Any, **more: Any) -> Row:
    return {"messages": [ASK, {"role": "assistant", "content": content, **more}]}


def graded(grade: str, attempt: str = "\\boxed{42}") -> Row:
    return {
        "question": Q,
        "solution": "42",
        "deepseek_thinking_trajectory": STEPS,
        "deepseek_attempt": attempt,
        "deepseek_grade": grade,
    }


def reference(answer: str, reply: str = "It is 42.") -> Row:
    info = {"reference_answer": answer, "think_content": STEPS}
    return {"messages": [{**ASK, "info": info}, {"role": "assistant", "content": f"<think>{STEPS}</think>{reply}"}]}


def numina(problem: str = "Yes", solution: str = "Yes", answer: str = "42") -> Row:
    text = f"{STEPS} So the value is 42."
    valid = {"problem_is_valid": problem, "solution_is_valid": solution}
    return {"problem": Q, "solution": text, "answer": answer, **valid}


BESIDE = {"messages": [ASK], "reasoning": STEPS, "answer": "It is 42."}
TEXT = {"type": "output_text", "text": "42"}
LOCKED = {"type": "reasoning.encrypted", "data": "x"}
SET = "\\left\\{1, 2\\right\\}"
SYSTEM_PARTS = [
    {"type": "text", "text": "Draft first. "},
    {"type": "thinking", "thinking": [{"type": "text", "text": "Your thoughts"}], "closed": True},
    {"type": "text", "text": "Then answer."},
]
COME_IN: dict[str, tuple[Row, str]] = {
    "trajectories": ({"question": Q, "solution": "42", "thinking_trajectories": [STEPS], "attempt": "42"}, "42"),
    "graded trajectories": (graded("Yes"), "\\boxed{42}"),
    "a second model's trajectory": (
        {**graded("No", "43"), "gemini_thinking_trajectory": STEPS, "gemini_attempt": "42", "gemini_grade": "Yes"},
        "42",
    ),
    "reasoning and answer beside the messages": (BESIDE, "It is 42."),
    "messages in input": ({"input": [ASK], "output": f"<think>\n{STEPS}\n</think>\n42"}, "42"),
    "a generated solution": (
        {"problem": Q, "generated_solution": f"<think>{STEPS}</think>42", "expected_answer": "42"},
        "42",
    ),
    "a solution beside a reply that thinks": (
        {"input": Q, "output": f"<think>{STEPS}</think>It is 42", "solution": "42"},
        "It is 42",
    ),
    "valid by its source": (numina(), "42"),
    "the reference in a note": (reference("42"), "It is 42."),
    "parts within parts": (
        said([{"type": "thinking", "thinking": [{"type": "text", "text": STEPS}]}, {"type": "text", "text": "42"}]),
        "42",
    ),
    "a summary of reasoning": (
        said([{"type": "reasoning", "summary": [{"type": "summary_text", "text": STEPS}]}, TEXT]),
        "42",
    ),
    "details of reasoning": (said("42", reasoning_details=[{"type": "reasoning.text", "text": STEPS}]), "42"),
    "blocks of thinking": (said("42", thinking_blocks=[{"type": "thinking", "thinking": STEPS}]), "42"),
    "an earlier reply with an empty block": (
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "<think>\n\n</think>\n\nHello!"},
                ASK,
                {"role": "assistant", "content": f"<think>\n{STEPS}\n</think>\n\n42"},
            ]
        },
        "42",
    ),
    "a chosen reply": ({"prompt": Q, "chosen": f"{STEPS} The answer is 42.", "rejected": "43"}, "42"),
    "a chosen conversation": (
        {"chosen": [ASK, {"role": "assistant", "content": f"{STEPS} The answer is 42."}], "rejected": [ASK]},
        "42",
    ),
    "capitals": ({"Question": Q, "Complex_CoT": STEPS, "Response": "42"}, "42"),
    "reasoning and content": ({"input": Q, "reasoning_content": STEPS, "content": "42"}, "42"),
    "a target": ({"input": Q, "rationale": STEPS, "target": "42"}, "42"),
    "responses of a named model": (
        {"question": Q, "reference_answer": "42", "responses": [{"response": f"{STEPS} The answer is 42."}]},
        "42",
    ),
    "the generation that was ended": (
        {
            "problem": Q,
            "generations": [f"<think>{STEPS}", f"<think>{STEPS}</think>42"],
            "finish_reasons": ["length", "stop"],
        },
        "42",
    ),
    "an attribute": (said(f'<think time="3 s">{STEPS}</think>42'), "42"),
    "spaces in the tags": (said(f"< think >{STEPS}</ think >42"), "42"),
    "braces of a set": ({"problem": "Which?", "solution": f"{STEPS} \\boxed{{{SET}}}"}, SET),
    "a heading": (said(f"{STEPS}\n### 答え\n42"), "42"),
    "an arrow": (said(f"{STEPS}\n答え→42"), "42"),
    "a bracketed heading in the line": (said(f"【思考】{STEPS}【回答】42です。"), "42"),
    "an inner product": (said(f"<x, y> is the product. {STEPS}\nThe answer is 42."), "42"),
    "tags of a page": (said(f"<p>{STEPS}</p> Hence &lt; 43.\nThe answer is 42."), "42"),
    "code": (said(f"```html\n<analysis>x</analysis>\n```\n{STEPS} `</internal>`\nThe answer is 42."), "42"),
}


@pytest.mark.parametrize("name", COME_IN)
def test_a_row_of_a_known_data_set_comes_in(name: str) -> None:
    row, answer = COME_IN[name]
    thought = to_think_row(row, family="f").thought
    assert (STEPS in thought.steps, thought.answer) == (True, answer)
    assert "think" not in thought.steps + thought.answer


WRONG = "judged wrong by its source"
UNCLEAR = "thinking tags unclear"
CUT = "cut off"
CONTROL = "control token left over"
STAY_OUT: dict[str, tuple[Row, str]] = {
    "a generation that was cut off": (
        {"problem": Q, "generation": f"<think>{STEPS}</think>42", "finish_reasons": ["length"]},
        CUT,
    ),
    "reasoning that was cut off": (
        {"problem": Q, "generations": [f"{STEPS} #### 42"], "is_reasoning_complete": [False]},
        CUT,
    ),
    "a message that was cut off": (said("42", reasoning=STEPS, finish_reason="length"), CUT),
    "a row that was cut off": ({**said("42", reasoning=STEPS), "truncated": True}, CUT),
    "dots for steps": (said("<think>...</think>42"), "no reasoning"),
    "a word for no steps": ({"question": Q, "reasoning": "N/A", "answer": "42"}, "no reasoning"),
    "a guess": (said(f"{STEPS}\nThe answer is 42, I guess."), "answer unclear"),
    "a question in brackets": (said(f"{STEPS}\nThe answer is 42 (not 43?)."), "answer unclear"),
    "graded as wrong": (graded("No"), WRONG),
    "another reference": (reference("41"), "two different answers"),
    "the reference denied": (reference("42", "It is not 42."), "two different answers"),
    "an invalid solution": (numina(solution="No"), WRONG),
    "a problem that was not solved": (numina(solution="Problem not solved"), WRONG),
    "half a problem": (numina(problem="Incomplete"), WRONG),
    "not verified": ({"question": Q, "reasoning": STEPS, "answer": "42", "is_correct": False}, WRONG),
    "a proof": (numina(answer="proof"), "no reasoning"),
    "an answer that is no number": ({"question": Q, "reasoning": STEPS, "answer": float("nan")}, "empty answer"),
    "an answer without end": ({"question": Q, "reasoning": STEPS, "answer": float("inf")}, "empty answer"),
    "a box closed by an escaped brace": ({"problem": Q, "solution": "6 x 7 = \\boxed{42\\}"}, "answer unclear"),
    "encrypted reasoning": (said("42", reasoning_details=[LOCKED]), "no reasoning"),
    "reasoning that its maker keeps": (said([{"type": "reasoning", "summary": []}, TEXT]), "no reasoning"),
    "a picture's row": ({**said("42", reasoning_content=STEPS), "images": ["a.png"]}, "not text"),
    "a picture's place": ({"question": f"<image>\n{Q}", "reasoning": STEPS, "answer": "42"}, "not text"),
    "a call": (said(f'<think>{STEPS}</think><tool_call>{{"name": "mul"}}</tool_call>'), "tool calls"),
    "a call of another family": (said(f'<think>{STEPS}</think>[TOOL_CALLS][{{"name": "mul"}}]'), "tool calls"),
    "a call in an earlier reply": (
        {"messages": [*said("<tool_call>{}</tool_call>")["messages"], *said("42", reasoning=STEPS)["messages"]]},
        "tool calls",
    ),
    "code for an interpreter": (said(f"<think>{STEPS}</think><|python_tag|>print(42)"), "tool calls"),
    "an end of turn": (said(f"<think>{STEPS}</think>42<|im_end|>"), CONTROL),
    "another family's end": (said(f"{STEPS} The answer is 42<｜end▁of▁sentence｜>"), CONTROL),
    "an end of text": (said(f"{STEPS} The answer is 42</s>"), CONTROL),
    "channels without their tokens": (said(f"analysis{STEPS}assistantfinal\nThe answer is 42"), CONTROL),
    "half a channel": (said(f"<|channel>thought\n{STEPS}<channel|>The answer is 42"), CONTROL),
    "a code block cut by a tag": (said(f"```\n<think>\n{STEPS}\n</think>\n```\n42"), UNCLEAR),
    "one or the other": (said("6掛ける7は42です。\n答えは42か43です。"), "answer unclear"),
    "a question": (said("6掛ける7は42です。\n答えは何でしょうか。"), "answer unclear"),
    "a bracketed heading that is spoken of": (said("6掛ける7は42です。【答え】という見出しで書く"), "no reasoning"),
    "another bracket behind the heading": (said("6掛ける7は42です。【答え】42【単位】個"), "no reasoning"),
    "a bracketed heading and a doubt": (said("6掛ける7は42です。【答え】42か43"), "answer unclear"),
    "on a condition": (said(f"{STEPS}\nThe answer is 42 if x is even."), "answer unclear"),
} | {
    f"'{text}'": (said(f"{STEPS}\nThe answer is {text}"), "answer unclear")
    for text in ("as follows:", "the following: A, B", "given by x.", "left as an exercise.", "in the table above.")
}
UNKNOWN = {
    "<analysis>": "</analysis>",
    "<思考>": "</思考>",
    "【思考】": "【/思考】",
    "<plan>": "</plan>",
    "<work id='1'>": "</work>",
}
for _opening, _closing in UNKNOWN.items():
    _dresses = (_opening, _closing), (_closing, _opening), (_opening * 2, _closing * 2)
    for _first, _last in _dresses:
        _row = said(f"{_first}{STEPS}{_last}The answer is 42")
        STAY_OUT[f"{_first}...{_last}"] = (_row, UNCLEAR)


@pytest.mark.parametrize("name", STAY_OUT)
def test_a_row_that_its_source_or_another_program_made_uncertain_stays_out(name: str) -> None:
    row, reason = STAY_OUT[name]
    with pytest.raises(RowError) as caught:
        to_think_row(row, family="f")
    assert caught.value.reason == reason


def test_a_system_text_that_shows_how_to_think_counts_as_one_of_another_form() -> None:
    asked = said("42", reasoning=STEPS)["messages"]
    row = to_think_row({"messages": [{"role": "system", "content": SYSTEM_PARTS}, *asked]}, family="f")
    assert OTHER_FORM in row.notes
    assert "Your thoughts" not in str(row.messages)
