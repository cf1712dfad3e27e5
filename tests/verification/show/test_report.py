"""Laws of the report: the page stands alone, nothing from outside is obeyed, the forms agree, the bytes are stable.

Each law is followed by a proof that its check can fail (the same check on a broken report or page).
"""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from report_page import Page, faults_of_page
from rich.console import Console
from sample_report import KINDS, Kind, bare_report, check, sample_report

from so8t_core.errors import InputError
from verification.gate.report import Report
from verification.show.junit import junit_xml
from verification.show.terminal import verdict_table
from verification.show.words import VERDICT_WORDS, number, steps, texts
from verification.show.write import json_schema, load_report, to_html, to_json, to_markdown, write_report

HOSTILE = "<script>alert(1)</script>\"'&</details>|`x` \x00\x07\x1b[31m\u202egpj.exe $x^{"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def hostile_report() -> Report:
    report = sample_report("fail")
    raw = json.loads(to_json(report).replace("Q8_0", json.dumps("Q8" + HOSTILE)[1:-1]))
    raw["summary"] = raw["notes"][0] = raw["legs"][0]["checks"][0]["detail"] = raw["legs"][2]["compared"] = HOSTILE
    raw["versions"] = {HOSTILE: HOSTILE}
    raw["policy"] = {HOSTILE: [HOSTILE]}
    raw["artefacts"][0]["path"] = f"runs/{HOSTILE}"
    raw["training"]["curves"][0]["name"] = HOSTILE
    raw["answers"]["samples"][0]["after"] = HOSTILE
    return Report.model_validate(raw)


@cache
def page_of(kind: Kind) -> str:
    return to_html(sample_report(kind))


def said(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("kind", KINDS)
def test_page_stands_alone_and_says_verdict_and_every_failure(kind: Kind) -> None:
    report = sample_report(kind)
    html = page_of(kind)
    assert faults_of_page(html) == []
    text = said(Page(html).text)
    assert VERDICT_WORDS[report.verdict] in text
    assert report.summary in text
    open_checks = [c for leg in report.legs for c in leg.checks if c.status != "pass"]
    assert open_checks
    section = said(Page(html[html.index("h-attention") : html.index("h-notes")]).text)
    for c in open_checks:
        assert c.title in section
        assert texts(c)[0] in section or c.value is None
        assert c.reason in section
    assert html.count("<figure") == html.count("</figure>") >= 10


@pytest.mark.parametrize(
    "bad",
    [
        "<script>1</script>",
        '<img src="https://example.org/x.png">',
        '<p onclick="x()">a</p>',
        '<a href="http://example.org">a</a>',
        '<i id="h-kld"></i>',
        '<i style="clip-path:url(#nowhere)"></i>',
        "<style>@import 'x'</style>",
        "<div>",
    ],
)
def test_the_page_check_can_fail(bad: str) -> None:
    html = page_of("pass")
    assert faults_of_page(html.replace("<main>", f"<main>{bad}", 1)) != []


def test_hostile_text_is_shown_and_never_obeyed() -> None:
    report = hostile_report()
    html, markdown, junit = to_html(report), to_markdown(report), junit_xml(report)
    assert faults_of_page(html) == []
    assert "<script" not in html + markdown + junit
    assert "<script>alert(1)</script>" in Page(html).text  # shown as text
    for form in (html, markdown, junit):
        assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\u202a-\u202e\u2066-\u2069]", form)
        assert "[U+202E]" in form.replace("\\", "")  # Markdown escapes the brackets
    rows = [line for line in markdown.splitlines() if "✓ pass" in line and line.startswith("|")]
    assert rows
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 9 for row in rows)  # a | in a label adds no column
    ET.fromstring(junit)
    out = io.StringIO()
    Console(file=out, width=80).print(verdict_table(report))
    assert "\x1b" not in out.getvalue()
    assert "\u202e" not in out.getvalue()


def faults_of_junit(report: Report, text: str) -> list[str]:
    """Differences between the document and the report's checks."""
    root = ET.fromstring(text)
    cases = [case for case in root.iter("testcase") if case.get("classname") != "so8t.verdict"]
    checks = [(leg, c) for leg in report.legs for c in leg.checks]
    if len(cases) != len(checks):
        return [f"{len(cases)} cases, {len(checks)} checks"]
    expected = {
        "pass": None,
        "fail": ("failure", "failure"),
        "inconclusive": ("failure", "inconclusive"),
        "waived": ("skipped", None),
        "not evaluated": ("skipped", None),
    }
    faults = []
    for case, (leg, c) in zip(cases, checks, strict=True):
        node = next((child for child in case if child.tag in ("failure", "skipped")), None)
        found = None if node is None else (node.tag, node.get("type"))
        if found != expected[c.status] or case.get("classname") != f"so8t.{leg.name}":
            faults.append(f"{c.name}: {c.status} -> {found}")
        if node is not None and (
            c.title not in (node.get("message") or "") or c.reason not in (node.get("message") or "")
        ):
            faults.append(f"{c.name}: message {node.get('message')}")
    for holder in [root, *root]:
        for key, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
            if int(holder.get(key, "-1")) != len(list(holder.iter(tag))):
                faults.append(f"{holder.get('name')}: {key} = {holder.get(key)}")
    names = [(case.get("classname"), case.get("name")) for case in root.iter("testcase")]
    return faults + ([] if len(names) == len(set(names)) else ["two cases of one name"])


@pytest.mark.parametrize("kind", KINDS)
def test_junit_has_one_case_a_check_and_is_red_unless_passed(kind: Kind) -> None:
    report = sample_report(kind)
    text = junit_xml(report)
    assert faults_of_junit(report, text) == []
    assert (int(ET.fromstring(text).get("failures", "0")) == 0) == (kind == "pass")
    assert faults_of_junit(report, text.replace('failures="', 'failures="1'))
    assert faults_of_junit(sample_report("fail" if kind == "pass" else "pass"), text)


@pytest.mark.parametrize("kind", ["fail", "incomplete"])
def test_json_round_trips_bit_equal_and_bytes_are_deterministic(kind: Kind, tmp_path: Path) -> None:
    report = sample_report(kind)
    first, second = write_report(report, tmp_path / "a"), write_report(load_report(tmp_path / "a"), tmp_path / "b")
    names = ["junit.xml", "report.html", "report.intoto.json", "report.json", "report.md"]
    assert sorted(path.name for path in first.values()) == names
    for form, path in first.items():
        assert path.read_bytes() == second[form].read_bytes(), form
    assert load_report(first["json"]) == report
    changed = report.model_copy(update={"summary": "x"})
    assert to_html(changed) != page_of(kind)


def test_non_finite_numbers_survive_strict_json(tmp_path: Path) -> None:
    report = bare_report()
    report.legs[0].checks[:] = [
        check("a", "A", "fail", value=math.inf, bound=1.0),
        check("b", "B", "fail", value=math.nan, bound=1.0),
        check("c", "C", value=-math.inf, bound=1.0),
    ]
    paths = write_report(report, tmp_path)
    json.loads(paths["json"].read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    values = [c.value for c in load_report(paths["json"]).legs[0].checks]
    assert values[0] == math.inf
    assert isinstance(values[1], float)
    assert math.isnan(values[1])
    assert values[2] == -math.inf
    assert "infinite" in Page(to_html(report)).text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "Run `so8t verify"),
        (b'{"schema_version": "1.0", ', "is not JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "no SO8T report"),
        (b'{"schema_version": "2.0"}', "this version reads 1.x"),
        (b'{"schema_version": "1.0", "legs": [3]}', "not a valid report"),
    ],
)
def test_a_bad_report_file_is_one_clear_line(content: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(says)) as caught:
        load_report(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_optional_sections_vanish_without_holes() -> None:
    html = to_html(bare_report())
    page = Page(html)
    assert faults_of_page(html) == []
    shown = {name for name in page.ids if name.startswith("h-")}
    assert shown == {"h-ladder", "h-checks", "h-bound"}
    assert not {"figure", "figcaption"} & {tag for tag, _ in page.tags}
    for word in ("None", "Undefined", "nan"):
        assert word not in page.text
    whole = Page(page_of("fail")).ids
    for name in ("attention", "notes", "cells", "kld", "noise", "tensors", "training", "answers", "guards"):
        assert f"h-{name}" in whole  # the same look finds them where they are


def faults_of_schema(value: object, schema: dict, root: dict, where: str = "report") -> list[str]:
    """A small reader of the parts of JSON Schema that the report's schema uses; unknown parts are faults themselves."""
    if "$ref" in schema:
        return faults_of_schema(value, root["$defs"][schema["$ref"].split("/")[-1]], root, where)
    if "anyOf" in schema:
        tried = [faults_of_schema(value, option, root, where) for option in schema["anyOf"]]
        return [] if [] in tried else [f"{where}: {value!r} is none of {len(tried)}"]
    if "enum" in schema or "const" in schema:
        allowed = schema.get("enum", [schema.get("const")])
        return [] if value in allowed else [f"{where}: {value!r} is not in {allowed}"]
    kinds = {"string": str, "integer": int, "number": (int, float), "null": type(None), "array": list, "object": dict}
    kinds["boolean"] = bool
    kind = schema.get("type")
    if kind is None:
        return [] if not set(schema) - {"title", "default", "description"} else [f"{where}: unread {sorted(schema)}"]
    if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return [f"{where}: {value!r} is no {kind}"]
    faults = []
    if isinstance(value, list):
        each = schema.get("prefixItems") or [schema["items"]] * len(value)
        faults += [f"{where}: {len(value)} items"] if len(each) != len(value) else []
        for i, (item, part) in enumerate(zip(value, each, strict=False)):
            faults += faults_of_schema(item, part, root, f"{where}[{i}]")
    elif isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        faults += [f"{where}: no {name}" for name in schema.get("required", []) if name not in value]
        for key, item in value.items():
            part = known.get(key, more)
            if part is False:
                faults.append(f"{where}: unknown {key}")
            elif isinstance(part, dict):
                faults += faults_of_schema(item, part, root, f"{where}.{key}")
    return faults


@pytest.mark.parametrize("kind", KINDS)
def test_every_report_meets_the_published_schema_and_a_changed_one_does_not(kind: Kind) -> None:
    schema = json_schema()
    report = sample_report(kind)
    report.legs[0].checks[0].value = math.inf
    report.divergences[0].max_kld = math.nan
    stored = json.loads(to_json(report))
    assert faults_of_schema(stored, schema, schema) == []
    for path, value in (
        (("verdict",), "good"),
        (("cells", 0, "divergence", "mean_kld"), "low"),
        (("noise", 0, "positions"), 1.5),
        (("legs", 0, "name"), "other"),
        (("legs", 0, "checks", 0, "more"), 1),
        (("divergences", 0, "mean_kld_interval"), [0.0]),
    ):
        broken = json.loads(to_json(report))
        node = broken
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = value
        assert faults_of_schema(broken, schema, schema), path
    del stored["policy"]
    assert faults_of_schema(stored, schema, schema) == ["report: no policy"]


def test_cells_show_every_value_and_every_reason() -> None:
    report = sample_report("pass")
    text = said(Page(page_of("pass")).text)
    for cell in report.cells:
        assert cell.title in text
        assert (cell.why or number(cell.divergence.mean_kld if cell.divergence else None)) in text
    assert "1,613 times the floor" in text  # 5e-5 over 3.1e-8


def test_forms_agree_on_verdict_and_headlines() -> None:
    for kind in KINDS:
        report = sample_report(kind)
        out = io.StringIO()
        Console(file=out, width=80, no_color=True).print(verdict_table(report))
        terminal, markdown = out.getvalue(), to_markdown(report)
        assert max(map(len, terminal.splitlines())) <= 80
        assert "\x1b" not in terminal
        assert VERDICT_WORDS[report.verdict] in terminal
        assert markdown.startswith(f"## {VERDICT_WORDS[report.verdict]}\n")
        html = said(Page(page_of(kind)).text)
        for step in steps(report):
            if step.headline and not step.as_count:
                value = texts(step.headline)[0]
                assert value in html
                assert value in markdown
                assert value in said(terminal)


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")
@pytest.mark.timeout(90)
def test_a_real_browser_renders_the_page_without_sideways_scrolling(tmp_path: Path) -> None:
    paths = write_report(sample_report("fail"), tmp_path)
    probe = tmp_path / "probe.html"
    # The policy forbids scripts in the page, so a frame of phone width around it does the measuring.
    probe.write_text(
        f'<iframe id=f src="{paths["html"].name}" style="width:390px;height:900px;border:0"></iframe><p id=out></p>'
        "<script>f.onload=()=>{const d=f.contentDocument,e=d.documentElement;"
        "out.textContent=[d.querySelector('h1').textContent,e.scrollWidth,d.querySelectorAll('figure svg').length,"
        "d.querySelector('figure svg').getBoundingClientRect().width].join(';')}</script>"
    )
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --allow-file-access-from-files --virtual-time-budget=4000 --dump-dom"
    )
    assert BROWSER is not None
    done = subprocess.run(
        [BROWSER, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=80,
        check=False,
    )
    found = re.search(r'<p id="out">([^<]*)</p>', done.stdout)
    assert found, done.stderr[-500:]
    title, width, figures, drawn = found[1].split(";")
    assert title == VERDICT_WORDS["fail"]
    assert int(width) <= 390
    assert int(figures) >= 10
    assert float(drawn) > 250
