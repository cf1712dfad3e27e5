"""Laws of the loss mask and of the template round trip."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.data.masking import IGNORED, encode_row, render_row
from pipeline.data.think_form import Message, RowError, chat, format_assistant, strip_message
from so8t_core.errors import InputError

END = {"smollm2": "<|im_end|>", "phi35": "<|end|>"}
ANSWER = format_assistant("12 + 30 = 42\n四十二です。", "42")
words = st.text(alphabet="ab 1+=#\n思考答。\u3000é🙂<|>", min_size=1).map(strip_message).filter(bool)


def row(answer: str = ANSWER, prompt: str = "12 + 30 = ?") -> list[Message]:
    return [*chat(prompt), {"role": "assistant", "content": answer}]


def with_template(tokenizer: Any, template: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def reason(tokenizer: Any, messages: list[Message], max_tokens: int | None = None) -> str:
    with pytest.raises(RowError) as caught:
        encode_row(tokenizer, messages, max_tokens)
    return caught.value.reason


@pytest.mark.parametrize("name", END)
def test_loss_covers_exactly_the_answer_and_its_end_of_turn(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    encoded = encode_row(tokenizer, row())
    trained = [label for label in encoded["labels"] if label != IGNORED]
    assert tokenizer.decode(trained) == ANSWER + END[name]
    assert trained[-1] == tokenizer.convert_tokens_to_ids(END[name])
    assert len(encoded["labels"]) == len(encoded["input_ids"])
    assert all(label in (IGNORED, token) for label, token in zip(encoded["labels"], encoded["input_ids"], strict=True))


def test_what_follows_the_end_of_turn_is_not_trained(tokenizer: Any) -> None:
    encoded = encode_row(tokenizer, row())
    assert encoded["labels"][-1] == IGNORED  # ChatML's newline, Phi-3.5's <|endoftext|>
    assert encoded["input_ids"][-1] != IGNORED


def test_end_of_turn_is_trained_although_it_is_the_padding_token(smollm2: Any) -> None:
    assert smollm2.pad_token_id == smollm2.eos_token_id
    assert smollm2.eos_token_id in encode_row(smollm2, row())["labels"]


def test_only_the_last_turn_is_trained(tokenizer: Any) -> None:
    earlier = [*chat("first"), {"role": "assistant", "content": "earlier"}, {"role": "user", "content": "second"}]
    encoded = encode_row(tokenizer, [*earlier, {"role": "assistant", "content": ANSWER}])
    assert "earlier" not in tokenizer.decode([label for label in encoded["labels"] if label != IGNORED])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=words, answer=words)
def test_prompt_and_answer_partition_the_row(prompt: str, answer: str, tokenizer: Any) -> None:
    messages = row(answer, prompt)
    rendering = render_row(tokenizer, messages)
    alone = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert rendering.input_ids[: rendering.prompt_length] == list(alone)
    kept = rendering.input_ids[rendering.prompt_length : rendering.answer_end - 1]
    assert tokenizer.decode(kept, clean_up_tokenization_spaces=False) == answer


def test_a_row_at_the_limit_passes_and_one_above_does_not(tokenizer: Any) -> None:
    length = len(encode_row(tokenizer, row())["input_ids"])
    assert encode_row(tokenizer, row(), length)
    assert reason(tokenizer, row(), length - 1) == "too long"


def test_a_special_token_inside_a_message_is_rejected(tokenizer: Any) -> None:
    for token in tokenizer.all_special_tokens:
        assert reason(tokenizer, row(prompt=f"a{token}b")) == "special token in a message"


def test_a_row_that_ends_with_the_user_is_rejected(tokenizer: Any) -> None:
    assert reason(tokenizer, chat("q")) == "roles out of order"


FAULTY_TEMPLATES = {
    "chat template alters a message": "{% for m in messages %}<|{{m.role}}|>\n{{ m.content|upper }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "prompt is not a prefix of the row": "{% for m in messages %}<|{{m.role}}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\nSure. {% endif %}",
    "no end-of-turn token": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "chat template refuses the row": "{{ raise_exception('system role not supported') }}",
}


@pytest.mark.parametrize("fault", FAULTY_TEMPLATES)
def test_every_template_fault_is_named(fault: str, phi35: Any) -> None:
    assert reason(with_template(phi35, FAULTY_TEMPLATES[fault]), row("the answer")) == fault


def test_token_prefix_is_checked_beside_the_text_prefix(smollm2: Any) -> None:
    """A generation prompt that ends inside a word: the text is a prefix, the tokens are not."""
    template = (
        "{% for m in messages %}{{ m.content }}{% if not loop.last %} inter{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} inter{% endif %}<|im_end|>"
    )
    template = template.replace("{% endif %}<|im_end|>", "{% else %}<|im_end|>{% endif %}")
    messages = row("national")
    assert reason(with_template(smollm2, template), messages) == "prompt is not a prefix of the row"


def test_nothing_may_stand_between_the_generation_prompt_and_the_answer(phi35: Any) -> None:
    """What generation would have to invent first; both text and tokens of the prompt are a prefix here."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}So: {% endif %}{{ m.content }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    assert reason(with_template(phi35, template), row("42")) == "chat template alters a message"


def test_a_template_that_drops_the_turn_is_an_error(phi35: Any) -> None:
    template = "{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    assert reason(with_template(phi35, template), row("dropped")) == "chat template alters a message"


def test_a_tokenizer_without_template_is_the_users_error(phi35: Any) -> None:
    with pytest.raises(InputError, match="no chat template"):
        encode_row(with_template(phi35, None), row())
