"""Laws of row formats: what people's data sets hold comes in with the right answer, what is not certain stays out."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from perturbed_rows import FAULTS, FORMATS, Labelled, labelled_rows

from pipeline.config import DataConfig
from pipeline.data.build import build_dataset
from pipeline.data.formats import load_formats
from pipeline.data.inputs import data_inputs, expected_rows
from pipeline.data.report import DataReport
from pipeline.data.rows import DISAGREES, EARLIER, OTHER_FORM, RowOptions, to_think_row
from pipeline.data.source_rows import count_rows, read_rows
from pipeline.data.split.text import split_text
from pipeline.data.think_form import SYSTEM_MESSAGE, BrokenLine, RowError, format_assistant
from so8t_core.errors import InputError

Row = dict[str, Any]


def said(content: Any, **more: Any) -> Row:
    """A row of one question and one reply."""
    return {"messages": [{"role": "user", "content": "6 x 7?"}, {"role": "assistant", "content": content, **more}]}


def talk(*turns: tuple[str, Any]) -> Row:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def gpt(*turns: tuple[str, str]) -> Row:
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


STEPS = "6 x 7 = 42."
CALL = {"type": "function", "function": {"name": "mul", "arguments": '{"a": 6, "b": 7}'}}

# Row and (steps, answer).
COME_IN: dict[str, tuple[Row, tuple[str, str]]] = {
    "reasoning_content": (said("42", reasoning_content=STEPS), (STEPS, "42")),
    "reasoning": (said("42", reasoning=STEPS), (STEPS, "42")),
    "thinking": (said("42", thinking=STEPS), (STEPS, "42")),
    "reasoning in an object": (said("42", reasoning={"content": STEPS}), (STEPS, "42")),
    "reasoning in parts": (
        said([{"type": "thinking", "thinking": STEPS}, {"type": "text", "text": "42"}]),
        (STEPS, "42"),
    ),
    "text in parts": (
        said([{"type": "text", "text": f"{STEPS}\n"}, {"type": "text", "text": "#### 42"}]),
        (STEPS, "42"),
    ),
    "tags on lines": (
        said(f"<think>\n{STEPS} The answer is 42.\n</think>\n\n42"),
        (f"{STEPS} The answer is 42.", "42"),
    ),
    "tags on one line": (said("<think>So the answer is 42</think> 42"), ("So the answer is 42", "42")),
    "tags, the answer marked": (said(f"<think>{STEPS}</think>\n\n**Answer:** 42"), (STEPS, "42")),
    "tags in capitals": (said(f"<THINK>{STEPS}</THINK>42"), (STEPS, "42")),
    "tags behind a greeting": (said(f"Sure! <think>{STEPS}</think> 42"), (f"Sure!\n\n{STEPS}", "42")),
    "no opening tag": (said(f"{STEPS}\n</think>\n\n42"), (STEPS, "42")),
    "empty block before the steps": (said(f"<think>\n\n</think>\n\n{STEPS}\n#### 42"), (STEPS, "42")),
    "other tags": (said(f"<reasoning>{STEPS}</reasoning><answer>42</answer>"), (STEPS, "42")),
    "brackets": (said(f"[THINK]{STEPS}[/THINK]42"), (STEPS, "42")),
    "begin and end of thought": (
        said(f"<|begin_of_thought|>{STEPS}<|end_of_thought|><|begin_of_solution|>42<|end_of_solution|>"),
        (STEPS, "42"),
    ),
    "answer tags alone": (said(f"{STEPS}\n<answer>42</answer>"), (STEPS, "42")),
    "a correction inside the thinking": (
        said("<think>The answer is 41. No: The answer is 42.</think>42"),
        ("The answer is 41. No: The answer is 42.", "42"),
    ),
    "ShareGPT": (gpt(("human", "6 x 7?"), ("gpt", f"{STEPS}\n#### 42")), (STEPS, "42")),
    "ShareGPT with a system": (
        gpt(("system", "Be brief."), ("user", "q"), ("assistant", f"{STEPS}\n#### 42")),
        (STEPS, "42"),
    ),
    "Alpaca": ({"instruction": "Multiply.", "input": "6, 7", "output": f"{STEPS} So the answer is 42."}, (STEPS, "42")),
    "boxed": ({"problem": "6 x 7?", "solution": "So $6 \\cdot 7 = \\boxed{42}$."}, ("So $6 \\cdot 7 = 42$.", "42")),
    "boxed and stated": (
        {"problem": "p", "solution": f"{STEPS} Hence \\boxed{{42}}", "answer": 42},
        (f"{STEPS} Hence 42", "42"),
    ),
    "solution and a bare answer": ({"problem": "6 x 7?", "solution": STEPS, "answer": "42"}, (STEPS, "42")),
    "final answer in a box": (said(f"{STEPS}\n\n**Final Answer**\n\\boxed{{42}}"), (STEPS, "42")),
    "generation": (
        {"problem": "p", "solution": "s", "generation": f"<think>{STEPS}</think>42", "answer": "42"},
        (STEPS, "42"),
    ),
    "generations with verdicts": (
        {
            "problem": "p",
            "generations": ["<think>a</think>41", f"<think>{STEPS}</think>42"],
            "correctness": [False, True],
        },
        (STEPS, "42"),
    ),
    "generations and an answer": (
        {"problem": "p", "generations": ["<think>a</think>41", f"<think>{STEPS}</think>42"], "answer": "42"},
        (STEPS, "42"),
    ),
    "GSM8K": ({"question": "q", "answer": "6 x 7 = <<6*7=42>>42 eggs\n#### 42"}, ("6 x 7 = 42 eggs", "42")),
    "rationale": ({"question": "q", "rationale": STEPS, "answer": "42"}, (STEPS, "42")),
    "steps in a list": ({"question": "q", "steps": ["6 x 7", "= 42"], "answer": 42}, ("6 x 7\n= 42", "42")),
    "prompt and completion as messages": (
        {
            "prompt": [{"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": f"{STEPS}\n#### 42"}],
        },
        (STEPS, "42"),
    ),
    "empty system": (talk(("system", ""), ("user", "q"), ("assistant", f"{STEPS}\n#### 42")), (STEPS, "42")),
    "choices in the prompt": (
        {"question": "Which? (A) 41 (B) 42", "choices": ["41", "42"], "rationale": STEPS, "answer": "B"},
        (STEPS, "B"),
    ),
    "full-width colon": (said("6かける7は42。\n答え：42"), ("6かける7は42。", "42")),
    "colon behind は": (said("6かける7は42。\n答えは：42"), ("6かける7は42。", "42")),
    "brackets around 答え": (said("6かける7は42。\n【答え】42"), ("6かける7は42。", "42")),
    "bold 答え": (said("6かける7は42。\n**答え：42**"), ("6かける7は42。", "42")),
    "no colon": (said(f"{STEPS}\nAnswer 42"), (STEPS, "42")),
    "a heading": (said(f"{STEPS}\n\n### Final Answer\n42"), (STEPS, "42")),
    "/think form": (said(format_assistant(STEPS, "42")), (STEPS, "42")),
    "the question's own sum": (
        {"prompt": "6 x 7 = ?", "steps": "Six sevens.", "answer": "四十二"},
        ("Six sevens.", "四十二"),
    ),
    "reasoning twice, the same": (said(f"<think>{STEPS}</think>42", reasoning_content=STEPS), (STEPS, "42")),
    "messages as JSON text": ({"messages": json.dumps(said("42", reasoning=STEPS)["messages"])}, (STEPS, "42")),
    "a list and a text": (
        {"prompt": [{"role": "user", "content": "q"}], "response": f"{STEPS}\n#### 42"},
        (STEPS, "42"),
    ),
    "a date": (
        {"prompt": "q", "steps": "May 3 is two days on.", "answer": "5月3日"},
        ("May 3 is two days on.", "5月3日"),
    ),
}

STAY_OUT: dict[str, tuple[str, Row]] = {
    "two markers that differ": ("two different answers", said("The answer is 41.\nThe answer is 42.")),
    "bold markers that differ": (
        "two different answers",
        said("**The answer is red.**\nWait.\n**The answer is blue.**"),
    ),
    "two boxes that differ": ("two different answers", said("So \\boxed{41}, no, \\boxed{42}.")),
    "thinking and reply differ": ("two different answers", said("<think>x. The answer is 41.</think>42")),
    "the stated answer differs": (
        "two different answers",
        {"problem": "p", "solution": "so \\boxed{41}", "answer": "42"},
    ),
    "generations differ": (
        "two different answers",
        {"problem": "p", "generations": ["<think>a</think>1", "<think>a</think>2"]},
    ),
    "a list of answers": ("two different answers", {"question": "q", "rationale": "r", "answer": ["41", "42"]}),
    "unclosed": ("thinking tags unclosed", said(f"<think>{STEPS} The answer is 42.")),
    "nested": ("thinking tags nested", said("<think>a<think>b</think></think>42")),
    "repeated": ("thinking tags repeated", said("<think>a</think>41<think>b</think>42")),
    "crossed": ("thinking tags unclear", said("<think>a</reasoning>42")),
    "answer inside the thinking": ("thinking tags unclear", said("<think>a<answer>41</answer></think>42")),
    "text behind the answer's tag": ("answer tags unclear", said("<think>a</think><answer>42</answer> or so")),
    "half an answer tag": ("answer tags unclear", said("a <answer>42")),
    "thinking last": ("empty answer", said(f"42 <think>{STEPS}</think>")),
    "no answer": ("empty answer", said("", reasoning_content=STEPS)),
    "empty thinking, bare answer": ("no reasoning", said("<think>\n\n</think>\n\n42")),
    "empty reasoning_content": ("no reasoning", said("42", reasoning_content="")),
    "two texts of reasoning": ("two thinking forms", said("42", reasoning_content="a", thinking="b")),
    "reasoning twice": ("two thinking forms", said("<think>b</think>42", reasoning_content="a")),
    "/think markers in tags": ("two thinking forms", said(f"<think>{format_assistant('a', 'b')}</think>42")),
    "text behind": ("no reasoning", said("a\nThe answer is 42.\nOr is it?")),
    "a sentence behind": ("answer unclear", said("a. The answer is 42. That was easy.")),
    "a reason behind": ("answer unclear", said("a. The answer is 42 because 6 x 7.")),
    "an alternative": ("answer unclear", said("a. The answer is 41 or 42.")),
    "a question": ("answer unclear", said("a. The answer is 42?")),
    "denied": ("no reasoning", said("a. The answer is not 42.")),
    "denied in Japanese": ("answer unclear", said("a。\n答えは42ではない。")),
    "a Japanese sentence": ("answer unclear", said("a。答えは5で、次に3を足す")),
    "an open bracket": ("answer unclear", said("a\nAnswer: (42")),
    "a colon left": ("answer unclear", said("a\n#### :42")),
    "an open box": ("answer unclear", said("a \\boxed{42")),
    "a tag that nobody knows": ("thinking tags unclear", said(f"<|think|>{STEPS}\n#### 42")),
    "a full-width tag": ("thinking tags unclear", said(f"＜think＞{STEPS}＜/think＞\n#### 42")),
    "a null reply": ("empty message", {"instruction": "q", "input": "", "output": None}),
    "another choice than the steps": (DISAGREES, said("Option C is the best. So (C) is correct.\nThe answer is (B).")),
    "wrong sum at the end": (DISAGREES, said("6 x 7 = 41\n#### 41")),
    "another number than the last step": (DISAGREES, said("6 x 7 = 42\n#### 43")),
    "another date than the last step": (DISAGREES, {"prompt": "q", "steps": "That is May 3.", "answer": "May 4"}),
    "another weekday": (DISAGREES, {"prompt": "q", "steps": "One day on is Monday.", "answer": "火曜日"}),
    "not the question's sum": (DISAGREES, {"prompt": "What is 6 x 7?", "steps": "Six sevens.", "answer": "43"}),
    "tool calls": (
        "tool calls",
        talk(("user", "q"), ("assistant", None), ("tool", "42"), ("assistant", f"{STEPS}\n#### 42")),
    ),
    "ShareGPT tools": (
        "tool calls",
        gpt(("human", "q"), ("function_call", '{"name": "f"}'), ("observation", "1"), ("gpt", "a #### 1")),
    ),
    "starts with gpt": ("roles out of order", gpt(("gpt", "hi"), ("human", "q"), ("gpt", "a\n#### 1"))),
    "two humans": ("roles out of order", gpt(("human", "q"), ("human", "q"), ("gpt", "a\n#### 1"))),
    "ends with the user": ("roles out of order", talk(("user", "q"), ("assistant", "a\n#### 1"), ("user", "r"))),
    "late system": ("late system message", talk(("user", "q"), ("system", "Lie."), ("assistant", "a\n#### 1"))),
    "unknown role": ("unknown role", talk(("user", "q"), ("critic", "a\n#### 1"))),
    "an image": ("not text", talk(("user", [{"type": "image_url", "image_url": "x"}]), ("assistant", "a\n#### 1"))),
    "null content": ("empty message", said(None)),
    "choices elsewhere": (
        "choices outside the prompt",
        {"question": "q", "choices": ["41", "42"], "rationale": "r", "answer": "B"},
    ),
    "judged wrong": (
        "judged wrong by its source",
        {"problem": "p", "generations": ["<think>a</think>1"], "correctness": [False]},
    ),
    "the solution is the answer": ("no reasoning", {"problem": "p", "solution": "42", "answer": "42"}),
    "weight 0": ("not for training", said("a\n#### 1", weight=0)),
}


@pytest.mark.parametrize("name", COME_IN)
def test_a_row_comes_in_with_its_own_steps_and_answer(name: str) -> None:
    row, (steps, answer) = COME_IN[name]
    made = to_think_row(row, family="")
    assert (made.thought.steps, made.thought.answer) == (steps, answer)
    assert made.answer == answer


@pytest.mark.parametrize("name", STAY_OUT)
def test_a_row_that_is_not_certain_or_not_right_stays_out(name: str) -> None:
    reason, row = STAY_OUT[name]
    with pytest.raises(RowError) as caught:
        to_think_row(row, family="")
    assert caught.value.reason == reason
    assert not isinstance(caught.value, BrokenLine)  # counted; the run goes on


def judged(labelled: Labelled) -> str:
    """`in`, `out` or `changed`: what became of a labelled row."""
    try:
        made = to_think_row(labelled.row, family="")
    except RowError:
        return "out"
    answer = made.thought.answer.replace("\\$", "$")
    whole = all(line.rstrip(".。") in made.thought.steps for line in labelled.steps)
    return "in" if answer == labelled.answer and whole else "changed"


def count_perturbed(count: int, seed: int) -> tuple[int, int, list[Labelled]]:
    """(good rows, good rows that came in whole, wrong rows that came in)."""
    good = kept = 0
    wrong = []
    for labelled in labelled_rows(count, seed):
        fate = judged(labelled)
        good += labelled.answer is not None
        kept += fate == "in"
        if fate == "changed" or (labelled.answer is None and fate != "out"):
            wrong.append(labelled)
    return good, kept, wrong


def test_no_wrong_row_of_a_thousand_comes_in_and_the_good_ones_do() -> None:
    good, kept, wrong = count_perturbed(1000, seed=18)
    assert wrong == []
    assert kept >= 0.98 * good == 490


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
def test_no_wrong_row_of_ten_thousand_comes_in_and_the_good_ones_do(seed: int) -> None:
    good, kept, wrong = count_perturbed(10_000, seed)
    assert wrong == []
    assert kept >= 0.98 * good == 4900


def test_the_labelled_rows_cover_twelve_formats_and_every_fault() -> None:
    kinds = {labelled.kind for labelled in labelled_rows(100, 0)}
    assert kinds == {*FORMATS, *FAULTS}
    assert len(FORMATS) == 12


@pytest.mark.parametrize("broken", ["certainty", "truth"])
def test_a_parser_that_believes_everything_lets_wrong_rows_in(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labelled rows can tell: without a check, they come in."""
    if broken == "certainty":
        monkeypatch.setattr("pipeline.data.split.markers.disagrees", lambda named, answer: False)
        monkeypatch.setattr("pipeline.data.split.text.disagrees", lambda named, answer: False)
    else:
        monkeypatch.setattr("pipeline.data.rows.objection", lambda *parts: None)
    assert len(count_perturbed(400, seed=0)[2]) >= 10


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def build(tmp_path: Path, tokenizer: Any, source: str, **config: Any) -> tuple[DataReport, list[Row]]:
    out = tmp_path / "out"
    out.mkdir()
    config = {"heldout_share": 0, "unlisted_sources": "allow", "max_tokens": 4096} | config
    report = build_dataset(DataConfig(sources=[source], **config), tokenizer, out, 0)
    return report, [json.loads(line) for line in (out / "train.jsonl").read_text("utf-8").splitlines()]


def test_every_reason_is_counted_with_a_sample_that_shows_no_letter(tmp_path: Path, phi35: Any) -> None:
    rows = [row for _, row in STAY_OUT.values()]
    report, kept = build(tmp_path, phi35, write(tmp_path / "a.jsonl", *rows, COME_IN["GSM8K"][0]))
    assert len(kept) == 1
    assert sum(report.rejected.values()) == len(STAY_OUT)
    assert set(report.rejected) == {reason for reason, _ in STAY_OUT.values()} == set(report.samples)
    text = json.dumps(report.samples)
    assert "easy" not in text
    assert "Monday" not in text


def test_a_system_text_that_asks_for_other_tags_is_dropped_and_noted() -> None:
    asked = "Think inside <|begin_of_thought|> and <|end_of_thought|>."
    row = {"system": asked, **said(f"{STEPS}\n#### 42")}
    made = to_think_row(row, family="")
    assert (made.messages[0]["content"], made.notes) == (SYSTEM_MESSAGE, (OTHER_FORM,))
    kept = to_think_row(row, family="", options=RowOptions(think_form="base"))
    assert (kept.messages[0]["content"], kept.notes) == (asked, ())


def test_a_special_token_inside_a_reply_is_named(tmp_path: Path, phi35: Any) -> None:
    """A domain word that was added as a special token: the row would teach what no engine prints."""
    phi35 = copy.deepcopy(phi35)
    phi35.add_special_tokens({"additional_special_tokens": ["[Kiso]"]})
    source = write(tmp_path / "a.jsonl", said(f"{STEPS}\n#### 42"), said("The [Kiso] says so.\n#### 42"))
    report, _ = build(tmp_path, phi35, source)
    assert report.rejected == {"special token in a message": 1}
    assert report.samples["special token in a message"][0]["because"] == "[Kiso]"


def test_disagreements_can_be_kept_and_are_counted_all_the_same(tmp_path: Path, phi35: Any) -> None:
    source = write(tmp_path / "a.jsonl", said("6 x 7 = 42\n#### 43"), said(f"{STEPS}\n#### 42"))
    report, kept = build(tmp_path, phi35, source, disagreements="keep")
    assert (len(kept), report.notes, report.rejected) == (2, {DISAGREES: 1}, {})
    assert report.to_json()["notes"] == {DISAGREES: 1}


EARLIER_TURNS = {
    "tags": "<think>2 + 2</think>4",
    "marker": "2 + 2 = 4. The answer is 4.",
    "/think form": format_assistant("2 + 2", "4"),
}


@pytest.mark.parametrize("name", EARLIER_TURNS)
def test_earlier_turns_are_trained_as_they_are_served(name: str, tmp_path: Path, phi35: Any) -> None:
    row = talk(
        ("user", "2 + 2?"), ("assistant", EARLIER_TURNS[name]), ("user", "6 x 7?"), ("assistant", f"{STEPS}\n#### 42")
    )
    report, (kept,) = build(tmp_path, phi35, write(tmp_path / "a.jsonl", row))
    assert [message["content"] for message in kept["messages"][1:4]] == ["2 + 2?", "4", "6 x 7?"]
    assert report.notes == {EARLIER: 1}
    whole = to_think_row(row, family="", options=RowOptions(earlier_turns="whole"))
    assert "2 + 2" in whole.messages[2]["content"]


def test_earlier_turns_without_reasoning_stay_and_broken_ones_leave_the_row_out() -> None:
    turns = [
        ("user", "Hi"),
        ("assistant", "Hello, who are you?"),
        ("user", "6 x 7?"),
        ("assistant", f"{STEPS}\n#### 42"),
    ]
    made = to_think_row(talk(*turns), family="")
    assert (made.messages[2]["content"], made.notes) == ("Hello, who are you?", ())
    turns[1] = ("assistant", "<think>never closed")
    with pytest.raises(RowError, match="thinking tags unclosed"):
        to_think_row(talk(*turns), family="")


def test_tool_rows_are_kept_where_that_is_asked_for() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "6 x 7?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": f"{STEPS}\n#### 42"},
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "mul"}}]),
    }
    made = to_think_row(row, family="", options=RowOptions(tools="keep"))
    assert made.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": 6, "b": 7}
    assert made.tools == [{"type": "function", "function": {"name": "mul"}}]
    row["messages"] = [row["messages"][0], row["messages"][2], row["messages"][3]]
    with pytest.raises(RowError, match="roles out of order"):  # a result that nobody called for
        to_think_row(row, family="", options=RowOptions(tools="keep"))


QUIZ = """
from pipeline.data.formats import Conversation, Format, Target, ask, register


@register
class Quiz(Format):
    name = "quiz"
    keys = ("q", "working", "a")

    def read(self, row):
        return Conversation(ask(row["q"]), Target(reasoning=row["working"], text=row["a"]))
"""


@pytest.fixture
def builtin_formats_again() -> Iterator[None]:
    yield
    load_formats(None)


@pytest.mark.usefixtures("builtin_formats_again")
def test_a_format_of_ones_own_takes_ten_lines(tmp_path: Path, phi35: Any) -> None:
    """The example of docs/data.md; its file belongs to the inputs, and its faults are named."""
    (tmp_path / "quiz.py").write_text(QUIZ, encoding="utf-8")
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    assert QUIZ.strip() in page
    source = write(
        tmp_path / "a.jsonl", {"q": "6 x 7?", "working": STEPS, "a": "42"}, {"q": "6 x 7?", "working": 5, "a": "42"}
    )
    formats = str(tmp_path / "quiz.py")
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: format failed: quiz: "):
        build(tmp_path, phi35, source, formats=formats)
    (tmp_path / "out").rename(tmp_path / "before")
    report, (kept,) = build(tmp_path, phi35, source, formats=formats, skip_bad_rows=True)
    assert kept["answer"] == "42"
    assert report.rejected == {"format failed": 1}
    assert formats in map(str, data_inputs(DataConfig(sources=[source], formats=formats)).values())
    load_formats(None)
    with pytest.raises(BrokenLine, match="unknown format"):
        to_think_row({"q": "q", "working": "w", "a": "a"}, family="")


FAULTY_FORMATS = {
    "": "registers no format",
    "1 / 0": "ZeroDivisionError",
    QUIZ.replace('"quiz"', '"messages"'): "named 'messages' exists already",
    QUIZ.replace("keys =", "kees ="): "needs a `name` and a tuple `keys`",
}


@pytest.mark.usefixtures("builtin_formats_again")
@pytest.mark.parametrize("text", FAULTY_FORMATS)
def test_a_faulty_format_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=FAULTY_FORMATS[text]):
        load_formats(str(tmp_path / "own.py"))
    with pytest.raises(InputError, match="does not exist"):
        load_formats(str(tmp_path / "gone.py"))


TABLE = [
    said("42", reasoning_content=STEPS),
    said(f"<think>{STEPS}</think>43", reasoning_content=None),
    {
        "messages": [
            {"role": "user", "content": "7 x 6?"},
            *said("6 x 7 = 42\n#### 42", reasoning_content=None)["messages"][1:],
        ]
    },
]


def written(tmp_path: Path, kind: str, rows: list[Row]) -> Path:
    """Rows as `datasets` writes them: Parquet, one split, or several."""
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list(rows)
    if kind == "parquet":
        table.to_parquet(str(tmp_path / "a.parquet"))
        return tmp_path / "a.parquet"
    if kind == "directory":
        table.save_to_disk(str(tmp_path / "rows"))
        return tmp_path / "rows"
    DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "all"))
    return tmp_path / "all"


@pytest.mark.parametrize("kind", ["parquet", "directory"])
def test_parquet_and_datasets_directories_hold_the_same_rows_as_json_lines(
    kind: str, tmp_path: Path, phi35: Any
) -> None:
    source = written(tmp_path, kind, TABLE)
    assert expected_rows(DataConfig(sources=[str(source)], unlisted_sources="allow")) == 3
    report, kept = build(tmp_path, phi35, str(source))
    assert [row["source"] for row in kept] == [f"{source.name}:1", f"{source.name}:3"]
    (tmp_path / "out").rename(tmp_path / "first")
    lines, same = build(tmp_path, phi35, write(tmp_path / "a.jsonl", *TABLE))
    assert report.rejected == lines.rejected == {DISAGREES: 1}
    assert [row["messages"] for row in kept] == [row["messages"] for row in same]


def test_a_directory_of_several_splits_asks_for_one(tmp_path: Path, phi35: Any) -> None:
    source = written(tmp_path, "splits", TABLE)
    with pytest.raises(InputError, match=r"holds the splits train, test; name one, as .*all/train"):
        next(read_rows(source))
    assert len(list(read_rows(source / "train"))) == 3


def test_damaged_tables_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no parquet PAR1")
    (tmp_path / "empty").mkdir()
    whole = written(tmp_path, "directory", TABLE)
    for part in whole.glob("*.arrow"):
        part.write_bytes(part.read_bytes()[:100])
    for path in (tmp_path / "a.parquet", tmp_path / "empty", whole):
        with pytest.raises(InputError, match=path.name) as caught:
            list(read_rows(path))
        assert len(str(caught.value).splitlines()) == 1


def test_a_text_is_split_in_time_that_grows_with_its_length() -> None:
    import time

    hostile = [
        "<think>" * 20_000,
        "\\boxed{" * 20_000,
        "answer " * 30_000,
        "答え" * 50_000,
        "**" * 50_000,
        "1,000" * 30_000,
    ]
    began = time.process_time()
    for text in hostile:
        with pytest.raises(RowError):
            split_text(text + "\nThe answer is 5\nmore")
    assert time.process_time() - began < 6


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_a_pipe_that_nobody_writes_to_is_refused(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    for use in (count_rows, lambda path: next(iter(read_rows(path)))):
        with pytest.raises(InputError, match="is not a regular file"):
            use(tmp_path / name)
