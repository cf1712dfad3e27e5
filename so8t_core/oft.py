"""Exact exchange with stock PEFT OFT adapters (block size 8, exact Cayley map): users need not install SO8T.

OFT turns rows, x_row @ P with P = R^T, and stores P = (I - Q)(I + Q)^-1 by the upper triangle of the skew Q. Q grows
like tan(angle / 2), so angles near pi are refused. Import takes the logarithm of R.
Shapes: theta (n, 28), OFT's weight (n, 28). Source: Qiu et al., Controlling Text-to-Image Diffusion by Orthogonal
Finetuning (2023); the layout is PEFT 0.21's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import OFTConfig
from torch import Tensor

from so8t_core.adapter import layer_of
from so8t_core.baking import folds_from_files
from so8t_core.config import SO8TConfig
from so8t_core.errors import InputError
from so8t_core.exponential import BLOCK, PARAMETERS
from so8t_core.folding import Fold, Turn
from so8t_core.rotation import log_so8, plane_angles, skew, upper_triangle
from so8t_core.store import KEY_PREFIX, read_adapter, read_files, write_files

LARGEST_ANGLE = 3.1  # rad; tan(1.55) = 48, and float32 still gives the angle back to 1e-6
_OURS, _THEIRS = ".lora_so8t.theta", ".oft_R.weight"


def export_oft(adapter_dir: str | Path, out_dir: str | Path) -> Path:
    """Write the adapter as a stock PEFT OFT adapter with the same function; returns `out_dir`.

    A rotation that several modules share is written for each of them, and a product of earlier rotations as one.

    Raises:
        InputError: the adapter has a LoRA inside, a scale or a shuffle (OFT has no such part: bake instead), or an
            angle above 3.1 rad (an eigenvalue -1 has the angle pi).
    """
    config, tensors = read_adapter(adapter_dir)
    held = ["a LoRA inside the rotation"] if config.lora is not None else []
    held += ["a shuffle"] if config.shuffle else []
    held += ["a scale"] if config.scale != "none" else []
    if held:
        raise InputError(f"{adapter_dir} has {held[0]}, which an OFT adapter cannot hold; bake it instead")
    folds = {name.removesuffix(".weight"): fold for name, fold in folds_from_files(config, tensors).items()}
    exported = {KEY_PREFIX + module + _THEIRS: _to_oft(module, fold) for module, fold in folds.items()}
    stock = OFTConfig(
        r=0,
        oft_block_size=BLOCK,
        use_cayley_neumann=False,
        target_modules=sorted({module.rpartition(".")[2] for module in folds}),
        layers_to_transform=sorted({layer for module in folds if (layer := layer_of(module)) >= 0}),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    return write_files(out_dir, stock.to_dict(), exported)


def import_oft(oft_dir: str | Path, out_dir: str | Path) -> Path:
    """Write a stock PEFT OFT adapter as an SO8T adapter with the same function; returns `out_dir`.

    Raises:
        InputError: not an OFT adapter of block size 8; constrained or shared blocks; or the Cayley-Neumann map, whose
            truncated series is not orthogonal and turns the other way.
    """
    folder = Path(oft_dir)
    fields, tensors = read_files(folder, "OFT")
    refused = {
        "use_cayley_neumann": "its truncated series is not a rotation; train with use_cayley_neumann=False",
        "coft": "constrained OFT projects its weights while it runs",
        "block_share": "its blocks are shared",
    }
    for option, why in refused.items():
        if fields.get(option, option == "use_cayley_neumann"):
            raise InputError(f"{folder} was trained with {option}=True: {why}")
    imported = {}
    for key, weight in tensors.items():
        if not key.endswith(_THEIRS) or weight.ndim != 2 or weight.shape[1] != PARAMETERS:
            raise InputError(f"{folder}: {key} {tuple(weight.shape)} is no OFT rotation of block size {BLOCK}")
        imported[key.removesuffix(_THEIRS) + _OURS] = _from_oft(weight)
    config = SO8TConfig(
        layers=sorted({layer for key in imported if (layer := layer_of(key)) >= 0}),
        targets=sorted({key.removesuffix(_OURS).rpartition(".")[2] for key in imported}),
        share=False,
        shared={},
        task_type=fields.get("task_type"),
        base_model_name_or_path=fields.get("base_model_name_or_path"),
        inference_mode=True,
    )
    return write_files(out_dir, config.to_dict(), imported)


def _to_oft(module: str, fold: Fold) -> Tensor:
    """The rotation of one module -> OFT's weight (n, 28), float32."""
    assert fold.theta is not None  # without a LoRA there is nothing else in the adapter
    R = Turn(fold.theta, fold.accumulated).matrix()
    # The angles of R itself, at most pi: theta's angles may exceed a full turn.
    largest = plane_angles(log_so8(R)).max().item() if R.numel() else 0.0
    if largest > LARGEST_ANGLE:
        raise InputError(
            f"{module} turns a plane by {largest:.4f} rad; above {LARGEST_ANGLE} OFT's Cayley map "
            "is too close to its singularity at pi. Bake the adapter instead"
        )
    eye = torch.eye(BLOCK, dtype=torch.float64)
    Q: Tensor = torch.linalg.solve(eye + R.mT, eye - R.mT)
    return upper_triangle(Q).float().contiguous()


def _from_oft(weight: Tensor) -> Tensor:
    """OFT's weight (n, 28) -> theta (n, 28), float32."""
    Q, eye = skew(weight.double()), torch.eye(BLOCK, dtype=torch.float64)
    P = torch.linalg.solve(eye + Q, eye - Q)
    return log_so8(P.mT).float().contiguous()
