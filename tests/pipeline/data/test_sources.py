"""Laws of the source manifest: a mistake is named by file and line, and what is not clearly permitted is excluded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.data.licences import ALLOWED, FORBIDDEN, LicencePolicy
from pipeline.data.source_manifest import load_manifest_file, resolve
from so8t_core.errors import InputError

GOOD = {
    "path": "a.jsonl",
    "licence": "CC-BY-4.0",
    "robots": "not-applicable",
    "collected": "2026-05-01",
    "purpose": "training",
}


def manifest(tmp_path: Path, *entries: dict[str, Any], **fields: Any) -> Path:
    path = tmp_path / "sources.yaml"
    path.write_text(yaml.safe_dump({"version": 1, "sources": list(entries), **fields}, sort_keys=False), "utf-8")
    return path


def objection(tmp_path: Path, **changes: Any) -> str | None:
    path = manifest(tmp_path, {**GOOD, **changes})
    return resolve([str(tmp_path / "a.jsonl")], path, LicencePolicy(), allow_unlisted=False)[0].objection


def test_a_complete_entry_is_accepted_and_its_facts_are_kept(tmp_path: Path) -> None:
    path = manifest(tmp_path, GOOD)
    (source,) = resolve([str(tmp_path / "a.jsonl")], path, LicencePolicy(), allow_unlisted=False)
    assert source.objection is None
    assert source.facts == {
        "licence": "CC-BY-4.0",
        "robots": "not-applicable",
        "collected": "2026-05-01",
        "purpose": "training",
        "url": None,
    }


OBJECTIONS: dict[str, dict[str, Any]] = {
    "manifest lacks licence": {"licence": None},
    "manifest lacks robots": {"robots": None},
    "manifest lacks collected": {"collected": None},
    "manifest lacks purpose": {"purpose": None},
    "licence unknown": {"licence": "CC-BY-5.0"},
    "licence forbidden": {"licence": "cc-by-nc-sa-4.0"},
    "robots.txt forbids the page": {"robots": "disallowed", "url": "https://example.org/a"},
}


@pytest.mark.parametrize("reason", OBJECTIONS)
def test_what_is_not_clearly_permitted_is_excluded(reason: str, tmp_path: Path) -> None:
    assert objection(tmp_path, **OBJECTIONS[reason]) == reason
    assert objection(tmp_path) is None  # the entry without the fault


def test_a_fetched_page_needs_a_robots_decision(tmp_path: Path) -> None:
    assert objection(tmp_path, url="https://example.org/a") == "manifest lacks robots"
    assert objection(tmp_path, url="https://example.org/a", robots="allowed") is None


def test_a_file_that_no_manifest_lists_is_excluded(tmp_path: Path) -> None:
    other = str(tmp_path / "other.jsonl")
    path = manifest(tmp_path, GOOD)
    for given, said in ((path, "not in the source manifest"), (None, "no source manifest")):
        assert resolve([other], given, LicencePolicy(), allow_unlisted=False)[0].objection == said
        assert resolve([other], given, LicencePolicy(), allow_unlisted=True)[0].objection is None


def test_a_url_that_no_manifest_lists_is_an_error(tmp_path: Path) -> None:
    for given in (manifest(tmp_path, GOOD), None):
        with pytest.raises(InputError, match=r"https://x.org/a is not in data.manifest"):
            resolve(["https://x.org/a"], given, LicencePolicy(), allow_unlisted=True)


def test_paths_are_relative_to_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    path = manifest(tmp_path / "data", {**GOOD, "path": "../a.jsonl"})
    monkeypatch.chdir(tmp_path)
    assert resolve(["a.jsonl"], path.relative_to(tmp_path), LicencePolicy(), allow_unlisted=False)[0].objection is None


ENTRY = "  - path: a.jsonl\n    licence: MIT\n"
MISTAKES = {
    "unknown key": ("version: 1\nsources:\n" + ENTRY + "    license: MIT\n", 5, "`sources.0.license`: unknown key"),
    "unknown key at the top": ("version: 1\nsource: []\nsources:\n" + ENTRY, 2, "`source`: unknown key"),
    "wrong robots": ("version: 1\nsources:\n" + ENTRY + "    robots: maybe\n", 5, "`sources.0.robots`"),
    "wrong date": ("version: 1\nsources:\n" + ENTRY + "    collected: soon\n", 5, "`sources.0.collected`"),
    "wrong version": ("sources:\n" + ENTRY + "version: 2\n", 4, "`version`"),
    "no version": ("\nsources:\n" + ENTRY, 2, "`version`"),
    "no sources": ("version: 1\nsources: []\n", 2, "`sources`"),
    "neither path nor url": ("version: 1\nsources:\n  - licence: MIT\n", 3, "needs a `path` or a `url`"),
    "no web address": ("version: 1\nsources:\n  - url: ftp://x.org/a\n", 3, "http"),
    "a password in the address": ("version: 1\nsources:\n  - url: https://u:p@x.org/a\n", 3, "user name or password"),
    "twice the same": ("version: 1\nsources:\n" + ENTRY + ENTRY, 5, "a.jsonl is listed twice"),
    "twice the same in other words": (
        "version: 1\nsources:\n" + ENTRY + ENTRY.replace("a.jsonl", "./b/../a.jsonl"),
        5,
        "is listed twice",
    ),
    "aliases of aliases": (
        "version: 1\na0: &a0 [1]\n"
        + "".join(f"a{n}: &a{n} [{', '.join(f'*a{n - 1}' for _ in '0123456789')}]\n" for n in range(1, 12))
        + "sources:\n"
        + ENTRY,
        2,
        "`a0`: unknown key",
    ),
    "a key twice": ("version: 1\nsources:\n" + ENTRY + "    licence: GPL\n", 5, "`licence` stands there twice"),
    "not a mapping": ("- a\n", 1, "must be a mapping"),
    "empty": ("", 1, "must be a mapping"),
    "not YAML": ("version: 1\nsources: [a\n", 3, "is not YAML"),
    "wrong contact": ("version: 1\ncontact: me\nsources:\n" + ENTRY, 2, "`contact`"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_by_file_and_line(name: str, tmp_path: Path) -> None:
    text, line, words = MISTAKES[name]
    path = tmp_path / "sources.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(InputError) as caught:
        load_manifest_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}, line {line}"), message
    assert words in message
    assert len(message.splitlines()) <= 2


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("version: 1 # 日本".encode("cp932"), "not UTF-8"),
        (b"version: 1\nsources: [{collected: 2026-13-45}]", "is not YAML that can be read"),
        (b"a: &x [*x]", "line 1: `version`: Field required"),
        (b"a: " + b"[" * 3000, "is not YAML that can be read"),
        (None, "does not exist"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_a_plain_error(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "sources.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_manifest_file(path)


LICENCES = {
    "MIT": None,
    "apache-2.0": None,
    "LicenseRef-Own": None,
    "MIT OR CC-BY-NC-4.0": None,
    "MIT AND Apache-2.0": None,
    "MIT AND CC-BY-NC-4.0": "licence forbidden",
    "MIT AND Foo": "licence unknown",
    "Foo OR Bar": "licence unknown",
    "Foo OR CC-BY-ND-4.0": "licence forbidden",
    "MIT OR Foo AND Bar": "licence unknown",
    "CC-BY-NC-ND-3.0": "licence forbidden",
    "CC-BY-NC": "licence forbidden",
    "MITX": "licence unknown",
    "CC-BY-*": "licence unknown",
    "": "licence unknown",
    "NONE": "licence forbidden",
    "MIT or Apache-2.0": "licence unknown",
    "(MIT)": None,
    "(MIT OR Foo) AND Apache-2.0": None,
    "(MIT OR Foo) AND Bar": "licence unknown",
    "MIT AND (Apache-2.0 OR CC-BY-NC-4.0)": None,
    "MIT AND (Foo OR CC-BY-NC-4.0)": "licence forbidden",
    "MIT OR (Foo AND CC-BY-NC-4.0)": None,
    "MIT OR (Foo OR Bar AND ISC)": "licence unknown",
    "(MIT) OR Foo AND Bar": "licence unknown",
    "(MIT": "licence unknown",
    "MIT) OR (ISC": "licence unknown",
    "()": "licence unknown",
    "MIT OR": "licence unknown",
    "OR MIT OR ISC": "licence unknown",
    "MIT OR ISC OR": "licence unknown",
    "MIT AND () AND ISC": "licence unknown",
    "(MIT AND ISC) Foo": "licence unknown",
    "MIT (Apache-2.0)": "licence unknown",
    "GPL-2.0-only WITH Classpath-exception-2.0": "licence unknown",
    "GPL-2.0-only WITH Classpath-exception-2.0 OR MIT": None,
    "MIT WITH Foo": "licence unknown",
    "CC-BY-NC-4.0 WITH Foo": "licence forbidden",
    "a/b OR MIT": None,
    "(MIT AND " * 5000 + "ISC" + ")" * 5000: "licence unknown",
}


@pytest.mark.parametrize("licence", LICENCES, ids=lambda licence: licence[:60])
def test_licence_expressions(licence: str) -> None:
    assert LicencePolicy().objection(licence) == LICENCES[licence]


def test_the_lists_can_be_replaced_and_forbidding_wins() -> None:
    policy = LicencePolicy(allowed=["GPL-3.0*", "MIT"], forbidden=["MIT"])
    assert [policy.objection(name) for name in ("GPL-3.0-only", "MIT", "Apache-2.0")] == [
        None,
        "licence forbidden",
        "licence unknown",
    ]
    assert not set(ALLOWED) & set(FORBIDDEN)


def test_a_list_may_name_an_exception_and_what_spdx_could_not_name() -> None:
    policy = LicencePolicy(allowed=["GPL-2.0-only WITH Classpath-exception-2.0", "Our terms (v2)"], forbidden=[])
    assert policy.objection("gpl-2.0-only  with classpath-exception-2.0") is None
    assert policy.objection("GPL-2.0-only") == "licence unknown"
    assert policy.objection("(GPL-2.0-only WITH Classpath-exception-2.0 AND Foo) OR MIT") == "licence unknown"
    assert policy.objection("Our terms (v2)") is None


def test_one_name_needs_no_library_for_expressions() -> None:
    code = "from pipeline.data.licences import *; import sys; LicencePolicy().objection({!r}); print(*sys.modules)"
    for licence, needed in (("MIT", False), ("MIT OR ISC", True)):
        run = subprocess.run([sys.executable, "-c", code.format(licence)], capture_output=True, text=True, check=True)
        assert ("license_expression" in run.stdout.split()) is needed
