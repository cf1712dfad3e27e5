"""An in-toto statement beside the report, with the digests of report and inputs: an edited report is refused.

report.intoto.json is an in-toto Statement v1. Its subjects are the candidate files by sha256. Its predicate holds the
sha256 of report.json, of every input, of the scored token ids and of the policy, the versions and the CPU's features.
The statement is plain unsigned JSON: it proves that report and files belong together, but not who wrote them. A person
who can edit the report can edit the statement too, so sign it if that matters (docs/ci.md).
Source: in-toto/attestation, spec/v1/statement.md.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from so8t_core.errors import InputError
from so8t_core.files import sha256_file, write_text
from verification.gate.report import Report
from verification.gate.strict_json import read_json

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:so8t:verification:v1"
_MAX_BYTES = 4 << 20  # a few hundred bytes an input


def statement_path(report: Path) -> Path:
    """The path of a report's statement: report.json -> report.intoto.json."""
    return report.with_name(f"{report.stem}.intoto.json")


def policy_digest(policy: dict[str, Any]) -> str:
    """sha256 of a policy's canonical JSON: every key and bound, but not the layout of the YAML file."""
    return hashlib.sha256(json.dumps(policy, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def make_statement(report: Report, report_file: Path) -> dict[str, Any]:
    """The statement about a report that has been written to `report_file`."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [
            {"name": Path(a.path).name, "digest": {"sha256": a.sha256}}
            for a in report.artefacts
            if a.role == "candidate"
        ],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "verdict": report.verdict,
            "summary": report.summary,
            "created": report.created,
            "report": {"name": report_file.name, "digest": {"sha256": sha256_file(report_file)}},
            "policy": {"digest": {"sha256": policy_digest(report.policy)}},
            "inputs": [
                {"role": a.role, "name": Path(a.path).name, "label": a.label, "digest": {"sha256": a.sha256}}
                for a in report.artefacts
            ],
            "tokens": {"digest": {"sha256": report.tokens_sha256}} if report.tokens_sha256 else None,
            "versions": report.versions,
        },
    }


def write_statement(report: Report, report_file: Path) -> Path:
    """Write the statement beside `report_file`, which must exist."""
    path = statement_path(report_file)
    text = json.dumps(make_statement(report, report_file), indent=2, ensure_ascii=False) + "\n"
    write_text(path, text.encode("utf-8", "backslashreplace").decode("utf-8"))  # a lone surrogate: its JSON escape
    return path


def check_policy(report: Report, wanted: str) -> None:
    """Refuse a report that was decided under another policy than the policy with this digest.

    Raises:
        InputError: the policies differ; the message names both digests.
    """
    if policy_digest(report.policy) != wanted.lower():
        raise InputError(
            f"the report was decided under the policy {policy_digest(report.policy)}, asked for is {wanted}. "
            "Verify with that policy, or leave --policy-sha256 out."
        )


def check_statement(report: Report, report_file: Path) -> None:
    """Refuse a report, read from `report_file`, that its statement does not describe.

    Raises:
        InputError: no statement, a statement that so8t did not write, changed bytes of the report, or a digest or
            verdict that differs from the statement.
    """
    path = statement_path(report_file)
    again = "Verify again" if report_file.name != "report.json" else f"Run `so8t verify --out {report_file.parent}`"
    if not path.is_file():
        raise InputError(
            f"{path} is missing: nothing says that {report_file} is what was measured. {again}, or accept the report "
            "as it is with --no-statement."
        )
    try:
        stated = read_json(path, most=_MAX_BYTES)
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read as JSON ({what}). {again}.") from None
    kind = (stated.get("_type"), stated.get("predicateType")) if isinstance(stated, dict) else (None, None)
    if kind != (STATEMENT_TYPE, PREDICATE_TYPE):
        raise InputError(f"{path} is no in-toto statement of SO8T: it says {str(kind)[:200]}. {again}.")
    expected = make_statement(report, report_file)
    if stated != expected:
        raise InputError(
            f"{report_file} and {path.name} do not belong together: {_difference(stated, expected)}. {again}."
        )


def _difference(stated: dict[str, Any], found: dict[str, Any]) -> str:
    """The first contradiction in words; the digest of the report's bytes is compared first."""
    claims = stated.get("predicate")
    claims = claims if isinstance(claims, dict) else {}
    for key in ("report", "verdict", "policy", "tokens", "inputs", "versions", "summary", "created"):
        if claims.get(key) != found["predicate"][key]:
            if key == "report":
                return "the report's bytes are not those that were stated; it was edited or replaced"
            return f"the statement's {key} is not the report's"
    return "the statement's subjects or its form were changed"
