"""Laws of the forms of thinking behind the socket: each form through a real server, and how a form is chosen."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_upstream import ANSWER, CANARY, DONE, OK, STEPS, FakeUpstream, chunk, generation, no_canary
from guard_kits import BORDER, KITS
from running_server import AUDIT_KEY, RunningServer, answer_of, error, status

from pipeline.data.think_form import SYSTEM_MESSAGE, THINK_MARKER
from pipeline.serve.audit_log import thinking_hmac
from pipeline.serve.forms.registry import FORMS, describe, form_named, form_of_template
from pipeline.serve.guard import SEPARATES
from so8t_core.errors import InputError

InFront = Callable[..., RunningServer]


def deltas(form: str, text: str, field: str = "reasoning_content", finish: str = "stop") -> list[bytes | float]:
    """An upstream's reply in a form; of an upstream that separates, as CASES F6 describes it."""
    if form != "separated":
        return [*generation(text, finish=finish)]
    role = chunk(choice={"delta": {"role": "assistant", "content": None}})
    found: list[bytes | float] = [OK, role, b":\n\n"]
    for number, part in enumerate(text.split(BORDER)):
        name = "content" if number % 2 else field
        found += [chunk(choice={"delta": {name: part[i : i + 3]}}) for i in range(0, len(part), 3)]
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 9}}\n\n'
    return [*found, chunk(None, finish), usage, DONE]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", KITS)
def test_each_form_shows_the_answer_alone(in_front: InFront, upstream: FakeUpstream, form: str, stream: bool) -> None:
    kit = KITS[form]
    server = in_front(form=kit.form, fixed=True)
    seen = set()
    for seed, steps in enumerate((STEPS, "x", STEPS * 40)):
        upstream.script = lambda _, steps=steps, seed=seed: deltas(form, kit.write(random.Random(seed), steps, ANSWER))
        seen.add(server.ask(stream=stream))
        assert server.records()[-1]["verdict"] == "released"
    upstream.script = lambda _: deltas(form, kit.canonical(STEPS, ANSWER))
    seen.add(server.ask(stream=stream))
    assert len(seen) == 1  # two thinkings with one answer give one response, byte for byte
    [response] = seen
    assert (status(response), answer_of(response, stream)) == (200, ANSWER)
    assert server.records()[-1]["thinking_hmac"] == thinking_hmac(AUDIT_KEY, STEPS.encode())
    no_canary(response, server.audit.read_bytes())


@pytest.mark.parametrize("form", KITS)
def test_each_form_withholds_what_is_not_in_it(in_front: InFront, upstream: FakeUpstream, form: str) -> None:
    kit = KITS[form]
    server = in_front(form=kit.form, fixed=True)
    marker = kit.markers[-1]
    texts = kit.odd(random.Random(0), CANARY, CANARY, next(iter(kit.odds(marker).values())))
    seen = set()
    for text in (*texts, *(text for texts in kit.reasons.values() for text in texts)):
        upstream.script = lambda _, text=text: deltas(form, text)
        seen.add(server.ask())
    upstream.script = lambda _: deltas(form, kit.canonical(STEPS, ANSWER), finish="length")
    seen.add(server.ask())
    [response] = seen  # one error for every reason
    assert (status(response), error(response)["code"]) == (502, "answer_withheld")
    assert {record["verdict"] for record in server.records()} == {"withheld"}
    assert len({record["reason"] for record in server.records()}) > 3
    no_canary(response, server.audit.read_bytes())


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_an_upstream_that_separates_is_read_in_its_own_form(
    in_front: InFront, upstream: FakeUpstream, field: str
) -> None:
    server = in_front(form=FORMS["separated"])
    upstream.script = lambda _: deltas("separated", f"{STEPS}{BORDER}{ANSWER}", field)
    assert answer_of(server.ask(), False) == ANSWER
    both = {"delta": {"reasoning": CANARY, "reasoning_content": CANARY, "content": None}}  # vLLM sends both names
    upstream.script = lambda _: [OK, chunk(choice=both), chunk(ANSWER), chunk(None, "stop"), DONE]
    response = server.ask()
    assert answer_of(response, False) == ANSWER
    assert server.records()[-1]["thinking_hmac"] == thinking_hmac(AUDIT_KEY, CANARY.encode())
    copied = {"reasoning_content": "a plan", "thinking": CANARY * 3, "content": f"x {CANARY * 3}"}  # two texts
    upstream.script = lambda _: [OK, chunk(choice={"delta": copied}), chunk(None, "stop"), DONE]
    assert error(server.ask())["code"] == "answer_withheld"
    assert server.records()[-1]["reason"] == "copied run"
    for odd in ([CANARY], {"text": CANARY}, 3):
        upstream.script = lambda _, odd=odd: [OK, chunk(choice={"delta": {field: odd}}), chunk(None, "stop"), DONE]
        assert error(server.ask())["code"] == "engine_failed"
    no_canary(response, server.audit.read_bytes())


def test_an_upstream_that_separates_unasked_is_named_once(
    in_front: InFront, upstream: FakeUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    """CASES F6: the audit log says so, the server's log says so at the first request, the client learns nothing."""
    server = in_front()
    upstream.script = lambda _: deltas("separated", f"{STEPS}{BORDER}{ANSWER}")
    for _ in range(2):
        response = server.ask()
        assert (status(response), error(response)["code"]) == (502, "answer_withheld")
        assert b"separate" not in response
    assert {record["reason"] for record in server.records()} == {SEPARATES}
    assert [r.getMessage() for r in caplog.records if r.name == "so8t.serve"] == [SEPARATES]
    no_canary(response, server.audit.read_bytes())


def test_the_shared_system_message_goes_with_its_form_only(in_front: InFront, upstream: FakeUpstream) -> None:
    user = {"role": "user", "content": "q"}
    own = {"role": "system", "content": "Be brief."}
    for form in FORMS.values():
        server = in_front(form=form)
        for messages in ([user], [own, user]):
            server.ask(messages=messages)
            sent = upstream.requests.pop()[1]["messages"]
            assert any(SYSTEM_MESSAGE in message["content"] for message in sent) == (form.name == "so8t")
            assert form.name == "so8t" or sent == messages


def templates() -> Iterator[tuple[str, str]]:
    yield "so8t", "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    yield "think", "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    yield "think", "{{ message.content.split('</think>')[-1] }}"
    yield "harmony", "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    yield "mistral", "[SYSTEM_PROMPT]First think: [THINK]...[/THINK][/SYSTEM_PROMPT]"
    yield "seed", "<seed:think>{{ m.reasoning_content }}</seed:think>"
    yield "kimi", "◁think▷{{ m }}◁/think▷"
    yield "gemma", "<|turn>model\n<|channel>thought\n<channel|>{{ m.content.split('<channel|>')[-1] }}<turn|>"
    yield "thought", "<thought>{{ m }}</thought>"


@pytest.mark.parametrize(("form", "template"), list(templates()))
def test_a_template_tells_its_form(form: str, template: str) -> None:
    assert form_of_template(template).name == form


def test_forms_have_names_and_odd_ones_are_refused() -> None:
    for name, form in FORMS.items():
        assert form_named(name) is form
        assert describe(form).startswith(f"{name} (")
    assert describe(form_named("<plan>...</plan>")) == "<plan>...</plan> (<plan> ... </plan>)"
    for name in (
        "",
        "x",
        "Think",
        "...",
        "<a>...",
        "...</a>",
        "<a>...<a>",
        "---...***",
        "<a>...<a></a>",
    ):
        with pytest.raises(InputError, match="--think-form"):
            form_named(name)


def test_a_forced_pair_is_one_of_plain_words_too(in_front: InFront, upstream: FakeUpstream) -> None:
    server = in_front(form=form_named("Reasoning:...Result:"))
    upstream.script = lambda _: generation(f"Reasoning: {STEPS}\nResult: {ANSWER}")
    assert answer_of(server.ask(), False) == ANSWER
    upstream.script = lambda _: generation(f"Reasoning: {STEPS}\nResult: {ANSWER}, a second reasoning {CANARY}")
    assert error(server.ask())["code"] == "answer_withheld"
    assert THINK_MARKER not in json.dumps(server.records())


@pytest.mark.parametrize("where", ["header", "body"])
def test_what_is_no_utf8_is_no_reply_whatever_the_header_says(
    in_front: InFront, upstream: FakeUpstream, where: str
) -> None:
    """With httpx-sse alone the header's charset would decide, and broken bytes would be replaced."""
    server = in_front(form=FORMS["think"])
    charset: Any = OK.replace(b"event-stream", b"event-stream; charset=latin-1")
    bad = b'data: {"choices":[{"delta":{"content":"<think>a</think>b\xff"}}]}\n\n'
    upstream.script = lambda _: [charset if where == "header" else OK, bad, chunk(None, "stop"), DONE]
    assert error(server.ask())["code"] == "engine_failed"
    assert server.records()[-1]["reason"] == "upstream sent no UTF-8"
    upstream.script = lambda _: [charset, *generation("<think>a</think>四十二")[1:]]
    assert answer_of(server.ask(), False) == "四十二"
