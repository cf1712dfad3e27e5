"""The chat page at `/`: one static file that loads nothing else, with a policy that forbids every other source.

It shows answers, and to the owner of an operator's key why answers were withheld. It never gets a thinking.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import Response

FILE = Path(__file__).parent / "static" / "chat.html"


@cache
def _content() -> tuple[bytes, dict[str, str]]:
    """The file and its headers, which allow script and style by their hashes."""
    data = FILE.read_bytes()
    hashes = {}
    for tag in (b"script", b"style"):
        [inside] = re.findall(rb"(?s)<%b>(.*?)</%b>" % (tag, tag), data)
        hashes[tag] = base64.b64encode(hashlib.sha256(inside).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes[b'script']}'; style-src 'sha256-{hashes[b'style']}'; "
        "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
    )
    return data, {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "cache-control": "no-store",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }


def page() -> Response:
    """The page."""
    data, headers = _content()
    return Response(data, 200, headers)
