"""Laws of the secrets: no key at rest, none guessed by time, none in files that others can read or write."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest

from pipeline.serve.keys import load_api_keys, load_audit_key, new_api_key, who
from so8t_core.errors import InputError


def test_new_key_is_shown_once_and_stored_as_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    first, second = new_api_key(file, "alice"), new_api_key(file, "ボブ")
    assert first != second
    assert len(first) > 40
    text = file.read_text(encoding="utf-8")
    assert first not in text
    assert second not in text
    assert file.stat().st_mode & 0o777 == 0o600
    known = load_api_keys(file)
    assert known == {n: hashlib.sha256(k.encode()).hexdigest() for n, k in (("alice", first), ("ボブ", second))}
    assert (who(known, first), who(known, second)) == ("alice", "ボブ")
    for wrong in ("", first[:-1], first + " ", first.swapcase(), "so8t-", known["alice"], "\udcff"):
        assert who(known, wrong) is None


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {str(n): hashlib.sha256(str(n).encode()).hexdigest() for n in range(5)}
    compared: list[str] = []
    monkeypatch.setattr(hmac, "compare_digest", lambda given, stored: bool(compared.append(stored)))
    who(known, "0")
    assert compared == list(known.values())  # no early way out after a hit, and none of them by ==


def test_names_are_unique(tmp_path: Path) -> None:
    new_api_key(tmp_path / "k", "alice")
    for name in ("alice", " "):
        with pytest.raises(InputError, match="name of its own"):
            new_api_key(tmp_path / "k", name)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"keys": [{}]}', '{"keys": [{"name": "a", "sha256": "zz"}]}', '{"keys": 1}']
)
def test_other_files_are_no_key_files(tmp_path: Path, text: str) -> None:
    (tmp_path / "k").write_text(text)
    (tmp_path / "k").chmod(0o600)
    with pytest.raises(InputError, match="no API key file"):
        load_api_keys(tmp_path / "k")


def test_key_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    new_api_key(tmp_path / "k", "alice")
    for mode in (0o620, 0o602, 0o666):
        (tmp_path / "k").chmod(mode)
        with pytest.raises(InputError, match="chmod 600"):
            load_api_keys(tmp_path / "k")
    with pytest.raises(InputError, match="--new-key"):
        load_api_keys(tmp_path / "gone")


def test_deployment_key_is_needed_long_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SO8T_AUDIT_KEY", raising=False)
    with pytest.raises(InputError, match="openssl rand"):
        load_audit_key(None)
    monkeypatch.setenv("SO8T_AUDIT_KEY", "k" * 31)
    with pytest.raises(InputError, match="31 bytes, at least 32"):
        load_audit_key(None)
    monkeypatch.setenv("SO8T_AUDIT_KEY", "k" * 32)
    assert load_audit_key(None) == b"k" * 32
    file = tmp_path / "key"
    with pytest.raises(InputError, match="does not exist"):
        load_audit_key(file)
    file.write_text("f" * 64 + "\n")
    for mode in (0o640, 0o604, 0o610):
        file.chmod(mode)
        with pytest.raises(InputError, match="chmod 600"):
            load_audit_key(file)
    file.chmod(0o600)
    assert load_audit_key(file) == b"f" * 64
    file.write_text("short\n")
    with pytest.raises(InputError, match="5 bytes") as caught:
        load_audit_key(file)
    assert "short" not in str(caught.value)


def test_operators_stay_operators_when_keys_are_added(tmp_path: Path) -> None:
    from pipeline.serve.keys import load_operators

    file = tmp_path / "keys.json"
    new_api_key(file, "a")
    assert load_operators(file) == frozenset()
    new_api_key(file, "b", operator=True)
    new_api_key(file, "c")
    assert load_operators(file) == {"b"}
    assert set(load_api_keys(file)) == {"a", "b", "c"}
    file.write_text(file.read_text().replace('"operator": true', '"operator": "yes"'))  # true, and nothing like it
    assert load_operators(file) == frozenset()
