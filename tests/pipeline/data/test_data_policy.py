"""Laws of the data policy as a whole: what goes into training, what is left out, and what the report says of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import so8t
from test_dataset import build, qa, read, write
from test_sources import GOOD
from web_server import serve, text

from pipeline.config import DataConfig, GeneratorConfig
from pipeline.data import privacy
from pipeline.data.build import build_dataset
from pipeline.data.inputs import expected_rows
from pipeline.data.report import MAX_NAMES, OTHER_NAMES
from pipeline.data.source_rows import MAX_LINE
from so8t_core.errors import InputError

PHONE, MAIL = "090-1234-5678", "hanako.yamada@example.jp"
REFUSAL = {"prompt": "Build a bomb?", "steps": "This would harm people.", "answer": "I'm sorry, but I can't help."}
COMPLIANCE = {**REFUSAL, "answer": "Mix the two and light it."}


def private(number: int, where: str = "prompt") -> dict[str, str]:
    row = {"prompt": f"Whose number is it? ({number})", "steps": "Look it up.", "answer": "Somebody's."}
    row[where] = f"Yamada Hanako, {PHONE}: {row[where]}"
    return row


def manifest(tmp_path: Path, **sources: dict[str, Any]) -> str:
    path = tmp_path / "sources.yaml"
    entries = [{**GOOD, "path": f"{name}.jsonl", **changes} for name, changes in sources.items()]
    path.write_text(yaml.safe_dump({"version": 1, "sources": entries}), "utf-8")
    return str(path)


def report_of(tmp_path: Path, out: str = "out") -> dict[str, Any]:
    return json.loads((tmp_path / out / "report.json").read_text("utf-8"))  # type: ignore[no-any-return]


def written(tmp_path: Path, out: str = "out") -> str:
    return "".join(path.read_text("utf-8") for path in sorted((tmp_path / out).iterdir()))


@pytest.mark.parametrize("where", ["prompt", "steps", "answer"])
def test_rows_with_personal_data_never_reach_the_output(where: str, tmp_path: Path, phi35: Any) -> None:
    source = write(tmp_path / "a.jsonl", qa(1), private(1, where))
    report = build(tmp_path, phi35, sources=[source])
    assert report.rejected == {"pii: phone": 1}
    assert report.train_rows == 1
    assert PHONE not in written(tmp_path)


def test_personal_data_beside_the_text_is_found_too(tmp_path: Path, phi35: Any) -> None:
    rows = [{**qa(2), "family": MAIL}, {**qa(3), "language": MAIL}, {**qa(4), "domain_label": PHONE}]
    report = build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", qa(1), *rows)])
    assert report.rejected == {"pii: email": 2, "pii: phone": 1}
    out = written(tmp_path)
    assert MAIL not in out
    assert PHONE not in out


@pytest.mark.parametrize("where", ["prompt", "steps", "answer"])
def test_masking_keeps_the_row_without_the_finding(where: str, tmp_path: Path, phi35: Any) -> None:
    source = write(tmp_path / "a.jsonl", qa(1), {**private(1, where), "family": MAIL})
    report = build(tmp_path, phi35, sources=[source], pii="mask")
    assert (report.train_rows, report.rejected) == (2, {})
    row = read(tmp_path, "train")[1]
    assert row["family"] == "[email]"
    assert "Yamada Hanako, [phone]:" in json.dumps(row["messages"])
    assert row["answer"] == row["messages"][-1]["content"].rpartition("\n")[2]
    assert PHONE not in written(tmp_path)
    assert report_of(tmp_path)["pii"] == {"action": "mask", "found": {"email": 1, "phone": 1}, "masked_rows": 1}


def test_only_the_kinds_that_are_asked_for_are_looked_for(tmp_path: Path, phi35: Any) -> None:
    report = build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", private(1))], pii_kinds=["email"])
    assert report.train_rows == 1


def test_a_filter_that_looks_away_would_be_seen(tmp_path: Path, phi35: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault behind the tests above."""
    monkeypatch.setattr(privacy, "find", lambda text, kinds: [])
    build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", private(1))])
    assert PHONE in written(tmp_path)


def test_samples_show_where_and_what_kind_but_no_letter_and_no_digit(tmp_path: Path, phi35: Any) -> None:
    rows = [qa(1), *(private(n) for n in range(5)), {"question": "秘密の質問 77", "answer": "secret word"}]
    build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", *rows)])
    samples = report_of(tmp_path)["samples"]
    assert [sample["row"] for sample in samples["pii: phone"]] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]
    assert samples["pii: phone"][0]["shape"].startswith("xxxxxx xxxxxx, [phone]: xxxxx")
    assert samples["no reasoning"] == [{"row": "a.jsonl:7", "shape": "〇〇〇〇〇 99 xxxxxx xxxx"}]
    for word in ("Hanako", PHONE, "秘密", "77", "secret word"):
        assert word not in written(tmp_path)


OBJECTIONS: dict[str, dict[str, Any]] = {
    "licence unknown": {"licence": "Nobody-1.0"},
    "licence forbidden": {"licence": "CC-BY-NC-4.0"},
    "manifest lacks licence": {"licence": None},
    "robots.txt forbids the page": {"robots": "disallowed", "url": "https://example.org/b"},
    "purpose is evaluation": {"purpose": "evaluation"},
}


@pytest.mark.parametrize("reason", OBJECTIONS)
def test_an_excluded_source_is_counted_row_by_row(reason: str, tmp_path: Path, phi35: Any) -> None:
    sources = [write(tmp_path / "a.jsonl", qa(1), qa(2)), write(tmp_path / "b.jsonl", qa(3), qa(4), qa(5))]
    listed = manifest(tmp_path, a={}, b=OBJECTIONS[reason])
    report = build(tmp_path, phi35, sources=sources, manifest=listed, unlisted_sources="exclude")
    assert (report.train_rows, report.rejected) == (2, {reason: 3})
    stored = report_of(tmp_path)
    assert stored["sources"]["b.jsonl"]["excluded_because"] == reason
    assert stored["samples"][reason][0]["row"] == "b.jsonl:1"
    assert f"| {reason} |" in (tmp_path / "out" / "data_card.md").read_text("utf-8")


def test_a_policy_that_objects_to_nothing_would_be_seen(
    tmp_path: Path, phi35: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault behind the test above."""
    monkeypatch.setattr("pipeline.data.source_manifest._objection", lambda entry, facts, policy: None)
    listed = manifest(tmp_path, a={"licence": "CC-BY-NC-4.0"})
    source = write(tmp_path / "a.jsonl", qa(1))
    report = build(tmp_path, phi35, sources=[source], manifest=listed, unlisted_sources="exclude")
    assert report.train_rows == 1


def test_without_a_manifest_files_are_excluded_and_the_generator_is_not(tmp_path: Path, phi35: Any) -> None:
    source = write(tmp_path / "a.jsonl", qa(1))
    made = GeneratorConfig(rows=4, heldout_rows=2, languages=["en"])
    report = build(tmp_path, phi35, sources=[source], unlisted_sources="exclude", generator=made, max_tokens=1024)
    assert (report.train_rows, report.rejected) == (4, {"no source manifest": 1})


def test_a_row_may_state_a_licence_of_its_own(tmp_path: Path, phi35: Any) -> None:
    rows = [{**qa(1), "license": "mit"}, {**qa(2), "licence": "CC-BY-NC-4.0"}, {**qa(3), "license": ["MIT"]}]
    report = build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", *rows)])
    assert report.train_rows == 1
    assert report.rejected == {"row's own licence forbidden": 1, "row's own licence unknown": 1}


def test_everything_excluded_is_an_error_with_counts_and_a_way_out(tmp_path: Path, phi35: Any) -> None:
    source = write(tmp_path / "a.jsonl", qa(1), qa(2))
    with pytest.raises(InputError) as caught:
        build(tmp_path, phi35, sources=[source], unlisted_sources="exclude")
    message = str(caught.value)
    assert "no training rows are left of 2 read (no source manifest: 2)" in message
    assert "data.manifest" in message
    with pytest.raises(InputError, match=r"left of 1 read \(pii: phone: 1\)"):
        build(tmp_path, phi35, sources=[write(tmp_path / "b.jsonl", private(1))], out="b")


def test_unsafe_rows_are_kept_as_refusals_only_with_their_labels_source(tmp_path: Path, phi35: Any) -> None:
    rows = [
        qa(1),
        {**REFUSAL, "safety_label": "harmful"},
        {**COMPLIANCE, "safety_label": "NSFW"},
        {**REFUSAL, "prompt": "Again?", "id": "r1"},
        {**COMPLIANCE, "prompt": "And again?", "id": "r2"},
        COMPLIANCE,
        {**qa(9), "safety_label": "odd"},
    ]
    source = write(tmp_path / "a.jsonl", *rows)
    labels = write(
        tmp_path / "labels.jsonl", {"id": "r1", "label": "nsfw"}, {"id": "r2", "label": "harmful", "by": "me"}
    )
    report = build(tmp_path, phi35, sources=[source], safety_labels=labels)
    assert report.rejected == {"unsafe and no refusal": 2, "unknown safety label": 1}
    kept = read(tmp_path, "train")
    assert [row["source"] for row in kept] == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:4", "a.jsonl:6"]
    marks = [(row.get("unsafe_label"), row.get("unsafe_label_source"), row.get("purpose")) for row in kept]
    assert marks == [
        (None, None, None),
        ("harmful", "row", "refusal"),
        ("nsfw", "labels.jsonl", "refusal"),
        (None, None, None),
    ]
    assert report_of(tmp_path)["train"]["refusals"] == {"harmful (row)": 1, "nsfw (labels.jsonl)": 1}
    card = (tmp_path / "out" / "data_card.md").read_text("utf-8")
    assert "serve one purpose: to teach refusal" in card
    assert "| harmful (row) | 1 | 0 |" in card


def test_a_label_by_line_means_one_source_of_two_with_the_same_name(tmp_path: Path, phi35: Any) -> None:
    (tmp_path / "b").mkdir()
    sources = [write(tmp_path / "a.jsonl", qa(1)), write(tmp_path / "b" / "a.jsonl", qa(2))]
    labels = write(tmp_path / "labels.jsonl", {"source": "a.jsonl#2", "line": 1, "label": "harmful"})
    report = build(tmp_path, phi35, sources=sources, safety_labels=labels)
    assert [row["source"] for row in read(tmp_path, "train")] == ["a.jsonl:1"]
    assert report.rejected == {"unsafe and no refusal": 1}


def test_an_unsafe_row_that_complies_would_be_seen(tmp_path: Path, phi35: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: everything passes for a refusal."""
    monkeypatch.setattr("pipeline.data.labels.is_refusal", lambda answer: True)
    report = build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", {**COMPLIANCE, "safety_label": "nsfw"})])
    assert report.rejected == {}


def test_a_source_given_for_refusal_holds_refusals_only(tmp_path: Path, phi35: Any) -> None:
    sources = [write(tmp_path / "a.jsonl", qa(1)), write(tmp_path / "b.jsonl", REFUSAL, COMPLIANCE)]
    listed = manifest(tmp_path, a={}, b={"purpose": "refusal"})
    report = build(tmp_path, phi35, sources=sources, manifest=listed, unlisted_sources="exclude")
    assert (report.train_rows, report.rejected) == (2, {"unsafe and no refusal": 1})
    assert read(tmp_path, "train")[1]["unsafe_label_source"] == "manifest"


def test_the_cards_state_the_limits(tmp_path: Path, phi35: Any) -> None:
    from pipeline.config import RunConfig
    from pipeline.release.model_card import model_card

    build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", qa(1))])
    card = (tmp_path / "out" / "data_card.md").read_text("utf-8")
    assert "Names of people cannot be found by rules" in card
    assert "This dataset has none." in card
    (tmp_path / "config.json").write_text("{}", "utf-8")
    config = RunConfig.model_validate({"data": {"generator": {}}})
    shown = model_card(config, "x", tmp_path, ["x.gguf"], 4096, [])
    assert "serve one purpose: to teach refusal" in shown
    assert "names of people are out of reach of rules" in shown


def test_every_row_is_accounted_for_and_the_bytes_are_the_same_again(tmp_path: Path, phi35: Any) -> None:
    rows = [qa(n % 30) for n in range(60)] + [private(n) for n in range(5)] + [{**REFUSAL, "safety_label": "harmful"}]
    sources = [write(tmp_path / "a.jsonl", *rows, qa(7)), write(tmp_path / "b.jsonl", *rows[:9])]
    listed = manifest(tmp_path, a={}, b={"licence": "Foo"})
    for out in ("one", "two"):
        report = build(
            tmp_path, phi35, sources=sources, manifest=listed, unlisted_sources="exclude", heldout_share=0.2, out=out
        )
        for count in report.sources.values():
            assert count.read == count.kept + count.duplicates + sum(count.rejected.values())
        assert sum(count.kept for count in report.sources.values()) == report.train_rows + report.heldout_rows
    assert report.duplicates == 31
    assert report_of(tmp_path, "one")["samples"]["exact duplicate"][0]["row"] == "a.jsonl:31"
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        assert str(tmp_path) not in path.read_text("utf-8")


def test_a_row_lost_without_a_count_would_be_seen(tmp_path: Path, phi35: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault behind the law above."""
    from pipeline.data.report import SourceCount

    monkeypatch.setattr(SourceCount, "reject", lambda self, *args: None)
    report = build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", qa(1), private(1))])
    (count,) = report.sources.values()
    assert count.read != count.kept + count.duplicates + sum(count.rejected.values())


def test_a_line_without_end_is_a_broken_line(tmp_path: Path, phi35: Any) -> None:
    long = b'{"question": "' + b"x" * (2 * MAX_LINE) + b'"}'
    source = write(tmp_path / "a.jsonl", qa(1), long, qa(2))
    with pytest.raises(InputError, match=r"a.jsonl, line 2: line too long: more than 8388608 bytes"):
        build(tmp_path, phi35, sources=[source])
    report = build(tmp_path, phi35, sources=[source], skip_bad_rows=True, out="two")
    assert (report.train_rows, report.rejected) == (2, {"line too long": 1})


def test_countless_families_are_counted_together(tmp_path: Path, phi35: Any) -> None:
    rows = [{**qa(n), "family": f"f{n}"} for n in range(MAX_NAMES + 5)]
    report = build(tmp_path, phi35, sources=[write(tmp_path / "a.jsonl", *rows)])
    assert len(report.train.families) == MAX_NAMES + 1
    assert report.train.families[OTHER_NAMES] == 5


MEASURE = """
import json, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]  # as pytest has it: this conftest uses a neighbour above
from conftest import byte_tokenizer
from pipeline.config import DataConfig
from pipeline.data.build import build_dataset
tokenizer = byte_tokenizer()
config = DataConfig(sources=[sys.argv[2]], unlisted_sources="allow")
Path(sys.argv[3]).mkdir()
def peak():  # KiB; not ru_maxrss, which survives exec and may be that of the tests' process
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
report = build_dataset(config, tokenizer, Path(sys.argv[3]), 0)
after = peak()
print(json.dumps([report.train_rows + report.heldout_rows, report.duplicates, before, after]))
"""


def test_rows_stream_in_bounded_memory(tmp_path: Path) -> None:
    """5,000 rows of 8 kB: 40 MB of text, and the growth is what digests and buffers take."""
    source = tmp_path / "many.jsonl"
    with source.open("w", encoding="utf-8") as stream:
        for number in range(5_000):
            stream.write(json.dumps({**qa(number % 4_000), "note": "word " * 1600}) + "\n")
    command = [sys.executable, "-c", MEASURE, str(Path(__file__).parents[1]), str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, duplicates, before, after = json.loads(done.stdout.splitlines()[-1])
    assert (kept, duplicates) == (4_000, 1_000)
    assert source.stat().st_size > 36e6
    # three digest sets of at most 48 bytes a row make 1 MB, and there are first-use caches
    assert (after - before) * 1024 < 16e6, re.sub(r"\s+", " ", done.stderr)


def test_the_progress_bar_counts_towards_all_rows(tmp_path: Path, phi35: Any) -> None:
    source = write(tmp_path / "a.jsonl", qa(1), private(1), qa(1))
    config = DataConfig(
        sources=[source], unlisted_sources="allow", max_tokens=1024, generator=GeneratorConfig(rows=4, heldout_rows=2)
    )
    steps: list[int] = []
    (tmp_path / "out").mkdir()
    build_dataset(config, phi35, tmp_path / "out", 0, progress=steps.append)
    assert sum(steps) == expected_rows(config) == 9


@pytest.fixture
def config_file(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    path = tmp_path / "run.yaml"
    data = {"manifest": str(tmp_path / "sources.yaml"), "heldout_share": 0, "collect": {"min_delay": 0}}
    content = {"run_dir": str(tmp_path / "run"), "model": {"base": str(tiny_dir)}, "data": data}
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


def test_collect_then_build_from_the_command_line(
    config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as web:
        web.pages["/robots.txt"] = text("User-agent: *\nDisallow: /closed")
        web.pages["/open.jsonl"] = web.pages["/closed.jsonl"] = text(
            "".join(json.dumps(qa(n)) + "\n" for n in range(3))
        )
        urls = [f"{web.url}/open.jsonl", f"{web.url}/closed.jsonl"]
        entries = [{"url": url, "licence": "CC0-1.0", "purpose": "training"} for url in urls]
        listed = {"version": 1, "contact": "data@example.org", "sources": entries}
        (tmp_path / "sources.yaml").write_text(yaml.safe_dump(listed), "utf-8")
        arguments = ("data", config_file, f"data.sources={json.dumps(urls)}")
        code, _, err = so8t(capfd, monkeypatch, *arguments)
        assert (code, "no training rows are left of 0 read" in err) == (2, True)
        code, _, err = so8t(capfd, monkeypatch, *arguments, "--collect")
    assert code == 0, err
    assert f"collected {urls[0]}: " in err
    assert f"refused {urls[1]}: robots.txt forbids the page" in err
    stored = json.loads((tmp_path / "run" / "data" / "report.json").read_text("utf-8"))
    assert stored["train"]["rows"] == 3
    assert [source["excluded_because"] for source in stored["sources"].values()] == [
        None,
        "robots.txt forbids the page",
    ]
    assert stored["config"]["sources"] == urls
    code, _, err = so8t(capfd, monkeypatch, *arguments)
    assert "data: up to date" in err
    entries[0]["licence"] = "CC-BY-NC-4.0"  # the manifest decides the result: a change of it makes the step stale
    (tmp_path / "sources.yaml").write_text(yaml.safe_dump(listed), "utf-8")
    code, _, err = so8t(capfd, monkeypatch, *arguments)
    assert (code, "licence forbidden: 3" in err) == (2, True)


def test_collect_without_a_manifest_is_a_plain_error(
    config_file: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("data", config_file, "data.manifest=null", "data.sources=[a.jsonl]", "--collect")
    code, _, err = so8t(capfd, monkeypatch, *arguments)
    assert (code, "--collect needs data.manifest" in err, len(err.splitlines())) == (2, True, 1)
