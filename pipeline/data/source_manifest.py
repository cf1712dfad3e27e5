"""The source manifest: origin, licence and permitted use of each source.

    version: 1
    contact: https://example.org/data-bot            # stands in the user agent of `so8t data --collect`
    sources:
      - path: think.jsonl                            # relative to the manifest
        licence: CC-BY-4.0                           # SPDX identifier, or LicenseRef-Own
        robots: not-applicable                       # allowed | disallowed | not-applicable (no page was fetched)
        collected: 2026-05-01
        purpose: training                            # training | evaluation | refusal
      - {url: "https://example.org/rows.jsonl", licence: CC0-1.0, purpose: training}   # --collect adds the rest
An unknown key is an error by file and line. A missing field, unknown licence or refusing robots.txt excludes the rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.data.licences import LicencePolicy
from so8t_core.errors import InputError
from so8t_core.files import read_regular, sha256_file

Robots = Literal["allowed", "disallowed", "not-applicable"]
_MAX_BYTES = 1 << 24
COLLECTED = "collected"  # directory beside the manifest, one folder a URL
ROWS, RECORD = "rows.jsonl", "record.json"


class SourceEntry(BaseModel):
    """One source as the manifest states it; a missing field excludes its rows, an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")

    path: str | None = None
    url: str | None = None
    licence: str | None = None
    robots: Robots | None = None
    collected: date | None = None
    purpose: Literal["training", "evaluation", "refusal"] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> SourceEntry:
        if self.path is None and self.url is None:
            raise ValueError("a source needs a `path` or a `url`")
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("`url` must start with http:// or https:// and name a host")
            if parts.username or parts.password:
                raise ValueError("`url` must not contain a user name or password")
        return self


class Manifest(BaseModel):
    """A whole manifest file."""

    model_config = ConfigDict(extra="forbid")

    version: Literal[1]
    contact: str | None = Field(None, pattern=r"^(https?://\S+|mailto:\S+|[^\s@]+@[^\s@]+)$")
    sources: list[SourceEntry] = Field(min_length=1)


class CollectionRecord(BaseModel):
    """The record that `--collect` wrote beside the rows of one URL; `sha256` is None where nothing was fetched."""

    model_config = ConfigDict(extra="forbid")

    url: str
    final_url: str
    licence: str
    robots: Literal["allowed", "disallowed"]
    robots_reason: str
    collected: str  # UTC, ISO 8601
    user_agent: str
    status: int | None = None
    content_type: str | None = None
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Source:
    """One input of the data step: a file, its facts, and the reason why its rows are excluded (None: they are used)."""

    path: Path
    name: str  # for reports: never a machine's path
    objection: str | None = None
    facts: dict[str, str | None] = field(default_factory=dict)  # licence, robots, collected, purpose, url, sha256

    @property
    def refusal_only(self) -> bool:
        """Whether the manifest allows the source for refusal only."""
        return self.facts.get("purpose") == "refusal"


def load_manifest_file(path: Path) -> Manifest:
    """Read and validate a manifest.

    Raises:
        InputError: missing, not UTF-8, not YAML, an unknown key, a wrong type; the message gives the line.
    """
    try:
        text = read_regular(path, most=_MAX_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"data.manifest {path} does not exist; docs/data_policy.md shows one") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read: {what}") from None
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
        twice = _repeated_key(tree, set())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where} is not YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None
    except (ValueError, RecursionError) as error:  # a date such as 2026-13-45, or too deep nesting
        raise InputError(f"{path} is not YAML that can be read: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}, line 1: a manifest must be a mapping with `version` and `sources`")
    if twice:
        raise InputError(f"{path}, line {twice[1]}: the key `{twice[0]}` stands there twice; keep one")
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        said = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise InputError(f"{path}, line {_line_of(tree, first['loc'])}: `{where}`: {said}{more}") from None
    places: set[str] = set()
    for number, entry in enumerate(manifest.sources):
        place = _place(entry, path)
        if place in places:
            line = _line_of(tree, ("sources", number))
            raise InputError(f"{path}, line {line}: {entry.path or entry.url} is listed twice; keep one")
        places.add(place)
    return manifest


def _place(entry: SourceEntry, manifest_path: Path) -> str:
    """The identity of an entry: one file has one entry, in whatever way its path is written."""
    return str((manifest_path.parent / entry.path).resolve()) if entry.path is not None else str(entry.url)


def _line_of(node: Any, location: Sequence[int | str]) -> int:
    """1-based line of the deepest part of `location` that the file has."""
    line = node.start_mark.line + 1
    for part in location:
        found = None
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
            line = found[0].start_mark.line + 1 if found else line
            node = found[1] if found else None
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            node = None
        if node is None:
            break
    return int(line)


def _repeated_key(node: Any, seen: set[int]) -> tuple[str, int] | None:
    """A key that stands twice in one mapping; YAML would silently keep the second value."""
    if id(node) in seen:  # an alias: checked once, at its anchor
        return None
    seen.add(id(node))
    children: list[Any] = []
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if str(key.value) in keys:
                return str(key.value), key.start_mark.line + 1
            keys.add(str(key.value))
            children.append(value)
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    return next(filter(None, (_repeated_key(child, seen) for child in children)), None)


def url_folder(manifest_path: Path, url: str) -> Path:
    """The folder of a URL's rows and record: `collected/<host>-<first 12 digits of sha256(url)>` by the manifest."""
    host = re.sub("[^A-Za-z0-9.-]", "-", urlsplit(url).netloc)
    return manifest_path.parent / COLLECTED / f"{host}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def resolve(
    wanted: Sequence[str], manifest_path: Path | None, policy: LicencePolicy, *, allow_unlisted: bool
) -> list[Source]:
    """The files behind `data.sources` (paths or URLs of the manifest), each with its objection, in the same order.

    Raises:
        InputError: a manifest that cannot be used, a URL that is in no manifest, a broken or foreign record.
    """
    entries: dict[str, SourceEntry] = {}
    if manifest_path is not None:
        for entry in load_manifest_file(manifest_path).sources:
            entries[_place(entry, manifest_path)] = entry
    found = []
    for text in wanted:
        is_url = text.startswith(("http://", "https://"))
        entry_of = entries.get(text if is_url else str(Path(text).resolve()))
        if is_url and (entry_of is None or manifest_path is None):
            raise InputError(f"data source {text} is not in data.manifest; add it there with its licence and purpose")
        if is_url and entry_of is not None and manifest_path is not None:
            found.append(_collected(text, entry_of, url_folder(manifest_path, text), policy))
        elif entry_of is None:
            said = "not in the source manifest" if manifest_path else "no source manifest"
            found.append(Source(Path(text), Path(text).name, None if allow_unlisted else said))
        else:
            facts = _facts(entry_of)
            found.append(Source(Path(text), Path(text).name, _objection(entry_of, facts, policy), facts))
    return found


def _facts(entry: SourceEntry) -> dict[str, str | None]:
    return {
        "licence": entry.licence,
        "robots": entry.robots,
        "collected": entry.collected.isoformat() if entry.collected else None,
        "purpose": entry.purpose,
        "url": entry.url,
    }


def _objection(entry: SourceEntry, facts: dict[str, str | None], policy: LicencePolicy) -> str | None:
    """The reason why rows of this source are excluded: a missing field, the licence, robots.txt."""
    for name in ("licence", "robots", "collected", "purpose"):
        if facts[name] is None:
            return f"manifest lacks {name}"
    if said := policy.objection(str(facts["licence"])):
        return said
    if facts["robots"] == "disallowed":
        return "robots.txt forbids the page"
    if facts["robots"] == "not-applicable" and entry.url is not None:
        return "manifest lacks robots"  # a page was fetched, so robots.txt must have been read
    return None


def _collected(url: str, entry: SourceEntry, folder: Path, policy: LicencePolicy) -> Source:
    """A source that `--collect` fetched, judged by its record; without a record there are no rows."""
    rows, name = folder / ROWS, f"{folder.name}.jsonl"
    record = read_record(folder)
    facts = _facts(entry)
    if record is None:
        return Source(rows, name, "not collected yet", facts)
    if record.url != url:
        raise InputError(f"{folder / RECORD} is the record of {record.url}, not of {url}; run so8t data --collect")
    facts |= {"robots": record.robots, "collected": record.collected, "sha256": record.sha256}
    objection = _objection(entry.model_copy(update={"url": None}), facts, policy)
    if objection is None and record.licence != entry.licence:
        objection = "licence changed since collection"
    if objection is None and (not rows.is_file() or sha256_file(rows) != record.sha256):
        objection = "rows are not those that were collected"
    return Source(rows, name, objection, facts)


def read_record(folder: Path) -> CollectionRecord | None:
    """The record in a URL's folder; None where the folder has no record.

    Raises:
        InputError: a record that cannot be read.
    """
    path = folder / RECORD
    try:
        return CollectionRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, OSError):
        raise InputError(f"{path} is not a collection record; run so8t data --collect again") from None
