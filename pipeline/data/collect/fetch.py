"""One bounded HTTP GET: one deadline, a limit on the body, no redirects (the caller follows them).

The deadline covers connecting, headers and body: it cuts off a server that sends one byte a second or never ends.
Compressed bodies are neither requested nor accepted, so that the limit on bytes limits the stored text.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import httpx

READ_TIMEOUT = 15.0  # seconds of silence


class FetchError(Exception):
    """The page could not be fetched; the text says why."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one request."""

    max_bytes: int
    max_seconds: float
    content_types: Collection[str] | None = None  # allowed types of a 200; None = any
    cut: bool = False  # True: stop reading at max_bytes; False: a longer body is an error


@dataclass(frozen=True)
class Reply:
    """Status, redirect target (absolute), and the body's size and digest."""

    status: int
    location: str | None
    content_type: str
    size: int
    sha256: str
    truncated: bool


def get(url: str, agent: str, limits: Limits, target: Path | None = None) -> tuple[Reply, bytes]:
    """GET `url` without following redirects; the body of a 2xx is written to `target`, or returned if that is None.

    Raises:
        FetchError: no connection, protocol error, a broken-off body, or one of the limits.
    """
    return asyncio.run(_bounded(url, agent, limits, target))


async def _bounded(url: str, agent: str, limits: Limits, target: Path | None) -> tuple[Reply, bytes]:
    headers = {"User-Agent": agent, "Accept-Encoding": "identity", "Accept": "*/*"}
    timeout = httpx.Timeout(min(READ_TIMEOUT, limits.max_seconds))
    try:
        async with (
            asyncio.timeout(limits.max_seconds),
            httpx.AsyncClient(timeout=timeout, headers=headers) as client,
            client.stream("GET", url, follow_redirects=False) as response,
        ):
            if target is None:
                return await _read(response, limits, None)
            with target.open("wb") as stream:
                return await _read(response, limits, stream)
    except TimeoutError:
        raise FetchError(f"took longer than {limits.max_seconds:g} s") from None
    except httpx.TimeoutException:
        raise FetchError(f"no answer for {min(READ_TIMEOUT, limits.max_seconds):g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # UnicodeError: a host name that IDNA refuses
        raise FetchError(f"{type(error).__name__}: {error}".rstrip(": ")) from None


async def _read(response: httpx.Response, limits: Limits, stream: BinaryIO | None) -> tuple[Reply, bytes]:
    status = response.status_code
    content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    location = response.headers.get("location") if 300 <= status < 400 else None
    digest, size, parts, truncated = hashlib.sha256(), 0, [], False
    if 200 <= status < 300:
        if limits.content_types is not None and content_type not in limits.content_types:
            raise FetchError(
                f"content type {content_type or 'missing'!r}, wanted one of {sorted(limits.content_types)}"
            )
        if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise FetchError(f"content encoding {response.headers['content-encoding']!r} was not asked for")
        announced = response.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limits.max_bytes and not limits.cut:
            raise FetchError(f"{announced} bytes announced, allowed are {limits.max_bytes}")
        async for chunk in response.aiter_raw():
            kept = chunk[: limits.max_bytes - size]
            truncated = len(kept) < len(chunk)
            if truncated and not limits.cut:
                raise FetchError(f"more than the {limits.max_bytes} bytes that are allowed")
            size += len(kept)
            digest.update(kept)
            if stream is None:
                parts.append(kept)
            else:
                stream.write(kept)
            if truncated:
                break
    target = str(response.url.join(location)) if location else None
    return Reply(status, target, content_type, size, digest.hexdigest(), truncated), b"".join(parts)
