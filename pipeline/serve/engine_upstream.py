"""The upstream engine: a chat completion streamed from llama-server, vLLM or Ollama, read as if it were hostile.

Its request is built here, field by field; of its reply only `delta.content` and `finish_reason` of choice 0 are read.
A generation counts as ended by the model only if the finish reason is "stop", comes once, nothing follows it, and the
stream ends with [DONE]. Anything else (status, redirect, compression, JSON of another shape, too many bytes) fails.
"""

from __future__ import annotations

import ipaddress
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx

from pipeline.data.think_form import Message
from pipeline.serve.engine import EngineError, Feed, Job
from pipeline.serve.guard import MAX_BYTES
from pipeline.serve.protocol import invalid
from so8t_core.errors import InputError

if TYPE_CHECKING:  # llama.cpp is loaded only where a tokenizer was given
    from pipeline.serve.tokens import Tokens

MAX_STREAM = 256 * MAX_BYTES  # of the raw reply; a token's JSON wrapping is some 200 bytes around a few of text
MAX_LINE = 4 * MAX_BYTES
CONTROL_LIKE = ("<|", "|>", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]")


def is_loopback(host: str) -> bool:
    """True for `localhost` and loopback addresses."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_url(url: str, *, allow_remote: bool) -> str:
    """The URL without a slash at its end.

    Raises:
        InputError: not http or https, with user, query or fragment, or remote without being allowed to.
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
        tokens: the model's tokenizer, where known: usage and `max_tokens` need it.
        n_ctx: bounds the prompt, together with `max_new_tokens`.
    Raises:
        InputError: they leave no room for a prompt.
    """

    def __init__(
        self, url: str, *, model_id: str, n_ctx: int, max_new_tokens: int, tokens: Tokens | None = None,
        key: str | None = None, connections: int = 64,
    ) -> None:  # fmt: skip
        self.model_id, self.digest = model_id, f"upstream:{model_id}"
        self.tokens, self.max_new_tokens, self.quick = tokens, max_new_tokens, tokens is None
        self.room = n_ctx - max_new_tokens
        if self.room <= 0:
            raise InputError(f"--max-new-tokens {max_new_tokens} leaves no room for a prompt in {n_ctx} tokens")
        base = url.removesuffix("/v1")
        self._url = f"{base}/v1/chat/completions"
        headers = {"accept-encoding": "identity", **({"authorization": f"Bearer {key}"} if key else {})}
        self._client = httpx.AsyncClient(
            headers=headers, follow_redirects=False, trust_env=False,  # no proxy may see a generation
            timeout=httpx.Timeout(None, connect=5.0, pool=5.0),  # the server's own deadline bounds the whole
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
        )  # fmt: skip

    def check(self, messages: list[Message]) -> int | None:
        """Tokens of the texts where a tokenizer is known (the template's are the upstream's secret)."""
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
                param="messages", code="context_length_exceeded",
            )  # fmt: skip
        return found if self.tokens is not None else None

    def count(self, text: str) -> int | None:
        """Tokens of a text, where a tokenizer is known."""
        return self.tokens.count(text) if self.tokens else None

    def cut(self, text: str, limit: int) -> str:
        """The text's first `limit` tokens; refused without a tokenizer."""
        if self.tokens is None:
            raise invalid(
                "`max_tokens` counts tokens of the answer, and this server has no tokenizer (--tokenizer FILE.gguf)",
                param="max_tokens", code="unsupported_parameter",
            )  # fmt: skip
        return self.tokens.cut(text, limit)

    def body(self, job: Job) -> dict[str, Any]:
        """The request: nothing but what is named here."""
        fields: dict[str, Any] = {
            "model": self.model_id, "messages": job.messages, "stream": True, "max_tokens": self.max_new_tokens,
            "temperature": job.temperature, "top_p": job.top_p,
        }  # fmt: skip
        return fields if job.seed is None else {**fields, "seed": job.seed}

    async def generate(self, job: Job, feed: Feed) -> str | None:
        """Stream one completion into `feed`; cancelling closes the connection, which ends it upstream as well.

        Raises:
            EngineError: no connection, another status than 200, a compressed or broken reply; never with its words.
        """
        reader = _Reader(feed)
        try:
            async with self._client.stream("POST", self._url, json=self.body(job)) as response:
                if response.status_code != 200:
                    raise EngineError("upstream status", busy=response.status_code in (429, 503))
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise EngineError("upstream compressed")
                async for data in response.aiter_raw():
                    reader.take(data)
                    if reader.done:
                        break
        except httpx.ConnectError:
            raise EngineError("upstream unreachable", busy=True) from None
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL):
            raise EngineError("upstream broke off") from None
        return reader.finish if reader.done else None

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()


class _Reader:
    """Server-sent events of a chat completion, cut into lines whatever the chunks were."""

    def __init__(self, feed: Feed) -> None:
        self._feed, self._rest, self._total = feed, bytearray(), 0
        self.finish: str | None = None
        self.done = False

    def take(self, data: bytes) -> None:
        self._total += len(data)
        self._rest += data
        if self._total > MAX_STREAM or len(self._rest) > MAX_LINE:
            raise EngineError("upstream sent too much")
        if b"\n" not in data:  # a line in a million pieces must not be searched a million times
            return
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            self._line(bytes(line).removesuffix(b"\r"))

    def _line(self, line: bytes) -> None:
        field, _, value = line.partition(b":")
        if field != b"data" or self.done:  # comments, event names, ids
            return
        value = value.removeprefix(b" ")
        if value == b"[DONE]":
            self.done = True
            return
        try:
            content, finish = _delta(json.loads(value.decode("utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            raise EngineError("upstream sent no chat chunk") from None
        if self.finish is not None and (content or finish):
            raise EngineError("upstream went on after its end")
        if content:
            self._feed(content)
        self.finish = self.finish or finish


def _delta(chunk: Any) -> tuple[bytes, str | None]:
    """Content and finish reason of a chunk; TypeError where it is none of choice 0's text."""
    if chunk["choices"] == []:  # usage, sent at the end by some
        return b"", None
    [choice] = chunk["choices"]
    delta, finish = choice.get("delta") or {}, choice.get("finish_reason")
    content = delta.get("content")
    if choice.get("index", 0) != 0 or not isinstance(content or "", str) or not isinstance(finish or "", str):
        raise TypeError
    return (content or "").encode("utf-8", "surrogatepass"), finish or None
