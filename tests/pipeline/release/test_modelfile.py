"""Laws of the Modelfile: its Go template writes what the model's own chat template writes, and it stops."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.generator import generate
from pipeline.data.think_form import SYSTEM_MESSAGE
from pipeline.release.modelfile import go_template, modelfile, stop_tokens
from so8t_core.errors import InputError


def _as_ollama(template: str, turns: list[tuple[str, str]], system: str) -> str:
    """Ollama fills the template once a turn: the system text in the first, the response empty in the last."""
    text = ""
    for number, (prompt, response) in enumerate(turns):
        opened, rest = template.removeprefix("{{ if .System }}").split("{{ end }}")
        head = opened.replace("{{ .System }}", system) if number == 0 else ""
        text += head + rest.replace("{{ .Prompt }}", prompt).replace("{{ .Response }}", response)
    return text


def test_go_template_renders_what_the_chat_template_renders(tokenizer: Any) -> None:
    template = go_template(tokenizer)
    assert template is not None
    messages = [
        {"role": "system", "content": "S s"},
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert _as_ollama(template, [("一", "two"), ("three", "")], "S s") == expected


def test_turns_that_are_not_uniform_get_no_guessed_template(smollm2: Any) -> None:
    class Odd:
        bos_token = None

        def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
            return "".join(f"<{i}>{m['content']}" for i, m in enumerate(messages)) + "<a>"

    assert go_template(Odd()) is None


def test_modelfile_holds_stop_set_context_and_shared_system_message(smollm2: Any, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    text = modelfile("m-Q8_0.gguf", tmp_path, smollm2, 4096)
    assert "FROM ./m-Q8_0.gguf\n" in text
    assert 'PARAMETER stop "<|endoftext|>"\nPARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER num_ctx 4096\n" in text
    assert SYSTEM_MESSAGE in text


def test_model_without_an_end_token_is_refused(tmp_path: Path) -> None:
    class Endless:
        eos_token_id = None

    with pytest.raises(InputError, match="never stop"):
        stop_tokens(tmp_path, Endless())


def _as_llama_cpp(template: str, messages: list[dict[str, str]]) -> str:
    """llama.cpp's own rendering of a GGUF's template, as llama-server without --jinja does it."""
    import llama_cpp

    array = (llama_cpp.llama_chat_message * len(messages))(
        *(llama_cpp.llama_chat_message(m["role"].encode(), m["content"].encode()) for m in messages)
    )
    buffer = llama_cpp.ctypes.create_string_buffer(1 << 16)
    length = llama_cpp.llama_chat_apply_template(template.encode(), array, len(messages), True, buffer, len(buffer))
    assert 0 < length <= len(buffer)
    return buffer.raw[:length].decode()


def conversations(count: int) -> list[list[tuple[str, str]]]:
    """Turns of one to three problems in two languages; the last reply is still to come."""
    rows = iter(generate(2 * count, 0, ["ja", "en"], 0)[0])
    found = []
    for number in range(count):
        turns = [(row["prompt"], row["answer"]) for row in islice(rows, 1 + number % 3)]
        found.append([*turns[:-1], (turns[-1][0], "")])
    return found


def _messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": SYSTEM_MESSAGE}]
    for prompt, response in turns:
        messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return messages[:-1]


def test_fifty_conversations_are_written_as_llama_cpp_writes_them(smollm2: Any) -> None:
    template = go_template(smollm2)
    assert template is not None
    chosen = conversations(50)
    assert len({str(turns) for turns in chosen}) == 50
    for turns in chosen:
        expected = _as_llama_cpp(smollm2.chat_template, _messages(turns))
        assert _as_ollama(template, turns, SYSTEM_MESSAGE) == expected
        broken = template.replace("<|im_end|>\n", "<|im_end|>", 1)  # a lost line break shows
        assert _as_ollama(broken, turns, SYSTEM_MESSAGE) != expected
