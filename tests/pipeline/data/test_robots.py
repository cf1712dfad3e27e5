"""Laws of robots.txt (RFC 9309), against a real server on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from web_server import Web, broken_off, endless, redirect, serve, slow_headers, text

from pipeline.data.collect import robots
from pipeline.data.collect.robots import MAX_AGE, MAX_BYTES, Decision, RobotsCache

AGENT = "so8t-data/1 (+https://example.org/googlebot)"  # the contact must not choose another crawler's rules


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve() as running:
        yield running


def decide(web: Web, path: str = "/a", *, seconds: float = 5) -> Decision:
    return RobotsCache(AGENT, max_seconds=seconds).decide(web.url + path)


RULES = """\
User-agent: *
Disallow: /private/
Allow: /private/open/      # the longest match counts
Disallow: /*.cgi
Disallow: /exact$
Disallow: /tie
Allow: /tie
Disallow: /a*b*/c$
Disallow: /%E6%97%A5
User-agent: googlebot
Disallow: /
"""
PAGES = {
    "/": True,
    "/private/x": False,
    "/private/open/x": True,
    "/private": True,
    "/x/y.cgi": False,
    "/x/y.cgi?z=1": False,
    "/x/y.txt": True,
    "/exact": False,
    "/exact/more": True,
    "/exact?q": True,
    "/tie": True,  # of equally long rules, the one that allows
    "/axxbyy/c": False,
    "/axxbyy/c/d": True,
    "/日本": False,
    "/%e6%97%a5x": False,
    "/robots.txt": True,
}


def test_longest_match_wildcards_ends_and_escapes(web: Web) -> None:
    web.pages["/robots.txt"] = text(RULES)
    cache = RobotsCache(AGENT)
    assert {path: cache.decide(web.url + path).allowed for path in PAGES} == PAGES
    assert web.paths() == ["/robots.txt"]  # asked once
    assert web.requests[0][2] == AGENT


def test_the_rules_for_our_name_come_before_those_for_all(web: Web) -> None:
    web.pages["/robots.txt"] = text("User-agent: *\nDisallow: /\n\nUser-agent: SO8T-Data\nDisallow: /a\n")
    assert not decide(web, "/a").allowed
    assert decide(web, "/b").allowed


def test_a_byte_order_mark_does_not_hide_the_first_rule(web: Web) -> None:
    web.pages["/robots.txt"] = text("\ufeffUser-agent: *\nDisallow: /")
    assert not decide(web).allowed


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 429, 451])
def test_a_4xx_allows_everything(web: Web, status: int) -> None:
    web.pages["/robots.txt"] = text("User-agent: *\nDisallow: /", status)
    assert decide(web) == Decision(True, f"no robots.txt (status {status})")


@pytest.mark.parametrize("status", [500, 502, 503, 304])
def test_a_5xx_or_an_answer_without_sense_forbids_everything(web: Web, status: int) -> None:
    web.pages["/robots.txt"] = text("" if status == 304 else "User-agent: *\nAllow: /", status)
    decision = decide(web)
    assert (decision.allowed, decision.unreachable) == (False, True)


def test_no_server_forbids_everything(web: Web) -> None:
    decision = RobotsCache(AGENT, max_seconds=2).decide("http://127.0.0.1:9/a")
    assert (decision.allowed, decision.unreachable) == (False, True)


@pytest.mark.parametrize("page", [slow_headers(), endless(piece=b"#", pause=0.05), broken_off])
def test_a_slow_or_broken_off_robots_txt_forbids_everything(web: Web, page: object) -> None:
    web.pages["/robots.txt"] = page  # type: ignore[assignment]
    started = time.monotonic()
    decision = decide(web, seconds=0.5)
    assert (decision.allowed, decision.unreachable) == (False, True)
    assert time.monotonic() - started < 60  # most of these pages never end


def test_five_redirects_are_followed_also_to_another_host(web: Web) -> None:
    with serve() as other:
        web.pages["/robots.txt"] = redirect("/1", 301)
        for number, status in ((1, 302), (2, 303), (3, 307)):
            web.pages[f"/{number}"] = redirect(f"/{number + 1}", status)
        web.pages["/4"] = redirect(f"{other.url}/rules", 308)
        other.pages["/rules"] = text("User-agent: *\nDisallow: /a")
        assert not decide(web, "/a").allowed
        assert decide(web, "/b").allowed
        assert "/robots.txt" not in other.paths()  # the rules are the first host's, whoever keeps them


@pytest.mark.parametrize("last", ["/robots.txt", "/next"])
def test_a_sixth_redirect_or_a_loop_forbids_everything(web: Web, last: str) -> None:
    web.pages["/robots.txt"] = redirect("/next0")
    for number in range(9):
        web.pages[f"/next{number}"] = redirect(f"/next{number + 1}" if last == "/next" else last)
    web.pages["/next9"] = text("User-agent: *\nAllow: /")
    decision = decide(web)
    assert (decision.allowed, decision.unreachable) == (False, True)
    assert len(web.requests) == 6


def test_a_redirect_away_from_the_web_forbids_everything(web: Web) -> None:
    web.pages["/robots.txt"] = redirect("file:///etc/passwd")
    assert not decide(web).allowed


def test_the_first_500_kib_count_and_a_line_cut_in_two_does_not(web: Web) -> None:
    filler = "# " + "x" * 97 + "\n"
    head = "User-agent: *\nDisallow: /a\n"
    lines = (MAX_BYTES - len(head) - 20) // len(filler)
    body = head + filler * lines
    body += "#" * (MAX_BYTES - len(body) - 13) + "\n" + "Disallow: /bbb\nDisallow: /c\n"
    assert body[:MAX_BYTES].endswith("Disallow: /b")
    web.pages["/robots.txt"] = endless(body.encode())
    cache = RobotsCache(AGENT)
    found = [cache.decide(web.url + path).allowed for path in ("/a", "/b", "/bbb", "/c")]
    assert found == [False, True, True, True]


def test_rules_are_kept_for_a_day_and_no_longer(web: Web) -> None:
    now = 0.0
    cache = RobotsCache(AGENT, clock=lambda: now)
    web.pages["/robots.txt"] = text("User-agent: *\nDisallow: /")
    assert not cache.decide(f"{web.url}/a").allowed
    web.pages["/robots.txt"] = text("User-agent: *\nAllow: /")
    now = MAX_AGE - 1
    assert not cache.decide(f"{web.url}/a").allowed
    now = MAX_AGE
    assert cache.decide(f"{web.url}/a").allowed
    assert len(web.requests) == 2


def test_every_port_has_its_own_rules(web: Web) -> None:
    with serve() as other:
        web.pages["/robots.txt"] = text("User-agent: *\nDisallow: /")
        cache = RobotsCache(AGENT)
        assert not cache.decide(f"{web.url}/a").allowed
        assert cache.decide(f"{other.url}/a").allowed


def test_the_longer_of_crawl_delay_and_request_rate_counts(web: Web) -> None:
    web.pages["/robots.txt"] = text("User-agent: *\nCrawl-delay: 2.5\nRequest-rate: 1/7\n")
    assert decide(web).delay == 7
    web.pages["/robots.txt"] = text("User-agent: *\nCrawl-delay: 2.5\n")
    assert decide(web).delay == 2.5


def test_the_standard_librarys_parser_would_fail_these_laws(web: Web) -> None:
    """A planted fault: with urllib's rules in place of Protego's, wildcards and longest match go wrong."""
    from urllib.robotparser import RobotFileParser

    parser = RobotFileParser()
    parser.parse(RULES.splitlines())
    found = {path: parser.can_fetch(robots.PRODUCT, path) for path in PAGES}
    assert found != PAGES
