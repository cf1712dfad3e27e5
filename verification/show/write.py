"""Writes and reads the report: report.json is the source, the HTML, Markdown and JUnit forms are made from it.

report.json and its statement are written first; each file is whole or absent. The HTML page needs no network and no
script; every text from outside is escaped, and characters that hide or reorder text are shown as [U+XXXX].
report.json is strict JSON: a NaN or infinite number is written as "NaN", "Infinity" or "-Infinity", and read as such.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic import ValidationError

from so8t_core.errors import InputError
from so8t_core.files import write_text
from verification.gate.check import not_evaluated
from verification.gate.report import NOT_FINITE, SCHEMA_VERSION, Check, Report, Status
from verification.gate.statement import write_statement
from verification.gate.strict_json import read_json
from verification.show import figures, tensor_map, words
from verification.show.junit import junit_xml
from verification.show.terminal import decisive_text
from verification.show.words import Step, margin, number, texts, visible

_MARKS: dict[Status, str] = {"pass": "✓", "fail": "✕", "inconclusive": "?", "not evaluated": "–", "waived": "!"}
_SIGNS = {"<=": "≤", ">=": "≥", "==": "=", "!=": "≠"}


def write_report(report: Report, out_dir: Path) -> dict[str, Path]:
    """Write report.json, .html, .md, junit.xml and the statement into `out_dir`; returns {"json": path, ...}.

    report.json and its statement come first. A form that cannot be made or written is left out of the result;
    `report.notes` names it, also in the file.

    Raises:
        InputError: report.json or its statement cannot be written.
    """
    forms = {
        "html": ("report.html", to_html),
        "md": ("report.md", to_markdown),
        "junit": ("junit.xml", junit_xml),
    }
    for name, _ in forms.values():  # no form of another report may stay beside this one
        with contextlib.suppress(OSError):
            (Path(out_dir) / name).unlink()
    written = _write_source(report, out_dir)
    lost = []
    for kind, (name, draw) in forms.items():
        try:
            write_text(Path(out_dir) / name, draw(report))
        except Exception as error:  # plots, templates, a full disk: the verdict is valid without them
            lost.append(not_evaluated(name, error))
        else:
            written[kind] = Path(out_dir) / name
    if lost:
        report.notes.extend(note for note in lost if note not in report.notes)
        _write_source(report, out_dir)
    return written


def _write_source(report: Report, out_dir: Path) -> dict[str, Path]:
    """report.json and the statement that binds it to its inputs."""
    path = Path(out_dir) / "report.json"
    write_text(path, to_json(report))
    return {"json": path, "statement": write_statement(report, path)}


def load_report(path: Path) -> Report:
    """Read a report.json (or the one inside a directory).

    Raises:
        InputError: missing, not JSON, another major schema version, or not a report; the message says what to do.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "report.json"
    try:
        raw = read_json(path)
    except FileNotFoundError:
        raise InputError(f"no report at {path}. Run `so8t verify --out {path.parent}` first.") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Check the path and its permissions.") from None
    except ValueError as error:
        what = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
        raise InputError(f"{path} is not JSON ({what}). It was cut off or edited; run `so8t verify` again.") from None
    found = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(found, str):
        raise InputError(f"{path} is no SO8T report: it has no schema_version. Give the report.json of `so8t verify`.")
    if found.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise InputError(
            f"{path} has report schema {visible(found)[:40]!r}, this version reads {SCHEMA_VERSION.split('.')[0]}.x. "
            "Use the so8t version that wrote it, or run `so8t verify` again."
        )
    try:
        return Report.model_validate(_restore(raw))
    except ValidationError as error:
        first = error.errors()[0]
        where = " ".join(visible(".".join(str(part) for part in first["loc"])).split())[:200]
        what = " ".join(visible(first["msg"].removeprefix("Value error, ")).split())[:300]
        raise InputError(
            f"{path} (report schema {SCHEMA_VERSION}) is not a valid report: {where}{': ' if where else ''}{what}. "
            "Run `so8t verify` again."
        ) from None


def to_json(report: Report) -> str:
    """Strict JSON, UTF-8, fields in schema order, floats at full precision."""
    return strict_json(report.model_dump(mode="python"))


def strict_json(value: Any) -> str:
    """A value as strict JSON with a line feed at its end; a non-finite number is a word: "NaN", "Infinity"."""
    text = json.dumps(_strict(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # a lone surrogate becomes its JSON escape


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of report.json. A non-finite number is a word: "NaN", "Infinity", "-Infinity"."""
    schema = Report.model_json_schema(mode="serialization")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"SO8T verification report {SCHEMA_VERSION}"
    words = {"enum": list(NOT_FINITE)}
    return cast("dict[str, Any]", _with_words(schema, words))


def _with_words(node: Any, words: dict[str, Any]) -> Any:
    """The schema with every float also allowed as one of the words."""
    if isinstance(node, list):
        return [_with_words(item, words) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "number":
        rest = {key: value for key, value in node.items() if key != "type"}
        return {**rest, "anyOf": [{"type": "number"}, words]}
    return {key: _with_words(value, words) for key, value in node.items()}


@cache
def _page_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("verification.show"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value,
    )
    environment.filters.update(_FILTERS)
    environment.filters["breakable"] = _breakable
    return environment


def to_html(report: Report) -> str:
    """The whole page; the same report gives the same bytes."""
    page = _page_environment().get_template("report.html.j2")
    return page.render(_context(report), figures=_figures(report))


def to_markdown(report: Report) -> str:
    """A short form for a step summary."""
    return render_markdown("report.md.j2", **_context(report))


@cache
def _markdown_environment() -> Environment:
    environment = Environment(  # not HTML: `finalize` escapes Markdown's markup
        loader=PackageLoader("verification.show"),
        autoescape=False,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _markdown_escape(value) if isinstance(value, str) else value,
    )
    environment.filters.update(_FILTERS)
    return environment


def render_markdown(template: str, **fields: Any) -> str:
    """A Markdown template filled with its fields; every text is escaped."""
    return _markdown_environment().get_template(template).render(fields)


def _context(report: Report) -> dict[str, Any]:
    steps = words.steps(report)
    rungs = [step for step in steps if words.is_rung(step)]
    statuses = Counter(check.status for leg in report.legs for check in leg.checks)
    return {
        "report": report,
        "verdict_words": words.VERDICT_WORDS[report.verdict],
        "decisive": words.decisive(report),
        "decisive_text": decisive_text(report),
        "next_action": words.next_action(report),
        "trained_words": words.trained_words(report),
        "attention": words.attention(report),
        "counts": [(status, statuses[status]) for status in words.SEVERITY if statuses[status]],
        "rungs": rungs,
        "guards": [step for step in steps if step not in rungs],
        "scale": _scale(rungs),
        "fallbacks": _fallbacks(report),
        "worst_tensors": figures.worst_tensors(report),
        "tensor_maps": tensor_map.tensor_maps(report),
        "unproven": tensor_map.unproven(report),
        "percentiles": figures.percentiles([*report.divergences, *report.base_divergences]),
        "divergences": [(d, False) for d in report.divergences] + [(d, True) for d in report.base_divergences],
        "policy_yaml": yaml.safe_dump(json.loads(to_json(report))["policy"], sort_keys=False, allow_unicode=True),
        "marks": _MARKS,
        "cells": _cells(report),
        "cell_labels": list(dict.fromkeys(cell.candidate for cell in report.cells)),
        "noise_worst": max((row.mean_kld for row in report.noise if row.mean_kld > 0), default=0.0),
        "noise_bound": _noise_bound(report),
    }


def _figures(report: Report) -> dict[str, Any]:
    """Figure name -> safe SVG, only figures with data; "training" is a list of (caption, SVG)."""
    single = {
        "distribution": figures.kld_distribution(report),
        "position": figures.kld_by_position(report),
        "confidence": figures.kld_by_confidence(report),
        "cells": figures.kld_by_cell(report),
        "size": figures.size_tradeoff(report),
        "tensors": figures.tensor_errors(report),
        "angles": figures.angles_by_layer(report),
        "blocks": figures.angles_by_block(report),
    }
    curves = [(caption, Markup(svg)) for caption, svg in figures.training_curves(report)]
    return {name: Markup(svg) if svg else None for name, svg in single.items()} | {"training": curves}


def _cells(report: Report) -> list[dict[str, Any]]:
    """One entry for each cell: title, setting, why it does not apply, each candidate's divergence and worst status."""
    statuses: dict[tuple[str, str], list[Status]] = {}
    for check in (check for leg in report.legs if leg.name == "cells" for check in leg.checks):
        statuses.setdefault((check.name.split(".")[1], check.subject), []).append(check.status)
    rows: dict[str, dict[str, Any]] = {}
    for cell in report.cells:
        row = rows.setdefault(cell.cell, {"title": cell.title, "setting": cell.setting, "why": cell.why, "of": {}})
        if cell.divergence is not None:
            found = statuses.get((cell.cell, cell.candidate))
            status = words.worst(found) if found else None  # None: a cell without a bound
            row["of"][cell.candidate] = {"d": cell.divergence, "status": status}
    return list(rows.values())


def _noise_bound(report: Report) -> float | None:
    checks = (check for leg in report.legs for check in leg.checks if check.name == "evidence.noise_floor")
    return next((float(c.bound) for c in checks if isinstance(c.bound, (int, float))), None)


def _scale(rungs: list[Step]) -> dict[str, Any]:
    """The ladder's common log axis: whole decades around all steps, at most -6 .. +4, and the place of the bound."""
    margins = [step.distance for step in rungs if step.distance]
    ends = [d for m in margins for d in (m.best, m.worst) if math.isfinite(d)]
    low, high = max(-6, min(-2, math.floor(min(ends, default=-2)))), min(4, max(1, math.ceil(max(ends, default=1))))

    def position(decades: float) -> float:
        return round(100 * (min(max(decades, low), high) - low) / (high - low), 2)

    ticks = [(position(d), "bound" if d == 0 else f"{10 ** abs(d):,}x") for d in range(low, high + 1)]
    every = 1 if len(ticks) <= 6 else 2
    shown = [tick for tick, d in zip(ticks, range(low, high + 1), strict=True) if d % every == 0]
    return {"low": low, "high": high, "position": position, "ticks": shown, "bound": position(0)}


def _fallbacks(report: Report) -> list[dict[str, Any]]:
    """Tensors whose stored type differs from the promised type, grouped by candidate and pair of types."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    totals = Counter(row.candidate for row in report.tensors)
    for row in report.tensors:
        if row.nominal_type != row.actual_type:
            groups.setdefault((row.candidate, row.nominal_type, row.actual_type), []).append(row.name)
    return [
        {"candidate": who, "nominal": nominal, "actual": actual, "names": names, "total": totals[who]}
        for (who, nominal, actual), names in groups.items()
    ]


def _bound(check: Check) -> str:
    text = texts(check)[1]
    sign, _, rest = text.partition(" ")
    return f"{_SIGNS[sign]} {rest}" if sign in _SIGNS else text


def _breakable(text: str) -> Markup:
    """Escaped text that may wrap after / . _ and - (paths, tensor names)."""
    safe = escape(visible(text))
    for mark in "/._-":
        safe = safe.replace(mark, Markup(f"{mark}<wbr>"))
    return safe


def _markdown_escape(text: str) -> str:
    text = visible(text).replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "|`*[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())


def _strict(value: Any) -> Any:
    """A value with JSON's containers, and words for non-finite numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, (list, tuple)) else value


def _restore(raw: dict[str, Any]) -> dict[str, Any]:
    """Restore non-finite numbers in fields of checks that also hold texts (fields of type float parse the words)."""
    legs = raw.get("legs")
    for leg in legs if isinstance(legs, list) else []:
        checks = leg.get("checks") if isinstance(leg, dict) else None
        for check in checks if isinstance(checks, list) else []:
            for key in ("value", "bound"):
                if isinstance(check, dict) and isinstance(check.get(key), str):
                    check[key] = NOT_FINITE.get(check[key], check[key])
    return raw


_FILTERS = {
    "number": number,
    "percent": words.percent,
    "size": words.size,
    "duration": words.duration,
    "value": lambda check: texts(check)[0],
    "bound": _bound,
    "margin": margin,
    "differing": tensor_map.differing,
    "strips": tensor_map.strips,
    "shown": tensor_map.shown,
}
