"""The OpenAI forms at the edge: requests by allow-list, responses and errors built from nothing but what is named here.

A request field that is not listed is refused by its name, never ignored: logprobs, n > 1, echo, grammar, logit_bias,
response_format and the like would be oracles on the thinking, and so would an assistant message at the end (prefill).
A null counts as absent. `stop` and `max_tokens` cut the released answer and never reach an engine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.data.think_form import Message, strip_message, system_text

MAX_MESSAGES = 256
MAX_STOPS = 4


class Refusal(Exception):
    """A request that is not answered: HTTP status and OpenAI's error object. Never holds text of a generation."""

    def __init__(
        self,
        status: int,
        kind: str,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code
        self.message, self.param, self.retry_after = message, param, retry_after

    def body(self) -> dict[str, Any]:
        """OpenAI's error form."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def invalid(message: str, *, param: str | None = None, code: str = "invalid_value", status: int = 422) -> Refusal:
    """A request that its sender must change."""
    return Refusal(status, "invalid_request_error", code, message, param=param)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def text(self) -> str:
        return strip_message(self.content if isinstance(self.content, str) else "".join(p.text for p in self.content))


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """Everything a client may ask for."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str | None = None
    messages: list[_Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    temperature: float = Field(0.0, ge=0, le=2)  # 0 = the likeliest token, always
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**32 - 1)
    stop: str | list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list, max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: Literal[1] = 1
    user: str | None = None  # accepted because clients send it; neither used nor stored

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def limit(self) -> int | None:
        """Tokens of the answer; both names of the limit are known, the smaller one holds."""
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(limits) if limits else None


def parse_request(body: bytes) -> ChatRequest:
    """Validate a request's body.

    Raises:
        Refusal: 400 not JSON; 422 with the name of the parameter that is unknown, refused or out of bounds.
    """
    try:
        raw = json.loads(body.decode("utf-8"))
        json.dumps(raw, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        raise invalid("the body is not JSON in UTF-8", code="invalid_json", status=400) from None
    if not isinstance(raw, dict):
        raise invalid("the body must be a JSON object", code="invalid_json", status=400)
    try:
        request = ChatRequest.model_validate(_without_nulls(raw))
    except ValidationError as error:
        raise _first_problem(error) from None
    if isinstance(request.stop, str) and not request.stop:
        raise invalid("`stop` is empty; leave it out", param="stop")
    if len(request.stops) > MAX_STOPS:
        raise invalid(f"`stop` has {len(request.stops)} entries; at most {MAX_STOPS} are allowed", param="stop")
    return request


def _without_nulls(raw: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in raw.items() if value is not None}
    if isinstance(kept.get("messages"), list):  # clients send a reply back with all its fields, most of them null
        kept["messages"] = [
            {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message
            for message in kept["messages"]
        ]
    return kept


def _first_problem(error: ValidationError) -> Refusal:
    item = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in item["loc"])[:80]
    name = str(item["loc"][0])[:80]
    if item["type"] == "extra_forbidden":
        return invalid(f"`{where}` is not supported here; leave it out", param=where, code="unsupported_parameter")
    return invalid(f"`{where}`: {item['msg']}", param=name)


def conversation(request: ChatRequest) -> list[Message]:
    """Messages for the engine: the shared system message (the client's after it), every text stripped at its ends.

    Raises:
        Refusal: a system message that is not the first, an empty text, or a last message that is not the user's.
    """
    system, turns = None, []
    for index, message in enumerate(request.messages):
        text = message.text()
        if message.role in ("system", "developer"):
            if index:
                raise invalid("a system message must come first, and only once", param=f"messages.{index}.role")
            system = text
            continue
        if not text:
            raise invalid(f"message {index} is empty", param=f"messages.{index}.content")
        turns.append({"role": message.role, "content": text})
    if not turns or turns[-1]["role"] != "user":
        raise invalid(
            "the last message must be the user's: a reply cannot be begun for the model",
            param="messages", code="unsupported_parameter",
        )  # fmt: skip
    return [{"role": "system", "content": system_text(system)}, *turns]


def cut_at_stops(answer: str, stops: list[str]) -> str:
    """The answer up to the first place where any stop text begins."""
    return answer[: min((at for stop in stops if (at := answer.find(stop)) >= 0), default=len(answer))]


@dataclass(frozen=True)
class Reply:
    """All that a response is built from; nothing in it depends on the thinking."""

    id: str
    created: int  # the request's arrival, seconds
    model: str
    answer: str
    finish: Literal["stop", "length"]
    prompt_tokens: int | None
    answer_tokens: int | None  # None where no tokenizer is known: then no usage is stated

    def usage(self) -> dict[str, int] | None:
        """Tokens of prompt and shown answer."""
        if self.prompt_tokens is None or self.answer_tokens is None:
            return None
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.answer_tokens}
        return {**counts, "total_tokens": sum(counts.values())}


def completion(reply: Reply) -> dict[str, Any]:
    """The response of a request without `stream`."""
    message = {"role": "assistant", "content": reply.answer}
    choice = {"index": 0, "message": message, "finish_reason": reply.finish}
    head = {"id": reply.id, "object": "chat.completion", "created": reply.created, "model": reply.model}
    usage = reply.usage()
    return {**head, "choices": [choice], **({"usage": usage} if usage else {})}


def chunks(reply: Reply, *, include_usage: bool) -> list[dict[str, Any]]:
    """The response of a request with `stream`: role, the answer whole, the finish reason, the usage where asked for."""
    head = {"id": reply.id, "object": "chat.completion.chunk", "created": reply.created, "model": reply.model}
    steps: list[tuple[dict[str, str], str | None]] = [
        ({"role": "assistant", "content": ""}, None),
        ({"content": reply.answer}, None),
        ({}, reply.finish),
    ]
    found = [{**head, "choices": [{"index": 0, "delta": d, "finish_reason": f}]} for d, f in steps]
    usage = reply.usage()
    return [*found, {**head, "choices": [], "usage": usage}] if include_usage and usage else found


def dumps(value: dict[str, Any]) -> bytes:
    """The bytes of a JSON response."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"
