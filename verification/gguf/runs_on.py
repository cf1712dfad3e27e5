"""The oldest build of llama.cpp that knows all that a file needs: its architecture, types, tokenizer, tensors and keys.

`llama_builds.json` gives for every name the first build that knows it, and the pull request that brought it: builds are
numbered by their commits, so the number of the commit is the number of the build. `scripts/llama_builds.py` writes the
table from a clone's history. A name that it does not hold gives no number, never a guess.

Two numbers. *loads*: a build before it refuses the file, or does not know how to cut its text. *knows every key*: a
build before it loads the file and passes over a key that can change the network or the tokens; that key may say nothing
new, so the earlier build may still compute the same. That a build knows a name does not mean that it had no faults yet.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verification.gguf.key_effects import effect_of
from verification.gguf.reader import GGUFFile

_TABLE = Path(__file__).with_name("llama_builds.json")
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Need:
    """Something that a build has to know, and since when llama.cpp does."""

    what: str  # "architecture qwen35", "type MXFP4", "pre-tokenizer llama-bpe"
    build: int
    source: str  # "PR #19468"; "" where the commit names none


@dataclass(frozen=True)
class RunsOn:
    """The oldest build for a file.

    Attributes:
        loads: what decides the oldest build that loads it; None where a name is unknown.
        keys: the same for the oldest build that knows every key; None where that is not later.
        unknown: names that no build up to `newest` knows.
        newest: the last build that the table covers.
    """

    loads: Need | None
    keys: Need | None
    unknown: tuple[str, ...]
    newest: int

    @property
    def sentence(self) -> str:
        """ "loads from b5092 on (architecture qwen3, PR #12828)"."""
        if self.loads is None:
            names = ", ".join(self.unknown)
            return f"the oldest build is not known here: {names}: in no build up to b{self.newest}"
        text = f"loads from b{self.loads.build} on ({_because(self.loads)})"
        return (
            text if self.keys is None else f"{text}, knows every key from b{self.keys.build} on ({_because(self.keys)})"
        )


def _because(need: Need) -> str:
    return ", ".join(filter(None, (need.what, need.source)))


def runs_on(file: GGUFFile) -> RunsOn:
    """The oldest build of llama.cpp for a file that llama.cpp loads as a model."""
    table = _table()
    known: list[Need] = []
    unknown: list[str] = []
    for section, name, what in _needs(file):
        fact = table[section].get(name)
        if fact is None:
            unknown.append(what)
        else:
            known.append(_need(what, fact))
    known += _later_tensors(file, table)
    loads = None if unknown else max(known, key=lambda need: need.build)
    keys = max(_keys(file, table), key=lambda need: need.build, default=None)
    if loads is None or keys is None or keys.build <= loads.build:
        keys = None
    return RunsOn(loads, keys, tuple(unknown), table["newest"])


def _needs(file: GGUFFile) -> Iterator[tuple[str, str, str]]:
    """(section of the table, name, how a person calls it) of what a build refuses not to know."""
    yield "gguf_versions", str(file.version), f"GGUF version {file.version}"
    yield "architectures", file.architecture, f"architecture {file.architecture}"
    for kind in sorted({tensor.type for tensor in file.tensors.values()}):
        yield "types", kind, f"type {kind}"
    if "split.count" in file.metadata and len(file.shards) > 1:
        yield "keys", "split.count", "a set of shards"
    tokenizer, cut = (file.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if isinstance(tokenizer, str):
        yield "tokenizers", tokenizer, f"tokenizer {tokenizer}"
    if tokenizer == "gpt2" and isinstance(cut, str):  # other kinds of tokenizer do not look at it
        yield "pre_tokenizers", cut, f"pre-tokenizer {cut}"


def _later_tensors(file: GGUFFile, table: dict[str, Any]) -> Iterator[Need]:
    """Tensors that came after their architecture: a loader refuses a file with a tensor that it does not use."""
    tensors, endings = table["later_tensors"].get(file.architecture, {}), table["later_endings"]
    seen: set[str] = set()
    for name in file.tensors:
        shown = _NUMBER.sub(".%d.", name)
        fact = tensors.get(shown) or (endings.get(shown.rpartition(".")[2]) if file.architecture != "bitnet" else None)
        if fact is not None and shown not in seen:
            seen.add(shown)
            yield _need(f"tensor {name}", fact)


def _keys(file: GGUFFile, table: dict[str, Any]) -> Iterator[Need]:
    """Keys that can change the network or the tokens."""
    for key in file.metadata:
        if key == "tokenizer.ggml.pre":  # its value was asked for already
            continue
        effect = effect_of(key, file.architecture)
        prefix, _, rest = key.partition(".")
        fact = table["keys"].get(f"%s.{rest}" if prefix == file.architecture else key)
        if effect is not None and effect.kind in ("network", "tokens") and fact is not None:
            yield _need(key, fact)


def _need(what: str, fact: tuple[int, int | None]) -> Need:
    return Need(what, fact[0], "" if fact[1] is None else f"PR #{fact[1]}")


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(_TABLE.read_text(encoding="utf-8"))
    return table
