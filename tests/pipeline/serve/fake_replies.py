"""Replies of an upstream: hostile ones, of which nothing may get through, and odd ones that are all one answer."""

from __future__ import annotations

import json

from fake_upstream import ANSWER, CANARY, DONE, OK, STEPS, chunk, generation, text

from pipeline.data.think_form import ANSWER_MARKER, THINK_MARKER


def hostile() -> dict[str, list[bytes | float]]:
    """Replies that must all be withheld."""
    good = text()
    raw = good.encode()
    inline = raw.replace(b"\n", b"\\n")
    kind = b"content-type: application/json\r\n"
    wrapped = json.dumps(good).encode()
    return {
        "finish_reason length": [*generation(good, finish="length")],
        "no finish reason": [*generation(good, finish=None)],
        "no [DONE]": [*generation(good)[:-1]],
        "broken off in the middle": generation(good)[:20],
        "content after the finish": [*generation(good)[:-1], chunk(CANARY), DONE],
        "two finishes": [*generation(good)[:-1], chunk(None, "stop"), DONE],
        "deltas doubled": [part for part in generation(good) for _ in range(2)],
        "whole text twice": generation(good + "\n" + good),
        "no thinking marker": generation(f"{CANARY}\n{ANSWER_MARKER}\n{CANARY}"),
        "preamble": generation(f"{CANARY}\n{good}"),
        "thinking only": generation(f"{THINK_MARKER}\n{CANARY}"),
        "thinking after the answer": generation(f"{good}\n{THINK_MARKER}\n{CANARY}"),
        "odd marker after the answer": generation(f"{good}\n**思考ステップ**\n{CANARY}"),
        "answer copies": generation(text(CANARY * 3, CANARY * 3)),
        "think tags": generation(f"<think>{CANARY}</think>{good}"),
        "invalid UTF-8": [
            OK,
            b'data: {"choices":[{"delta":{"content":"' + inline + b'\xff"}}]}\n\n',
            chunk(None, "stop"),
            DONE,
        ],
        "half a surrogate": [OK, chunk(good), chunk("\ud83d"), chunk("\ude00", "stop"), DONE],
        "replacement character": generation(good + "\ufffd"),
        "status 500": [b"HTTP/1.1 500 Oops\r\ncontent-length: %d\r\n\r\n" % len(raw), raw],
        "status 400 with the text": [
            b"HTTP/1.1 400 Bad\r\n%scontent-length: %d\r\n\r\n" % (kind, len(wrapped)),
            wrapped,
        ],
        "redirect": [b"HTTP/1.1 307 Go\r\nlocation: http://127.0.0.1:1/" + b"secret\r\ncontent-length: 0\r\n\r\n"],
        "malformed JSON": [
            OK,
            chunk(good[:20]),
            b'data: {"choices": [{"delta": {"content": "' + CANARY.encode() + b"\n\n",
            DONE,
        ],
        "JSON of another shape": [OK, b'data: ["' + CANARY.encode() + b'"]\n\n', DONE],
        "content is a list": [OK, chunk(choice={"delta": {"content": [CANARY]}}), chunk(None, "stop"), DONE],
        "an error event": [OK, chunk(good[:9]), b'data: {"error": {"message": "' + CANARY.encode() + b'"}}\n\n', DONE],
        "nested too deep": [OK, b"data: " + b"[" * 100_000 + b"\n\n", DONE],
        "two choices": [OK, chunk(good, "stop", choice={"index": 1}), DONE],
        "tool call": generation(good, finish="tool_calls"),
        "not streamed": [b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(wrapped), wrapped],
        "compressed": [OK.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n"), raw],
        "not HTTP": [b"\x00\x01" + raw],
        "headers with text": [b"HTTP/1.1 200 OK\r\nx-" + CANARY.encode() + b": 1\r\n\r\n", DONE],
        "hangs up": [],
        "huge": [OK, *([chunk("あ" * 50_000 + CANARY)] * 20), chunk(None, "stop"), DONE],
        "one endless line": [OK, *([b"data: " + b"x" * 500_000] * 4)],
        "reasoning field only": [
            OK,
            chunk(choice={"delta": {"reasoning_content": CANARY, "content": ANSWER}}),
            chunk(None, "stop"),
            DONE,
        ],
    }


def friendly() -> dict[str, list[bytes | float]]:
    """Replies that are unusual and right: all must give the very same response."""
    good = text()
    whole = b"".join(generation(good)[1:])
    extra = {
        "logprobs": {"content": [{"token": CANARY, "logprob": -1}]},
        "delta": {"content": good, "reasoning_content": CANARY},
    }
    return {
        "plain": generation(good),
        "one delta": generation(good, size=10_000),
        "one character a delta": generation(good, size=1),
        "one byte a packet": [OK, *(whole[i : i + 1] for i in range(len(whole)))],
        "CRLF": [OK, whole.replace(b"\n", b"\r\n")],
        "comments and event names": [OK, b": hello\n\nevent: x\nid: 3\n", whole],
        "no space after data:": [OK, whole.replace(b"data: ", b"data:")],
        "usage at the end": [
            *generation(good)[:-1],
            b'data: {"choices": [], "usage": {"completion_tokens": 777}}\n\n',
            DONE,
        ],
        "logprobs, timings, reasoning": [
            OK,
            chunk(choice=extra, timings={"predicted_n": 777}),
            chunk(None, "stop", usage={"x": CANARY}),
            DONE,
        ],
        "longer thinking": generation(text(STEPS * 40)),
        "shorter thinking": generation(text("x")),
        "white space around": generation(f"\n {good} \n"),
        "trailing garbage after [DONE]": [*generation(good), chunk(CANARY), b"data: {"],
        "more headers": [OK.replace(b"\r\n\r\n", b"\r\nx-a: " + b"secret\r\nset-cookie: a=secret\r\n\r\n"), whole],
        "slow": [OK, 0.05, whole],
    }
