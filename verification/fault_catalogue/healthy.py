"""The healthy pairs that faults are planted into: a checkpoint, the files made from it, and what is known of them.

`main` has a rotation and a LoRA baked in, so that base and adapter can be held against it: the user's model, or a small
Llama whose logits are far from uniform. The families are tiny models of other architectures, each for the faults that
only it can have. Everything is converted and quantised once and kept in the work directory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from so8t_core.errors import InputError
from verification.engines.convert import convert
from verification.engines.quantise import quantise
from verification.engines.reconversion import Twin
from verification.gguf.cache import Memory
from verification.gguf.reader import GGUFFile, read_gguf
from verification.reference.tokenizer import load_tokenizer
from verification.weight_parity.compare import Sources, rotations
from verification.weight_parity.expected import Checkpoint
from verification.weight_parity.hypotheses import Rotation

KINDS = ("F16", "Q8_0", "Q4_K_M")
ANGLE = 0.03  # rad, standard deviation of the rotation's parameters: near what a short training learns
LORA = {"r": 8, "lora_alpha": 8, "target_modules": ["down_proj"]}
LORA_SIZE = 0.02  # of the weight it is added to


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

    def twin(self, kind: str) -> Twin:
        """The reference in a file type, made here: what `verify` holds a candidate against.

        Raises:
            InputError: a type that the pair has no file of.
        """
        if kind not in self.files:
            raise InputError(f"the candidate's general.file_type is {kind}, which this reference was not quantised to")
        return Twin(self.opened[kind], self.opened["F16"], imatrix=False)

    @property
    def layers(self) -> int:
        return int(self.checkpoint.config["num_hidden_layers"])

    @property
    def middle(self) -> str:
        """Prefix of the layer that faults of a single layer are planted in."""
        return f"blk.{self.layers // 2}"

    def rotation(self, layer: int) -> Rotation:
        """R of one layer's o_proj, (in/8, 8, 8)."""
        return self.sources.rotations[f"model.layers.{layer}.self_attn.o_proj.weight"]


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
    """A checkpoint as it is, without anything merged."""
    return Healthy("plain", base, work, make_files(base, work, name="self-test"))


def make_main(base: Path, work: Path) -> Healthy:
    """A rotation on every layer and a LoRA on `down_proj`, baked into `base`."""
    from so8t_core import SO8TConfig, attach, bake_checkpoint, save_adapter
    from verification.engines.logits import load_hf

    work.mkdir(parents=True, exist_ok=True)
    reference, adapter = work / "reference", work / "adapter"
    if not (reference / "config.json").is_file():
        torch.manual_seed(1)
        model = attach(load_hf(base), SO8TConfig(init_scale=ANGLE, lora=dict(LORA)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # PEFT starts it at zero
                    inner = model.get_parameter(name.replace("lora_B", "lora_A"))
                    weight = model.get_parameter(name.split(".lora_B")[0] + ".base_layer.weight")
                    parameter.normal_()
                    size = torch.linalg.norm(parameter @ inner) / torch.linalg.norm(weight)
                    parameter.mul_(LORA_SIZE / float(size))
        save_adapter(model, adapter)
        bake_checkpoint(base, adapter, reference)
    return Healthy("main", reference, work, make_files(reference, work, name="self-test"), base, adapter)


def save_sharp(directory: Path, tokenizer: Any) -> Path:
    """A random Llama of four layers, width 256: quantised like a trained model, with logits far from uniform.

    Residual branches are kept small against the stream, as in trained models, so that a layer's quantisation error is
    damped; the head's spread keeps the entropy well below ln V.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    if (directory / "config.json").is_file():
        return directory
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, rms_norm_eps=1e-5, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.uniform_(0.8, 1.2)  # distinct gains: a swapped or lost norm shows
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
    """A tiny model of another architecture, with a small SentencePiece vocabulary where its converter takes one.

    Args:
        tokenizer: for the other families; None gives these a SentencePiece vocabulary too.
        name: the family, and after a space "key=value": "mistral sliding_window=32" changes the config; "llama
            small=16" moves 2^16 of size from each v_proj to its o_proj, which leaves the function as it is.
    """
    from verification.fault_catalogue.specimens import save_model

    family, _, change = name.partition(" ")
    key, _, value = change.partition("=")
    reference = work / "hf"
    if not (reference / "config.json").is_file():
        save_model(family, reference, tokenizer, **({key: int(value)} if key and key != "small" else {}))
        _rescale(reference, _SHARP | _OTHERWISE.get(family, {}))
        if key == "small":
            _rescale(reference, {".v_proj.": 2.0 ** -int(value), "o_proj.weight": 2.0 ** int(value)})
    return Healthy(name, reference, work, make_files(reference, work, name=f"tiny-{family}"))


# A random model's logits are nearly uniform and its quantisation errors add up undamped; a trained one's are neither.
_SHARP = {"lm_head.weight": 2.0, "embed_tokens.weight": 1.6, "o_proj.weight": 0.4, "down_proj.weight": 0.4}
# A larger vocabulary needs a wider spread. Norms behind a branch undo what its weights are scaled by: OLMo-2's are
# scaled themselves; Gemma's keep the stream at one size, and a larger tied head would only repeat the input.
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
    """Multiply the tensors whose names hold a key."""
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
