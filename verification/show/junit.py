"""The report as JUnit XML: one test case per check, one test suite per leg, so that every CI system can show it.

fail -> failure; inconclusive -> failure of type "inconclusive"; not evaluated -> skipped; waived -> skipped with its
reason. A last suite, "verdict", holds one case that fails whenever the verdict is not "pass": an incomplete run has
only skipped checks and would otherwise look green. Characters that XML 1.0 forbids are written as [U+XXXX].
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

from verification.gate.report import Check, Leg, Report
from verification.show.words import next_action, texts, visible

_SUITE_PREFIX = "so8t"


def junit_xml(report: Report) -> str:
    """The whole document as text, ending with a newline; the same report gives the same bytes."""
    root = ET.Element("testsuites", name=_SUITE_PREFIX)
    seen: dict[str, int] = {}
    for leg in report.legs:
        suite = _suite(root, leg.name, report)
        for check in leg.checks:
            _case(suite, leg, check, _unique(_case_name(check), f"{leg.name}", seen))
        if not leg.checks:
            empty = Check(name=leg.name, title=leg.title, status=leg.status, detail="this leg holds no check")
            _case(suite, leg, empty, leg.name)
    suite = _suite(root, "verdict", report)
    case = ET.SubElement(suite, "testcase", classname=f"{_SUITE_PREFIX}.verdict", name="release", time="0")
    if report.verdict != "pass":
        text = visible(report.summary)
        ET.SubElement(case, "failure", type=report.verdict, message=text).text = f"{text}\n{next_action(report)}"
    _provenance(suite, report)
    for suite in root:
        _count(suite)
    for key in ("tests", "failures", "errors", "skipped"):
        root.set(key, str(sum(int(suite.get(key, "0")) for suite in root)))
    root.set("time", f"{sum(report.durations.values()):.3f}")
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(root: ET.Element, name: str, report: Report) -> ET.Element:
    seconds = report.durations.get(name, 0.0)
    timestamp = visible(report.created).removesuffix("Z").removesuffix("+00:00")
    return ET.SubElement(root, "testsuite", name=f"{_SUITE_PREFIX}.{name}", timestamp=timestamp, time=f"{seconds:.3f}")


def _case_name(check: Check) -> str:
    return visible(f"{check.name}[{check.subject}]" if check.subject else check.name)


def _unique(name: str, leg: str, seen: dict[str, int]) -> str:
    """A unique case name: repeats get a number, because CI systems merge cases of one name."""
    count = seen[f"{leg}\0{name}"] = seen.get(f"{leg}\0{name}", 0) + 1
    return name if count == 1 else f"{name} ({count})"


def _case(suite: ET.Element, leg: Leg, check: Check, name: str) -> None:
    case = ET.SubElement(suite, "testcase", classname=f"{_SUITE_PREFIX}.{leg.name}", name=name, time="0")
    message = _message(check)
    body = visible(f"{leg.title}\ncompared: {leg.compared}\n{message}")
    if check.status in ("fail", "inconclusive"):
        kind = "failure" if check.status == "fail" else "inconclusive"
        ET.SubElement(case, "failure", type=kind, message=message).text = body
    elif check.status != "pass":
        ET.SubElement(case, "skipped", message=message)
    ET.SubElement(case, "system-out").text = message


def _message(check: Check) -> str:
    """ "Mean KL divergence (F16): 0.165 nats, bound <= 5e-5. <detail>", with the status word for a skipped case."""
    value, bound = texts(check)
    subject = f" ({check.subject})" if check.subject else ""
    parts = [f"{check.title}{subject}: {value}" + (f", bound {bound}" if bound else "")]
    if check.status == "waived":
        parts.insert(0, f"waived: {check.reason or 'no reason given'}")
    elif check.status == "not evaluated":
        parts.insert(0, "not evaluated")
    if check.detail:
        parts.append(check.detail)
    return visible(". ".join(parts))


def _provenance(suite: ET.Element, report: Report) -> None:
    """Write the provenance (digests, versions) as properties of the verdict suite."""
    properties = ET.Element("properties")
    suite.insert(0, properties)
    entries = [("verdict", report.verdict), ("schema_version", report.schema_version)]
    entries += [(f"sha256.{a.role}.{a.label or a.path}", a.sha256) for a in report.artefacts]
    entries += [(f"version.{name}", version) for name, version in report.versions.items()]
    for name, value in entries:
        ET.SubElement(properties, "property", name=visible(name), value=visible(value))


def _count(suite: ET.Element) -> None:
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", "0")
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
