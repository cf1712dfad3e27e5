"""A real HTTP server on an ephemeral loopback port, whose pages are functions; it notes every request and its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Page = Callable[[BaseHTTPRequestHandler], None]


class Web:
    """`pages[path]` answers a path; anything else is a 404."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.pages: dict[str, Page] = {}
        self.requests: list[tuple[float, str, str]] = []  # (seconds, path, user agent)
        self.url = f"http://127.0.0.1:{server.server_address[1]}"

    def paths(self) -> list[str]:
        return [path for _, path, _ in self.requests]


def text(body: str | bytes, status: int = 200, content_type: str = "text/plain", **headers: str) -> Page:
    """A page with this body."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        data = body.encode() if isinstance(body, str) else body
        handler.send_response(status)
        handler.send_header("Content-Type", content_type)
        handler.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return page


def redirect(target: str, status: int = 302) -> Page:
    return text("", status, Location=target)


def endless(first: bytes = b"", piece: bytes = b"x" * 65536, pause: float = 0.0, seconds: float = 20.0) -> Page:
    """A body without end (until the client goes, or `seconds` are over)."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/plain")
        handler.end_headers()
        handler.wfile.write(first)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(pause)

    return page


def slow_headers(seconds: float = 20.0) -> Page:
    """One byte of a header every 50 ms: never silent, never done."""

    def page(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            handler.wfile.write(b"x")
            handler.wfile.flush()
            time.sleep(0.05)

    return page


def broken_off(handler: BaseHTTPRequestHandler) -> None:
    """Announces 1000 bytes and closes after five."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/plain")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"12345")
    handler.close_connection = True


@contextmanager
def serve() -> Iterator[Web]:
    """A running server."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            web.requests.append((time.monotonic(), self.path, self.headers.get("User-Agent", "")))
            try:
                web.pages.get(self.path, text("not here", 404))(self)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client had enough

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    web = Web(server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
