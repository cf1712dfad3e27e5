"""Kinds of bad input: how each is made, the value in it and the bound it breaks, which its message has to name.

To add a kind, add an entry to `KINDS` and run `python tests/verification/bad_input.py`, which writes docs/bad_input.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from policy_reports import released
from tiny_gguf import write_tiny

from so8t_core.files import sha256_file
from verification.gate.statement import statement_path
from verification.gate.strict_json import MAX_MARKS
from verification.show.write import to_json, write_report

ROOT = Path(__file__).parents[2]
# what a way out begins with, behind a full stop, a semicolon, a comma, a colon, "or", "and" or a bracket
_VERBS = (
    "accept|add|ask|check|choose|convert|copy|cut|delete|do|export|give|install|join|keep|leave|lists|look|make|mend|"
    "move|name|open|pass|pick|quantise|read|remove|run|save|see|send|set|shorten|show|start|supply|take|unset|update|"
    "use|verify|wait|write"
)
WAY_OUT = re.compile(
    rf"(?:^|[.;,:(`] ?|`so8t [a-z-]+` |\bor |\band |\bfirst )(?:{_VERBS})\b|every key is explained in|shows? the", re.I
)


@dataclass(frozen=True)
class Kind:
    """One kind of bad input."""

    given: str  # in words, for the page
    make: Callable[[Path], list[str]]  # writes what is needed into an empty folder; gives the command's arguments
    value: str  # what the message must name of what was given
    bound: str  # and of what is asked for
    env: dict[str, str] = field(default_factory=dict)


def config(text: str, *more: str) -> Callable[[Path], list[str]]:
    """A run configuration of this text."""

    def make(folder: Path) -> list[str]:
        (folder / "run.yaml").write_text(text, encoding="utf-8")
        return ["run", str(folder / "run.yaml"), "--dry-run", *more]

    return make


def policy(data: str | bytes) -> Callable[[Path], list[str]]:
    """A policy of these bytes for a report that passes."""

    def make(folder: Path) -> list[str]:
        (folder / "gate.yaml").write_bytes(data if isinstance(data, bytes) else data.encode())
        return [*report()(folder), "--policy", str(folder / "gate.yaml")]

    return make


def report(
    change: Callable[[Any], object] | None = None, *, data: bytes | None = None, statement: bool = False
) -> Callable[[Path], list[str]]:
    """A report that passes, changed or replaced."""

    def make(folder: Path) -> list[str]:
        candidate, path = folder / "m.gguf", folder / "report.json"
        candidate.write_bytes(b"GGUF")
        made = released(str(candidate), sha256_file(candidate), 4)
        write_report(made, folder)
        if change is not None:
            raw = json.loads(to_json(made))
            change(raw)
            path.write_text(json.dumps(raw), encoding="utf-8")
        if data is not None:
            path.write_bytes(data)
        return ["gate", str(path), *([] if statement else ["--no-statement"])]

    return make


def stated(data: bytes | None = None, change: Callable[[Any], object] | None = None) -> Callable[[Path], list[str]]:
    """A report that passes, with a statement that was changed, replaced or (neither) taken away."""

    def make(folder: Path) -> list[str]:
        arguments = report(statement=True)(folder)
        path = statement_path(folder / "report.json")
        if change is not None:
            raw = json.loads(path.read_text(encoding="utf-8"))
            change(raw)
            path.write_text(json.dumps(raw), encoding="utf-8")
        elif data is not None:
            path.write_bytes(data)
        else:
            path.unlink()
        return arguments

    return make


def gguf(change: Callable[[bytes], bytes], verb: str = "lint") -> Callable[[Path], list[str]]:
    """A small GGUF file, changed."""

    def make(folder: Path) -> list[str]:
        path = write_tiny(folder / "m.gguf")
        path.write_bytes(change(path.read_bytes()))
        return [verb, str(path)]

    return make


def plain(*arguments: str) -> Callable[[Path], list[str]]:
    """A command that needs no file; {} stands for the folder."""
    return lambda folder: [argument.replace("{}", str(folder)) for argument in arguments]


def on(make: Callable[[Path], list[str]], *more: str) -> Callable[[Path], list[str]]:
    """The same command with more arguments."""
    return lambda folder: [*make(folder), *(argument.replace("{}", str(folder)) for argument in more)]


def verify(*more: str) -> Callable[[Path], list[str]]:
    """A verification of files that are there, with other options."""

    def make(folder: Path) -> list[str]:
        (folder / "m.gguf").write_bytes(b"GGUF")
        given = [
            "verify",
            "--reference",
            str(folder),
            "--candidate",
            str(folder / "m.gguf"),
            "--out",
            str(folder / "out"),
        ]
        return [*given, *(argument.replace("{}", str(folder)) for argument in more)]

    return make


def kld(data: bytes) -> Callable[[Path], list[str]]:
    """A base file of llama-perplexity of these bytes."""

    def make(folder: Path) -> list[str]:
        (folder / "base.kld").write_bytes(data)
        return ["kld", str(folder / "base.kld"), "--candidate", str(write_tiny(folder / "m.gguf"))]

    return make


def keys(data: str | None, mode: int, *more: str) -> Callable[[Path], list[str]]:
    """A server's audit key file."""

    def make(folder: Path) -> list[str]:
        path = folder / "audit.key"
        if data is not None:
            path.write_text(data, encoding="utf-8")
            path.chmod(mode)
        (folder / "m.gguf").write_bytes(b"GGUF")
        return ["serve", "--model", str(folder / "m.gguf"), "--audit-key-file", str(path), *more]

    return make


def a_folder_as_policy(folder: Path) -> list[str]:
    return [*report()(folder), "--policy", str(folder)]


def a_pipe_as_report(folder: Path) -> list[str]:
    os.mkfifo(folder / "report.json")
    return ["gate", str(folder / "report.json")]


def a_pipe_as_policy(folder: Path) -> list[str]:
    os.mkfifo(folder / "pipe")
    return [*report()(folder), "--policy", str(folder / "pipe")]


def a_pipe_as_config(folder: Path) -> list[str]:
    os.mkfifo(folder / "pipe")
    return ["run", str(folder / "pipe")]


def a_file_as_out(folder: Path) -> list[str]:
    (folder / "taken").write_text("x", encoding="utf-8")
    return [*verify()(folder)[:-1], str(folder / "taken")]


LAUNCH = {"WORLD_SIZE": "2", "RANK": "0"}
KINDS: dict[str, Kind] = {
    # the command line
    "verb": Kind("a verb that does not exist", plain("verfy"), "verfy", "so8t --help"),
    "option": Kind("an option that does not exist", plain("gate", "r.json", "--polcy", "x"), "--polcy", "--help"),
    "argument": Kind("a verb without its argument", plain("gate"), "REPORT.json", "--help"),
    "number": Kind("a text where a number belongs", verify("--chunks", "many"), "many", "integer"),
    "chunks": Kind("a number below its range", verify("--chunks", "1"), "'1'", "or equal to 2"),
    "n_ctx": Kind("a context that scores too little", verify("--n-ctx", "8"), "'8'", "or equal to 64"),
    "threads": Kind("no thread", verify("--threads", "0"), "'0'", "or equal to 1"),
    "level": Kind("a level that does not exist", verify("--cells", "some"), "some", "quick or full"),
    "candidates": Kind(
        "a verification of nothing", plain("verify", "--reference", "x", "--out", "{}"), "candidate", "--"
    ),
    "reference": Kind("a reference that is not there", verify("--reference", "{}/gone"), "gone", "exist"),
    "candidate": Kind("a candidate that is not there", verify("--candidate", "{}/gone.gguf"), "gone.gguf", "exist"),
    "out": Kind("a file where the report's directory belongs", a_file_as_out, "taken", "directory"),
    "out right": Kind("a place that takes no files", on(verify(), "--out", "/sys/so8t"), "/sys/so8t", "write"),
    # the launch
    "world": Kind("a number of processes that is a word", verify(), "two", "from 1 on", {"WORLD_SIZE": "two"}),
    "rank": Kind("a process beyond the launch", verify(), "RANK=2", "WORLD_SIZE=2", {**LAUNCH, "RANK": "2"}),
    "minus": Kind("a process below zero", verify(), "-1", "from 0 on", {**LAUNCH, "RANK": "-1"}),
    # the configuration of a run
    "config": Kind("a configuration that is not there", plain("run", "{}/gone.yaml"), "gone.yaml", "exist"),
    "config pipe": Kind("a pipe that nobody writes to as the configuration", a_pipe_as_config, "pipe", "regular file"),
    "config size": Kind("a configuration without end", config("#" * 300_000), "300000", "at most 262144"),
    "config form": Kind("a configuration that is no mapping", config("[1, 2]"), "list", "mapping"),
    "config yaml": Kind("a configuration that is not YAML", config("a: ["), "line", "expected"),
    "config key": Kind("a configuration with an unknown key", config("trian: {}"), "trian", "unknown"),
    "config type": Kind("a configuration with a text as a number", config("train: {steps: many}"), "many", "integer"),
    "config range": Kind("a number out of its range", config("train: {steps: -1}"), "-1", "greater than"),
    "override": Kind("an override without a value", config("{}", "train.steps"), "train.steps", "key.path=value"),
    "step": Kind(
        "a step that does not exist", config("data: {generator: {rows: 4}}", "--from", "deploy"), "deploy", "verify"
    ),
    # the policy
    "policy": Kind("a policy that is not there", on(report(), "--policy", "{}/gone.yaml"), "gone.yaml", "exist"),
    "policy folder": Kind("a directory as the policy", a_folder_as_policy, "policy", "regular file"),
    "policy pipe": Kind("a pipe that nobody writes to as the policy", a_pipe_as_policy, "pipe", "regular file"),
    "policy waivers": Kind(
        "a policy of waivers alone",
        on(report(lambda r: r["policy"].update(waivers=[{"check": "x", "reason": "y"}] * 1001)), "--no-statement"),
        "1001",
        "at most 1000",
    ),
    "policy form": Kind("a policy that is no mapping", policy("[1, 2]"), "list", "mapping"),
    "policy yaml": Kind("a policy that is not YAML", policy("a: ["), "line 1", "expected"),
    "policy tab": Kind("a tab as indentation", policy("convert:\n\tmean_kld: 1"), r"\t", "cannot start"),
    "policy bytes": Kind("bytes that are no text", policy(b"\xff\xfe\xfa"), "0xff", "utf-8"),
    "policy binary": Kind("a binary file", policy(b"\0\1"), "x0000", "not allowed"),
    "policy size": Kind("a policy without end", policy("#" * 70_000), "70000", "at most 65536"),
    "policy depth": Kind("a policy nested without end", policy("a: " + "[" * 900), "nested", "16 levels"),
    "policy alias": Kind("a policy of aliases", policy("a: &a [x]\nb: [*a, *a]"), "alias", "write the value out"),
    "policy twice": Kind("a section twice", policy("bake: {}\nbake: {}"), "line 1", "twice"),
    "policy tag": Kind("a tag that would run code", policy("a: !!python/object:os.system x"), "os.system", "tag"),
    "policy date": Kind("a date that does not exist", policy("bake: {max_abs_logit: 2026-99-99}"), "month", "1..12"),
    "policy digits": Kind(
        "a policy with a number without end", policy("bake: {max_abs_logit: " + "9" * 99 + "}"), "line 1", "64 bits"
    ),
    "policy key": Kind("an unknown section", policy("bakes: {}"), "bakes", "known are required, bake"),
    "policy inner": Kind("an unknown bound", policy("bake: {max_logit: 1}"), "max_logit", "known are max_abs_logit"),
    "policy type": Kind("a text as a bound", policy("bake: {max_abs_logit: high}"), "high", "valid number"),
    "policy bool": Kind("true as a bound", policy("bake: {max_abs_logit: true}"), "True", "no bounds"),
    "policy range": Kind("a bound out of its range", policy("convert: {top1: 1.5}"), "1.5", "less than or equal to 1"),
    "policy nan": Kind("a bound that is no number", policy("convert: {top1: .nan}"), "nan", "finite"),
    "policy leg": Kind("a leg that does not exist", policy("required: [tests]"), "tests", "'bake'"),
    "policy reason": Kind("a waiver without a reason", policy("waivers: [{check: x}]"), "reason", "required"),
    "policy blank": Kind("a waiver with a blank reason", policy("waivers: [{check: x, reason: ' '}]"), "' '", "match"),
    "policy digest": Kind(
        "another policy than the pinned one", on(report(), "--policy-sha256", "0" * 64), "0" * 64, "decided under"
    ),
    # the report
    "report": Kind("a report that is not there", plain("gate", "{}/gone.json"), "gone.json", "no report"),
    "report pipe": Kind("a pipe as the report", a_pipe_as_report, "report.json", "regular file"),
    "report cut": Kind("a report that was cut", report(data=b'{"schema_version": "1.2"'), "char 24", "Expecting"),
    "report bytes": Kind("a report that is no text", report(data=b'{"a": "\xff"}'), "report.json", "UTF-8"),
    "report depth": Kind("a report nested without end", report(data=b"[" * 9999), "nested deeper", "32 levels"),
    "report size": Kind("a report without end", report(data=b" " * ((32 << 20) + 1)), "33554433", "33554432"),
    "report values": Kind(
        "a report of too many values", report(data=b"[" + b"1," * 1_000_001 + b"1]"), "1000002", "1000000"
    ),
    "report marks": Kind(
        "a report of quotation marks", report(data=b'"' * (MAX_MARKS + 1)), "4000001", "at most 4000000"
    ),
    "report twice": Kind("a key of a report twice", report(data=b'{"verdict": 1, "verdict": 2}'), "'verdict'", "twice"),
    "report nan": Kind("a word for a number", report(data=b'{"verdict": NaN}'), "NaN", "JSON number"),
    "report digits": Kind("a report with a number without end", report(data=b"9" * 9999), "9" * 20, "64 bits"),
    "report double": Kind("a number beyond a double", report(data=b"1e999"), "1e999", "double's range"),
    "report other": Kind("JSON that is no report", report(data=b"{}"), "report.json", "schema_version"),
    "report schema": Kind("a report of another schema", report(lambda r: r.update(schema_version="2.0")), "2.0", "1.x"),
    "report field": Kind("a report that lacks a field", report(lambda r: r.pop("legs")), "legs", "required"),
    "report extra": Kind("an unknown field", report(lambda r: r.update(more=1)), "more", "not permitted"),
    "report status": Kind(
        "an unknown status", report(lambda r: r["legs"][0].update(status="fine")), "status", "'pass'"
    ),
    "report bool": Kind(
        "true as a value", report(lambda r: r["legs"][0]["checks"][0].update(value=True)), "true", "numbers"
    ),
    "report digest": Kind(
        "an input without a digest", report(lambda r: r["artefacts"][0].update(sha256="")), "sha256", "{64}"
    ),
    "report labels": Kind(
        "two files of one label",
        report(lambda r: r["artefacts"][1].update(label="Q8_0")),
        "'Q8_0', 'Q8_0'",
        "of its own",
    ),
    "report empty": Kind(
        "a report about no file", report(lambda r: r.update(artefacts=[])), "report.json", "no candidate"
    ),
    "report changed": Kind(
        "a file changed since", report(lambda r: r["artefacts"][2].update(sha256="0" * 64)), "m.gguf", "changed"
    ),
    # the statement
    "statement": Kind("a report without its statement", stated(), "report.intoto.json", "missing"),
    "statement json": Kind("a statement that is no JSON", stated(b"{"), "char 1", "JSON"),
    "statement kind": Kind("a statement of another kind", stated(b"[]"), "None", "in-toto statement"),
    "statement edited": Kind(
        "a statement of another verdict",
        stated(None, lambda s: s["predicate"].update(verdict="fail")),
        "verdict",
        "belong together",
    ),
    "statement report": Kind(
        "a report edited after its statement",
        report(lambda r: r.update(summary="x"), statement=True),
        "edited",
        "belong together",
    ),
    # files of other tools
    "gguf short": Kind("a GGUF without a header", gguf(lambda data: data[:20]), "20 bytes", "needs 24"),
    "gguf magic": Kind("a file of another kind", gguf(lambda data: b"PK\3\4" + data[4:]), "b'PK", "b'GGUF'"),
    "gguf version": Kind("a GGUF of version 1", gguf(lambda data: data[:4] + b"\1" + data[5:]), "version 1", "2 and 3"),
    "gguf cut": Kind("a GGUF that was cut", gguf(lambda data: data[:-100]), "truncated", "the file has"),
    "gguf type": Kind(
        "a key of another type",
        gguf(lambda d: d.replace(b"llama.block_count\4", b"llama.block_count\6", 1)),
        "block_count",
        "wanted",
    ),
    "gguf text": Kind(
        "a text that is not UTF-8", gguf(lambda data: data.replace(b"llama", b"ll\xffma", 1)), "not UTF-8", "UTF-8"
    ),
    "kld": Kind(
        "a base file that is not there", plain("kld", "{}/gone.kld", "--candidate", "{}/x.gguf"), "gone.kld", "exist"
    ),
    "kld magic": Kind("a base file of another kind", kld(b"GGUF" * 10), "GGUF", "_logits_"),
    "audit key": Kind("an audit key that is not there", keys(None, 0), "audit.key", "exist"),
    "audit open": Kind("an audit key that others can read", keys("x" * 64, 0o644), "audit.key", "chmod 600"),
    "audit short": Kind("an audit key that is too short", keys("short", 0o600), "5 bytes", "at least"),
    "serve both": Kind("a server of nothing", plain("serve"), "--model", "--upstream", {"SO8T_AUDIT_KEY": "k" * 64}),
    "new key": Kind("a new key without a file", plain("serve", "--new-key", "me"), "--new-key", "--keys"),
}


def run(kind: Kind, folder: Path) -> tuple[int, str, str]:
    """Exit code, standard output and error of the command on an input of a kind, in this process."""
    from pipeline.cli.main import main

    arguments, before = kind.make(folder), (sys.argv, dict(os.environ))
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["so8t", *arguments]
    os.environ.update(kind.env)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        return int(ended.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = before[0]
        os.environ.clear()
        os.environ.update(before[1])
    raise AssertionError("it did not exit")


def message(err: str, folder: Path) -> str:
    """What was said, without the places of this machine."""
    lines = [line for line in err.strip().splitlines() if not line.startswith("Not here, so not held")]
    text = "\n".join(lines).replace(str(folder.resolve()), "DIR").replace(str(folder), "DIR").replace(str(ROOT), "SO8T")
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1...", text)


def page() -> str:
    """docs/bad_input.md."""
    rows = []
    for kind in KINDS.values():
        with tempfile.TemporaryDirectory() as made:
            code, _, err = run(kind, Path(made))
            said = message(err, Path(made)).replace("|", "\\|").replace("\n", " ")
            rows.append(f"| {kind.given} | {code} | `{said.replace('`', chr(39))}` |")
    return HEAD.format(count=len(KINDS)) + "\n".join(rows) + "\n"


HEAD = """# Bad input

{count} kinds of input that `so8t` refuses, with the exit code and the message of each. A message has two lines at most,
goes to standard error, and names the value, the bound that it breaks and a way out; nothing is measured and nothing is
written. DIR stands for the user's directory, SO8T for the place of the installation.

This page is written by `python tests/verification/bad_input.py`, out of the same table that the tests run.

| given | code | message |
|---|---|---|
"""

if __name__ == "__main__":
    (ROOT / "docs" / "bad_input.md").write_text(page(), encoding="utf-8")
