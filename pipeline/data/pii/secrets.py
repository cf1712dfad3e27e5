"""Keys, tokens and passwords in folded text: known formats, and assignments whose value looks random.

A known format (AWS, GitHub, OpenAI-like, JWT, PEM ...) is enough by itself. An assignment (`api_key = "..."`) counts
when the value has the entropy of a key (H = -sum p log2 p >= 3 bits a character, 16 characters or more) or is a
password of letters and digits. Placeholders (`YOUR_API_KEY`, `${TOKEN}`, `xxxx`) do not count.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

Span = tuple[int, int]

_EDGE, _END = r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])"
_KNOWN = re.compile(
    f"{_EDGE}(?:"
    r"(?:AKIA|ASIA|AROA|AIDA|AGPA|ANPA)[A-Z0-9]{16}"  # AWS access key ids
    r"|gh[pousr]_[A-Za-z0-9]{36,251}|github_pat_[A-Za-z0-9_]{22,251}"
    r"|glpat-[A-Za-z0-9_-]{20,64}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,200}"  # Slack
    r"|AIza[A-Za-z0-9_-]{35}"  # Google
    r"|[rs]k_(?:live|test)_[A-Za-z0-9]{16,200}"  # Stripe
    r"|hf_[A-Za-z0-9]{30,64}|npm_[A-Za-z0-9]{36}|pypi-AgE[A-Za-z0-9_-]{40,300}"
    r"|SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{30,64}"  # SendGrid
    f"){_END}"
)
_OPENAI = re.compile(f"{_EDGE}sk-(?:[a-z]+[0-9]*-)*[A-Za-z0-9_-]{{20,250}}")
_JWT = re.compile(f"{_EDGE}(eyJ[A-Za-z0-9_-]{{8,2000}})\\.[A-Za-z0-9_-]{{4,8000}}\\.[A-Za-z0-9_-]{{0,2000}}")
_PEM = re.compile(r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_PEM_END = re.compile(r"-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_URL_LOGIN = re.compile(r"[a-z][a-z0-9+.-]{1,20}://[^\s/:@'\"]{1,64}:([^\s/@'\"]{3,128})@[A-Za-z0-9]", re.IGNORECASE)
_ASSIGNED = re.compile(
    r"(?P<name>api[ _-]?key|access[ _-]?key(?:[ _-]?id)?|secret(?:[ _-]?(?:access[ _-]?)?key)?|client[ _-]?secret|"
    r"auth[ _-]?token|access[ _-]?token|bearer|token|private[ _-]?key|credential|passw(?:or)?d|passphrase|pwd|"
    r"(?<![a-z])pw|パスワード|暗証番号|秘密鍵|アクセスキー|シークレットキー?|APIキー|アクセストークン|トークン)"
    r"[\"'」]?\s{0,3}(?::=|=>|[:=]|は|\bis\b|(?<=earer))\s{0,3}[\"'「`]?(?P<value>[!-~]{6,500})",
    re.IGNORECASE,
)
_PASSWORD = re.compile(r"pass|pwd?|パスワード|暗証", re.IGNORECASE)
_PLACEHOLDER = re.compile(
    r"^(?:\$?\{|<[a-z_]|\$\(|%[(s]|[a-z_.]{3,}\(|os\.|process\.|env[.\[]|self\.|config[.\[]|getenv|\*{3})|your|example|placeholder|changeme|"
    r"redacted|dummy|sample|x{4,}|\*{4,}|\.{3}",
    re.IGNORECASE,
)
_HINT = re.compile(
    r"AKIA|ASIA|AROA|AIDA|A[GN]PA|gh[pousr]_|github_|glpat|xox|AIza|k_live|k_test|hf_|npm_|pypi-|SG\.|sk-|eyJ|-----B|://|"
    r"key|secret|token|bearer|credential|passw|passphrase|pwd?\b|パスワード|暗証|秘密鍵|キー|シークレット|トークン",
    re.IGNORECASE,
)


def secrets(text: str) -> Iterator[Span]:
    """Spans of keys, tokens and passwords."""
    if not _HINT.search(text):
        return
    position = 0
    while match := _PEM.search(text, position):
        end = _PEM_END.search(text, match.end())
        position = end.end() if end else len(text)  # a key that is cut off counts up to the end
        yield match.start(), position
    yield from (match.span() for match in _KNOWN.finditer(text))
    for match in _OPENAI.finditer(text):
        if _looks_random(match.group().rpartition("sk-")[2]):
            yield match.span()
    yield from (match.span() for match in _JWT.finditer(text) if _is_jwt_header(match[1]))
    yield from (match.span(1) for match in _URL_LOGIN.finditer(text) if not _PLACEHOLDER.search(match[1]))
    for match in _ASSIGNED.finditer(text):
        value = match["value"].rstrip("\"'`;,.)]}>")
        if len(value) < 6 or _PLACEHOLDER.search(value):
            continue
        if _looks_random(value) or (_PASSWORD.search(match["name"]) and _mixed(value)):
            yield match.start("value"), match.start("value") + len(value)


def entropy(text: str) -> float:
    """Bits a character, from the text's own letter counts."""
    return -sum(n / len(text) * math.log2(n / len(text)) for n in Counter(text).values())


def _looks_random(value: str) -> bool:
    """Whether a value has 16 characters or more, 3 bits each, and changes between classes as often as random text.

    Neighbours differ in class at a rate of 0.6 in random letters and digits, 0.47 in hex, and 0.4 in CamelCase of
    five-letter words.
    """
    if len(value) < 16 or entropy(value) < 3 or not re.search("[A-Za-z]", value):
        return False
    classes = [letter.isdigit() + 2 * letter.isupper() for letter in value]
    changes = sum(a != b for a, b in pairwise(classes))
    digit_changes = sum(a.isdigit() != b.isdigit() for a, b in pairwise(value))
    return digit_changes >= 4 or changes >= 0.45 * len(value)


def _mixed(value: str) -> bool:
    """Whether a value has letters and digits, as password rules ask for."""
    return bool(re.search("[0-9]", value) and re.search("[A-Za-z]", value))


def _is_jwt_header(part: str) -> bool:
    try:
        header = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (binascii.Error, ValueError):
        return False
    return isinstance(header, dict) and ("alg" in header or "typ" in header)
