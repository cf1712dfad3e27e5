"""Everything that must be equal and needs no logits: token ids, special ids, chat template, stop set, metadata.

Ids are compared on plain text and on rendered chats, because llama.cpp treats spaces after special tokens by its own
rules and only a rendered chat shows it. Each function returns (value, detail): the number of disagreements and a
sentence about the first. Metadata is held against config.json by name; floats are compared as float32, as GGUF stores
them. U+3000 stands inside a text, never at its ends: both sides strip those differently by design (data is stripped).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from verification.gguf_file import GGUFFile
from verification.llama_engine import LlamaModel
from verification.tensors import read_json

Finding = tuple[int, str]

PLAIN = (
    "The quick test of a plain sentence.",
    "Two  spaces,   three; a tab\there.",
    "line one\nline two\r\nline three\n\n\nend",
    "東京の気温は二十三度で、風は弱い。",
    "全角　スペースと、カタカナ・ひらがな「かぎ括弧」。",
    "１２３４５ と 12345、そして 3.14159 は -2.5e-10 ではない。",
    "0 00 000 0000 00000 1234567890 1,234,567.89",
    "e\u0301 vs \u00e9, か\u3099 vs が, n\u0303",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5 \u2764\ufe0f",
    "def f(x: int) -> int:\n    return x ** 2  # 二乗\n",
    "if (a<b && c!=d) { x[i] += y->z; } // \\n",
    "It's we'll they've I'M DON'T",
    "Привет, мир! مرحبا Γειά שלום",
    "a\u200bb\u00a0c\u2028d",
    "<b>not special</b> [INST] <<SYS>> </s> <|end|> <|im_end|> <|endoftext|>",
    "# 思考ステップ\n1. 3 + 4 = 7\n\n# 最終回答\n7",
    " leading and trailing ",
    "",
)
_HELLO = {"role": "user", "content": "Hello, what is 3 + 4?"}
_ANSWER = {"role": "assistant", "content": "# 思考ステップ\n3 + 4 = 7\n\n# 最終回答\n7"}
CHATS: tuple[list[dict[str, str]], ...] = (
    [_HELLO],
    [{"role": "system", "content": "You count things."}, _HELLO],
    [_HELLO, _ANSWER, {"role": "user", "content": "東京から大阪まで何キロ？\nおよそで良い。"}],
    [{"role": "user", "content": "code:\n```python\nprint('a  b')\n```"}],
)


def render_chats(tokenizer: Any) -> list[str]:
    """The chat fixtures through the model's template; a chat that its template refuses (no system role) is left out."""
    from jinja2.exceptions import TemplateError

    if not tokenizer.chat_template:
        return []
    rendered = []
    for chat in CHATS:
        try:
            rendered.append(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        except TemplateError:
            continue
    return rendered


def token_ids(tokenizer: Any, model: LlamaModel, texts: list[str] | tuple[str, ...]) -> Finding:
    """Texts whose ids differ between the reference's tokenizer and llama.cpp's."""
    wrong, detail = 0, ""
    for text in texts:
        for special in (False, True):
            wanted = list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
            found = model.tokenize(text, add_special=special)
            if wanted != found:
                wrong += 1
                detail = detail or _first_difference(text, wanted, found)
                break
    return wrong, detail


def _first_difference(text: str, wanted: list[int], found: list[int]) -> str:
    pairs = zip([*wanted, None], [*found, None], strict=False)
    at = next(i for i, (a, b) in enumerate(pairs) if a != b)
    return (
        f"{text[:40]!r}: token {at} is {wanted[at : at + 3]} in the reference and {found[at : at + 3]} in llama.cpp "
        f"({len(wanted)} and {len(found)} tokens)"
    )


def special_ids(tokenizer: Any, file: GGUFFile) -> Finding:
    """BOS, EOS, UNK and padding ids that both sides name and that differ."""
    pairs = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    wrong = []
    for ours, theirs in pairs.items():
        wanted, found = getattr(tokenizer, f"{ours}_token_id"), file.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        if wanted is not None and found is not None and wanted != found:
            wrong.append(f"{ours} is {wanted} in the reference and {found} in the file")
        elif wanted is not None and found is None and ours in ("bos", "eos"):
            wrong.append(f"{ours} is {wanted} in the reference and absent in the file")
    return len(wrong), "; ".join(wrong)


def added_specials(tokenizer: Any, model: LlamaModel) -> Finding:
    """Whether BOS and EOS are added to a plain text by one side only."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    at = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    wanted = {"BOS": at > 0, "EOS": len(full) > at + len(bare)}
    found = {"BOS": model.add_bos, "EOS": model.add_eos}
    wrong = [
        f"{k}: the reference {_adds(wanted[k])}, llama.cpp {_adds(found[k])}" for k in wanted if wanted[k] != found[k]
    ]
    return len(wrong), "; ".join(wrong)


def _adds(value: bool) -> str:
    return "adds it" if value else "does not add it"


def chat_template(tokenizer: Any, model: LlamaModel) -> Finding:
    """0 when the template's text is the reference's, byte for byte."""
    wanted, found = tokenizer.chat_template or None, model.chat_template()
    if wanted == found:
        return 0, ""
    if wanted is None or found is None:
        return 1, f"the template is missing in the {'reference' if wanted is None else 'file'}"
    at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), min(len(wanted), len(found)))
    return 1, f"the templates differ from character {at}: {wanted[at : at + 30]!r} became {found[at : at + 30]!r}"


def stop_set(directory: Path, tokenizer: Any, model: LlamaModel) -> Finding:
    """Tokens at which the reference stops and llama.cpp does not."""
    wanted: set[int] = set()
    path = directory / "generation_config.json"
    if path.is_file():
        value = read_json(path).get("eos_token_id")
        wanted |= set(value if isinstance(value, list) else [] if value is None else [value])
    if tokenizer.eos_token_id is not None:
        wanted.add(int(tokenizer.eos_token_id))
    lost = sorted(token for token in wanted if not 0 <= token < model.vocab_size or not model.is_end(token))
    return len(lost), f"llama.cpp goes on after {lost}" if lost else ""


def metadata(config: dict[str, Any], file: GGUFFile, tokenizer_size: int) -> Finding:
    """Keys of the file that contradict config.json."""
    wrong = []
    for key, wanted in expected_metadata(config).items():
        found = file.get(key)
        if wanted is None or (found is None and key in _OPTIONAL):
            continue
        same = (
            np.float32(wanted) == np.float32(found)
            if isinstance(wanted, float) and found is not None
            else wanted == found
        )
        if not same:
            wrong.append(f"{file.architecture}.{key} is {found}, config.json says {wanted}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and embedding.shape[0] < tokenizer_size:
        wrong.append(f"the embedding has {embedding.shape[0]} rows for {tokenizer_size} tokens")
    if embedding is not None and embedding.shape[0] != config.get("vocab_size", embedding.shape[0]):
        wrong.append(f"the embedding has {embedding.shape[0]} rows, config.json says vocab_size {config['vocab_size']}")
    return len(wrong), "; ".join(wrong[:3])


# keys that llama.cpp derives when absent
_OPTIONAL = frozenset({"attention.key_length", "rope.freq_base", "attention.sliding_window", "vocab_size"})


def expected_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """GGUF keys (without architecture prefix) and the values config.json asks for; None means it says nothing."""
    get: Callable[[str], Any] = config.get
    heads, hidden = get("num_attention_heads"), get("hidden_size")
    rope = get("rope_parameters") or get("rope_scaling") or {}
    theta = rope.get("rope_theta", get("rope_theta")) if isinstance(rope, dict) else get("rope_theta")
    head_dim = get("head_dim") or (hidden // heads if hidden and heads else None)
    return {
        "block_count": get("num_hidden_layers"),
        "context_length": get("max_position_embeddings"),
        "embedding_length": hidden,
        "feed_forward_length": get("intermediate_size"),
        "attention.head_count": heads,
        "attention.head_count_kv": get("num_key_value_heads"),
        "attention.key_length": head_dim,
        "attention.layer_norm_rms_epsilon": None if get("rms_norm_eps") is None else float(get("rms_norm_eps")),
        "rope.freq_base": None if theta is None else float(theta),
        "vocab_size": get("vocab_size"),
    }


_DESCRIPTIVE = ("general.", "quantize.", "split.")  # names, authors, file type: they change no number


def differs_from_oracle(file: GGUFFile, oracle: GGUFFile) -> Finding:
    """Metadata keys that differ from the verifier's own conversion of the reference: whatever the list above forgot."""
    keys = [k for k in file.metadata.keys() | oracle.metadata.keys() if not k.startswith(_DESCRIPTIVE)]
    keys.append("general.architecture")
    wrong = sorted(key for key in keys if file.metadata.get(key) != oracle.metadata.get(key))
    return len(wrong), "; ".join(_change(key, oracle.metadata.get(key), file.metadata.get(key)) for key in wrong[:3])


def _change(key: str, wanted: Any, found: Any) -> str:
    """One key's difference; of two lists of the same length the first item that differs."""
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        at = next((i for i, (a, b) in enumerate(zip(wanted, found, strict=True)) if a != b), 0)
        return f"{key}[{at}]: {_short(wanted[at])} became {_short(found[at])}"
    return f"{key}: {_short(wanted)} became {_short(found)}"


def _short(value: Any) -> str:
    return f"list of {len(value)}" if isinstance(value, list) else repr(value)[:40]
