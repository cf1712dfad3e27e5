"""OpenAI's forms: parse requests by an allow-list, and build responses from named fields only.

A request field that is not listed is refused by its name, never ignored (see `parameters`). An assistant message at the
end (prefill) is refused too. A null counts as absent. `stop` and `max_tokens` cut the released answer and never reach
an engine.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.serve.history import Turn, read_turns
from pipeline.serve.parameters import without_neutral
from pipeline.serve.request_error import Refusal, invalid

MAX_STOPS = 4


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


class ChatRequest(BaseModel):
    """Everything a client may ask for."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str | None = None
    messages: list[Turn]
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    temperature: float = Field(0.0, ge=0, le=2)  # 0 = always the likeliest token
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**32 - 1)
    stop: str | list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list, max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def limit(self) -> int | None:
        """Largest number of tokens of the answer; of the limit's two names, the smaller value counts."""
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(limits) if limits else None


def parse_request(body: bytes) -> ChatRequest:
    """Validate a request's body.

    Raises:
        Refusal: 400 not JSON; 422 with the name of the parameter that is unknown, refused or out of bounds.
    """
    try:
        raw = json.loads(body.decode("utf-8"))
        json.dumps(raw, ensure_ascii=False).encode("utf-8")  # fails for half a surrogate pair
    except (ValueError, RecursionError):
        raise invalid("the body is not JSON in UTF-8", code="invalid_json", status=400) from None
    if not isinstance(raw, dict):
        raise invalid("the body must be a JSON object", code="invalid_json", status=400)
    try:
        raw = without_neutral(raw)
        turns = read_turns(raw.get("messages"))
        if isinstance(options := raw.get("stream_options"), dict):
            raw["stream_options"] = {key: value for key, value in options.items() if value is not None}
        request = ChatRequest.model_validate({**raw, "messages": turns})
    except ValidationError as error:
        raise _first_problem(error) from None
    if isinstance(request.stop, str) and not request.stop:
        raise invalid("`stop` is empty; leave it out", param="stop")
    if len(request.stops) > MAX_STOPS:
        raise invalid(f"`stop` has {len(request.stops)} entries; at most {MAX_STOPS} are allowed", param="stop")
    return request


_MUST_BE = {"stop": "a text or a list of texts, none of them empty", "stream_options": "an object"}


def _first_problem(error: ValidationError) -> Refusal:
    item = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in item["loc"])[:80]
    name = str(item["loc"][0])[:80]
    if name == "stop" or (name == "stream_options" and len(item["loc"]) == 1):
        return invalid(f"`{name}` must be {_MUST_BE[name]}", param=name)
    if item["type"] == "extra_forbidden":
        return invalid(f"`{where}` is not supported here; leave it out", param=where, code="unsupported_parameter")
    return invalid(f"`{where}`: {item['msg']}", param=name)


def cut_at_stops(answer: str, stops: list[str]) -> str:
    """The answer up to the first place at which a stop text begins."""
    return answer[: min((at for stop in stops if (at := answer.find(stop)) >= 0), default=len(answer))]


@dataclass(frozen=True)
class Ticket:
    """The first fields of every part of one response; none of them depends on the generation."""

    id: str
    created: int  # the request's arrival, seconds
    model: str

    def chunk(self, delta: dict[str, str], finish: str | None = None) -> dict[str, Any]:
        """One chunk of a stream; with an empty delta and no finish reason it only keeps the stream alive."""
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        return {**self.head("chat.completion.chunk"), "choices": [choice]}

    def head(self, kind: str) -> dict[str, Any]:
        """The fields that all objects of this response share."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


ROLE = {"role": "assistant", "content": ""}


@dataclass(frozen=True)
class Reply:
    """The content of a response; no field depends on the thinking."""

    ticket: Ticket
    answer: str
    finish: Literal["stop", "length"]
    prompt_tokens: int | None
    answer_tokens: int | None  # None if no tokenizer is known; then the response has no usage

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
    usage = reply.usage()
    return {**reply.ticket.head("chat.completion"), "choices": [choice], **({"usage": usage} if usage else {})}


def chunks(reply: Reply, *, include_usage: bool) -> list[dict[str, Any]]:
    """The chunks behind the role in a stream: the whole answer, the finish reason, the usage if asked for."""
    found = [reply.ticket.chunk({"content": reply.answer}), reply.ticket.chunk({}, reply.finish)]
    usage = reply.usage()
    if include_usage and usage:
        found.append({**reply.ticket.head("chat.completion.chunk"), "choices": [], "usage": usage})
    return found


def dumps(value: dict[str, Any]) -> bytes:
    """The bytes of a JSON response."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + dumps(value) + b"\n\n"
