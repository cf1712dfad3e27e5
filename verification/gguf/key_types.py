"""The type of every metadata key that llama.cpp or this project reads, as one table.

Most rows come from upstream: each `add_*` method of `gguf.GGUFWriter` is called once with small values, and the type in
which it stores its key is noted (4 ms; a newer `gguf` brings its newer keys along). Keys that it writes otherwise, or
not at all, stand below. Descriptive keys (`general.author`) have no row: nothing computes with them.
Sources: gguf, gguf_writer.py; llama.cpp, src/llama-model-loader.cpp (a key of another type is refused there too).
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from gguf.constants import GGUFValueType
from gguf.gguf_writer import GGUFWriter

NAMES = {  # as a person writes a type: "u32", "f32", "string"
    kind.value: kind.name.lower().replace("uint", "u").replace("int", "i").replace("float", "f")
    for kind in GGUFValueType
}
_KINDS = {
    "unsigned integer": {0, 2, 4, 10, 1, 3, 5, 11},  # any width; the sign is checked on the value
    "integer": {0, 1, 2, 3, 4, 5, 10, 11},
    "float": {6, 12},
    "bool": {7},
    "string": {8},
}
_ARRAY = "array of "
_PLAIN_KINDS = ("integer", "float", "bool", "string")
_BY_HAND = {
    "split.no": "unsigned integer",
    "split.count": "unsigned integer",
    "split.tensors.count": "unsigned integer",  # gguf-split stores it signed
    "tokenizer.chat_templates": "array of string",
    "tokenizer.chat_template.{name}": "string",
    "tokenizer.huggingface.json": "string",
    "tokenizer.ggml.{name}_token_id": "unsigned integer",
    "tokenizer.ggml.precompiled_charsmap": "array of integer",
    "{arch}.rope.scaling.type": "string",
    "{arch}.pooling_type": "unsigned integer",
    "{arch}.expert_gating_func": "unsigned integer",
    "quantize.imatrix.file": "string",
    "quantize.imatrix.dataset": "string",
    "quantize.imatrix.entries_count": "integer",
    "quantize.imatrix.chunks_count": "integer",
    "imatrix.chunk_count": "unsigned integer",
    "imatrix.chunk_size": "unsigned integer",
    "imatrix.datasets": "array of string",
    "so8t.think_form": "string",  # `so8t convert` writes it, `so8t serve` reads it
    "adapter.type": "string",
    "adapter.lora.alpha": "float",
}
# one number each: this project computes with them, so a list is refused, which elsewhere may be one value a layer
_SCALAR = re.compile(
    r"general\..*|tokenizer\..*|split\..*|[^.]+\.(block_count|context_length|embedding_length|vocab_size|expert_count"
    r"|attention\.((key|value)_length|kv_lora_rank|sliding_window|layer_norm(_rms)?_epsilon)"
    r"|rope\.(dimension_count|freq_base(_swa)?|scaling\.\w+))"
)
_DESCRIPTIVE = re.compile(r"general\.(?!(architecture|type|name|alignment|file_type|quantization_version|sampling\.))")
_EXAMPLES: dict[str, Any] = {"int": 1, "float": 1.0, "str": "x", "bool": True}


@dataclass(frozen=True)
class Wanted:
    """What a key may hold: names of kinds, as "array of float" or "unsigned integer"."""

    kinds: frozenset[str]

    def allows(self, kind: int, inner: int | None) -> bool:
        """Whether a value type fits; `inner` is the item type of an array."""
        if inner is None:
            return any(kind in _KINDS[wish] for wish in self.kinds if not wish.startswith(_ARRAY))
        return any(inner in _KINDS[wish.removeprefix(_ARRAY)] for wish in self.kinds if wish.startswith(_ARRAY))

    @property
    def is_unsigned(self) -> bool:
        """Whether a negative number has no meaning here."""
        return "unsigned integer" in self.kinds

    def __str__(self) -> str:
        return " or ".join(sorted(kind.replace("unsigned ", "") for kind in self.kinds))


def wanted(key: str) -> Wanted | None:
    """What a key may hold; None for a key that nothing reads."""
    rows = _table()
    _, _, rest = key.partition(".")
    parent, _, last = key.rpartition(".")
    if last.endswith("_token_id"):
        last = "{name}_token_id"
    candidates = (key, f"{{arch}}.{rest}", f"{parent}.{last}", f"{parent}.{{name}}")
    return next((rows[name] for name in candidates if name in rows), None)


@functools.cache
def _table() -> dict[str, Wanted]:
    recorder = _Recorder()
    recorder.record()
    rows = {}
    for key, kinds in {**recorder.seen, **{key: {kind} for key, kind in _BY_HAND.items()}}.items():
        if not _SCALAR.fullmatch(key.replace("{arch}", "x")):
            listed = {f"array of {kind.removeprefix('unsigned ')}" for kind in kinds if not kind.startswith("array")}
            kinds = kinds | listed
        if not _DESCRIPTIVE.match(key):
            rows[key] = Wanted(frozenset(kinds))
    return rows


class _Recorder(GGUFWriter):
    """A writer that writes nothing and notes each key's kinds."""

    def __init__(self) -> None:
        self.seen: dict[str, set[str]] = {}
        super().__init__(None, "{arch}")

    def add_key_value(self, key: str, val: Any, vtype: GGUFValueType, sub_type: GGUFValueType | None = None) -> None:
        if vtype == GGUFValueType.ARRAY:
            kind = {int: "integer", float: "float", bool: "bool", str: "string"}.get(type(val[0]))
            kind = kind and f"array of {kind}"
        else:
            unsigned = "unsigned " if vtype.name.startswith("UINT") else ""
            kind = next(
                (unsigned + k for k in ("integer", "float", "bool", "string") if vtype.value in _KINDS[k]), None
            )
        if kind:
            self.seen.setdefault(key, set()).add(kind)

    def record(self) -> None:
        """Call every method that adds one key with every combination of small values that its signature names."""
        plain = {f"add_{kind.name.lower()}" for kind in GGUFValueType} | {
            "add_key_value",
            "add_tensor",
            "add_tensor_info",
        }
        for name, method in inspect.getmembers(self, inspect.ismethod):
            if not name.startswith("add_") or name in plain:
                continue
            choices = [list(_examples(str(p.annotation))) for p in inspect.signature(method).parameters.values()]
            for values in itertools.product(*choices):
                try:
                    method(*values)
                except (AttributeError, IndexError, TypeError, ValueError):  # takes an enum: in the table by hand
                    continue


def _examples(annotation: str) -> Iterator[Any]:
    """Small values for each type in an annotation such as "int | Sequence[int]"."""
    for word in annotation.split(" | "):
        if word in _EXAMPLES:
            yield _EXAMPLES[word]
        elif "[" in word:
            inner = word.partition("[")[2].rstrip("]")
            yield [_EXAMPLES[inner]] if inner in _EXAMPLES else []
        else:
            yield b"x" if word == "bytes" else None
