"""The contract without logits: each comparison is silent on a healthy file and speaks on an injected fault."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from verification_models import Family, rewrite

from verification.contract import chat, metadata, tokens
from verification.engines.llama_model import LlamaModel
from verification.gguf.reader import read_gguf
from verification.reference.checkpoint import read_config


@pytest.fixture(scope="module")
def family(wide_family: Family) -> Family:
    """With SmolLM2's vocabulary, which is byte-level BPE."""
    return wide_family


def vocabulary(path: Path) -> LlamaModel:
    return LlamaModel(path, vocab_only=True)


def test_a_healthy_file_has_no_findings(family: Family, tokenizer: Any) -> None:
    file = read_gguf(family.files["Q8_0"])
    with vocabulary(file.path) as model:
        assert tokens.token_ids(tokenizer, model, tokens.corpus(tokenizer)) == []
        chats = list(chat.render_both(tokenizer, model))
        assert len(chats) == len(chat.asked_chats())
        assert chat.rendered_text(chats) == []
        assert chat.rendered_ids(tokenizer, model, chats) == []
        assert chat.template_text(tokenizer, model) == []
        assert chat.end_of_turn(model) == []
        assert tokens.added_specials(tokenizer, model) == []
        assert tokens.stop_set(family.reference, tokenizer, model) == []
    assert tokens.special_ids(tokenizer, file) == []
    assert metadata.against_config(read_config(family.reference), file, tokenizer_size=len(tokenizer)) == []
    assert metadata.against_oracle(file, read_gguf(family.files["F16"])) == []


def test_the_corpus_holds_the_tokenizers_own_special_tokens(tokenizer: Any) -> None:
    texts = tokens.corpus(tokenizer)
    assert any("a<|im_start|>b" in text for text in texts)
    for part in ("\u3000", "\r\n", "\U0001f600", "か\u3099", "def f("):
        assert any(part in text for text in texts)


def broken(family: Family, tmp_path: Path, **fields: Any) -> Path:
    return rewrite(
        family.files["F16"], tmp_path / "f.gguf", fields={k.replace("__", "."): v for k, v in fields.items()}
    )


def test_another_pre_tokenizer_changes_ids(family: Family, tokenizer: Any, tmp_path: Path) -> None:
    with vocabulary(broken(family, tmp_path, tokenizer__ggml__pre="llama-bpe")) as model:
        found = tokens.token_ids(tokenizer, model, tokens.PLAIN)
    assert found
    assert "in llama.cpp" in found[0].sentence


def test_an_added_bos_is_found(family: Family, tokenizer: Any, tmp_path: Path) -> None:
    with vocabulary(broken(family, tmp_path, tokenizer__ggml__add_bos_token=True)) as model:
        (found,) = tokens.added_specials(tokenizer, model)
        assert found.where == "tokenizer.ggml.add_bos_token"
        assert tokens.token_ids(tokenizer, model, tokens.PLAIN)


def test_a_changed_template_is_found_with_its_place(family: Family, tokenizer: Any, tmp_path: Path) -> None:
    other = tokenizer.chat_template.replace("assistant", "model")
    with vocabulary(broken(family, tmp_path, tokenizer__chat_template=other)) as model:
        (found,) = chat.template_text(tokenizer, model)
        chats = list(chat.render_both(tokenizer, model))
        assert chat.rendered_text(chats)
    assert "tokenizer.chat_template, character" in found.where
    with vocabulary(broken(family, tmp_path, tokenizer__chat_template=None)) as model:
        assert "chat template missing" in chat.template_text(tokenizer, model)[0].sentence


def test_both_sides_may_refuse_a_chat_but_not_one_alone(family: Family, tokenizer: Any, tmp_path: Path) -> None:
    refusing = "{{ raise_exception('no') }}"
    with vocabulary(broken(family, tmp_path, tokenizer__chat_template=refusing)) as model:
        chats = list(chat.render_both(tokenizer, model))
        assert len(chat.rendered_text(chats)) == len(chats)
        assert chat.rendered_ids(tokenizer, model, chats) == []
    same = [chat.Rendered("x", chat.REFUSED, chat.REFUSED)]
    assert chat.rendered_text(same) == []


def test_a_wrong_eos_is_found(family: Family, tokenizer: Any, tmp_path: Path) -> None:
    path = broken(family, tmp_path, tokenizer__ggml__eos_token_id=100)
    (found,) = tokens.special_ids(tokenizer, read_gguf(path))
    assert (found.where, found.expected, found.found) == ("tokenizer.ggml.eos_token_id", "2", "100")


def test_a_stop_token_that_llama_cpp_does_not_know_is_found(family: Family, tokenizer: Any, tmp_path: Path) -> None:
    directory = shutil.copytree(family.reference, tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 500]}), encoding="utf-8")
    with vocabulary(family.files["F16"]) as model:
        (found,) = tokens.stop_set(directory, tokenizer, model)
    assert found.where.startswith("token 500 ")
    assert found.found == "llama.cpp goes on"
    tool, *options, old, new = found.action.split(" (", 1)[0].split()
    assert (old, new) == ("OLD.gguf", "NEW.gguf")
    mended = tmp_path / new
    subprocess.run([Path(sys.executable).parent / tool, *options, family.files["F16"], mended], check=True)
    with vocabulary(mended) as model:
        assert tokens.stop_set(directory, tokenizer, model) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.rope.freq_base", 10001.0),
        ("llama.attention.layer_norm_rms_epsilon", 1.1e-5),
        ("llama.context_length", 1024),
        ("llama.attention.head_count_kv", 8),
        ("llama.attention.key_length", 64),
        ("llama.vocab_size", 49153),
    ],
)
def test_every_changed_key_is_named(family: Family, tokenizer: Any, tmp_path: Path, key: str, value: Any) -> None:
    file = read_gguf(rewrite(family.files["F16"], tmp_path / "f.gguf", fields={key: value}))
    named = {f.where for f in metadata.against_config(read_config(family.reference), file)}
    assert key in named
    assert key in {f.where for f in metadata.against_oracle(file, read_gguf(family.files["F16"]))}


def test_whatever_the_list_forgets_the_oracle_sees(family: Family, tmp_path: Path) -> None:
    scores = list(range(49152))
    file = read_gguf(rewrite(family.files["F16"], tmp_path / "f.gguf", fields={"tokenizer.ggml.token_type": scores}))
    (found,) = metadata.against_oracle(file, read_gguf(family.files["F16"]))
    assert found.where == "tokenizer.ggml.token_type[0]"


def test_expected_metadata_reads_both_forms_of_rope_theta() -> None:
    old = metadata.expected_metadata({"rope_theta": 5000, "rope_scaling": {"type": "linear"}})
    new = metadata.expected_metadata({"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}})
    assert old["rope.freq_base"] == new["rope.freq_base"] == 5000.0


TOOLS = """{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.tool_calls %}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}CALLED
{% else %}{{ m.content }}ANSWERED
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""


def ending(*, answered: str = "<|im_end|>", called: str = "<|im_end|>") -> str:
    return TOOLS.replace("ANSWERED", answered).replace("CALLED", called)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (("{{ tool | tojson }}", "{{ tool.function | tojson }}"), {"tools offered", "a tool called"}),
        (("{{ call.function | tojson }}", "{{ call.function.name }}"), {"a tool called", "two calls of tools"}),
        (("{{ m.role }}", "{{ 'user' if m.role == 'tool' else m.role }}"), {"a tool called", "two calls of tools"}),
        (("not enable_thinking", "enable_thinking"), {"thinking on", "thinking off", "thinking on, two turns"}),
    ],
    ids=["how tools are offered", "how a call is written", "the role of a result", "the switch turned round"],
)
def test_a_template_that_differs_for_tools_or_thinking_alone_is_named(
    family: Family, tokenizer: Any, change: tuple[str, str], names: set[str]
) -> None:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = ending()
    with vocabulary(family.files["F16"]) as model:
        with chat.FileTemplate(ending(), model) as same:
            assert chat.rendered_text(chat.render_both(changed, model, same)) == []
        with chat.FileTemplate(ending().replace(*change), model) as other:
            found = chat.rendered_text(chat.render_both(changed, model, other))
    named = {finding.where.split("'")[1] for finding in found}
    assert names <= named
    assert not named & set(chat.CHATS)  # a plain chat shows nothing of it


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (ending(), []),
        (ending(called="<file_sep><|im_end|>"), []),  # some families close the call before they close the turn
        (ending(called="<file_sep>"), ["calls of tools"]),
        (ending(answered="<file_sep>"), ["answers"]),
        (ending(answered="<file_sep>", called="<repo_name>"), ["answers", "calls of tools"]),
        (ending(answered="{{ '<file_sep>' if enable_thinking else '<|im_end|>' }}"), ["answers"]),
        (ending(answered="{{ '<file_sep>' if messages[-2].role == 'tool' else '<|im_end|>' }}"), ["answers"]),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}", []),  # knows no tools
    ],
)
def test_every_kind_of_reply_must_end_where_llama_cpp_stops(family: Family, template: str, wanted: list[str]) -> None:
    with vocabulary(family.files["F16"]) as model, chat.FileTemplate(template, model) as opened:
        found = chat.end_of_turn(model, opened)
    assert [finding.cause for finding in found] == ["never stops"] * len(wanted)
    assert [finding.expected for finding in found] == [
        f"an end of generation, as the template ends {kind} with it" for kind in wanted
    ]
