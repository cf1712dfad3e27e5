"""Laws of rows under templates that know thinking, dates, parts, tools, or no system role."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from template_shapes import SHAPES, shaped

from pipeline.config import DataConfig
from pipeline.data.build import build_dataset
from pipeline.data.masking import FOLDED, IGNORED, OPENED, PARTS, SCAFFOLD, encode_row, render_row
from pipeline.data.render import CLOCK, DATED, as_parts, frozen_clock, render, without_system
from pipeline.data.think_form import RowError, chat, format_assistant
from so8t_core.errors import InputError

ANSWER = format_assistant("6 x 7 = 42.", "42")
QUESTION = chat("6 x 7?", "Be brief.")
ROW = [*QUESTION, {"role": "assistant", "content": ANSWER}]
BASE_ROW = [*QUESTION[1:], {"role": "assistant", "reasoning_content": "6 x 7 = 42.", "content": "42"}]
LONG = [
    QUESTION[0],
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    *ROW[1:],
]
NOTES = {
    "block in the last turn": {SCAFFOLD},
    "generation markers and a date": {SCAFFOLD, DATED},
    "opened by the prompt": {OPENED},
    "empty blocks in history": {OPENED},
    "no system role": {FOLDED},
    "headers, date, tools": {DATED},
    "parts": {PARTS},
    "channels": set(),
    "a closed channel in the prompt": {SCAFFOLD},
}


def as_served(name: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages in the way that a shape's template takes them."""
    if name == "parts":
        return as_parts(messages)
    return without_system(messages) if name == "no system role" else messages


def pieces(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> tuple[str, str, str]:
    """(masked in front, trained, masked behind) as text."""
    encoded = encode_row(tokenizer, messages, **options)
    trained = [at for at, label in enumerate(encoded["labels"]) if label != IGNORED]
    assert trained == list(range(trained[0], trained[-1] + 1))
    ids = encoded["input_ids"]
    parts = ids[: trained[0]], ids[trained[0] : trained[-1] + 1], ids[trained[-1] + 1 :]
    return tuple(tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts)  # type: ignore[return-value]


@pytest.mark.parametrize("messages", [ROW, LONG], ids=["one turn", "two turns"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_masked_part_is_what_is_served_and_the_model_says_the_rest(
    name: str, messages: list[dict[str, Any]], phi35: Any
) -> None:
    tokenizer, shape = shaped(phi35, name), SHAPES[name]
    with frozen_clock():
        served = tokenizer.apply_chat_template(
            as_served(name, messages[:-1]), tokenize=False, add_generation_prompt=True
        )
    front, trained, _ = pieces(tokenizer, messages)
    assert front == served
    assert trained == shape.lead + ANSWER + shape.end
    assert set(render_row(tokenizer, messages).notes) == NOTES.get(name, set())


@pytest.mark.parametrize("name", SHAPES)
def test_the_whole_text_is_the_templates_own_where_it_writes_no_scaffold(name: str, phi35: Any) -> None:
    tokenizer = shaped(phi35, name)
    if NOTES.get(name, set()) & {SCAFFOLD, OPENED}:
        return
    with frozen_clock():
        whole = tokenizer.apply_chat_template(as_served(name, ROW), tokenize=False)
    assert render_row(tokenizer, ROW).text == whole


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.base])
def test_the_bases_own_form_is_its_thinking_closed_and_the_answer(name: str, phi35: Any) -> None:
    tokenizer, shape = shaped(phi35, name), SHAPES[name]
    front, trained, _ = pieces(tokenizer, BASE_ROW)
    with frozen_clock():
        served = tokenizer.apply_chat_template(BASE_ROW[:-1], tokenize=False, add_generation_prompt=True)
    assert front == served
    assert trained == str(shape.base).replace("S", "6 x 7 = 42.").replace("A", "42") + shape.end


@pytest.mark.parametrize("name", ["chatml", "brackets"])
def test_a_template_without_thinking_is_refused_for_the_bases_form(name: str, phi35: Any) -> None:
    with pytest.raises(InputError, match=r"no thinking form of its own; use so8t"):
        encode_row(shaped(phi35, name), BASE_ROW)


def test_another_difference_than_scaffold_is_still_refused(phi35: Any) -> None:
    tokenizer = shaped(phi35, "chatml")
    tokenizer.chat_template = SHAPES["block in the last turn"].template.replace(
        "<think>\\n' + thought", "So: ' + thought"
    )
    with pytest.raises(RowError, match="chat template alters a message"):
        encode_row(tokenizer, ROW)


def test_an_order_of_roles_that_the_template_refuses_is_not_folded_away(phi35: Any) -> None:
    tokenizer = shaped(phi35, "no system role")
    twice = [QUESTION[1], QUESTION[1], ROW[-1]]
    with pytest.raises(RowError, match="chat template refuses the row: roles must alternate"):
        encode_row(tokenizer, twice)


def test_the_clock_stands_still_only_inside(phi35: Any) -> None:
    tokenizer = shaped(phi35, "headers, date, tools")
    assert f"Today: {CLOCK:%d %b %Y}" in render(tokenizer, QUESTION, prompt=True)
    assert f"{CLOCK:%d %b %Y}" not in tokenizer.apply_chat_template(QUESTION, tokenize=False)


TOOL = {"type": "function", "function": {"name": "add", "description": "d", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 6, "b": 7}}}
TOOL_ROW = [
    *QUESTION,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "13"},
    {"role": "assistant", "content": ANSWER},
]


def test_tool_calls_are_prompt_where_the_template_has_them(phi35: Any) -> None:
    front, trained, _ = pieces(shaped(phi35, "headers, date, tools"), TOOL_ROW, tools=[TOOL])
    assert trained == ANSWER + "<|end|>"
    assert '"name": "add"' in front
    assert "13<|end|>" in front
    with pytest.raises(RowError, match="chat template has no tools"):
        encode_row(shaped(phi35, "chatml"), TOOL_ROW, tools=[TOOL])


@pytest.mark.parametrize(
    "name", ["chatml", "headers, date, tools", "brackets", "block in the last turn", "no system role"]
)
def test_llama_cpp_pythons_renderer_writes_the_same(name: str, phi35: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from llama_cpp import llama_chat_format

    tokenizer = shaped(phi35, name)

    class Frozen(llama_chat_format.datetime):  # type: ignore[name-defined,misc]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return CLOCK

    monkeypatch.setattr(llama_chat_format, "datetime", Frozen)
    theirs = llama_chat_format.Jinja2ChatFormatter(tokenizer.chat_template, tokenizer.eos_token, tokenizer.bos_token)
    messages = as_served(name, LONG[:-1])
    assert theirs(messages=messages).prompt == render(tokenizer, messages, prompt=True)


@pytest.mark.parametrize("name", ["block in the last turn", "opened by the prompt"])
@pytest.mark.parametrize("form", ["so8t", "base"])
def test_a_base_that_thinks_keeps_every_row(name: str, form: str, tmp_path: Path, phi35: Any) -> None:
    """The whole data step: what was 100 % dropped is 100 % kept, and reads itself again."""
    tokenizer = shaped(phi35, name)
    source = tmp_path / "rows.jsonl"
    source.write_text(
        "".join(
            json.dumps({"question": f"{n} + 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"}) + "\n"
            for n in range(20)
        )
    )
    config = DataConfig(
        sources=[str(source)], unlisted_sources="allow", heldout_share=0, think_form=form, max_tokens=4096
    )  # type: ignore[arg-type]
    (tmp_path / "out").mkdir()
    report = build_dataset(config, tokenizer, tmp_path / "out", 0)
    assert (report.train_rows, report.rejected) == (20, {})
    rows = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text("utf-8").splitlines()]
    assert ("reasoning_content" in rows[0]["messages"][-1]) == (form == "base")
    for row in rows:
        encode_row(tokenizer, row["messages"])
    (tmp_path / "again").mkdir()
    again = config.model_copy(update={"sources": [str(tmp_path / "out" / "train.jsonl")]})
    assert build_dataset(again, tokenizer, tmp_path / "again", 0).train_rows == 20
