"""Decide whether robots.txt lets a page be fetched: RFC 9309, with Protego for the rules.

    2xx             the rules, of the first 500 KiB
    3xx             followed up to five times, across hosts; more, or a loop: no permission
    4xx             unavailable: everything is allowed
    5xx, no answer  unreachable: nothing is allowed
Where the RFC leaves a choice (more than five redirects), the answer is no. The rules are kept for each scheme, host and
port, for 24 h at most.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from protego import Protego

from pipeline.data.collect.fetch import FetchError, Limits, Reply, get

PRODUCT = "so8t-data"  # the product token that robots.txt rules name
MAX_REDIRECTS = 5
MAX_BYTES = 500 * 1024
MAX_AGE = 24 * 3600.0  # seconds
MAX_SECONDS = 30.0


Fetch = Callable[[str, Limits], tuple[Reply, bytes]]


@dataclass(frozen=True)
class Decision:
    """Whether the page may be fetched, the reason, and the seconds between two requests to its host."""

    allowed: bool
    reason: str
    delay: float = 0.0
    unreachable: bool = False  # no answer came; there may be one on another day


@dataclass(frozen=True)
class _Rules:
    fetched: float
    parsed: Protego | None  # None: no rules, and `open` decides for every page
    open: bool
    reason: str


class RobotsCache:
    """Decisions for pages; each host's robots.txt is fetched when it is first needed, and again after a day.

    Args:
        fetch: makes a bounded request; the caller may pass a function that waits between two requests.
        clock: seconds; a test may move it.
    """

    def __init__(
        self,
        agent: str,
        *,
        fetch: Fetch | None = None,
        max_seconds: float = MAX_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch_page = fetch or (lambda url, limits: get(url, agent, limits))
        self._max_seconds, self._clock = max_seconds, clock
        self._rules: dict[str, _Rules] = {}

    def decide(self, url: str) -> Decision:
        """The decision for one page."""
        site = site_of(url)
        rules = self._rules.get(site)
        if rules is None or self._clock() - rules.fetched >= MAX_AGE:
            rules = self._rules[site] = self._fetch(site)
        if rules.parsed is None:
            return Decision(rules.open, rules.reason, unreachable=not rules.open)
        rate = rules.parsed.request_rate(PRODUCT)
        delay = max(rules.parsed.crawl_delay(PRODUCT) or 0.0, rate.seconds / rate.requests if rate else 0.0)
        if rules.parsed.can_fetch(url, PRODUCT):
            return Decision(True, "robots.txt allows the page", delay)
        return Decision(False, "robots.txt forbids the page", delay)

    def _fetch(self, site: str) -> _Rules:
        now = self._clock()
        url, limits = f"{site}/robots.txt", Limits(MAX_BYTES, self._max_seconds, cut=True)
        for _ in range(MAX_REDIRECTS + 1):
            try:
                reply, body = self._fetch_page(url, limits)
            except FetchError as error:
                return _Rules(now, None, False, f"robots.txt unreachable ({error})")
            if 200 <= reply.status < 300:
                return _Rules(now, _parse(body, reply.truncated), True, "")
            if reply.location is not None:
                url = urljoin(url, reply.location)
                if urlsplit(url).scheme not in ("http", "https"):
                    return _Rules(now, None, False, "robots.txt redirects to something that is no web page")
                continue
            if 400 <= reply.status < 500:
                return _Rules(now, None, True, f"no robots.txt (status {reply.status})")
            return _Rules(now, None, False, f"robots.txt unreachable (status {reply.status})")
        return _Rules(now, None, False, f"robots.txt redirects more than {MAX_REDIRECTS} times")


def site_of(url: str) -> str:
    """Scheme, host and port: a robots.txt is valid for exactly these three."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()


def _parse(body: bytes, truncated: bool) -> Protego:
    """Rules of a robots.txt without a line that the limit cut in two, and without a BOM, which hides the first rule."""
    if truncated:
        body = body[: max(body.rfind(b"\n"), body.rfind(b"\r")) + 1]
    return Protego.parse(body.decode("utf-8", errors="replace").removeprefix("\ufeff"))
