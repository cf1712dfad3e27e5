"""Mutated reports, statements and policies through the whole `so8t gate`: whatever they say, no non-pass becomes 0.

Every run ends with 0, 1 or 2, a refusal has two lines at most, nothing is a traceback. Whether a mutated report may
pass is judged here by a second reading of the rules (`may_pass`), which shares no code with the gate: its own list of
what a report has to hold and its own bounds. Faults planted in the gate show that the fuzzer would see them.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from policy_reports import released
from test_policy_table import ADAPTED, FILE, FLOATS, QUANTS, RUN

from pipeline.cli.main import app, main
from so8t_core.files import sha256_file
from verification.gate import decide as gate_decide
from verification.gate import strict_json
from verification.gate.policy import DEFAULT_POLICY, Policy
from verification.gate.report import Check
from verification.gate.statement import statement_path, write_statement
from verification.show.write import to_json

Json = Any
SPAN = 5.0  # seconds one run may take
DEFAULTS: Json = yaml.safe_load(DEFAULT_POLICY.read_text(encoding="utf-8"))
POOL: tuple[Json, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    1e-9,
    0.5,
    1e9,
    -1e9,
    (1 << 63) - 1,
    "",
    "0",
    "1",
    "NaN",
    "Infinity",
    "-Infinity",
    "pass",
    "fail",
    "inconclusive",
    "not evaluated",
    "waived",
    "<=",
    ">=",
    "==",
    "!=",
    "F16",
    "Q8_0",
    "Q4_K_M",
    "F16 x",
    "Q2_K",
    "candidate",
    "adapter",
    "\x1b[2J\n\n\n",
    "\ud800",
    "\0",
    "x" * 3000,
    [],
    {},
    [0, 1],
    [1, 0],
    ["NaN", 1],
    {"mean_kld": 9.0, "top1": 0.0},
    [{"check": "quality.mean_kld", "reason": "r"}],
    [{"check": "convert.top1"}],
)
TEXTS = (
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"[" * 40,
    b"\xff",
    b"\xef\xbb\xbf",
    b"\0",
    b"*a",
    b"&a ",
    b"2026-99-99",
    b"\t",
    b"}",
)


@dataclass(frozen=True)
class Case:
    """One run of the gate: its files, and which of them was changed."""

    report: bytes
    statement: bytes | None  # None: not asked for
    policy: bytes | None  # None: the report's own


def places(value: Json, at: tuple[Json, ...] = ()) -> Iterator[tuple[Json, ...]]:
    """The path of every value inside of a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*at, key)
        yield from places(inner, (*at, key))


def changed(value: Json, rng: random.Random) -> Json:
    """One change somewhere: dropped, doubled, renamed, of another type or size, exchanged with another value."""
    value = copy.deepcopy(value)
    if rng.random() < 0.6 and _a_report(value):
        return _inside_the_schema(value, rng)
    found = list(places(value))
    if not found:
        return rng.choice(POOL)
    *above, key = rng.choice(found)
    inside = value
    for part in above:
        inside = inside[part]
    old, what = inside[key], rng.randrange(7)
    if what == 0:
        del inside[key]
    elif what == 1:
        inside[key] = copy.deepcopy(rng.choice(POOL))
    elif what == 2 and isinstance(inside, list):
        inside.insert(rng.randrange(len(inside) + 1), changed(old, rng) if rng.random() < 0.7 else copy.deepcopy(old))
    elif what == 3 and isinstance(inside, dict):
        inside[str(rng.choice((f"{key}2", "", "status", "\x1b[1m", "ſ")))] = inside.pop(key)
    elif what == 4 and isinstance(old, int | float):
        inside[key] = rng.choice((old * 10, old / 10, -old, old + 1, old - 1, old * 1.0001, float(old), str(old)))
    elif what == 5 and isinstance(old, str):
        inside[key] = rng.choice((old + "2", old.upper(), old[:-1], f" {old}", old.replace("F16", "Q8_0"), f"{old}\n"))
    elif what == 6:
        *other, last = rng.choice(found)
        there = value
        try:
            for part in other:
                there = there[part]
            inside[key], there[last] = there[last], inside[key]
            json.dumps(value)
        except (KeyError, IndexError, TypeError, ValueError, RecursionError):  # one held the other
            return rng.choice(POOL)
    return value


def _a_report(value: Json) -> bool:
    """Whether changes before this one left a report with checks, files and tensors."""
    try:
        return all(leg["checks"] for leg in value["legs"]) and all(value["tensors"]) and all(value["artefacts"])
    except (TypeError, KeyError, AttributeError):
        return False


def _inside_the_schema(report: Json, rng: random.Random) -> Json:
    """A change that leaves a valid report: of a check, of a leg, of the label of a file, of the type of a tensor."""
    leg = rng.choice(report["legs"])
    check, what = rng.choice(leg["checks"]), rng.randrange(10)
    if not isinstance(check, dict):
        return report
    if what < 5:
        check.update(_change_of_a_check(check, rng))
    elif what == 5:
        leg["checks"].remove(check)
    elif what == 6:
        leg["checks"].insert(rng.randrange(2), {**check, **_change_of_a_check(check, rng)})
    elif what == 7:
        rng.choice(report["tensors"]).update(
            {rng.choice(("actual_type", "candidate")): rng.choice(("Q2_K", "F16", "Q8_0"))}
        )
    elif what == 8:
        old, new = rng.sample(("F16", "Q8_0", "Q4_K_M", "BF16 x"), 2)
        for entry in (*report["artefacts"], *_each(report["legs"], "subject"), *report["tensors"]):
            for key in ("label", "subject", "candidate", "type"):
                if isinstance(entry, dict) and entry.get(key) == old and rng.random() < 0.99:
                    entry[key] = new.split(" ")[0] if key == "type" else new
    else:
        report["policy"] = changed(report["policy"], rng)
    return report


def _change_of_a_check(check: Json, rng: random.Random) -> Json:
    unknown = rng.choice(("convert.other", f"{check.get('name')}2", "quality.mean_klds", "bake.fine"))
    value = check.get("value")
    scaled = -value if isinstance(value, int | float) and value else rng.choice((-1, 1e9, 0.3))
    return rng.choice(
        (
            {"status": rng.choice(("pass", "waived")), "reason": "r"},
            {"value": rng.choice((None, "NaN", "Infinity", "-Infinity", "0", 0, 1, 0.5, 1e9))},
            {"value": scaled, "interval": [min(scaled, 0), max(scaled, 0)]},
            {"value": "NaN", "interval": ["NaN", "NaN"]},
            {"interval": rng.choice((None, [0, 0], [0, 1], [1, 0], [0, 0.5], ["NaN", "NaN"]))},
            {"bound": rng.choice((0, 1, 1e9, "any", None)), "relation": rng.choice(("<=", ">=", "!=", None))},
            {"name": unknown, "value": 0, "bound": 1, "relation": "<=", "interval": [0, 0]},
            {"subject": rng.choice(("", "F16", "Q8_0", "Q4_K_M", "F16 (oracle)"))},
            {"value": 0.3, "interval": [0.2, 0.4]},
            {"value": 0.019, "interval": [0.01, 0.03]},
        )
    )


def _each(value: Json, key: str) -> Iterator[Json]:
    """Every object with a key."""
    if isinstance(value, dict):
        if key in value:
            yield value
        for inner in value.values():
            yield from _each(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _each(inner, key)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One change of the text: cut, a byte, words that JSON or YAML lack, a key twice."""
    at, what = rng.randrange(len(data) or 1), rng.randrange(6)
    if what == 0:
        return data[:at]
    if what == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if what == 2:
        return data[:at] + rng.choice(TEXTS) + data[at:]
    if what == 3:
        return rng.choice(TEXTS) + data
    for key, new in rng.sample(
        [(b'"verdict"', b'"pass"'), (b'"value"', b"0"), (b'"legs"', b"[]"), (b'"name"', b'"x"')], 4
    ):
        if key in data:  # the key a second time, before or behind the first
            start = data.index(key, at) if key in data[at:] else data.index(key)
            return data[:start] + key + b": " + new + b", " + data[start:]
    return data


def cases(folder: Path, count: int, seed: int) -> Iterator[Case]:
    """Mutants of a report that passes, and of the same one broken beforehand, so that its right verdict is no pass."""
    candidate = folder / "m.gguf"
    candidate.write_bytes(b"GGUF")
    whole = json.loads(to_json(released(str(candidate), sha256_file(candidate), 4)))
    loose = {"quality": {"Q4_K_M": {"mean_kld": 0.15, "top1": 0.8}}, "required": []}
    strict = {"bake": {"max_abs_logit": 1e-4}, "waivers": [{"check": "contract.layout", "reason": "r"}]}
    rng = random.Random(seed)
    for _ in range(count):
        report = whole
        if rng.random() < 0.3:
            report = copy.deepcopy(whole)
            for leg in rng.sample(report["legs"], 1):
                rng.choice(leg["checks"]).update(rng.choice(({"value": 1e6}, {"value": None}, {"value": "NaN"})))
        path = folder / "report.json"
        policy = rng.choice((None, None, {}, loose, strict))
        which = rng.choice(("report", "report", "report", "statement", "policy"))
        if which == "policy":
            policy = policy or {**DEFAULTS}
            for _ in range(rng.choice((1, 1, 2))):
                policy = changed(policy, rng)
        text = None if policy is None else yaml.safe_dump(_plain(policy)).encode()
        if which == "report":
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                report = changed(report, rng)
        data = json.dumps(report).encode()
        statement = None
        if which == "statement":
            path.write_bytes(data)
            stated = json.loads(write_statement(released(), path).read_text(encoding="utf-8"))
            statement = json.dumps(changed(stated, rng)).encode()
            statement = damaged(statement, rng) if rng.random() < 0.5 else statement
        elif rng.random() < 0.15:
            data = damaged(data, rng) if which == "report" else data
            text = damaged(text, rng) if which == "policy" and text is not None else text
        yield Case(data, statement, text)


def _plain(value: Json) -> Json:
    """Without lone surrogates, which YAML cannot write, and with the words for numbers that JSON lacks as numbers."""
    text = json.dumps(value).replace("\\ud800", "")
    return {"NaN": math.nan, "Infinity": math.inf}.get(value, value) if isinstance(value, str) else json.loads(text)


def gate(case: Case, folder: Path) -> tuple[int, str, str]:
    """Exit code, standard output and error of `so8t gate` on a case, in this process."""
    path = folder / "report.json"
    path.write_bytes(case.report)
    arguments = ["so8t", "gate", str(path)]
    if case.statement is None:
        arguments.append("--no-statement")
    else:
        statement_path(path).write_bytes(case.statement)
    if case.policy is not None:
        (folder / "gate.yaml").write_bytes(case.policy)
        arguments += ["--policy", str(folder / "gate.yaml")]
    before, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = arguments
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        return int(ended.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("it did not exit")


# ---- what may pass, read a second time


class NoPass(Exception):
    """Why it may not."""


def need(holds: object, why: str) -> None:
    if not holds:
        raise NoPass(why)


def _once(pairs: list[tuple[str, Json]]) -> Json:
    need(len({key for key, _ in pairs}) == len(pairs), "a key twice")
    return dict(pairs)


def number(value: Json) -> float:
    """A JSON number, or the word for one that is not finite."""
    need(
        value in ("NaN", "Infinity", "-Infinity") or (isinstance(value, int | float) and value is not True), "a number"
    )
    need(value is not False, "a number")
    return float(value)


def may_pass(case: Case) -> str:
    """Empty where a case may end with 0, otherwise why it may not."""
    try:
        if case.statement is not None:
            raise NoPass("a statement of another report")
        report = json.loads(case.report.decode("utf-8"), object_pairs_hook=_once)
        given = report["policy"] if case.policy is None else yaml.safe_load(case.policy.decode("utf-8-sig")) or {}
        policy = {
            key: {**value, **given.get(key, {})} if isinstance(value, dict) else given.get(key, value)
            for key, value in DEFAULTS.items()
        }
        _judge(report, policy)
    except NoPass as error:
        return str(error)
    except Exception as error:
        return repr(error)
    return ""


def _judge(report: Json, policy: Json) -> None:
    """Raises where the stored values and inputs do not amount to a pass."""
    files = [a for a in report["artefacts"] if a["role"] == "candidate"]
    candidates = [a["label"] for a in files]
    kinds = {a["label"]: a.get("type") or a["label"].split(" ")[0] for a in files}
    need(candidates and all(candidates) and len(set(candidates)) == len(candidates), "candidates with labels")
    wanted = {(name, "") for name in RUN}
    for label in candidates:
        is_float = kinds[label] in ("F32", "F16", "BF16")
        wanted |= {(name, label) for name in (*FILE, *(FLOATS if is_float else QUANTS))}
        types = {t["actual_type"] for t in report["tensors"] if t["candidate"] == label}
        need(types, "tensors")
        quantised = {name for name in types if name not in ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")}
        need(not is_float or not quantised, "a float file of float tensors")
    saved = {f"dtype.mean_kld.{name}" for name in ("float32", "float16", "bfloat16")}
    if any(a["role"] == "adapter" for a in report["artefacts"]):
        wanted |= {(name, "") for name in ADAPTED if name not in saved}
        need(any(c["name"] in saved and not c.get("subject") for leg in report["legs"] for c in leg["checks"]), "dtype")
    legs = set()
    for leg in report["legs"]:
        for check in leg["checks"]:
            if check["name"].split(".")[-1] in ("evaluated", "complete"):
                continue
            legs.add(leg["name"])
            wanted.discard((check["name"], check.get("subject", "")))
            subject = check.get("subject", "")
            _hold(check, kinds.get(subject, subject.split(" ")[0]), policy)
    need(not wanted, f"missing {wanted}")
    need(set(policy["required"]) <= legs, "a required leg")


def _hold(check: Json, kind: str, policy: Json) -> None:
    """Raises where a check about a file of this type neither holds nor is waived."""
    name, subject = check["name"], check.get("subject", "")
    known = _bound(name, kind, policy)
    need(known, f"{name} is known")
    need(check.get("value") is not None, f"{name} was measured")
    relation, bound = known  # type: ignore[misc]
    if relation == "any":
        return
    why = ""
    try:
        value = number(check["value"])
        is_share = name.endswith(".top1")
        is_mean = is_share or name.endswith(".mean_kld") or name.startswith("dtype.mean_kld.")
        need(not math.isnan(value) and value >= -1e-5 and (not is_share or value <= 1), f"{name} is possible")
        need(value <= bound if relation == "<=" else value >= bound, f"{name} holds")
        if is_mean:
            low, high = map(number, check["interval"])
            if not low <= value <= high:
                raise ValueError("not its interval")  # which no waiver covers
            far = high if relation == "<=" else low
            if not name.startswith("cells."):
                need(far <= bound if relation == "<=" else far >= bound, f"{name} holds with its interval")
    except NoPass as error:
        why = str(error)
    waived = any(w["check"] == name and w.get("subject") in (None, subject) for w in policy.get("waivers") or ())
    need(not why or waived, why)


def _bound(name: str, kind: str, policy: Json) -> tuple[str, float] | None:
    leg, _, what = name.partition(".")
    if name == "contract.fallback_types" and policy["contract"]["allow_fallback_types"]:
        return "any", 0
    if name == "quantise.tensors_differ" and policy["quantise"]["tensors_differ"] is None:
        return "any", 0  # `quantise.unexplained` decides
    if leg == "contract" or name.endswith(".non_finite"):
        return "<=", 0
    of_kind = policy.get(leg, {}).get(kind, {}) if leg in ("quality", "cells") else policy.get(leg, {})
    if name in ("convert.mean_kld", "convert.top1") and kind == "BF16":
        of_kind = policy["convert"]["BF16"]
    if leg == "dtype" and what.startswith("mean_kld."):
        what = what.removeprefix("mean_kld.")
    if leg == "cells":
        what = what.split(".")[-1]
    if name == "evidence.repeat":
        return "<=", 0
    if name == "evidence.noise_floor":
        return "<=", float(policy["convert"]["mean_kld"])
    if what not in of_kind or isinstance(of_kind[what], dict):
        return None
    bound = float(of_kind[what])
    if name == "controls.transposed":
        bound = max(bound, 2 * float(policy["bake"]["max_abs_logit"]))
    reached = what in ("top1", "positions", "chunks", "entropy", "alignment", "differs_from_base", "transposed")
    return ">=" if reached else "<=", bound


# ---- the laws


@pytest.fixture(autouse=True)
def built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command as typer builds it anew for each call, which takes longer than all the rest."""
    monkeypatch.setattr("pipeline.cli.main.app", typer.main.get_command(app))


def fuzz(folder: Path, count: int, seed: int) -> dict[str, int]:
    """How often each exit code came; a broken law is an AssertionError with the case beside it."""
    seen = {"0": 0, "1": 0, "2": 0}
    for number_, case in enumerate(cases(folder, count, seed)):
        begin = time.process_time()
        code, out, err = gate(case, folder)
        where = f"case {number_} of seed {seed}: {err[:500]} {out[:300]}"
        assert code in (0, 1, 2), where
        assert time.process_time() - begin < SPAN, where
        assert "Traceback" not in err, where
        assert "\x1b" not in err, where
        if code == 2:
            assert len(err.strip().splitlines()) <= 2, where
            assert out == "", where
        if code == 0:
            assert "Pass: ready to release" in out, where
            assert may_pass(case) == "", f"{may_pass(case)}: {where}"
        seen[str(code)] += 1
    return seen


def test_no_mutant_of_a_report_a_statement_or_a_policy_turns_a_non_pass_into_0(tmp_path: Path) -> None:
    seen = fuzz(tmp_path, 500, seed=21)
    assert min(seen.values()) > 25, seen  # all three ends were reached, or the law would say little


@pytest.mark.soak
def test_no_mutant_of_many_turns_a_non_pass_into_0(tmp_path: Path) -> None:
    seen = fuzz(tmp_path, 5000, seed=22)
    assert min(seen.values()) > 250, seen


def _keeps_bound(policy: Policy, check: Check, kind: str) -> Any:
    return KNOWN(policy, check, kind) or (check.relation and (check.relation, check.bound))


KNOWN = Policy.bound
EVALUATE = gate_decide._evaluate
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "an unknown check keeps its bound": (Policy, "bound", _keeps_bound),
    "NaN holds": (gate_decide, "_evaluate", lambda check: "pass" if check.value != check.value else EVALUATE(check)),
    "nothing is called for": (gate_decide, "_called_for", lambda report: []),
    "a type is believed": (gate_decide, "_of_other_types", lambda report: []),
    "any value is possible": (gate_decide, "_is_possible", lambda name, value: True),
    "the interval is not looked at": (gate_decide, "_is_statistic", lambda check: False),
    "the last of two keys counts": (strict_json, "_object", dict),
    "the stored verdict counts": (gate_decide, "_verdict", lambda legs: "pass"),
    "what was not measured passes": (gate_decide, "_BAD_FIRST", ("fail", "inconclusive")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_planted_in_the_gate_is_seen(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, wrong = FAULTS[fault]
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises(AssertionError, match="case"):
        fuzz(tmp_path, 1500, seed=23)
