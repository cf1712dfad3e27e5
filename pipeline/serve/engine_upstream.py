"""The upstream engine: a chat completion streamed from llama-server, vLLM or Ollama, whose reply is not trusted.

This module builds the request field by field; of the reply it reads only content, reasoning and finish reason of choice
0. The model ended a generation only if the finish reason is "stop", comes once, nothing follows it, and the stream ends
with [DONE]. Anything else (status, redirect, compression, JSON of another shape, too many bytes) fails.
"""

from __future__ import annotations

import codecs
import ipaddress
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
from httpx_sse import EventSource, ServerSentEvent, SSEError

from pipeline.data.think_form import Message
from pipeline.serve.counter import Counter
from pipeline.serve.engine import EngineError, Feed, Job
from pipeline.serve.forms.form import Form
from pipeline.serve.forms.registry import SO8T
from pipeline.serve.guard import MAX_BYTES, SEPARATES
from pipeline.serve.request_error import invalid
from so8t_core.errors import InputError

MAX_STREAM = 256 * MAX_BYTES  # bytes of the raw reply; each token has some 200 bytes of JSON around a few bytes of text
MAX_LINE = 4 * MAX_BYTES
CONTROL_LIKE = ("<|", "|>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", "[THINK]")
REASONING = ("reasoning_content", "reasoning", "thinking")  # llama-server and vLLM, vLLM and Ollama, others
log = logging.getLogger("so8t.serve")


def is_loopback(host: str) -> bool:
    """True for `localhost` and loopback addresses."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_url(url: str, *, allow_remote: bool) -> str:
    """The URL without a slash at its end.

    Raises:
        InputError: not http or https, with user, query or fragment, or remote without permission.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"--upstream {url!r} is no http or https URL; e.g. http://127.0.0.1:8081")
    if parts.username is not None or parts.query or parts.fragment:
        raise InputError("--upstream takes scheme, host, port and path only; give a key in $SO8T_UPSTREAM_KEY")
    if not (allow_remote or is_loopback(parts.hostname)):
        raise InputError(
            f"--upstream {parts.hostname} is another machine: the thinking would cross the network to get here. "
            "Allow it with --allow-remote-upstream"
        )
    return url.rstrip("/")


class UpstreamEngine:
    """Another server behind the guard; see `pipeline.serve.engine.Engine`.

    Args:
        tokens: the model's tokenizer, if known; usage and `max_tokens` need it.
        n_ctx: tokens of prompt and `max_new_tokens` together.
        form: the model's form of thinking, or `separated`.

    Raises:
        InputError: the limits leave no room for a prompt.
    """

    def __init__(
        self,
        url: str,
        *,
        model_id: str,
        n_ctx: int,
        max_new_tokens: int,
        tokens: Counter | None = None,
        key: str | None = None,
        connections: int = 64,
        form: Form = SO8T,
    ) -> None:
        self.model_id, self.digest = model_id, f"upstream:{model_id}"
        self.tokens, self.max_new_tokens, self.quick = tokens, max_new_tokens, tokens is None
        self.room, self.form, self._mismatch = n_ctx - max_new_tokens, form, False
        if self.room <= 0:
            raise InputError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in {n_ctx} tokens")
        base = url.removesuffix("/v1")
        self._url = f"{base}/v1/chat/completions"
        headers = {"accept-encoding": "identity", **({"authorization": f"Bearer {key}"} if key else {})}
        self._client = httpx.AsyncClient(
            headers=headers,
            follow_redirects=False,
            trust_env=False,  # no proxy may see a generation
            timeout=httpx.Timeout(None, connect=5.0, pool=5.0),  # the server's deadline bounds the whole request
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )

    def check(self, messages: list[Message]) -> int | None:
        """Tokens of the texts, if a tokenizer is known; the template's tokens are not known here."""
        if self.tokens is not None:
            found = self.tokens.refuse_control(messages)
        else:
            for index, message in enumerate(messages):
                if any(word in message["content"] for word in CONTROL_LIKE):
                    raise invalid(f"message {index} holds a control token", param="messages", code="control_token")
            found = (
                sum(len(message["content"]) for message in messages) // 4
            )  # a token is rarely more than 4 characters
        if found > self.room:
            raise invalid(
                f"the conversation has about {found} tokens, at most {self.room} are possible: shorten it",
                param="messages",
                code="context_length_exceeded",
            )
        return found if self.tokens is not None else None

    def count(self, text: str) -> int | None:
        """Tokens of a text, where a tokenizer is known."""
        return self.tokens.count(text) if self.tokens else None

    def cut(self, text: str, limit: int) -> str:
        """The text's first `limit` tokens; refused without a tokenizer."""
        if self.tokens is None:
            raise invalid(
                "`max_tokens` and `max_completion_tokens` count tokens; this server has no tokenizer (--tokenizer F)",
                param="max_tokens",
                code="unsupported_parameter",
            )
        return self.tokens.cut(text, limit)

    def body(self, job: Job) -> dict[str, Any]:
        """The request's body, with only these fields."""
        fields: dict[str, Any] = {
            "model": self.model_id,
            "messages": job.messages,
            "stream": True,
            "max_tokens": self.max_new_tokens,
            "temperature": job.temperature,
            "top_p": job.top_p,
        }
        return fields if job.seed is None else {**fields, "seed": job.seed}

    async def generate(self, job: Job, feed: Feed) -> str | None:
        """Stream one completion into `feed`; cancelling closes the connection, which ends the upstream's work too.

        Raises:
            EngineError: no connection, another status than 200, a compressed or broken reply; never with its text.
        """
        reader = _Reader(feed)
        try:
            async with self._client.stream("POST", self._url, json=self.body(job)) as response:
                if response.status_code != 200:
                    raise EngineError("upstream status", busy=response.status_code in (429, 503))
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise EngineError("upstream compressed")
                async with aclosing(_events(response)) as events:
                    async for event in events:
                        reader.take(event.data)
                        if reader.done:
                            break
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout):
            raise EngineError("upstream unreachable", busy=True) from None
        except SSEError:
            raise EngineError("upstream sent no event stream") from None
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL):
            raise EngineError("upstream broke off") from None
        if reader.reasoned and self.form.markers and not self._mismatch:
            self._mismatch = True
            log.warning("%s", SEPARATES)
        return reader.finish if reader.done else None

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def _events(response: httpx.Response) -> AsyncGenerator[ServerSentEvent, None]:
    """The events of a reply, by httpx-sse, which reads the response through `_Bounded`."""
    return EventSource(cast(httpx.Response, _Bounded(response))).aiter_sse()


class _Bounded:
    """A response for httpx-sse with bounds, in strict UTF-8 for any charset in its header.

    httpx-sse keeps an unfinished line of any length, and httpx would decode by the header's charset and replace bytes
    that it cannot decode.
    """

    def __init__(self, response: httpx.Response) -> None:
        self.headers, self._response = response.headers, response

    async def aiter_text(self) -> AsyncIterator[str]:
        """The body's text, piece by piece.

        Raises:
            EngineError: the body or a line is too long, or it is not UTF-8.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        total = line = 0
        async for data in self._response.aiter_raw():
            total += len(data)
            line = line + len(data) if data.rfind(b"\n") < 0 else len(data) - data.rfind(b"\n")
            if total > MAX_STREAM or line > MAX_LINE:
                raise EngineError("upstream sent too much")
            try:
                text = decoder.decode(data)
            except UnicodeDecodeError:
                raise EngineError("upstream sent no UTF-8") from None
            if text:
                yield text


class _Reader:
    """The events of one chat completion."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self.finish: str | None = None
        self.done = self.reasoned = False

    def take(self, data: str) -> None:
        """Take one event's data; an event without data is ignored.

        Raises:
            EngineError: the data is no chunk of a chat completion, or comes after the end.
        """
        if data == "[DONE]":
            self.done = True
        if data == "[DONE]" or not data:
            return
        try:
            reasoning, content, finish = _delta(json.loads(data))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            raise EngineError("upstream sent no chat chunk") from None
        if self.finish is not None and (reasoning or content or finish):
            raise EngineError("upstream went on after its end")
        if reasoning:
            self.reasoned = True
            self._feed(reasoning, reasoning=True)
        if content:
            self._feed(content)
        self.finish = self.finish or finish


def _delta(chunk: Any) -> tuple[bytes, bytes, str | None]:
    """Reasoning, content and finish reason of a chunk; TypeError where the chunk holds no text of choice 0."""
    if chunk["choices"] == []:  # some servers send usage at the end
        return b"", b"", None
    [choice] = chunk["choices"]
    delta, finish = choice.get("delta") or {}, choice.get("finish_reason")
    thoughts = list(dict.fromkeys(delta[name] for name in REASONING if delta.get(name)))  # some send it under two names
    content = delta.get("content") or ""
    if choice.get("index", 0) != 0 or not all(isinstance(text, str) for text in [*thoughts, content, finish or ""]):
        raise TypeError
    reasoning, shown = (text.encode("utf-8", "surrogatepass") for text in ("".join(thoughts), content))
    return reasoning, shown, finish or None
