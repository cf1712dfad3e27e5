"""An upstream that says whatever a test wants, byte by byte: raw HTTP on a real socket."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable
from typing import Any

from pipeline.data.think_form import ANSWER_MARKER, THINK_MARKER

CANARY = "カナリアκαναρι secret"
STEPS = f"{CANARY} one\n{CANARY} two"
ANSWER = "四十二 is the answer"

Script = Iterable[bytes | float]  # bytes to send, or seconds to wait; the connection closes at its end

OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


def text(steps: str = STEPS, answer: str = ANSWER) -> str:
    return f"{THINK_MARKER}\n{steps}\n\n{ANSWER_MARKER}\n{answer}"


def chunk(content: str | None = None, finish: str | None = None, **more: Any) -> bytes:
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "finish_reason": finish, **more.pop("choice", {})}
    return b"data: " + json.dumps({"id": "x", "choices": [choice], **more}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def generation(content: str, *, size: int = 3, finish: str | None = "stop") -> list[bytes]:
    """A well-behaved reply, `size` characters a delta."""
    parts = [content[i : i + size] for i in range(0, len(content), size)]
    return [
        OK,
        chunk("", choice={"delta": {"role": "assistant", "content": ""}}),
        *map(chunk, parts),
        chunk(None, finish),
        DONE,
    ]


class FakeUpstream:
    """A server in a thread of its own; `script` gives the reply to each request's JSON body."""

    def __init__(self) -> None:
        self.script: Callable[[dict[str, Any]], Script] = lambda body: generation(text())
        self.requests: list[tuple[bytes, dict[str, Any]]] = []
        self.running = 0
        self.keep = True
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, backlog=512))
            started.set()
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        started.wait()
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.running += 1
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            size = next(int(h.split(b":")[1]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length"))
            body = json.loads(await reader.readexactly(size))
            if self.keep:
                self.requests.append((head, body))
            for item in self.script(body):
                if isinstance(item, bytes):
                    writer.write(item)
                    await writer.drain()
                elif isinstance(item, threading.Event):
                    while not item.is_set():
                        await asyncio.sleep(0.005)
                else:
                    await asyncio.sleep(item)
                    if reader.at_eof():
                        break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.running -= 1
            writer.close()

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


FORMS = [CANARY.encode(form) for form in ("utf-8", "utf-16-le")] + [
    json.dumps(CANARY)[1:-1].encode(),
    "カナリア".encode(),
    "καναρι".encode(),
    b"secret",
    b"\\u30ab\\u30ca",
    b"\\xce\\xba",
]


def no_canary(*places: bytes) -> None:
    for place in places:
        for form in FORMS:
            assert form not in place, place[:2000]
