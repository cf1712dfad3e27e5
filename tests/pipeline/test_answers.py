"""Laws of the answers: decoding many prompts together changes none of them, and only a finished /think turn counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.data.think_form import format_assistant
from pipeline.release.answers import judge, normalised
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
