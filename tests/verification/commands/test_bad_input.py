"""Every kind of bad input ends with 2 and a line or two that name the value, the bound and a way out."""

from __future__ import annotations

from pathlib import Path

import pytest
from bad_input import KINDS, ROOT, WAY_OUT, message, run


@pytest.mark.parametrize("name", KINDS)
def test_bad_input_is_refused_with_value_bound_and_way_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("RANK", "WORLD_SIZE", "SO8T_AUDIT_KEY"):
        monkeypatch.delenv(variable, raising=False)
    kind = KINDS[name]
    code, out, err = run(kind, tmp_path)
    said = message(err, tmp_path)
    assert code == 2, err
    assert out == ""
    assert 1 <= len(said.splitlines()) <= 2, said
    assert "Traceback" not in err
    assert said.replace("\n", "").isprintable()
    assert len(said) < 1200
    told = err.replace("\n", " ")
    assert kind.value in told, said
    assert kind.bound in told, said
    assert WAY_OUT.search(said.removeprefix("so8t: ")), said
    page = (ROOT / "docs" / "bad_input.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith(f"| {kind.given} | 2 | `"))
    assert "so8t" in row


def test_the_kinds_are_many_and_each_stands_once_on_the_page() -> None:
    assert len(KINDS) >= 60
    assert len({kind.given for kind in KINDS.values()}) == len(KINDS)
    rows = [
        line for line in (ROOT / "docs" / "bad_input.md").read_text(encoding="utf-8").splitlines() if "| 2 |" in line
    ]
    assert len(rows) == len(KINDS)


@pytest.mark.parametrize(
    "said", ["bad value", "`a` = 3: Input should be less than 2", "x is damaged", "it does not exist"]
)
def test_a_message_without_a_way_out_would_be_seen(said: str) -> None:
    assert not WAY_OUT.search(said)
