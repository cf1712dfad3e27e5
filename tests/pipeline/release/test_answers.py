"""Laws of the answers: decoding many prompts together changes none of them, and only a finished /think turn counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data.think_form import format_assistant
from pipeline.data.truth.equality import normalised, same_answer
from pipeline.release.answers import judge, parse_reply, render_prompt
from pipeline.release.generate import Completion, complete, with_bos
from so8t_core.errors import InputError

PROMPTS = ["one", "two three four", "<|im_start|>user\n五 times 6<|im_end|>\n", "x" * 700]


def test_parallel_decoding_equals_one_at_a_time(tiny_gguf: Path) -> None:
    alone = [complete(tiny_gguf, [prompt], max_new_tokens=12, parallel=1)[0] for prompt in PROMPTS]
    assert complete(tiny_gguf, PROMPTS, max_new_tokens=12, parallel=2) == alone
    assert complete(tiny_gguf, PROMPTS, max_new_tokens=12, parallel=4) == alone
    assert len({c.text for c in alone}) > 1  # so that equality means something


def test_greedy_text_equals_the_hugging_face_model(tiny_gguf: Path, tiny_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    ids = tokenizer(PROMPTS[1], return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids.input_ids.shape[1] :]
    expected = tokenizer.decode([i for i in out.tolist() if i != tokenizer.eos_token_id])
    assert complete(tiny_gguf, [PROMPTS[1]], max_new_tokens=12)[0].text == expected


def test_limit_is_kept_and_reported(tiny_gguf: Path) -> None:
    found = complete(tiny_gguf, ["one"], max_new_tokens=8)[0]
    assert not found.finished


def test_a_token_longer_than_the_buffer_is_not_lost(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = complete(tiny_gguf, PROMPTS, max_new_tokens=8)
    monkeypatch.setattr("pipeline.release.generate.PIECE_BYTES", 1)
    assert complete(tiny_gguf, PROMPTS, max_new_tokens=8) == expected


def test_damaged_file_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:100_000])
    with pytest.raises(InputError, match=r"cut\.gguf"):
        complete(cut, ["one"], max_new_tokens=2)


@pytest.mark.parametrize(("given", "same"), [("４５。", "45"), (" Yes.", "yes"), ("1 9:00", "1 9:00")])
def test_answers_are_compared_by_meaningful_characters(given: str, same: str) -> None:
    assert normalised(given) == normalised(same)
    assert normalised("45") != normalised("4 5")
    assert normalised("45") != normalised("45..")  # one full stop, not any number of them


SAME = [
    *[
        ("12", "12.0"),
        ("12", "十二"),
        ("12", "12 個"),
        ("12", "１２"),
        ("1,200", "千二百"),
        ("12万", "120000"),
        ("0.5", "1/2"),
    ],
    *[
        ("\\frac{1}{2}", "0.5"),
        ("\\boxed{12}", "12"),
        ("$12", "12 dollars"),
        ("12%", "0.12"),
        ("(A)", "A."),
        ("yes", "はい"),
    ],
    *[
        ("May 17", "5月17日"),
        ("3:05", "3時5分"),
        ("3 p.m.", "15:00"),
        ("Monday", "月曜日"),
        ("twelve", "12"),
        ("**12**", "12"),
    ],
    *[
        ("x^2+2x+1", "(x+1)^2"),
        ("2\\sqrt{2}", "\\sqrt{8}"),
        ("{1,2}", "\\{2,1\\}"),
        ("12 yen", "12円"),
        ("「はい」", "はい"),
    ],
]
DIFFERENT = [
    *[("12", "13"), ("12 km", "12 m"), ("12円", "12個"), ("A", "B"), ("yes", "no"), ("4 5", "45"), ("5 am", "5 pm")],
    *[
        ("三", "三角形"),
        ("5", "5月"),
        ("3:05", "3:50"),
        ("May 17", "May 18"),
        ("", "12"),
        ("1/0", "1"),
        ("(1,2)", "(2,1)"),
    ],
    *[
        ("2", "2nd"),
        ("(A) x", "(A) y"),
        ("12 or 13", "12"),
        ("-5", "5"),
        ("9**9**9**9", "9**9**9**8"),
        ("5", "x = 3, y = 5"),
    ],
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_answers_that_say_the_same_are_equal(a: str, b: str) -> None:
    assert same_answer(a, b)
    assert same_answer(b, a)


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_answers_that_do_not_are_not(a: str, b: str) -> None:
    assert not same_answer(a, b)
    assert not same_answer(b, a)


def test_a_base_form_reply_is_thinking_closed_and_an_answer() -> None:
    for text in ("<think>\n6 x 7\n</think>\n\n42", "6 x 7\n</think>\n\nThe answer is 42."):
        assert judge(Completion(text, True), "42", base_form=True) == (True, True)
        assert judge(Completion(text, True), "43", base_form=True) == (True, False)
        assert judge(Completion(text, False), "42", base_form=True) == (False, False)
    assert parse_reply("<think>6 x 7", base_form=True) is None
    assert parse_reply("42", base_form=True) is None


def test_a_prompt_holds_earlier_replies(smollm2: Any) -> None:
    turns = [("user", "2 + 2?"), ("assistant", "4"), ("user", "6 x 7?"), ("assistant", format_assistant("s", "42"))]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    expected = smollm2.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
    assert render_prompt(smollm2, row) == expected


def test_only_a_finished_think_turn_counts() -> None:
    right = format_assistant("1 + 1 = 2", "2")
    assert judge(Completion(right, True), "2") == (True, True)
    assert judge(Completion(right, True), "3") == (True, False)
    assert judge(Completion(right, False), "2") == (False, False)  # cut off: the answer may be half an answer
    assert judge(Completion("2", True), "2") == (False, False)
    assert judge(Completion(right, True), None) == (True, False)


def test_seeded_noise_is_not_in_form() -> None:
    letters = "".join(map(chr, np.random.default_rng(0).integers(33, 126, 200)))
    assert judge(Completion(letters, True), "2") == (False, False)


def test_bos_stands_once_whether_the_template_wrote_it_or_not() -> None:
    class Model:
        bos = 1

        def __init__(self, add_bos: bool) -> None:
            self.add_bos = add_bos

    assert with_bos(Model(True), [5, 6]) == [1, 5, 6]  # type: ignore[arg-type]
    assert with_bos(Model(True), [1, 5, 6]) == [1, 5, 6]  # type: ignore[arg-type]
    assert with_bos(Model(False), [5, 6]) == [5, 6]  # type: ignore[arg-type]
