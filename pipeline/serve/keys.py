"""Secrets: API keys (only their SHA-256 is stored) and the deployment key for the audit log's HMACs.

An API key is 256 random bits, which nobody can guess, so a plain hash without salt is enough for storage.
The key file is JSON: {"keys": [{"name": ..., "sha256": ..., "operator": true}, ...]}; `operator` may be missing. An
operator may see metrics and why answers were withheld, but never a thinking.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import stat
from pathlib import Path

from so8t_core.errors import InputError
from so8t_core.files import write_text

AUDIT_KEY_VARIABLE = "SO8T_AUDIT_KEY"
MIN_AUDIT_KEY = 32  # bytes


def new_api_key(path: Path, name: str, *, operator: bool = False) -> str:
    """Make a key, add its hash to the file and return the key, which cannot be read again later.

    Raises:
        InputError: the name is empty or taken, or the file is no key file of so8t.
    """
    entries, operators = (load_api_keys(path), load_operators(path)) if path.exists() else ({}, frozenset())
    if not name.strip() or name in entries:
        raise InputError(f"an API key needs a name of its own; {name!r} is {'taken' if name in entries else 'empty'}")
    key = f"so8t-{secrets.token_urlsafe(32)}"
    entries[name] = hashlib.sha256(key.encode()).hexdigest()
    operators |= {name} if operator else set()
    listed = [{"name": n, "sha256": d, **({"operator": True} if n in operators else {})} for n, d in entries.items()]
    write_text(path, json.dumps({"keys": listed}, indent=1, ensure_ascii=False) + "\n")
    path.chmod(0o600)
    return key


def load_api_keys(path: Path) -> dict[str, str]:
    """{name: hex SHA-256 of the key}.

    Raises:
        InputError: the file is missing, has another form, or others may write to it (and could add their keys).
    """
    if not path.is_file():
        raise InputError(f"the API key file {path} does not exist; make one: so8t serve --new-key NAME --keys {path}")
    if path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InputError(f"the API key file {path} may be written by others; run: chmod 600 {path}")
    try:
        entries = {entry["name"]: entry["sha256"] for entry in json.loads(path.read_text(encoding="utf-8"))["keys"]}
        if not all(isinstance(n, str) and len(bytes.fromhex(d)) == 32 for n, d in entries.items()):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no API key file; make one: so8t serve --new-key NAME --keys FILE") from None
    return entries


def load_operators(path: Path) -> frozenset[str]:
    """Names of the operators' keys; the file must have passed `load_api_keys`."""
    entries = json.loads(path.read_text(encoding="utf-8"))["keys"]
    return frozenset(entry["name"] for entry in entries if entry.get("operator") is True)


def who(keys: dict[str, str], presented: str) -> str | None:
    """The name of the presented key, or None; every entry is compared, each in constant time."""
    digest = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).hexdigest()
    found = None
    for name, known in keys.items():
        if hmac.compare_digest(digest, known):
            found = name
    return found


def load_audit_key(path: Path | None) -> bytes:
    """The deployment key, from the file or else from $SO8T_AUDIT_KEY.

    Raises:
        InputError: no key is given, it is too short, or others may read the file.
    """
    way_out = f"make one: (umask 077; openssl rand -hex 32 > audit.key), then --audit-key-file or ${AUDIT_KEY_VARIABLE}"
    if path is None:
        key = os.environ.get(AUDIT_KEY_VARIABLE, "").encode("utf-8", "surrogateescape").strip()
        source = f"${AUDIT_KEY_VARIABLE}"
        if not key:
            raise InputError(f"no deployment key for the audit log; {way_out}")
    else:
        if not path.is_file():
            raise InputError(f"the deployment key file {path} does not exist; {way_out}")
        if path.stat().st_mode & 0o077:
            raise InputError(f"the deployment key file {path} is open to others; run: chmod 600 {path}")
        key, source = path.read_bytes().strip(), str(path)
    if len(key) < MIN_AUDIT_KEY:
        raise InputError(
            f"the deployment key in {source} has {len(key)} bytes, at least {MIN_AUDIT_KEY} are needed; {way_out}"
        )
    return key
