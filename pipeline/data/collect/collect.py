"""`so8t data --collect`: fetch the URLs of a source manifest that licence and robots.txt permit, and keep records.

Each URL gets a folder beside the manifest, replaced as a whole: rows.jsonl and record.json (digest, date, licence,
robots decision, final address, user agent). A page that robots.txt forbids leaves a record without rows. A failed
fetch, of the page or of robots.txt, leaves the folder as it was. At most five redirects are followed, and each hop
obeys the robots.txt of its host.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from urllib.parse import urlsplit

from pipeline.config import CollectConfig, DataConfig
from pipeline.data.collect.fetch import FetchError, Limits, Reply, get
from pipeline.data.collect.robots import MAX_REDIRECTS, PRODUCT, RobotsCache, site_of
from pipeline.data.licences import LicencePolicy
from pipeline.data.source_manifest import (
    COLLECTED,
    RECORD,
    ROWS,
    CollectionRecord,
    SourceEntry,
    load_manifest_file,
    url_folder,
)
from pipeline.manifest import locked
from so8t_core.errors import InputError
from so8t_core.files import atomic_dir, explain_os_errors, sweep, temporary_prefix

CONTENT_TYPES = frozenset(
    {
        "application/jsonl",
        "application/x-jsonlines",
        "application/jsonlines",
        "application/json-lines",
        "application/x-ndjson",
        "application/ndjson",
        "application/json",
        "text/plain",
        "application/octet-stream",
        "binary/octet-stream",
    }
)


AGENT_VERSION = "1"  # of the collector's behaviour, not of the package


@dataclass(frozen=True)
class Outcome:
    """The result for one URL."""

    url: str
    state: Literal["collected", "refused", "failed"]  # refused: by licence or robots.txt
    reason: str


def user_agent(contact: str) -> str:
    """`so8t-data/VERSION (+contact)`; rules in robots.txt name the part before the slash."""
    return f"{PRODUCT}/{AGENT_VERSION} (+{contact})"


def collect(
    manifest_path: Path, policy: LicencePolicy, limits: CollectConfig, progress: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Fetch every URL of the manifest, one after another.

    Raises:
        InputError: a manifest that cannot be used, without a contact or without a URL.
    """
    manifest = load_manifest_file(manifest_path)
    entries = [entry for entry in manifest.sources if entry.path is None]
    if not entries:
        raise InputError(f"{manifest_path} lists no `url` to collect")
    if manifest.contact is None:
        raise InputError(f"{manifest_path} has no `contact`; give an address or URL where a site's owner can reach you")
    collector = _Collector(user_agent(manifest.contact), limits)
    outcomes = []
    place = manifest_path.parent / COLLECTED
    with explain_os_errors(place):
        place.mkdir(exist_ok=True)
        with locked(place):
            sweep(place)
            for entry in entries:
                outcome = collector.one(entry, url_folder(manifest_path, str(entry.url)), policy)
                outcomes.append(outcome)
                if progress:
                    progress(outcome)
    return outcomes


def collect_for(config: DataConfig, note: Callable[[str], None]) -> None:
    """Collect for one configuration and note the result for each URL.

    Raises:
        InputError: no manifest, one that cannot be used, or a fetch that failed.
    """
    if config.manifest is None:
        raise InputError("--collect needs data.manifest, a YAML file that lists URLs; docs/data_policy.md shows one")
    require_collected(
        collect(
            Path(config.manifest),
            LicencePolicy.of(config),
            config.collect,
            lambda outcome: note(f"{outcome.state} {outcome.url}: {outcome.reason}"),
        )
    )


def require_collected(outcomes: Sequence[Outcome]) -> None:
    """Raise `InputError` if a fetch failed; a refusal is a decision, not a failure."""
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if failed:
        raise InputError(
            f"{len(failed)} of {len(outcomes)} URLs could not be collected: {failed[0].url}: {failed[0].reason}; "
            "what was collected before is kept, run --collect again"
        )


class _Collector:
    def __init__(self, agent: str, limits: CollectConfig) -> None:
        self._agent, self._limits = agent, limits
        self._last: dict[str, float] = {}  # by site: the time at which its last request ended
        self._delays: dict[str, float] = {}
        self._robots = RobotsCache(agent, fetch=self._get, max_seconds=min(30.0, limits.max_seconds))

    def one(self, entry: SourceEntry, folder: Path, policy: LicencePolicy) -> Outcome:
        """Fetch one URL into its folder."""
        url = str(entry.url)
        said = policy.objection(entry.licence) if entry.licence else "manifest lacks licence"
        if said or entry.licence is None or entry.purpose is None:
            return Outcome(url, "refused", said or "manifest lacks purpose")  # unusable rows are not fetched
        with TemporaryDirectory(dir=folder.parent, prefix=temporary_prefix(folder), suffix=".tmp") as temporary:
            body = Path(temporary) / ROWS
            try:
                decision, final_url, reply = self._follow(url, body)
            except FetchError as error:
                return Outcome(url, "failed", str(error))
            record = CollectionRecord(
                url=url,
                final_url=final_url,
                licence=entry.licence,
                robots="allowed" if reply else "disallowed",
                robots_reason=decision,
                collected=datetime.now(UTC).isoformat(timespec="seconds"),
                user_agent=self._agent,
                status=reply.status if reply else None,
                content_type=reply.content_type if reply else None,
                bytes=reply.size if reply else None,
                sha256=reply.sha256 if reply else None,
            )
            with atomic_dir(folder) as fresh:
                if reply:
                    os.replace(body, fresh / ROWS)
                (fresh / RECORD).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if reply is None:
            return Outcome(url, "refused", decision)
        return Outcome(url, "collected", f"{reply.size} bytes, {decision}")

    def _follow(self, url: str, target: Path) -> tuple[str, str, Reply | None]:
        """(robots decision, final URL, reply; None where robots.txt forbids a hop)."""
        limits = Limits(self._limits.max_bytes, self._limits.max_seconds, CONTENT_TYPES)
        for _ in range(MAX_REDIRECTS + 1):
            decision = self._robots.decide(url)
            if decision.unreachable:
                raise FetchError(decision.reason)
            if not decision.allowed:
                return decision.reason, url, None
            if decision.delay > self._limits.max_delay:
                raise FetchError(
                    f"the site asks for {decision.delay:g} s between requests, more than collect.max_delay"
                )
            self._delays[site_of(url)] = decision.delay
            reply, _ = self._get(url, limits, target)
            if reply.location is None:
                if reply.status != 200:
                    raise FetchError(f"status {reply.status}")
                if reply.size == 0:
                    raise FetchError("an empty body")
                return decision.reason, url, reply
            url = reply.location
            if urlsplit(url).scheme not in ("http", "https"):
                raise FetchError(f"redirects to {url[:80]}, which is no web page")
        raise FetchError(f"redirects more than {MAX_REDIRECTS} times")

    def _get(self, url: str, limits: Limits, target: Path | None = None) -> tuple[Reply, bytes]:
        """`get`, after the site's crawl delay (`min_delay` at least) has passed since its last request ended."""
        site = site_of(url)
        delay = max(self._delays.get(site, 0.0), self._limits.min_delay)
        if site in self._last:
            time.sleep(max(0.0, self._last[site] + delay - time.monotonic()))
        try:
            return get(url, self._agent, limits, target)
        finally:
            self._last[site] = time.monotonic()
