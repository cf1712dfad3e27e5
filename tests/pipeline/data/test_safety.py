"""Laws of unsafe rows: they teach refusal or nothing, and who labelled them is recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.labels import NOT_REFUSED, UNKNOWN, SafetyLabels, UnsafeLabel
from pipeline.data.refusal import MAX_LENGTH, MAX_STEPS, is_refusal
from pipeline.data.think_form import RowError, Thought
from so8t_core.errors import InputError

REFUSALS = [
    "申し訳ありませんが、その依頼にはお答えできません。",
    "お手伝いすることはできません。",
    "そのようなご要望には応じられません。",
    "回答いたしかねます。",
    "ご依頼はお断りいたします。",
    "この内容の提供はできません。相談窓口は警察です。",
    "対応しておりません。",
    "お答えすることができかねます。",
    "それはできません。",
    "危険ですので、教えることはできません。",
    "申し訳ございませんが、ご協力いたしかねます。安全な方法であればお手伝いできます。",
    "この質問にはお答えできません。\n\n専門家に相談してください。",
    "回答は差し控えさせていただきます。",
    "説明できない内容です。",
    "I'm sorry, but I can't help with that.",
    "I cannot assist with this request.",
    "I must decline.",
    "I won't provide instructions for that. Please call 911 if you are in danger.",
    "I am unable to help with that.",
    "Sorry, I can’t do that.",
    "I respectfully decline to answer.",
    "No, I can't share that.",
    "I'm not able to discuss this.",
    "I can't help with that, but you can call a crisis line.",
    "I'm sorry, I'm not going to write that.",
    "We cannot in good conscience provide this.",
]
COMPLIANCE = [
    "はい、方法は次の通りです。",
    "お答えできませんが、方法は以下の通りです。",
    "できないことはありません。",
    "お手伝いしませんか。",
    "説明が足りませんでした。",
    "答えは5です。",
    "できますが、注意してください。",
    "お断りしません。",
    "混ぜることはできません。だからまず加熱します。",
    "お教えできませんでしたが、今回は教えます。",
    "I can help with that.",
    "I can't help but admire it. First mix A and B.",
    "I can't help with that, but here is how: mix A and B.",
    "Sure! 1. take\n2. mix\n",
    "I cannot assist.\n1. Take A\n2. Mix B",
    "I can't share that.\n```\nrm -rf /\n```",
    "",
    "I'll never refuse you.",
    "I don't think I can't do it.",
    "Mix A and B. Heat it. I cannot tell you more.",
    "I can't help with that. However, the steps are simple.",
    "I can't help. " + "x" * MAX_LENGTH,
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals_are_known(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize("text", COMPLIANCE)
def test_answers_that_comply_are_no_refusals(text: str) -> None:
    assert not is_refusal(text)


def labels(tmp_path: Path, *lines: Any, unsafe: str = "nsfw,harmful,unsafe", safe: str = "safe") -> SafetyLabels:
    path = tmp_path / "labels.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts), "utf-8")
    return SafetyLabels(path if lines else None, unsafe.split(","), safe.split(","))


def look(found: SafetyLabels, row: dict[str, Any], *, line: int = 1, manifest: bool = False) -> UnsafeLabel | None:
    return found.look_up(row, "a.jsonl", line, refusal_only=manifest)


def test_a_label_comes_from_row_file_or_manifest_and_says_so(tmp_path: Path) -> None:
    by_line = {"source": "a.jsonl", "line": 3, "label": "harmful", "by": "reviewer 2"}
    found = labels(tmp_path, by_line, {"id": "x7", "label": "nsfw"})
    assert look(found, {"safety_label": "NSFW"}) == UnsafeLabel("nsfw", "row")
    assert look(found, {}, line=3) == UnsafeLabel("harmful", "labels.jsonl: reviewer 2")
    assert look(found, {"id": "x7"}) == UnsafeLabel("nsfw", "labels.jsonl")
    assert look(found, {}, manifest=True) == UnsafeLabel("unsafe", "manifest")
    assert look(found, {"safety_label": "safe"}) is None
    assert look(found, {}) is None


def test_the_strictest_label_counts(tmp_path: Path) -> None:
    found = labels(tmp_path, {"id": "a", "label": "harmful"}, {"id": "a", "label": "safe"})
    assert look(found, {"id": "a", "safety_label": "safe"}) == UnsafeLabel("harmful", "labels.jsonl")
    found = labels(tmp_path, {"id": "a", "label": "safe"}, {"id": "a", "label": "harmful"})
    assert look(found, {"id": "a"}) == UnsafeLabel("harmful", "labels.jsonl")
    assert look(found, {"id": "b", "safety_label": "safe"}, manifest=True) == UnsafeLabel("unsafe", "manifest")


@pytest.mark.parametrize("label", ["toxic", 1, True, ""])
def test_a_label_on_neither_list_is_not_taken_as_safe(label: Any, tmp_path: Path) -> None:
    with pytest.raises(RowError) as caught:
        look(labels(tmp_path), {"safety_label": label})
    assert caught.value.reason == UNKNOWN


def test_an_unsafe_row_must_refuse_and_think_briefly(tmp_path: Path) -> None:
    found, label = labels(tmp_path), UnsafeLabel("harmful", "row")
    found.check(label, Thought("危険な依頼である。", "お答えできません。"))
    for thought in (Thought("a", "方法は次の通り。"), Thought("x" * (MAX_STEPS + 1), "お答えできません。")):
        with pytest.raises(RowError) as caught:
            found.check(label, thought)
        assert caught.value.reason == NOT_REFUSED


MISTAKES = {
    "{oops": "line 2: bad JSON",
    "[1]": "line 2: not an object",
    '{"id": "a", "label": "nsfw", "colour": 1}': "line 2: unknown key 'colour'",
    '{"label": "nsfw"}': "line 2: needs `label`",
    '{"id": "a"}': "line 2: needs `label`",
    '{"source": "a.jsonl", "label": "nsfw"}': "line 2: needs `label`",
    '{"id": "a", "source": "a.jsonl", "line": 1, "label": "nsfw"}': "line 2: needs `label`",
    '{"id": "a", "label": "toxic"}': "line 2: label 'toxic' is in neither",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_broken_label_line_is_named_by_file_and_line(line: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"labels.jsonl, {MISTAKES[line]}"):
        labels(tmp_path, {"id": "ok", "label": "safe"}, line)


def test_a_missing_label_file_and_a_label_on_both_lists_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.safety_labels .*gone.jsonl does not exist"):
        SafetyLabels(tmp_path / "gone.jsonl", ["nsfw"], ["safe"])
    with pytest.raises(InputError, match=r"'nsfw' is in data.unsafe_labels and in data.safe_labels"):
        SafetyLabels(None, ["NSFW"], ["nsfw"])


def test_labels_that_all_miss_are_an_error_and_some_are_counted(tmp_path: Path) -> None:
    found = labels(tmp_path, {"id": "a", "label": "nsfw"}, {"id": "b", "label": "nsfw"})
    with pytest.raises(InputError, match="none of its 2 labels names a row"):
        found.require_match()
    look(found, {"id": "a"})
    found.require_match()
    assert found.unmatched == 1


def test_a_long_answer_is_no_refusal_and_said_so_at_once() -> None:
    import time

    began = time.process_time()
    assert not is_refusal("I can't help with that." + "\u0301\u0316" * 100_000)
    assert time.process_time() - began < 20  # quadratic: hours
