"""Tiny random models of nine architectures, each through the real converter: what lint has to explain without a miss.

Hidden size 256, so that K-quants are real; heads of 64 or 128 channels, so that `o_proj` is square in some and not in
others; the RoPE scalings are spread over the families (llama3, linear, yarn, LongRoPE).
"""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0 + i / 64 for i in range(32)],
    "long_factor": [1.0 + i / 4 for i in range(32)], "original_max_position_embeddings": 512,
}  # fmt: skip
# family -> (config class, changes to SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": LLAMA3, "attention_bias": True, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 32, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
                            "original_max_position_embeddings": 256},
        "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 128, "tie_word_embeddings": False}),
    "phi3": ("Phi3Config", {"rope_parameters": LONGROPE, "sliding_window": 2047, "tie_word_embeddings": False,
                            "original_max_position_embeddings": 512}),
    "gemma2": ("Gemma2Config", {"head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 256}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 256}),
    "olmo2": ("Olmo2Config", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0},
                              "tie_word_embeddings": False}),
    "smollm3": ("SmolLM3Config", {"tie_word_embeddings": True}),
}  # fmt: skip
# qwen2: transformers 5 forces Qwen2's own splitting on every tokenizer.json of this model type, so that only a real
# Qwen2 vocabulary has a hash that the converter knows; its converter takes a SentencePiece model as well
SENTENCEPIECE = ("phi3", "gemma2", "qwen2", "llama", "mistral", "smollm3", "gemma3")
PHI3_CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TURNS = (
    "{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Pair:
    """One architecture: the checkpoint and the files made from it."""

    family: str
    reference: Path
    files: dict[str, Path]


def save_model(family: str, directory: Path, tokenizer: Any = None, *, seed: int = 0, **more: Any) -> Path:
    """A random checkpoint of `family` with the tokenizer files that its converter asks for.

    Args:
        tokenizer: None trains a small SentencePiece vocabulary, which makes everything faster.
        more: further changes of the config.
    """
    import transformers

    name, changes = FAMILIES[family]
    torch.manual_seed(seed)
    small = family in SENTENCEPIECE or tokenizer is None
    vocabulary, stops = save_sentencepiece(directory, family) if small else (len(tokenizer), [2])
    config = getattr(transformers, name)(**{**SIZES, "vocab_size": vocabulary, **changes, **more})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter.uniform_(-0.3, 0.3).add_(0 if family.startswith("gemma") else 1)
    model.generation_config.eos_token_id = stops
    model.to(torch.bfloat16).save_pretrained(directory)
    if not small:
        tokenizer.save_pretrained(directory)
    return directory


def save_sentencepiece(directory: Path, family: str) -> tuple[int, list[int]]:
    """Train a small SentencePiece vocabulary with the family's special tokens; returns its size and the stop set."""
    import sentencepiece
    from tokenizers import AddedToken
    from transformers import LlamaTokenizer

    directory.mkdir(parents=True, exist_ok=True)
    text = [f"The {a} {b} of number {i}, 東京 and code x = {i};" for i in range(400) for a, b in [("quick", "test")]]
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=stream, vocab_size=400, model_type="bpe", byte_fallback=True,
        character_coverage=1.0, split_digits=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=family == "phi3",
        minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(stream.getvalue())
    phi = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    names = phi if family == "phi3" else ("<start_of_turn>", "<end_of_turn>")
    tokenizer = LlamaTokenizer.from_pretrained(
        str(directory), add_bos_token=family != "phi3", legacy=family == "phi3", add_prefix_space=family == "phi3"
    )
    tokenizer.add_tokens([AddedToken(n, special=True, normalized=False, rstrip=family == "phi3") for n in names])
    tokenizer.chat_template = PHI3_CHAT if family == "phi3" else TURNS
    tokenizer.save_pretrained(directory)
    # transformers 5 leaves these two out, and upstream's converter reads them from nowhere else
    path = directory / "tokenizer_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["add_bos_token"] = family != "phi3"
    shared = {"special": True, "normalized": False, "lstrip": False, "single_word": False}
    strips = {n: family == "phi3" and n != "<|endoftext|>" for n in names}
    fields["added_tokens_decoder"] = {
        str(tokenizer.convert_tokens_to_ids(n)): {"content": n, "rstrip": strips[n], **shared} for n in names
    }
    path.write_text(json.dumps(fields), encoding="utf-8")
    if family == "phi3":
        _as_phi3(directory / "tokenizer.json")
    return len(tokenizer), [2, tokenizer.convert_tokens_to_ids("<|end|>" if family == "phi3" else "<end_of_turn>")]


def _as_phi3(path: Path) -> None:
    """Phi-3's own tokenizer.json: a space mark before every stretch of text, and rstrip on all but three specials."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    fields["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    fields["pre_tokenizer"] = None
    for token in fields["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    path.write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")


def make_pairs(root: Path, tokenizer: Any, families: tuple[str, ...] = tuple(FAMILIES)) -> dict[str, Pair]:
    """Every family as F16, Q8_0 and Q4_K_M; two converters at a time."""
    from verification.engines.convert import convert
    from verification.engines.quantise import quantise

    references = {family: save_model(family, root / family / "hf", tokenizer) for family in families}

    def make(family: str) -> Pair:
        folder = root / family
        files = {"F16": convert(references[family], folder / "m-F16.gguf", model_name=f"tiny-{family}")}
        for kind in ("Q8_0", "Q4_K_M"):
            files[kind] = quantise(files["F16"], folder / f"m-{kind}.gguf", kind, threads=1)
        return Pair(family, references[family], files)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(families, pool.map(make, families), strict=True))


@dataclass(frozen=True)
class Baked:
    """base + adapter -> reference, and its files: a small Llama of three layers whose every lint takes a second."""

    base: Path
    adapter: Path
    reference: Path
    files: dict[str, Path]


def make_baked(root: Path, *, square: bool = True) -> Baked:
    """A Llama with a random rotation of 0.1 rad baked in; `o_proj` 256 x 256, or 256 x 512 when not `square`."""
    from so8t_core import SO8TConfig, attach, bake_checkpoint, save_adapter
    from verification.engines.convert import convert
    from verification.engines.logits import load_hf
    from verification.engines.quantise import quantise

    more = {"num_hidden_layers": 3, "attention_bias": False, "head_dim": 64 if square else 128}
    base = save_model("llama", root / "base", **more)
    torch.manual_seed(1)
    save_adapter(attach(load_hf(base), SO8TConfig(init_scale=0.1)), root / "adapter")
    reference = bake_checkpoint(base, root / "adapter", root / "reference")
    files = {"F16": convert(reference, root / "m-F16.gguf", model_name="small")}
    for kind in ("Q8_0", "Q4_K_M"):
        files[kind] = quantise(files["F16"], root / f"m-{kind}.gguf", kind)
    return Baked(base, root / "adapter", reference, files)
