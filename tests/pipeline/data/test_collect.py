"""Laws of `so8t data --collect`: what is permitted is fetched, within bounds, and is recorded; or nothing changes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from web_server import Web, broken_off, endless, redirect, serve, slow_headers, text

from pipeline.config import CollectConfig
from pipeline.data.collect import collect as collecting
from pipeline.data.collect.collect import Outcome, collect, require_collected, user_agent
from pipeline.data.collect.robots import Decision
from pipeline.data.licences import LicencePolicy
from pipeline.data.source_manifest import RECORD, ROWS, load_manifest_file, resolve, url_folder
from so8t_core.errors import InputError

ROW = json.dumps({"question": "What is 1 + 1?", "answer": "1 + 1 = 2\n#### 2"}) + "\n"
FAST = CollectConfig(max_bytes=100_000, max_seconds=5, min_delay=0)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve() as running:
        running.pages["/rows.jsonl"] = text(ROW, content_type="application/jsonl; charset=utf-8")
        yield running


def manifest(tmp_path: Path, *urls: str, **fields: Any) -> Path:
    path = tmp_path / "sources.yaml"
    entry = {"licence": "CC0-1.0", "purpose": "training", **fields}
    content = {"version": 1, "contact": "https://example.org/bot", "sources": [{"url": url, **entry} for url in urls]}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def run(path: Path, limits: CollectConfig = FAST) -> list[Outcome]:
    return collect(path, LicencePolicy(), limits)


def source(path: Path, url: str) -> Any:
    return resolve([url], path, LicencePolicy(), allow_unlisted=False)[0]


def test_a_permitted_page_is_stored_with_its_record(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/rows.jsonl"
    path = manifest(tmp_path, url)
    assert source(path, url).objection == "not collected yet"
    assert [outcome.state for outcome in run(path)] == ["collected"]
    folder = url_folder(path, url)
    assert sorted(p.name for p in folder.iterdir()) == [RECORD, ROWS]
    assert (folder / ROWS).read_text("utf-8") == ROW
    record = json.loads((folder / RECORD).read_text("utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record.pop("collected"))
    assert record == {
        "url": url,
        "final_url": url,
        "licence": "CC0-1.0",
        "robots": "allowed",
        "robots_reason": "no robots.txt (status 404)",
        "user_agent": "so8t-data/1 (+https://example.org/bot)",
        "status": 200,
        "content_type": "application/jsonl",
        "bytes": len(ROW),
        "sha256": hashlib.sha256(ROW.encode()).hexdigest(),
    }
    assert source(path, url).objection is None
    assert web.paths() == ["/robots.txt", "/rows.jsonl"]
    assert {agent for _, _, agent in web.requests} == {user_agent("https://example.org/bot")}


def test_a_page_that_robots_txt_forbids_is_never_asked_for(web: Web, tmp_path: Path) -> None:
    web.pages["/robots.txt"] = text("User-agent: so8t-data\nDisallow: /rows")
    url = f"{web.url}/rows.jsonl"
    path = manifest(tmp_path, url)
    outcomes = run(path)
    assert [(outcome.state, outcome.reason) for outcome in outcomes] == [("refused", "robots.txt forbids the page")]
    require_collected(outcomes)  # a decision, not a failure
    assert web.paths() == ["/robots.txt"]
    found = source(path, url)
    assert found.objection == "robots.txt forbids the page"
    assert not found.path.exists()


def test_a_robots_txt_that_is_ignored_would_be_seen(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a collector that takes every robots.txt for permission."""
    monkeypatch.setattr(collecting.RobotsCache, "decide", lambda self, url: Decision(True, ""))
    web.pages["/robots.txt"] = text("User-agent: *\nDisallow: /")
    assert [outcome.state for outcome in run(manifest(tmp_path, f"{web.url}/rows.jsonl"))] == ["collected"]
    assert "/rows.jsonl" in web.paths()  # what `test_a_page_that_robots_txt_forbids_is_never_asked_for` excludes


def test_a_page_forbidden_later_loses_its_rows(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/rows.jsonl"
    path = manifest(tmp_path, url)
    run(path)
    web.pages["/robots.txt"] = text("User-agent: *\nDisallow: /")
    run(path)
    assert source(path, url).objection == "robots.txt forbids the page"
    assert not (url_folder(path, url) / ROWS).exists()


@pytest.mark.parametrize(
    ("licence", "reason"),
    [("CC-BY-NC-4.0", "licence forbidden"), ("Foo-1.0", "licence unknown"), (None, "lacks licence")],
)
def test_what_may_not_be_used_is_not_fetched(web: Web, tmp_path: Path, licence: Any, reason: str) -> None:
    (outcome,) = run(manifest(tmp_path, f"{web.url}/rows.jsonl", licence=licence))
    assert outcome.state == "refused"
    assert reason in outcome.reason
    assert web.requests == []


def test_each_hop_of_a_redirect_is_asked_of_its_own_host(web: Web, tmp_path: Path) -> None:
    with serve() as other:
        web.pages["/moved"] = redirect(f"{other.url}/rows.jsonl", 301)
        other.pages["/rows.jsonl"] = text(ROW)
        url = f"{web.url}/moved"
        path = manifest(tmp_path, url)
        assert run(path)[0].state == "collected"
        record = json.loads((url_folder(path, url) / RECORD).read_text("utf-8"))
        assert record["final_url"] == f"{other.url}/rows.jsonl"
        assert other.paths() == ["/robots.txt", "/rows.jsonl"]
        other.pages["/robots.txt"] = text("User-agent: *\nDisallow: /rows")
        assert run(path)[0].state == "refused"
        assert other.paths().count("/rows.jsonl") == 1


FAILURES = {
    "missing": (text("", 404), "status 404"),
    "server error": (text("", 500), "status 500"),
    "empty": (text(""), "empty body"),
    "no content": (text("", 204), "status 204"),
    "web page": (text("<html>", content_type="text/html"), "content type 'text/html'"),
    "no type": (text(ROW, content_type=""), "content type 'missing'"),
    "compressed": (text(b"\x1f\x8b", Content_Encoding="gzip"), "content encoding"),
    "announced too long": (text("x" * 100_001), "100001 bytes announced"),
    "endless": (endless(), "more than the 100000 bytes"),
    "dripping": (endless(piece=b"x", pause=0.05), "took longer than 0.6 s"),
    "slow headers": (slow_headers(), "took longer than 0.6 s"),
    "silent": (lambda handler: time.sleep(2), "0.6 s"),
    "broken off": (broken_off, "RemoteProtocolError"),
    "loop": (redirect("/page"), "redirects more than 5 times"),
    "off the web": (redirect("ftp://example.org/x"), "no web page"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_fetch_leaves_what_was_there(web: Web, tmp_path: Path, name: str) -> None:
    page, said = FAILURES[name]
    url = f"{web.url}/page"
    path = manifest(tmp_path, url)
    web.pages["/page"] = text(ROW)
    run(path)
    before = {p.name: p.read_bytes() for p in url_folder(path, url).iterdir()}
    web.pages["/page"] = page
    started = time.monotonic()
    outcomes = run(path, FAST.model_copy(update={"max_seconds": 0.6}))
    assert time.monotonic() - started < 60  # most of these pages never end
    assert outcomes[0].state == "failed"
    assert said in outcomes[0].reason
    with pytest.raises(InputError, match="1 of 1 URLs could not be collected"):
        require_collected(outcomes)
    assert {p.name: p.read_bytes() for p in url_folder(path, url).iterdir()} == before
    assert sorted(p.name for p in url_folder(path, url).parent.iterdir()) == [".lock", url_folder(path, url).name]
    assert source(path, url).objection is None


def test_an_unreachable_robots_txt_fails_and_leaves_what_was_there(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/rows.jsonl"
    path = manifest(tmp_path, url)
    run(path)
    web.pages["/robots.txt"] = text("", 503)
    (outcome,) = run(path)
    assert (outcome.state, outcome.reason) == ("failed", "robots.txt unreachable (status 503)")
    assert web.paths().count("/rows.jsonl") == 1
    assert source(path, url).objection is None


def test_the_crawl_delay_is_kept_between_pages(web: Web, tmp_path: Path) -> None:
    web.pages["/robots.txt"] = text("User-agent: *\nCrawl-delay: 0.4")
    web.pages["/2"] = web.pages["/rows.jsonl"]
    run(manifest(tmp_path, f"{web.url}/rows.jsonl", f"{web.url}/2"))
    times = [seconds for seconds, path, _ in web.requests]
    assert web.paths() == ["/robots.txt", "/rows.jsonl", "/2"]
    assert all(later - earlier >= 0.4 for earlier, later in pairwise(times))


def test_a_crawl_delay_that_is_ignored_would_be_seen(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: a collector that never sleeps."""
    monkeypatch.setattr(collecting.time, "sleep", lambda seconds: None)
    web.pages["/robots.txt"] = text("User-agent: *\nCrawl-delay: 5")
    run(manifest(tmp_path, f"{web.url}/rows.jsonl"))
    first, second = (seconds for seconds, _, _ in web.requests)
    assert second - first < 5


def test_our_own_least_delay_is_kept_where_the_site_asks_for_none(web: Web, tmp_path: Path) -> None:
    run(manifest(tmp_path, f"{web.url}/rows.jsonl"), FAST.model_copy(update={"min_delay": 0.3}))
    first, second = (seconds for seconds, _, _ in web.requests)
    assert second - first >= 0.3


def test_a_site_that_asks_for_too_long_a_delay_is_not_collected(web: Web, tmp_path: Path) -> None:
    web.pages["/robots.txt"] = text("User-agent: *\nCrawl-delay: 1000")
    (outcome,) = run(manifest(tmp_path, f"{web.url}/rows.jsonl"))
    assert outcome.state == "failed"
    assert "1000 s between requests" in outcome.reason


def test_rows_changed_after_collection_are_excluded(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/rows.jsonl"
    path = manifest(tmp_path, url)
    run(path)
    rows = url_folder(path, url) / ROWS
    rows.write_text(ROW.replace("2", "3"), "utf-8")
    assert source(path, url).objection == "rows are not those that were collected"


def test_a_licence_changed_after_collection_excludes_the_rows(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/rows.jsonl"
    path = manifest(tmp_path, url)
    run(path)
    manifest(tmp_path, url, licence="CC-BY-4.0")
    assert source(path, url).objection == "licence changed since collection"


def test_a_broken_record_is_named(web: Web, tmp_path: Path) -> None:
    url = f"{web.url}/rows.jsonl"
    path = manifest(tmp_path, url)
    run(path)
    (url_folder(path, url) / RECORD).write_text("{", "utf-8")
    with pytest.raises(InputError, match=r"record.json is not a collection record"):
        source(path, url)


def test_a_manifest_without_contact_or_url_collects_nothing(web: Web, tmp_path: Path) -> None:
    path = manifest(tmp_path, f"{web.url}/rows.jsonl")
    path.write_text(path.read_text("utf-8").replace("contact:", "# contact:"), "utf-8")
    assert load_manifest_file(path).contact is None
    with pytest.raises(InputError, match="no `contact`"):
        run(path)
    local = {"path": "a.jsonl", "licence": "MIT", "purpose": "training"}
    path.write_text(yaml.safe_dump({"version": 1, "sources": [local]}), "utf-8")
    with pytest.raises(InputError, match="lists no `url` to collect"):
        run(path)
    assert web.requests == []


def test_a_directory_that_cannot_be_written_is_a_plain_error(web: Web, tmp_path: Path) -> None:
    path = manifest(tmp_path, f"{web.url}/rows.jsonl")
    (tmp_path / "collected").write_text("in the way", "utf-8")
    with pytest.raises(InputError, match=r"cannot write .*collected"):
        run(path)


def test_leftovers_of_a_killed_collection_are_swept(web: Web, tmp_path: Path) -> None:
    path = manifest(tmp_path, f"{web.url}/rows.jsonl")
    leftover, own = tmp_path / "collected" / ".so8t-host.abcdefgh.tmp", tmp_path / "collected" / ".notes.tmp"
    leftover.mkdir(parents=True)
    own.write_text("the user's")
    run(path)
    assert not leftover.exists()
    assert own.read_text() == "the user's"
    assert os.listdir(tmp_path / "collected")
