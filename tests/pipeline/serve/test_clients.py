"""Real clients against the real server: what they send is taken, what they show is the answer, errors are theirs.

Clients that are not installed are skipped with their name (the extra `clients`); litellm alone is 44 MB.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import openai
import pytest
from fake_replies import hostile
from fake_upstream import ANSWER, OK, FakeUpstream, generation, no_canary, text
from running_server import RunningServer

from pipeline.serve.request import Limits

InFront = Callable[..., RunningServer]
ASK: list[Any] = [{"role": "user", "content": "what is it?"}]


def withholding(upstream: FakeUpstream) -> None:
    upstream.script = lambda _: hostile()["answer copies"]


def test_openai_synchronous_asynchronous_and_streamed(in_front: InFront, upstream: FakeUpstream) -> None:
    server = in_front(limits=Limits(keep_alive=0.05))
    upstream.script = lambda _: [OK, 0.3, *generation(text())[1:]]  # with signs of life before the answer

    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    whole = client.chat.completions.create(model="m", messages=ASK)
    assert whole.choices[0].message.content == ANSWER
    stored = [*ASK, whole.choices[0].message.model_dump(), *ASK]  # with all its nulls
    assert client.chat.completions.create(model="m", messages=stored).choices[0].message.content == ANSWER

    async def asynchronous() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
            whole = await client.chat.completions.create(model="m", messages=ASK, n=1, logprobs=False, store=False)
            pieces = [
                chunk.choices[0].delta.content or ""
                async for chunk in await client.chat.completions.create(model="m", messages=ASK, stream=True)
            ]
            return [whole.choices[0].message.content or "", "".join(pieces)]

    assert asyncio.run(asynchronous()) == [ANSWER, ANSWER]
    with client.chat.completions.stream(model="m", messages=ASK) as stream:  # the client's own accumulator
        final = stream.get_final_completion()
    assert (final.choices[0].message.content, final.choices[0].finish_reason) == (ANSWER, "stop")
    with client.chat.completions.with_streaming_response.create(model="m", messages=ASK, stream=True) as raw:
        no_canary(raw.read())
    withholding(upstream)
    with pytest.raises(openai.InternalServerError, match="may be shown"):
        client.chat.completions.create(model="m", messages=ASK)
    with pytest.raises(openai.APIError, match="may be shown"):
        list(client.chat.completions.create(model="m", messages=ASK, stream=True))


@pytest.mark.parametrize("empty_chunks", [False, True])
def test_openai_lives_with_both_signs_of_life(in_front: InFront, upstream: FakeUpstream, empty_chunks: bool) -> None:
    server = in_front(limits=Limits(keep_alive=0.05, empty_chunks=empty_chunks))
    upstream.script = lambda _: [OK, 0.5, *generation(text())[1:]]
    client = openai.OpenAI(base_url=server.url, api_key="none", timeout=0.3, max_retries=0)  # without a byte
    events = list(client.chat.completions.create(model="m", messages=ASK, stream=True))
    assert "".join(event.choices[0].delta.content or "" for event in events) == ANSWER
    assert events[0].choices[0].delta.role == "assistant"


def test_openais_other_addresses_are_refused_in_words(in_front: InFront) -> None:
    """The client offers both `chat.completions` and `responses` and chooses neither by itself."""
    client = openai.OpenAI(base_url=in_front().url, api_key="none", max_retries=0)
    for call in (
        lambda: client.responses.create(model="m", input="what is it?"),
        lambda: client.completions.create(model="m", prompt="what is it?"),
        lambda: client.embeddings.create(model="m", input="what is it?"),
    ):
        with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
            call()


def test_litellm(in_front: InFront, upstream: FakeUpstream) -> None:
    litellm = pytest.importorskip("litellm", reason="litellm is not installed (pip install 'so8t[clients]')")
    server = in_front()
    where = {"model": "openai/m", "api_base": server.url, "api_key": "none", "num_retries": 0}
    whole = litellm.completion(messages=ASK, temperature=0.2, **where)
    assert whole.choices[0].message.content == ANSWER
    stored = [*ASK, whole.choices[0].message.model_dump(), *ASK]  # with `provider_specific_fields` and the like
    assert litellm.completion(messages=stored, **where).choices[0].message.content == ANSWER
    pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(messages=ASK, stream=True, **where)]
    assert "".join(pieces) == ANSWER
    withholding(upstream)
    with pytest.raises(litellm.exceptions.BadGatewayError, match="may be shown"):
        litellm.completion(messages=ASK, **where)


def test_langchain(in_front: InFront, upstream: FakeUpstream) -> None:
    module = pytest.importorskip(
        "langchain_openai", reason="langchain-openai is not installed (pip install 'so8t[clients]')"
    )
    server = in_front()
    chat = module.ChatOpenAI(base_url=server.url, api_key="none", model="m", temperature=0, max_retries=0)
    first = chat.invoke("what is it?")
    assert first.content == ANSWER
    assert chat.invoke([("system", "Be brief."), ("human", "what?"), first, ("human", "and?")]).content == ANSWER
    assert "".join(piece.content for piece in chat.stream("what is it?")) == ANSWER
    assert asyncio.run(chat.ainvoke("what is it?")).content == ANSWER
    withholding(upstream)
    with pytest.raises(openai.InternalServerError, match="may be shown"):
        chat.invoke("what is it?")


def test_ollamas_client_is_told_that_this_is_no_ollama(in_front: InFront) -> None:
    """It speaks Ollama's own API, which this server does not: a refusal in words, no crash."""
    ollama = pytest.importorskip("ollama", reason="ollama is not installed (pip install 'so8t[clients]')")
    server = in_front()
    with pytest.raises(ollama.ResponseError) as caught:
        ollama.Client(host=server.url.removesuffix("/v1")).chat(model="m", messages=ASK)
    assert caught.value.status_code == 404


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(in_front: InFront, upstream: FakeUpstream) -> None:
    server = in_front()

    def curl(*options: str) -> str:
        command = ["curl", "-sS", "--max-time", "30", *options]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    sent = ["-H", "content-type: application/json", f"{server.url}/chat/completions", "-d"]
    whole = json.loads(curl(*sent, json.dumps({"messages": ASK})))
    assert whole["choices"][0]["message"]["content"] == ANSWER
    events = curl("-N", *sent, json.dumps({"messages": ASK, "stream": True}))
    assert ANSWER in events
    assert events.endswith("data: [DONE]\n\n")
    withholding(upstream)
    refused = curl("-w", "\n%{http_code}", *sent, json.dumps({"messages": ASK})).rsplit("\n", 1)
    assert (json.loads(refused[0])["error"]["code"], refused[1]) == ("answer_withheld", "502")
    no_canary(events.encode(), refused[0].encode())
