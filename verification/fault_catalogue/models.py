"""The models for planted faults: healthy checkpoints and the files made from them.

`main` has a rotation and a LoRA baked in, so that it can be compared with base and adapter. It is the user's model, or
a small Llama with logits far from uniform. The families are tiny random models of nine architectures, each for faults
that only this architecture can have, and converted by the real converter. Their hidden size is 256, so that K-quants
are possible. Their heads have 64 or 128 channels, so that `o_proj` is square in some and not in others. The RoPE
scalings (llama3, linear, yarn, LongRoPE) are spread over the families. All models are converted and quantised once and
kept in the work directory.
"""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from so8t_core import SO8TConfig, attach, bake_checkpoint, save_adapter
from verification.engines.convert import convert
from verification.engines.huggingface import load_hf
from verification.engines.quantise import quantise
from verification.engines.reconversion import FloatFiles
from verification.gguf.cache import Memory
from verification.gguf.reader import GGUFFile, read_gguf
from verification.reference.checkpoint import Checkpoint
from verification.reference.tokenizer import load_tokenizer
from verification.weight_parity.compare import Sources, rotations
from verification.weight_parity.hypotheses import Rotation
from verification.weight_parity.own_quantiser import log_normal

Array = npt.NDArray[np.float32]
KINDS = ("F16", "Q8_0", "Q4_K_M")
ANGLE = 0.03  # rad, standard deviation of the rotation's parameters: near what a short training learns
LORA = {"r": 8, "lora_alpha": 8, "target_modules": ["down_proj"]}
LORA_SIZE = 0.02  # relative to the weight that the LoRA is added to


@dataclass
class Healthy:
    """One reference and its files."""

    name: str
    reference: Path
    work: Path
    files: dict[str, Path]
    base: Path | None = None
    adapter: Path | None = None
    memory: Memory = field(default_factory=Memory)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint(self.reference)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.reference)

    @cached_property
    def sources(self) -> Sources:
        turned = rotations(self.adapter) if self.adapter else {}
        return Sources(self.checkpoint, Checkpoint(self.base) if self.base else None, turned)

    @cached_property
    def opened(self) -> dict[str, GGUFFile]:
        return {kind: read_gguf(path) for kind, path in self.files.items()}

    @cached_property
    def elsewhere(self) -> GGUFFile:
        """The reference as Q4_K_M under `unknown_matrix`."""
        path = self.work / "healthy-elsewhere.gguf"
        if not path.is_file():
            quantise(self.files["F16"], path, "Q4_K_M", threads=1, imatrix=unknown_matrix(self.opened["F16"]))
        return read_gguf(path)

    @property
    def conversions(self) -> FloatFiles:
        """The reference's F16 file, from which the quantised files were made."""
        return FloatFiles(lambda kind: self.opened["F16"] if kind == "F16" else None)

    @property
    def layers(self) -> int:
        return int(self.checkpoint.config["num_hidden_layers"])

    @property
    def middle(self) -> str:
        """Name prefix of the layer that gets the faults of a single layer."""
        return f"blk.{self.layers // 2}"

    def rotation(self, layer: int) -> Rotation:
        """R of one layer's o_proj, (in/8, 8, 8)."""
        return self.sources.rotations[f"model.layers.{layer}.self_attn.o_proj.weight"]


def unknown_matrix(file: GGUFFile) -> dict[str, Array]:
    """Log-normal importance matrices of spread 1, the spread of real matrices: (input width,) for each linear layer."""
    rows = {name: t.shape[-1] for name, t in file.tensors.items() if len(t.shape) == 2 and "blk." in name}
    return {name: log_normal(width, 1.0, 1000 + number) for number, (name, width) in enumerate(rows.items())}


def make_files(reference: Path, work: Path, *, name: str, threads: int = 1) -> dict[str, Path]:
    """F16, Q8_0 and Q4_K_M of a checkpoint."""
    files = {"F16": work / "healthy-F16.gguf"}
    if not files["F16"].is_file():
        convert(reference, files["F16"], model_name=name)
    for kind in KINDS[1:]:
        files[kind] = work / f"healthy-{kind}.gguf"
        if not files[kind].is_file():
            quantise(files["F16"], files[kind], kind, threads=threads)
    return files


def make_plain(base: Path, work: Path) -> Healthy:
    """The healthy pair of a checkpoint without a merge."""
    return Healthy("plain", base, work, make_files(base, work, name="self-test"))


def make_main(base: Path, work: Path) -> Healthy:
    """The healthy pair of `base` with a rotation on every layer and a LoRA on `down_proj` baked in."""
    work.mkdir(parents=True, exist_ok=True)
    reference, adapter = work / "reference", work / "adapter"
    if not (reference / "config.json").is_file():
        torch.manual_seed(1)
        model = attach(load_hf(base), SO8TConfig(init_scale=ANGLE, lora=dict(LORA)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # PEFT initialises lora_B with zeros
                    inner = model.get_parameter(name.replace("lora_B", "lora_A"))
                    weight = model.get_parameter(name.split(".lora_B")[0] + ".base_layer.weight")
                    parameter.normal_()
                    size = torch.linalg.norm(parameter @ inner) / torch.linalg.norm(weight)
                    parameter.mul_(LORA_SIZE / float(size))
        save_adapter(model, adapter)
        bake_checkpoint(base, adapter, reference)
    return Healthy("main", reference, work, make_files(reference, work, name="self-test"), base, adapter)


def save_sharp(directory: Path, tokenizer: Any) -> Path:
    """A random Llama of four layers, width 256, with the quantisation errors of a trained model and non-uniform logits.

    Residual branches are small compared with the residual stream, as in trained models, so that a layer's quantisation
    error is damped; the head's spread keeps the entropy well below ln V.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if (directory / "config.json").is_file():
        return directory
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.8, 1.2)  # different gains, so that a swapped or lost norm shows
            elif "embed" in name or "lm_head" in name:
                weight.normal_(std=1.0 if "embed" in name else 0.19)
            else:
                branch = 0.3 if "o_proj" in name or "down_proj" in name else 1.0
                weight.normal_(std=branch * weight.shape[1] ** -0.5)
    model.generation_config.eos_token_id = [2]
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_family(name: str, work: Path, tokenizer: Any = None) -> Healthy:
    """A tiny model of another architecture, with a small SentencePiece vocabulary if its converter accepts one.

    Args:
        tokenizer: tokenizer of the other families; None gives them a SentencePiece vocabulary too.
        name: the family, and after a space "key=value": "mistral sliding_window=32" changes the config; "llama
            small=16" divides each v_proj by 2^16 and multiplies its o_proj by 2^16, which keeps the function; "llama
            rotated" is the family as base, with rotations of every linear input baked in, scaled and shuffled.
    """
    family, _, change = name.partition(" ")
    key, _, value = change.partition("=")
    reference = work / "hf"
    if not (reference / "config.json").is_file():
        save_model(family, reference, tokenizer, **({key: int(value)} if value and key != "small" else {}))
        _rescale(reference, _SHARP | _OTHERWISE.get(family, {}))
        if key == "small":
            _rescale(reference, {".v_proj.": 2.0 ** -int(value), "o_proj.weight": 2.0 ** int(value)})
    if key == "rotated":
        base, reference, adapter = reference, work / "reference", work / "adapter"
        if not (reference / "config.json").is_file():
            save_rotated(base, adapter)
            bake_checkpoint(base, adapter, reference)
        files = make_files(reference, work, name=f"tiny-{family}")
        return Healthy(name, reference, work, files, base, adapter)
    return Healthy(name, reference, work, make_files(reference, work, name=f"tiny-{family}"))


def save_rotated(base: Path, adapter: Path) -> None:
    """An adapter on every linear input of `base`, scaled and shuffled, with random values of `ANGLE`."""
    model = attach(load_hf(base), SO8TConfig(targets="all-linear", scale="channel", shuffle=True))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_so8t." in name:
                parameter.normal_(std=ANGLE, generator=generator)
    save_adapter(model, adapter)


# A random model has nearly uniform logits and undamped quantisation errors; a trained model has neither.
_SHARP = {"lm_head.weight": 2.0, "embed_tokens.weight": 1.6, "o_proj.weight": 0.4, "down_proj.weight": 0.4}
# A larger vocabulary needs a wider spread. A norm after a branch undoes the scale of the branch's weights: OLMo-2's
# norms are scaled instead; Gemma's keep the stream at one size, and a larger tied head would only repeat the input.
_OTHERWISE: dict[str, dict[str, float]] = {
    "gemma2": {"embed_tokens.weight": 1.0},
    "gemma3": {"embed_tokens.weight": 1.0},
    "qwen3": {"lm_head.weight": 2.6, "o_proj.weight": 0.2, "down_proj.weight": 0.2},
    "olmo2": {
        "lm_head.weight": 2.6,
        "embed_tokens.weight": 10.0,
        "post_attention_layernorm": 0.2,
        "post_feedforward_layernorm": 0.2,
    },
}


def _rescale(directory: Path, factors: dict[str, float]) -> None:
    """Multiply the tensors whose names contain a key of `factors`."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        for part, factor in factors.items():
            if part in name:
                tensors[name] = (tensor.float() * factor).to(tensor.dtype)
    save_file(tensors, path, metadata={"format": "pt"})


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Standard normal numbers, the same on every machine that has numpy's PCG64."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + i / 64 for i in range(32)],
    "long_factor": [1.0 + i / 4 for i in range(32)],
    "original_max_position_embeddings": 512,
}
# family -> (config class, changes to SIZES)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": LLAMA3, "attention_bias": True, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 32, "tie_word_embeddings": False}),
    "qwen2": (
        "Qwen2Config",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            },
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 128, "tie_word_embeddings": False}),
    "phi3": (
        "Phi3Config",
        {
            "rope_parameters": LONGROPE,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "original_max_position_embeddings": 512,
        },
    ),
    "gemma2": ("Gemma2Config", {"head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 256}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 256}),
    "olmo2": (
        "Olmo2Config",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}, "tie_word_embeddings": False},
    ),
    "smollm3": ("SmolLM3Config", {"tie_word_embeddings": True}),
}
_SCALES = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0078125,
    "logits_scaling": 8.0,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# families of 2025 and 2026; those with experts or recurrent layers are judged by upstream's conversion
NEWER: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("GraniteConfig", {**_SCALES, "tie_word_embeddings": True}),
    "granitemoe": ("GraniteMoeConfig", {**_SCALES, **_EXPERTS, "tie_word_embeddings": True}),
    "granitehybrid": (
        "GraniteMoeHybridConfig",
        {
            **_SCALES,
            **_EXPERTS,
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "shared_intermediate_size": 256,
            "mamba_n_heads": 8,
            "mamba_d_head": 64,
            "mamba_d_state": 64,
            "mamba_n_groups": 1,
            "position_embedding_type": None,
        },
    ),
    "qwen3moe": (
        "Qwen3MoeConfig",
        {"head_dim": 64, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256},
    ),
    "qwen35": (
        "Qwen3_5TextConfig",
        {
            "head_dim": 64,
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
            "tie_word_embeddings": False,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "head_dim": 128,
            "sliding_window": 256,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "num_kv_shared_layers": 1,
            "pad_token_id": 0,
        },
    ),
    "gpt-oss": ("GptOssConfig", {**_EXPERTS, "head_dim": 64, "intermediate_size": 256, "sliding_window": 128}),
    "lfm2": (
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True},
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            "head_dim": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size": 256,
            "intermediate_size_mlp": 512,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 256,
        },
    ),
}
# qwen2: transformers 5 forces Qwen2's splitting on every tokenizer.json of this model type, so that only a real Qwen2
# vocabulary has a hash that the converter knows; the converter accepts a SentencePiece model too
SENTENCEPIECE = ("phi3", "gemma2", "qwen2", "llama", "mistral", "smollm3", "gemma3", "granite", "granitemoe", "gemma4")
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
    """A random checkpoint of `family` with the tokenizer files that its converter needs.

    Args:
        tokenizer: None trains a small SentencePiece vocabulary, which makes everything faster.
        more: further changes of the config.
    """
    import transformers

    name, changes = (FAMILIES | NEWER)[family]
    torch.manual_seed(seed)
    small = family in SENTENCEPIECE or tokenizer is None
    vocabulary, stops = save_sentencepiece(directory, family) if small else (len(tokenizer), [2])
    by_layer = {"vocab_size_per_layer_input": vocabulary} if family == "gemma4" else {}
    config = getattr(transformers, name)(**{**SIZES, "vocab_size": vocabulary, **by_layer, **changes, **more})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:  # (out, in), (experts, out, in), (channels, 1, width)
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
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
        sentence_iterator=iter(text),
        model_writer=stream,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=family == "phi3",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (directory / "tokenizer.model").write_bytes(stream.getvalue())
    phi = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    names = phi if family == "phi3" else ("<start_of_turn>", "<end_of_turn>")
    tokenizer = LlamaTokenizer.from_pretrained(
        str(directory), add_bos_token=family != "phi3", legacy=family == "phi3", add_prefix_space=family == "phi3"
    )
    tokenizer.add_tokens([AddedToken(n, special=True, normalized=False, rstrip=family == "phi3") for n in names])
    tokenizer.chat_template = PHI3_CHAT if family == "phi3" else TURNS
    tokenizer.save_pretrained(directory)
    # transformers 5 does not write these two, and upstream's converter reads them only here
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
    """Change tokenizer.json as in Phi-3: a space mark before every piece of text, rstrip on all but three specials."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    fields["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    fields["pre_tokenizer"] = None
    for token in fields["added_tokens"]:
        token["rstrip"] = token["content"] not in ("<unk>", "<s>", "<|endoftext|>")
    path.write_text(json.dumps(fields, ensure_ascii=False), encoding="utf-8")


def make_pairs(root: Path, tokenizer: Any, families: tuple[str, ...] = tuple(FAMILIES)) -> dict[str, Pair]:
    """Every family as F16, Q8_0 and Q4_K_M; two converters at a time."""
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
    """base + adapter -> reference, and its files: a small Llama of three layers, for which a lint takes a second."""

    base: Path
    adapter: Path
    reference: Path
    files: dict[str, Path]


def make_baked(root: Path, *, square: bool = True) -> Baked:
    """A Llama with a random rotation of 0.1 rad baked in; `o_proj` 256 x 256, or 256 x 512 when not `square`."""
    more = {"num_hidden_layers": 3, "attention_bias": False, "head_dim": 64 if square else 128}
    base = save_model("llama", root / "base", **more)
    torch.manual_seed(1)
    save_adapter(attach(load_hf(base), SO8TConfig(init_scale=0.1)), root / "adapter")
    reference = bake_checkpoint(base, root / "adapter", root / "reference")
    files = {"F16": convert(reference, root / "m-F16.gguf", model_name="small")}
    for kind in ("Q8_0", "Q4_K_M"):
        files[kind] = quantise(files["F16"], root / f"m-{kind}.gguf", kind)
    return Baked(base, root / "adapter", reference, files)
