"""Bake: fold LoRA and rotation into the ordinary weights, W' = (W + s B A) @ R, so that nothing is left at inference.

`bake` works on a model in memory and `unbake` undoes it; `bake_checkpoint` works on the original checkpoint's files,
tensor by tensor, so that memory holds one tensor and not a model. The arithmetic is in `folding`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from so8t_core.adapter import SO8TLinear
from so8t_core.checkpoint_admission import admit_checkpoint
from so8t_core.config import SO8TConfig
from so8t_core.errors import InputError
from so8t_core.exponential import BLOCK, PARAMETERS
from so8t_core.files import atomic_dir, read_json
from so8t_core.folding import Fold, named
from so8t_core.gate import RotationGate
from so8t_core.safetensors_header import read_entries
from so8t_core.safetensors_stream import FLOATS, rewrite
from so8t_core.store import KEY_PREFIX, active_adapter, read_adapter, replace_layers
from so8t_core.weight_files import INDEX, SINGLE, WeightFiles

# Copies for other frameworks too: beside the baked weights they would be the model without its rotation
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".gguf", ".pt", ".pth", ".onnx", ".onnx_data", ".msgpack", ".h5", ".ot"}
_WEIGHT_SUFFIXES |= {".tflite"}
Progress = Callable[[int, int], None]  # (bytes done, bytes in all)


def bake(model: nn.Module) -> nn.Module:
    """Fold every adapter layer of `model` in place and return the plain model, standard architecture, gates gone.

    Raises:
        InputError: no SO8T adapter or several active ones, one that is merged already, a NaN or Inf, or a quantised
            base (bake from the original checkpoint instead); layers baked before the refusal stay baked.
    """
    active_adapter(model)  # there is one
    return replace_layers(model, _folded)


def _folded(name: str, layer: Any) -> nn.Module:
    fold = Fold()
    inner = layer
    if isinstance(inner, SO8TLinear):
        fold = next((gate.fold() for gate in inner.active_gates()), fold)
        inner = inner.base_layer
    if isinstance(inner, LoraLayer):
        for adapter in inner.active_adapters:
            if adapter in inner.lora_A:
                fold.loras.append((inner.lora_A[adapter].weight, inner.lora_B[adapter].weight, inner.scaling[adapter]))
        inner = inner.base_layer
    if type(inner) is not nn.Linear:
        raise InputError(
            f"cannot bake into {name}, a {type(inner).__name__}: only plain linear layers hold unquantised weights. "
            "Use bake_checkpoint(base_dir, adapter_dir, out_dir) on the original checkpoint"
        )
    with named(name):
        inner.weight.data = fold.apply(inner.weight.data)
    return inner


def unbake(model: nn.Module, adapter_dir: str | Path) -> nn.Module:
    """Undo `bake` or `bake_checkpoint` on the baked, plain `model`, in place: W = W' @ R^T - s B A.

    Each block of eight weights w comes back within |w_j - original| <= u |w + s B A|_2 + u |w_j|, u = eps / 2 of the
    weight's dtype. The first term is the bake's rounding, turned back; the second is the result's rounding. The
    adapter's LoRA may be large compared with w.

    Raises:
        InputError: (before anything is changed) a model that carries an adapter, damaged files, or an adapter for
            another model (the first misfitting weight is named).
    """
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError("the model carries an adapter; unbake takes the plain model that bake returned")
    modules = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor)}
    kinds = {dtype: kind for kind, dtype in FLOATS.items()}
    stored = {}
    for name, module in modules.items():
        kind = kinds.get(module.weight.dtype, "") if type(module) is nn.Linear else type(module).__name__
        stored[name] = kind, tuple(module.weight.shape)
    folds = folds_from_files(*read_adapter(adapter_dir))
    _check_fit(stored, folds, adapter_dir)
    for name, fold in folds.items():
        with named(name):
            modules[name].weight.data = fold.apply(modules[name].weight.data, undo=True)
    return model


def folds_from_files(config: SO8TConfig, tensors: dict[str, Tensor]) -> dict[str, Fold]:
    """Weight name in the base checkpoint -> the fold of that weight.

    Raises:
        InputError: a tensor that belongs neither to a rotation (theta (n, 28) and its companions) nor to a LoRA pair,
            or a missing tensor.
    """
    folds: dict[str, Fold] = {}
    turned: dict[str, dict[str, Tensor]] = {}  # by module, then by name: its gate's tensors
    for key, value in tensors.items():
        name = key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".")
        module, separator, part = name.partition(".lora_so8t.")
        if separator:
            turned.setdefault(module, {})[part] = value
        elif name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            B = tensors.get(key.replace(".lora_A.", ".lora_B."))
            if B is None:
                raise InputError(f"{key} has no lora_B beside it: the adapter file is incomplete")
            folds.setdefault(module, Fold()).loras.append((value, B, _lora_scale(config, module)))
        elif not name.endswith(".lora_B.weight"):
            raise InputError(f"unknown tensor {key} in the adapter; it cannot be folded exactly")
    for module, parts in turned.items():
        for reader in (module, *(config.shared or {}).get(module, [])):
            fold = _turning(config, module, parts)
            fold.loras = folds[reader].loras if reader in folds else []
            folds[reader] = fold
    if lost := sorted(set(config.shared or {}) - set(turned)):
        raise InputError(f"{lost[0]} should own a rotation that others share, but the adapter has none for it")
    return {f"{module}.weight": fold for module, fold in folds.items()}


def _turning(config: SO8TConfig, module: str, parts: dict[str, Tensor]) -> Fold:
    """The fold of one gate's tensors; docs/adapter_format.md lists their names and shapes."""
    blocks = parts["theta"].shape[0] if "theta" in parts and parts["theta"].ndim else 0
    options: dict[str, Any] = {"scale": config.scale, "shuffle": config.shuffle, "accumulate": config.accumulate}
    gate = RotationGate(max(blocks, 1) * BLOCK, layer=module, **options)
    shapes = {part: tuple(value.shape) for part, value in gate.state_dict().items()}
    for part in sorted({*shapes, *parts}):
        found, wanted = parts.get(part), shapes.get(part)
        if found is None or wanted is None:
            state = "misses" if found is None else "has, against its config,"
            raise InputError(f"the adapter {state} {module}.lora_so8t.{part}; the file is incomplete or damaged")
        if tuple(found.shape) != wanted:
            kind = f"a rotation is (n, {PARAMETERS})" if part.endswith("theta") else f"wanted {wanted}"
            raise InputError(f"{module}.lora_so8t.{part} has shape {tuple(found.shape)}, {kind}")
    gate.load_state_dict(parts, assign=True)  # in the dtypes of the file
    return gate.fold()


def _lora_scale(config: SO8TConfig, module: str) -> float:
    lora = config.lora_config
    if lora is None:
        raise InputError(f"the adapter has a LoRA on {module}, but its config has none")
    r = lora.rank_pattern.get(get_pattern_key(lora.rank_pattern.keys(), module), lora.r)
    alpha = lora.alpha_pattern.get(get_pattern_key(lora.alpha_pattern.keys(), module), lora.lora_alpha)
    return float(alpha / r**0.5 if lora.use_rslora else alpha / r)


def bake_checkpoint(
    base_dir: str | Path,
    adapter_dir: str | Path,
    out_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    invert: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write base + adapter as an ordinary checkpoint; every other file that holds no weights is copied byte for byte.

    Args:
        base_dir: the original, unquantised checkpoint in safetensors form (one file or sharded).
        out_dir: replaced whole if it exists; absent or as it was if anything fails.
        dtype: storage dtype of all floating-point tensors; None keeps each tensor's dtype.
        invert: bake R^T instead of R; for negative controls only.
        progress: called with (bytes written, bytes in all).

    Raises:
        InputError: no safetensors in base_dir, a quantised base, an adapter for another model, a value that overflows
            `dtype`, or a place that cannot be written or would overwrite its own input.
    """
    base_dir, out_dir = Path(base_dir), Path(out_dir)
    if dtype is not None and dtype not in FLOATS.values():
        raise InputError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    for source in (base_dir, Path(adapter_dir)):
        if source.resolve().is_relative_to(out_dir.resolve()):
            raise InputError(f"out_dir {out_dir} would replace its own input {source}; choose another place")
    weights, _ = admit_checkpoint(base_dir)
    folds = folds_from_files(*read_adapter(adapter_dir))
    for fold in folds.values():
        fold.transposed = invert
    changes = {name: fold.apply for name, fold in folds.items()}
    _check_fit({name: (entry.dtype, entry.shape) for name, entry in weights.entries.items()}, folds, adapter_dir)
    with atomic_dir(out_dir) as temporary:
        _copy_other_files(weights, temporary, dtype)
        total = sum(shard.stat().st_size for shard in weights.paths)
        done = 0
        for name in weights.names:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            for nbytes in rewrite(base_dir / name, temporary / name, changes, dtype):
                done += nbytes
                if progress:
                    progress(done, total)
        if dtype is not None:
            _rewrite_index(temporary, [temporary / name for name in weights.names])
    return out_dir


def _check_fit(stored: dict[str, tuple[str, tuple[int, ...]]], folds: dict[str, Fold], adapter_dir: str | Path) -> None:
    """Check, before anything is changed, that every folded weight exists and has the adapter's width."""
    other = f"the adapter in {adapter_dir} was made for another model"
    for name, fold in folds.items():
        if name not in stored:
            raise InputError(f"{other}: the base has no {name}")
        kind, shape = stored[name]
        if kind not in FLOATS or len(shape) != 2:
            raise InputError(
                f"{name} is {kind} {list(shape)}: not a plain weight matrix; bake from the unquantised original"
            )
        out, width = shape
        if fold.theta is not None and fold.theta.shape[0] * BLOCK != width:
            raise InputError(f"{other}: {name} has {width} columns, the rotation turns {fold.theta.shape[0] * BLOCK}")
        for A, B, _ in fold.loras:
            if (A.shape[1:], B.shape[:1], B.shape[1:]) != ((width,), (out,), A.shape[:1]):
                raise InputError(f"{other}: {name} is {out} x {width}, its LoRA {tuple(B.shape)} @ {tuple(A.shape)}")


def _copy_other_files(weights: WeightFiles, out_dir: Path, dtype: torch.dtype | None) -> None:
    """Copy tokenizer, templates, licence and subdirectories byte for byte; config.json too unless the dtype changes."""
    base_dir, single = weights.directory, weights.names == (SINGLE,)
    for file in sorted(base_dir.rglob("*")):
        name = file.relative_to(base_dir)
        is_weights = file.suffix in _WEIGHT_SUFFIXES or file.name == "pytorch_model.bin.index.json"
        unused_index = single and file.name == INDEX
        if not file.is_file() or is_weights or unused_index or any(part.startswith(".") for part in name.parts):
            continue
        (out_dir / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out_dir / name)
    if dtype is not None:
        config = read_json(base_dir / "config.json")
        config["dtype"] = str(dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
        _write_json(out_dir / "config.json", config)


def _rewrite_index(out_dir: Path, shards: list[Path]) -> None:
    path = out_dir / INDEX
    if path.is_file():
        index = read_json(path)
        index.setdefault("metadata", {})["total_size"] = sum(e.nbytes for shard in shards for e in read_entries(shard))
        _write_json(path, index)


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
