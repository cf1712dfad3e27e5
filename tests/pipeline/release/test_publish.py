"""Laws of a release: only what passed is published, as the bytes that were verified, its verification beside it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from fake_hub import Hub, fake_hub
from policy_reports import released
from report_page import Page
from sample_report import sample_report

from pipeline.cli.main import main
from pipeline.release.publish import with_badge
from so8t_core.files import sha256_file
from verification import Report, decide
from verification.show.card import badge, public_name, verification_card
from verification.show.write import write_report


@pytest.fixture
def hub() -> Iterator[Hub]:
    with fake_hub() as running:
        yield running


def so8t(hub: Hub, home: Path, *arguments: object) -> tuple[int, str, str]:
    """The command in a process of its own, whose hub is this one."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli.main", *map(str, arguments)],
        env={**os.environ, **hub.environment(home / "hf")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def passed(run: Path, **changes: Any) -> Report:
    """A run directory whose report passes: two files, the companions of `so8t convert`, the report."""
    gguf = run / "gguf"
    gguf.mkdir(parents=True)
    report = released()
    artefacts = [a for a in report.artefacts if a.role != "candidate"]
    for artefact in (a for a in report.artefacts if a.role == "candidate"):
        path = gguf / f"tiny-{artefact.label}.gguf"
        path.write_bytes(b"GGUF" + artefact.label.encode() * 700)
        given = {"path": str(path), "sha256": sha256_file(path), "bytes": path.stat().st_size}
        artefacts.append(artefact.model_copy(update=given))
    (run / "adapter").mkdir()
    artefacts = [a for a in artefacts if a.role == "candidate" or a.role == "adapter"]
    for name in ("Modelfile", "tiny-Q8_0.Modelfile", "types.json", "SHA256SUMS"):
        (gguf / name).write_text(f"{name} of the run\n")
    (gguf / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n\nText.\n")
    (gguf / "secret.txt").write_text("not published")
    report = decide(report.model_copy(update={"artefacts": artefacts, **changes}))
    (run / "report").mkdir()
    write_report(report, run / "report")
    return report


def published(run: Path) -> set[str]:
    folder = run / "release"
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


PUBLISHED = {
    *("tiny-F16.gguf", "tiny-Q8_0.gguf", "Modelfile", "tiny-Q8_0.Modelfile", "types.json", "SHA256SUMS", "README.md"),
    *("VERIFICATION.md", "verification.svg"),
    *(f"report/{name}" for name in ("report.json", "report.html", "report.md", "junit.xml", "report.intoto.json")),
}


def test_a_release_is_uploaded_whole_and_nothing_else_of_the_run(hub: Hub, tmp_path: Path) -> None:
    report = passed(tmp_path / "run")
    code, out, err = so8t(hub, tmp_path, "release", tmp_path / "run", "--to", "me/tiny-GGUF", "--private")
    assert code == 0, err
    assert published(tmp_path / "run") == PUBLISHED
    stored = hub.models["me/tiny-GGUF"]
    assert set(stored) == PUBLISHED
    for name in PUBLISHED:
        assert stored[name] == (tmp_path / "run" / "release" / name).read_bytes(), name
    assert hub.private["me/tiny-GGUF"]
    assert f"{hub.url}/me/tiny-GGUF/commit/{hub.commit('me/tiny-GGUF')}" in out
    assert sum(" /api/models/me/tiny-GGUF/commit/" in request for request in hub.requests) == 1  # whole, or not at all
    card = stored["VERIFICATION.md"].decode()
    assert all(a.sha256 in card for a in report.artefacts if a.role == "candidate")
    assert str(tmp_path) not in card
    assert "[![verification](verification.svg)](VERIFICATION.md)" in stored["README.md"].decode()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was handed to the upload."""
    calls: list[Any] = []
    monkeypatch.setattr("pipeline.hub.upload", lambda *given, **more: calls.append(given) or "there")
    return calls


def here(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The command in this process."""
    monkeypatch.setattr(sys, "argv", ["so8t", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("what", ["nothing", "report", "file", "gone", "statement", "no name"])
def test_what_did_not_pass_is_neither_written_nor_sent(
    what: str, sent: list[Any], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, to, wanted = tmp_path / "run", "me/tiny-GGUF", 2
    report = passed(run)
    if what == "report":
        legs = [leg for leg in report.legs if leg.name != "quality"]
        write_report(decide(report.model_copy(update={"legs": legs})), run / "report")
        wanted = 1
    elif what == "file":
        with open(run / "gguf" / "tiny-Q8_0.gguf", "r+b") as file:
            file.write(b"GGUG")
    elif what == "gone":
        (run / "gguf" / "tiny-Q8_0.gguf").unlink()
    elif what == "statement":
        (run / "report" / "report.intoto.json").unlink()
    elif what == "no name":
        to = "tiny"
    code = here(monkeypatch, "release", run, "--to", to)
    err = capfd.readouterr().err
    assert code == (0 if what == "nothing" else wanted), err
    assert len(err.strip().splitlines()) <= 2, err
    assert (run / "release").exists() == bool(sent) == (what == "nothing")


@pytest.mark.parametrize("trouble", ["refuses", "damages"])
def test_a_hub_that_says_no_or_stores_other_bytes_is_named(trouble: str, hub: Hub, tmp_path: Path) -> None:
    passed(tmp_path / "run")
    setattr(hub, trouble, 403 if trouble == "refuses" else True)
    code, _, err = so8t(hub, tmp_path, "release", tmp_path / "run", "--to", "me/tiny-GGUF")
    assert code == 2
    assert len(err.strip().splitlines()) <= 2, err
    assert ("hf auth login" if trouble == "refuses" else "changed on the way") in err


def test_without_a_repository_the_folder_is_made_and_nobody_is_asked(
    sent: list[Any], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed(tmp_path / "run")
    assert here(monkeypatch, "release", tmp_path / "run") == 0
    out = capfd.readouterr().out
    assert published(tmp_path / "run") == PUBLISHED
    assert sent == []
    assert "names folders of this computer" in out  # of the report, as the paths were absolute


def test_the_card_links_its_badge_once() -> None:
    card = with_badge("---\nlicense: mit\n---\n# tiny\n\nText.\n")
    assert card.splitlines()[3:6] == ["# tiny", "", "[![verification](verification.svg)](VERIFICATION.md)"]
    assert with_badge(card) == card
    assert with_badge("no heading\n").endswith("(VERIFICATION.md)\n")


@pytest.mark.parametrize("kind", ["pass", "fail", "inconclusive", "incomplete"])
def test_the_badge_says_the_verdict_and_runs_nothing(kind: Any) -> None:
    drawn = badge(sample_report(kind))
    root = ElementTree.fromstring(drawn)
    said = " ".join(root.itertext())
    assert ("3 files passed" in said) == (kind == "pass")
    assert kind == "pass" or f"not verified: {kind}" in said
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert tags <= {"svg", "title", "rect", "path", "g", "text"}
    assert not any(name.rpartition("}")[2] == "href" for element in root.iter() for name in element.attrib)


def test_the_card_escapes_what_a_report_brings_along() -> None:
    report = sample_report()
    evil = report.artefacts[1].model_copy(update={"path": "/home/me/<script>|x.gguf"})
    card = verification_card(report.model_copy(update={"artefacts": [report.artefacts[0], evil], "notes": ["<b>|"]}))
    assert "<script>" not in card
    assert "<b>" not in card
    assert "/home/me" not in card
    assert Page(card).tags == []


def test_a_table_of_the_card_has_one_width() -> None:
    for kind in ("pass", "incomplete"):
        tables = re.split(r"\n\n+", verification_card(sample_report(kind)))
        for rows in ([line for line in part.splitlines() if line.startswith("|")] for part in tables):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) <= 1, rows


def test_names_of_the_hubs_cache_are_its_ids() -> None:
    path = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/0123456789abcdef/model"
    assert public_name(path) == "Qwen/Qwen3-0.6B@0123456789ab"
    assert public_name("runs/demo/baked") == "baked"


def test_the_released_report_can_be_decided_again_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed(tmp_path / "run")
    assert here(monkeypatch, "release", tmp_path / "run") == 0
    stored = json.loads((tmp_path / "run" / "release" / "report" / "report.json").read_text())
    assert stored["verdict"] == "pass"
    assert here(monkeypatch, "gate", tmp_path / "run" / "release" / "report") == 0
