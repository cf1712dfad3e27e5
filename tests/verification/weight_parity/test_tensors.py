"""Weights against the checkpoint: healthy within one rounding, every small injected change seen and named."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from verification_models import Family, rewrite

from so8t_core import SO8TConfig, attach, bake, bake_checkpoint, load_adapter, save_adapter
from so8t_core.errors import InputError
from verification.engines.huggingface import load_hf
from verification.engines.reconversion import FloatFiles
from verification.fault_catalogue.edit import edit_tensor
from verification.gguf.candidate import Candidate
from verification.gguf.reader import read_gguf
from verification.logit_parity.bake import _largest, saved_rounding
from verification.reference.checkpoint import Checkpoint
from verification.weight_parity.checks import WeightResult, weight_checks
from verification.weight_parity.compare import Sources, rotations
from verification.weight_parity.expected import inventory
from verification.weight_parity.hypotheses import halves_to_pairs, rotated


def checks(family: Family, path: Path, kind: str = "F16") -> dict[str, object]:
    result = weights(family, Candidate(kind, read_gguf(path)))
    return {check.name: check for check in [*result.contract, *result.convert, *result.quantise]}


def weights(family: Family, candidate: Candidate, sources: Sources | None = None) -> WeightResult:
    floats = FloatFiles(lambda kind: read_gguf(family.files["F16"]) if kind == "F16" else None)
    return weight_checks(candidate, floats, sources or Sources(Checkpoint(family.reference)))


def test_healthy_files_are_fully_explained(family: Family) -> None:
    for kind, path in family.files.items():
        found = checks(family, path, kind)
        assert found["contract.inventory"].value == 0
        assert found["contract.finite_weights"].value == 0
        assert found["contract.hypotheses"].value == 0
        if kind == "F16":
            assert found["convert.rounding"].value <= 1.0
        else:
            assert found["quantise.tensors_differ"].value == 0


def test_every_tensor_is_mapped_by_principle(family: Family) -> None:
    file = read_gguf(family.files["F16"])
    found = inventory(Checkpoint(family.reference), file)
    assert set(found.source_of) == set(file.tensors)
    assert found.unmapped == found.missing == found.extra == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("blk.1.attn_output.weight", lambda w: w.T),
        ("blk.0.attn_q.weight", lambda w: np.roll(w, 1, axis=0)),
        ("blk.0.attn_norm.weight", lambda w: w * np.float32(1.0001)),
        ("blk.1.ffn_down.weight", lambda w: w + (np.arange(w.size).reshape(w.shape) == 77) * np.float16(0.01)),
        ("token_embd.weight", lambda w: np.nan_to_num(w) * np.float16(1.002)),
    ],
)
def test_a_changed_tensor_fails_and_is_named(family: Family, tmp_path: Path, name: str, change) -> None:
    found = checks(family, rewrite(family.files["F16"], tmp_path / "f.gguf", tensors={name: change}))
    assert found["convert.rounding"].value > 1.0
    assert name in found["convert.rounding"].detail


def test_a_non_finite_weight_fails_and_is_named(family: Family, tmp_path: Path) -> None:
    def poison(w):
        w[3, 5] = np.inf
        return w

    path = rewrite(family.files["F16"], tmp_path / "f.gguf", tensors={"blk.0.ffn_up.weight": poison})
    found = checks(family, path)["contract.finite_weights"]
    assert (found.value, found.detail) == (1, "blk.0.ffn_up.weight")


def test_one_flipped_bit_of_a_quant_differs_from_the_oracle(family: Family, tmp_path: Path) -> None:
    data = bytearray(family.files["Q4_K_M"].read_bytes())
    file = read_gguf(family.files["Q4_K_M"])
    data[file.tensors["blk.1.attn_k.weight"].offset + 20] ^= 1
    path = tmp_path / "f.gguf"
    path.write_bytes(data)
    found = checks(family, path, "Q4_K_M")["quantise.unexplained"]
    assert found.value == 1
    assert "blk.1.attn_k.weight" in found.detail


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
def test_a_wrong_rotation_is_named_in_verify(family: Family, tmp_path: Path, kind: str) -> None:
    """The nearest hypothesis names what the bytes only count."""
    name = "blk.1.attn_output.weight"
    sources = Sources(Checkpoint(family.reference), Checkpoint(family.base), rotations(family.adapter))
    R = sources.rotations["model.layers.1.self_attn.o_proj.weight"]
    path = edit_tensor(family.files[kind], tmp_path / "f.gguf", name, lambda w: rotated(w, R, transposed=True))
    candidate = Candidate(kind, read_gguf(path))
    result = weights(family, candidate, sources)
    (check,) = [check for check in result.contract if check.name == "contract.hypotheses"]
    assert check.value == 1
    assert f"{name}: expected the reference's weight, found " in check.detail
    assert "not rotated" in check.detail or "nothing baked" in check.detail


def test_a_lost_tensor_is_missing(family: Family) -> None:
    file = read_gguf(family.files["F16"])
    del file.tensors["blk.0.ffn_gate.weight"]
    result = weights(family, Candidate("F16", file))
    assert result.contract[0].value == 1
    assert "missing blk.0.ffn_gate.weight" in result.contract[0].detail


def test_a_tensor_nobody_expects_is_unexplained(family: Family) -> None:
    file = read_gguf(family.files["F16"])
    file.tensors["blk.9.extra.weight"] = replace(file.tensors["blk.0.attn_norm.weight"], name="blk.9.extra.weight")
    result = weights(family, Candidate("F16", file))
    assert "unexplained blk.9.extra.weight" in result.contract[0].detail


def test_the_rope_permutation_pairs_the_halves() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]  # two heads of four rows: r0 r1 i0 i1
    assert halves_to_pairs(rows, 4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_rotation_of_a_milliradian_in_one_layer_is_seen(family: Family, tmp_path: Path) -> None:
    """1e-3 rad moves weights by 1e-3 of themselves, twice the F16 grid; logits would not show it."""

    def rotate(w):
        w = w.astype(np.float64)
        c, s = np.cos(1e-3), np.sin(1e-3)
        w[:, :2] = w[:, :2] @ np.array([[c, -s], [s, c]])
        return w

    path = rewrite(family.files["F16"], tmp_path / "f.gguf", tensors={"blk.0.attn_output.weight": rotate})
    assert checks(family, path)["convert.rounding"].value > 1.0


def test_a_damaged_or_absent_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="holds no"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        Checkpoint(tmp_path)
    with pytest.raises(InputError, match=r"config\.json"):
        Checkpoint(tmp_path / "none")


def test_saving_a_stale_checkpoint_is_seen(family: Family, tmp_path: Path) -> None:
    baked = bake(load_adapter(load_hf(family.base), family.adapter))
    assert saved_rounding(baked, Checkpoint(family.reference))[0] <= 1.01
    stale, where = saved_rounding(baked, Checkpoint(family.base))
    assert stale > 10
    assert "o_proj" in where
    state = load_file(family.reference / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    (tmp_path / "config.json").write_bytes((family.reference / "config.json").read_bytes())
    save_file({k: v.to(torch.bfloat16) for k, v in state.items()}, tmp_path / "model.safetensors")
    assert saved_rounding(baked, Checkpoint(tmp_path)) == (
        float("inf"),
        "model.layers.1.mlp.up_proj.weight is not in the saved checkpoint",
    )


def test_a_quantised_tensor_inside_a_float_file_fails_the_rounding(family: Family) -> None:
    """One small tensor in Q8_0 moves the logits less than the bound of a whole file: only its type gives it away."""
    whole, quant = read_gguf(family.files["F16"]), read_gguf(family.files["Q8_0"])
    name = "blk.0.attn_v.weight"
    mixed = replace(whole, tensors={**whole.tensors, name: quant.tensors[name]})
    for file, held in ((whole, True), (mixed, False)):
        (check,) = weights(family, Candidate("F16", file)).convert
        assert (check.value <= 1) == held
    assert name in check.detail


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_saved_nan_is_not_hidden_by_the_tensors_after_it(family: Family, tmp_path: Path, bad: float) -> None:
    folder = Path(shutil.copytree(family.reference, tmp_path / "ref"))
    model = load_hf(folder)
    (path,) = folder.glob("*.safetensors")
    saved = load_file(path)
    assert saved_rounding(model, Checkpoint(folder))[0] == 0
    saved["model.embed_tokens.weight"][100, 3] = bad
    save_file(saved, path, metadata={"format": "pt"})
    value, where = saved_rounding(model, Checkpoint(folder))
    assert value == float("inf")
    assert "embed_tokens" in where


def test_experts_are_held_against_the_files_that_name_each(tmp_path: Path) -> None:
    """In memory the experts of a layer are one tensor, in the files they are one each."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    save_adapter(attach(load_hf(tmp_path / "base"), SO8TConfig(init_scale=0.1)), tmp_path / "adapter")
    saved = bake_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "saved")
    baked = bake(load_adapter(load_hf(tmp_path / "base"), tmp_path / "adapter"))
    assert saved_rounding(baked, Checkpoint(saved))[0] <= 1.01
    (path,) = saved.glob("*.safetensors")
    weights, name = load_file(path), "model.layers.1.mlp.experts.2.up_proj.weight"
    weights[name][3, 5] += 0.01
    save_file(weights, path, metadata={"format": "pt"})
    value, where = saved_rounding(baked, Checkpoint(saved))
    assert value > 10
    assert name in where
    del weights[name]
    save_file(weights, path, metadata={"format": "pt"})
    assert saved_rounding(baked, Checkpoint(saved)) == (float("inf"), f"{name} is not in the saved checkpoint")


def test_the_largest_difference_is_nan_wherever_the_nan_stands() -> None:
    clean, dirty = np.zeros((2, 3), dtype=np.float32), np.full((2, 3), np.nan, dtype=np.float32)
    assert np.isnan(_largest([clean, dirty], [clean, clean]))


def test_every_tensor_of_the_report_has_its_error_and_its_drawer(family: Family) -> None:
    for kind, path in family.files.items():
        rows = weights(family, Candidate(kind, read_gguf(path))).rows
        assert {row.drawer for row in rows} == {"proven"}
        assert all(row.rel_error is not None and row.why for row in rows)
        matrices = [row for row in rows if len(row.shape) > 1]
        low, high = {"F16": (0, 3e-4), "Q8_0": (3e-3, 1e-2), "Q4_K_M": (1e-2, 0.12)}[kind]
        assert all(low <= row.rel_error <= high for row in matrices if row.rel_error is not None)
