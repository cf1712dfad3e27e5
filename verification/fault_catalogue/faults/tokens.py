"""Faults of tokenizer, BOS, stop tokens and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from verification.fault_catalogue.edit import set_metadata, token_type
from verification.fault_catalogue.fault import Fault, Plant, steps
from verification.fault_catalogue.models import Healthy
from verification.gguf.reader import read_gguf
from verification.gguf.writer import Raw


def _set(key: str, value: Any = None) -> Plant:
    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        set_metadata(source, target, {key: value})

    return plant


def _flag(key: str) -> Plant:
    """Invert a truth value; a missing one counts as false."""

    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        set_metadata(source, target, {key: not read_gguf(source).metadata.get(key, False)})

    return plant


def _exchanged(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    """Exchange the tokens in `strength` pairs of neighbouring ordinary tokens."""
    raw = Raw.read(source)
    tokens = raw.keys["tokenizer.ggml.tokens"][1]
    for i in range(round(strength)):
        a = len(tokens) // 2 + 2 * i
        tokens[a], tokens[a + 1] = tokens[a + 1], tokens[a]
    raw.write(target)


def _merges(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    raw = Raw.read(source)
    kind, merges = raw.keys["tokenizer.ggml.merges"]
    raw.keys["tokenizer.ggml.merges"] = kind, merges[: len(merges) - round(strength)]
    raw.write(target)


def _score(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    raw = Raw.read(source)
    raw.keys["tokenizer.ggml.scores"][1][300] += strength
    raw.write(target)


def _template(change: Any) -> Plant:
    def plant(pair: Healthy, source: Path, target: Path, strength: float) -> None:
        text = read_gguf(source).metadata["tokenizer.chat_template"]
        set_metadata(source, target, {"tokenizer.chat_template": change(text, strength)})

    return plant


def _padded(pair: Healthy, source: Path, target: Path, strength: float) -> None:
    """Write more tokens than the embedding has rows."""
    raw = Raw.read(source)
    for key, item in (("tokens", "[PAD{}]"), ("scores", 0.0), ("token_type", 1)):
        values = raw.keys[f"tokenizer.ggml.{key}"][1]
        values += [item.format(i) if isinstance(item, str) else item for i in range(round(strength))]
    raw.write(target)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PRE = "tokenizer.ggml.pre"
TEMPLATE = ("tokenizer.chat_template",)
FAULTS = [
    Fault("pre-tokenizer of another model", "tokenizer", _set(PRE, "llama-bpe"), (PRE,)),
    Fault("pre-tokenizer not named", "tokenizer", _set(PRE), (PRE,)),
    Fault(
        "tokens exchanged", "tokenizer", _exchanged, ("tokenizer.ggml.tokens",), steps("{:g} pairs", 100, 10, 1), real=2
    ),
    Fault(
        "merges cut off", "tokenizer", _merges, ("tokenizer.ggml.merges",), steps("{:g} merges", 10000, 100, 1), real=1
    ),
    Fault(
        "a special token turned into text",
        "tokenizer",
        lambda pair, s, t, x: token_type(s, t, 2, 1),
        ("token_type", "eos_token_id"),
    ),
    Fault(
        "a token's score off",
        "tokenizer",
        _score,
        ("tokenizer.ggml.scores",),
        steps("{:g}", 10, 1, 0.01, 1e-6),
        real=1,
        pair="llama",
    ),
    Fault(
        "space put before the text",
        "tokenizer",
        _flag("tokenizer.ggml.add_space_prefix"),
        ("add_space_prefix",),
        pair="llama",
    ),
    Fault("Phi-3's name lost", "tokenizer", _set("general.name", "my-finetune"), ("chat '", "text "), pair="phi3"),
    Fault(
        "more tokens than embedding rows",
        "shape",
        _padded,
        ("tokenizer.ggml", "token_embd", "vocab"),
        steps("{:g} more", 64, 1),
        real=1,
        pair="llama",
    ),
    Fault("BOS doubled", "BOS and stop", _flag("tokenizer.ggml.add_bos_token"), ("add_bos_token",)),
    Fault("BOS missing", "BOS and stop", _flag("tokenizer.ggml.add_bos_token"), ("add_bos_token",), pair="llama"),
    Fault("EOS added to prompts", "BOS and stop", _flag("tokenizer.ggml.add_eos_token"), ("add_eos_token",)),
    Fault("another EOS: never stops", "BOS and stop", _set("tokenizer.ggml.eos_token_id", 0), ("eos_token_id",)),
    Fault("another BOS", "BOS and stop", _set("tokenizer.ggml.bos_token_id", 2), ("bos_token_id",)),
    Fault(
        "special id outside the vocabulary",
        "BOS and stop",
        _set("tokenizer.ggml.eos_token_id", 10**6),
        ("eos_token_id",),
    ),
    Fault(
        "an end-of-turn token nobody asked for",
        "BOS and stop",
        _set("tokenizer.ggml.eot_token_id", 28),
        ("eot_token_id",),
    ),
    Fault("chat template missing", "chat template", _set("tokenizer.chat_template"), TEMPLATE),
    Fault("chat template of another model", "chat template", _set("tokenizer.chat_template", CHATML), TEMPLATE),
    Fault(
        "chat template's end cut",
        "chat template",
        _template(lambda text, x: text[: len(text) - round(x)]),
        TEMPLATE,
        steps("{:g} characters", 60, 11),
        real=1,
    ),
    Fault(
        "newline after the chat template",
        "chat template",
        _template(lambda text, x: text + "\n" * round(x)),
        TEMPLATE,
        steps("{:g}", 2, 1),
        real=1,
    ),
]
