"""The expected values of every tensor of a GGUF file, computed from the checkpoint that the file was made from.

Float files: each weight lies within one rounding of its type, |g - w| <= u |w| + s, with u = 2^-p for p significant
bits (round to nearest: F32 exact because w is at most F32; F16 p = 11; BF16 p = 8) and s half the smallest subnormal
(F16 2^-25, BF16 2^-134). Names come from gguf's TensorNameMap; llama's q/k rows are permuted from two halves to pairs;
Gemma stores norm + 1; RoPE factors are computed from config.json. Tensors without such a rule (experts, families not in
KNOWN) are compared with the oracle, the verifier's own conversion: it gives names, shapes and values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np
from gguf.constants import MODEL_ARCH_NAMES
from gguf.tensor_mapping import get_tensor_name_map

from verification.gguf.reader import GGUFFile
from verification.reference import rope
from verification.reference.checkpoint import Array, Checkpoint
from verification.reference.families import KNOWN, NORM_PLUS_ONE, OTHER_TOWERS, PERMUTED
from verification.weight_parity.hypotheses import halves_to_pairs

_ROUNDING: dict[str, tuple[float, float]] = {
    "F32": (0.0, 0.0),
    "F16": (2.0**-11, 2.0**-25),
    "BF16": (2.0**-8, 2.0**-134),
}
# float32 powers of two libraries differ by 4 ulp; llama3's factors amplify that by at most factor * high/(high-low)
_COMPUTED = 2.0**-18


PREDICTION = "the prediction of further tokens (MTP)"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d{1,5})\.")
_MTP = re.compile(r"(?:^|\.)mtp(?:_\w+)?\.")


@dataclass(frozen=True)
class Inventory:
    """The checkpoint tensor that each GGUF tensor was made from."""

    source_of: dict[str, str]  # GGUF name -> checkpoint name
    unmapped: list[str]  # checkpoint tensors without a GGUF name
    missing: list[str]  # expected GGUF names that are not in the file
    extra: list[str]  # GGUF tensors that no checkpoint tensor explains
    computed: dict[str, Array] = field(default_factory=dict)  # GGUF tensors that config.json explains: RoPE factors


def is_known(file: GGUFFile) -> bool:
    """Whether this module can compute every tensor of the file from its checkpoint; not for mixtures of experts."""
    return file.architecture in KNOWN and not file.get("expert_count")


def inventory(checkpoint: Checkpoint, file: GGUFFile) -> Inventory:
    """Map every checkpoint tensor to a GGUF tensor, and list the tensors that are left on either side."""
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    architecture = numbers.get(file.architecture)
    source_of: dict[str, str] = {}
    unmapped: list[str] = []
    if architecture is None:
        return Inventory({}, sorted(checkpoint), [], sorted(file.tensors))
    blocks = file.get("block_count")
    names = get_tensor_name_map(architecture, blocks if isinstance(blocks, int) and 0 <= blocks < 10_000 else 0)
    tied = bool(checkpoint.config.get("tie_word_embeddings"))
    for name in checkpoint:
        if optional_part(name, checkpoint):
            continue
        target = names.get_name(name.replace("language_model.", ""), try_suffixes=(".weight", ".bias"))
        if target is None:
            unmapped.append(name)
        elif not (tied and target == "output.weight" and target not in file.tensors):
            source_of[target] = name
    computed = rope.factor_tensors(checkpoint.config)
    wanted = source_of.keys() | computed.keys()
    missing = sorted(wanted - set(file.tensors))
    extra = sorted(set(file.tensors) - wanted)
    if tied and "output.weight" in extra:  # a tied head that was written out repeats the embedding
        source_of["output.weight"] = source_of.get("token_embd.weight", "")
        extra.remove("output.weight")
    return Inventory(source_of, sorted(unmapped), missing, extra, computed)


def inventory_by_conversion(checkpoint: Checkpoint, file: GGUFFile, conversion: GGUFFile) -> Inventory:
    """Account for every tensor of a family that is not mapped by principle: upstream's conversion names them.

    Args:
        conversion: a whole conversion of the reference.
    """
    mapped = inventory(checkpoint, file)
    missing, extra = conversion.tensors.keys() - file.tensors.keys(), file.tensors.keys() - conversion.tensors.keys()
    if checkpoint.config.get("tie_word_embeddings"):  # a head may be written out, or left to the embedding
        missing, extra = missing - {"output.weight"}, extra - {"output.weight"}
    source_of = {name: source for name, source in mapped.source_of.items() if name in conversion.tensors}
    return Inventory(source_of, [], sorted(missing), sorted(extra))


def left_out(checkpoint: Checkpoint, file: GGUFFile) -> dict[str, list[str]]:
    """Tensors of the reference that a text model's file may leave out, by what they belong to."""
    found: dict[str, list[str]] = {}
    for name in checkpoint:
        part = optional_part(name, checkpoint)
        if part and not (part == PREDICTION and file.get("nextn_predict_layers")):
            found.setdefault(part, []).append(name)
    return found


def optional_part(name: str, checkpoint: Checkpoint) -> str:
    """What a tensor belongs to beside the text model; "" of the text model's own."""
    if any(part in name for part in OTHER_TOWERS):
        return "pictures or sound"
    layer, layers = _LAYER.search(name), checkpoint.config.get("num_hidden_layers")
    beyond = layer is not None and isinstance(layers, int) and int(layer[1]) >= layers
    return PREDICTION if beyond or _MTP.search(name) else ""


def expected_values(name: str, source: str, checkpoint: Checkpoint, architecture: str) -> Array:
    """The values that a GGUF tensor should hold before rounding: float32, in the tensor's shape."""
    values = checkpoint[source]
    config = checkpoint.config
    if architecture in PERMUTED and ".attn_q." in name:
        return halves_to_pairs(values, len(values) // int(config["num_attention_heads"]))
    if architecture in PERMUTED and ".attn_k." in name:
        heads = int(config.get("num_key_value_heads") or config["num_attention_heads"])
        return halves_to_pairs(values, len(values) // heads)
    if architecture in NORM_PLUS_ONE and name.endswith("norm.weight"):
        return values + np.float32(1)
    return values


def expectation(name: str, found: Inventory, checkpoint: Checkpoint, file: GGUFFile) -> Array | None:
    """A tensor's values before rounding, in its shape, from checkpoint or config; None if neither gives them."""
    if name in found.computed:
        return found.computed[name]
    source = found.source_of.get(name)
    if not source or not is_known(file):
        return None
    values = expected_values(name, source, checkpoint, file.architecture)
    if file.architecture == "gemma3" and name == "token_embd.weight":  # the converter drops rows without a token
        return values[: len(file.metadata.get("tokenizer.ggml.tokens") or values)]
    return values


def roundings(difference: Array, wanted: Array, kind: str, *, computed: bool = False) -> float | None:
    """Worst |difference|, in roundings of a float type; None for a quantised type.

    Args:
        difference: an array of any shape; `wanted` has the same shape.
        computed: `wanted` was calculated here, in float32 as in the converter, but by another library.
    """
    if kind not in _ROUNDING:
        return None
    unit, smallest = _ROUNDING[kind]
    if computed:
        unit = max(unit, _COMPUTED)
    if unit == 0.0:
        return 0.0 if not difference.any() else float("inf")
    return float((difference / (np.float32(unit) * np.abs(wanted) + np.float32(max(smallest, 1e-45)))).max(initial=0.0))
