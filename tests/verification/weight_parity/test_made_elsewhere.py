"""Files that this machine's quantiser did not make pass where they are healthy, and are refused where they are not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_elsewhere import (
    VOCAB,
    Source,
    activations,
    again,
    as_gguf,
    files,
    gptq,
    matrix,
    q4_bytes,
    q4_grid,
    rewritten,
    searched,
    small_llama,
    unseen,
)
from safetensors.torch import load_file, save_file

from verification.engines.huggingface import load_hf
from verification.engines.quantise import quantise, quantised_bytes
from verification.engines.reconversion import FloatFiles
from verification.gate.decide import _decide_check
from verification.gate.policy import make_policy
from verification.gate.report import Check
from verification.gguf.candidate import Candidate
from verification.gguf.reader import read_gguf
from verification.reference.checkpoint import Checkpoint
from verification.weight_parity.checks import WeightResult, output_checks, weight_checks
from verification.weight_parity.compare import Sources
from verification.weight_parity.expected import inventory
from verification.weight_parity.layer_output_error import output_errors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama(tmp_path_factory.mktemp("elsewhere") / "reference")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return load_hf(checkpoint)


@pytest.fixture(scope="module")
def source(checkpoint: Path, model: Any) -> Source:
    return made_source(checkpoint, model)


def made_source(checkpoint: Path, model: Any) -> Source:
    floats = as_gguf(checkpoint, checkpoint.parent / "f16.gguf")
    file = read_gguf(floats)
    found = inventory(Checkpoint(checkpoint), file)
    modules = {name: origin.removesuffix(".weight") for name, origin in found.source_of.items() if "blk." in name}
    modules = {name: module for name, module in modules.items() if len(file.tensors[name].shape) == 2}
    return Source(checkpoint, floats, activations(model, tokens(5, passages=8), modules))


def tokens(seed: int, passages: int = 0) -> np.ndarray:
    """Token ids (positions,), or (passages, positions): GPTQ wants several positions a channel."""
    return np.random.default_rng(seed).integers(0, VOCAB, (passages, 500) if passages else 500)


def weighed(source: Source, path: Path, reference: Path | None = None) -> WeightResult:
    floats = FloatFiles(lambda kind: source.file if kind == "F16" else None)
    sources = Sources(Checkpoint(reference or source.reference))
    memory = source.memory if reference is None else None  # a tensor that an earlier file had too is not asked again
    return weight_checks(Candidate("X", read_gguf(path)), floats, sources, memory=memory)


def alarms(result: WeightResult) -> list[str]:
    """What would fail: findings of any tensor."""
    return [f"{finding.where}: {finding.found} ({finding.cause})" for r in result.results for finding in r.findings]


def refused(checks: list[Check]) -> list[Check]:
    """Checks that the default policy does not let pass."""
    return [
        one
        for one in (_decide_check(check, make_policy({}), "Q4_K_M", judged=True) for check in checks)
        if one.status != "pass"
    ]


def judged(
    source: Source, model: Any, made: Iterator[tuple[str, Path]]
) -> tuple[dict[str, str], dict[str, Counter[str]]]:
    """The first alarm of each file that has one, and the drawers of its tensors, by maker.

    What is open is measured on tokens of another passage.
    """
    seen: dict[str, str] = {}
    drawers: dict[str, Counter[str]] = {}
    for maker, path in made:
        result = weighed(source, path)
        bad = alarms(result)
        drawers[maker] = Counter(r.drawer for r in result.results)
        if result.open and not bad:
            checks = output_checks("X", result.open, output_errors(model, tokens(6), result.open))
            bad += [f"{one.name} {one.status} {one.value} {one.detail}" for one in refused(checks)]
        if bad:
            seen[maker] = bad[0]
    print(json.dumps({maker: dict(counts) for maker, counts in drawers.items()}, indent=1))
    return seen, drawers


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=[pytest.mark.soak, pytest.mark.timeout(3600)])])
def test_every_healthy_maker_passes(source: Source, model: Any, tmp_path: Path, every: bool) -> None:
    """Also where only the layers' outputs can say so."""
    seen, drawers = judged(source, model, files(source, tmp_path, every=every))
    assert not seen
    assert len(drawers) >= (90 if every else 15)
    for maker in ("_L", "pure", "head kept in F16", "embedding in F16, Q8_0", "another type per layer"):
        assert set(drawers[maker]) == {"proven"}, maker
    for maker in ("GPTQ Q4_0", "imatrix whole Q4_K_M", "rounded scale first", "from a Q8_0"):
        assert drawers[maker]["judged"] > 4, maker


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_thirty_files_that_no_threshold_was_looked_at_with_pass(tmp_path: Path) -> None:
    checkpoint = small_llama(tmp_path / "other", other=True)
    model = load_hf(checkpoint)
    seen, drawers = judged(source := made_source(checkpoint, model), model, unseen(source, tmp_path))
    assert not seen
    assert len(drawers) == 30


def test_error_feedback_is_left_to_the_layers_output(source: Source, model: Any, tmp_path: Path) -> None:
    """GPTQ's own inputs make its output error small; a tensor with as much error at random has a large one."""
    path = _gptq(source, tmp_path)
    result = weighed(source, path)
    assert len(result.open) >= 4
    errors = output_errors(model, tokens(6), result.open)
    assert errors.keys() == result.open.keys()
    assert max(one.ratio for one in errors.values()) <= 1.1
    assert np.median([one.ratio for one in errors.values()]) < 0.95
    assert not refused(output_checks("X", result.open, errors))
    scrambled = {name: _scrambled(one) for name, one in result.open.items()}
    worse = output_errors(model, tokens(6), scrambled)
    assert min(one.ratio for one in worse.values()) > 1.1
    nothing = output_checks("X", result.open, {})
    assert [one.name for one in nothing] == ["quantise.output_error", "quantise.codes_error"]
    assert {one.value for one in nothing} == {None}  # what was not measured cannot pass


@pytest.mark.parametrize("kind", ["Q4_K_M", pytest.param("Q4_0", marks=pytest.mark.soak)])
def test_a_close_fine_tune_behind_an_unknown_matrix_is_refused(
    source: Source, model: Any, tmp_path: Path, kind: str
) -> None:
    """1 % of noise in every matrix raises no tensor's error by 1 %; its codes are not the nearest, and gain nothing."""
    weights, rng = matrix(source, 1.0, 11), np.random.default_rng(3)
    path = quantise(source.floats, tmp_path / "x.gguf", kind, imatrix=weights)
    assert not weighed(source, path).open

    def tuned(name: str, kind: str, data: bytes) -> tuple[str, bytes] | None:
        if name not in weights:
            return None
        wanted = source.file.tensors[name].values()
        other = wanted + 0.01 * wanted.std() * rng.standard_normal(wanted.shape)
        raw = quantised_bytes(other.astype(np.float32), kind, weights[name])
        assert raw is not None
        return kind, raw.tobytes()

    result = weighed(source, rewritten(path, tmp_path / "y.gguf", tuned))
    assert len(result.open) > 10
    checks = output_checks("X", result.open, output_errors(model, tokens(6), result.open))
    assert "quantise.codes_error" in {check.name for check in refused(checks)}  # Q6_K tensors also fail by size


def test_a_file_quantised_from_a_q8_0_is_judged(source: Source, tmp_path: Path) -> None:
    """Its codes are the nearest to the reference's Q8_0, not to the reference."""
    path = quantise(source.floats, tmp_path / "x.gguf", "Q4_K_M")

    result = weighed(source, again(source, path, tmp_path / "y.gguf"))
    assert alarms(result) == []
    assert not result.open
    assert sum(r.drawer == "judged" for r in result.results) > 10


def _gptq(source: Source, root: Path) -> Path:
    return searched(source, quantise(source.floats, root / "p.gguf", "Q4_0"), root / "g.gguf", gptq)


def _scrambled(one: Any) -> Any:
    """The tensor with its error's columns in another order: as large, without the feedback."""
    from dataclasses import replace

    values = one.tensor.values()
    error = (values - one.wanted)[:, np.random.default_rng(0).permutation(values.shape[1])]
    data = np.ascontiguousarray(one.wanted + 1.3 * error, dtype=np.float32)
    return replace(one, tensor=replace(one.tensor, type="F32", raw=data.view(np.uint8).reshape(-1)))


def test_a_file_whose_values_are_the_reference_is_proven(source: Source, tmp_path: Path) -> None:
    """The reference was dequantised from the file, as people do who start from a GGUF."""
    path = quantise(source.floats, tmp_path / "q.gguf", "Q4_K_M")
    file, reference = read_gguf(path), tmp_path / "ref"
    reference.mkdir()
    (reference / "config.json").write_bytes((source.reference / "config.json").read_bytes())
    found = inventory(Checkpoint(source.reference), file)
    (shard,) = source.reference.glob("*.safetensors")
    state = load_file(shard)
    from verification.weight_parity.hypotheses import pairs_to_halves

    for name, origin in found.source_of.items():
        values = file.tensors[name].values()
        if ".attn_q." in name or ".attn_k." in name:
            values = pairs_to_halves(values, 32)
        state[origin] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    save_file(state, reference / "model.safetensors", metadata={"format": "pt"})
    result = weighed(source, path, reference)
    assert {r.drawer for r in result.results} == {"proven"}
    assert any("dequantises" in r.proof for r in result.results)
    name = "blk.1.ffn_down.weight"
    state[found.source_of[name]] = (state[found.source_of[name]].float() * 1.01).to(torch.bfloat16)
    save_file(state, reference / "model.safetensors", metadata={"format": "pt"})
    scaled = weighed(source, path, reference)
    (row,) = [r for r in scaled.results if r.name == name]
    assert row.drawer != "proven"


def _lora(values: np.ndarray, size: float) -> np.ndarray:
    rng = np.random.default_rng(9)
    low = rng.standard_normal((values.shape[0], 8)) @ rng.standard_normal((8, values.shape[1]))
    return (values + size * np.linalg.norm(values) / np.linalg.norm(low) * low).astype(np.float32)


def _turned(values: np.ndarray, angle: float) -> np.ndarray:
    rng = np.random.default_rng(4)
    out = values.astype(np.float64).copy()
    for at in range(0, values.shape[1], 8):
        A = rng.standard_normal((8, 8)) * angle
        out[:, at : at + 8] = out[:, at : at + 8] @ torch.matrix_exp(torch.from_numpy(A - A.T)).numpy()
    return out.astype(np.float32)


# fault -> (tensor, change, what the diagnosis holds, types)
FAULTS = {
    "a LoRA of 4 % missing": ("ffn_down", lambda w: _lora(w, 0.04), "low-rank", ("Q4_K_M", "Q6_K", "Q8_0")),
    "a rotation left over": ("attn_output", lambda w: _turned(w, 0.01), "rotation off", ("Q4_K_M", "Q6_K", "Q8_0")),
    "scaled": ("ffn_up", lambda w: w * np.float32(1.03), "scaled by 1.0", ("Q4_K_M", "Q6_K", "Q8_0")),
    "one row scaled": (
        "ffn_gate",
        lambda w: np.concatenate([w[:9], w[9:10] * np.float32(1.2), w[10:]]),
        "row",
        ("Q4_K_M", "Q8_0"),
    ),
    "one column scaled": (
        "ffn_gate",
        lambda w: w * np.where(np.arange(w.shape[1]) == 70, 1.4, 1).astype(np.float32),
        "column",
        ("Q4_K_M", "Q8_0"),
    ),
    "shifted": ("ffn_down", lambda w: w + np.float32(0.05 * w.std()), "shifted", ("Q4_K_M", "Q8_0")),
    "transposed": ("attn_output", lambda w: w.T, "transposed", ("Q4_K_M", "Q2_K")),
    "noise of half its size": (
        "ffn_up",
        lambda w: w + np.float32(0.5 * w.std()) * np.random.default_rng(1).standard_normal(w.shape).astype(np.float32),
        "",
        ("Q4_K_M",),
    ),
    "rows in another order": ("ffn_up", lambda w: w[np.random.default_rng(1).permutation(len(w))], "", ("Q4_K_M",)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_behind_an_unknown_importance_matrix_is_refused(source: Source, tmp_path: Path, fault: str) -> None:
    from verification.gguf.writer import Raw

    kind_of, change, words, types = FAULTS[fault]
    name = f"blk.1.{kind_of}.weight"
    weights = matrix(source, 1.0, 11)
    wanted = source.file.tensors[name].values()
    for kind in types:
        path = quantise(source.floats, tmp_path / "x.gguf", kind, imatrix=weights)
        raw = Raw.read(path)
        (info,) = [info for info in raw.tensors if info.name == name]
        values = np.ascontiguousarray(change(wanted), dtype=np.float32)
        data = quantised_bytes(values, read_gguf(path).tensors[name].type, weights[name])
        assert data is not None
        info.data = data.tobytes()
        result = weighed(source, raw.write(tmp_path / "f.gguf"))
        found = [f for r in result.results for f in r.findings]
        assert {f.where for f in found} == {name}, (fault, kind)
        assert any(words in f.cause for f in found), (fault, kind, found)


def test_another_builds_blocks_are_judged_as_well(source: Source, tmp_path: Path) -> None:
    """A scaled row lies within the blocks' bounds of another build; its structure shows what it is."""
    from verification.gguf.writer import Raw

    name = "blk.0.ffn_down.weight"
    wanted = source.file.tensors[name].values().copy()
    wanted[9] *= np.float32(1.05)
    raw = Raw.read(quantise(source.floats, tmp_path / "x.gguf", "Q4_K_S"))
    kinds = {n: t.type for n, t in read_gguf(tmp_path / "x.gguf").tensors.items()}
    for info in raw.tensors:
        if kinds[info.name] == "Q4_K":
            if info.name == name:
                data = quantised_bytes(wanted, "Q4_K")
                assert data is not None
                info.data = data.tobytes()
            blocks = np.frombuffer(info.data, np.uint8).reshape(-1, 144).copy()
            blocks[::7, 0] ^= 1  # the scale's last bit in a seventh of the blocks: another processor's sums
            info.data = blocks.tobytes()
    result = weighed(source, raw.write(tmp_path / "f.gguf"))
    found = [f for r in result.results for f in r.findings]
    assert [(f.where, f.cause) for f in found] == [(name, "a row scaled")]
    assert {r.drawer for r in result.results if r.type == "Q4_K" and r.name != name} == {"judged"}


def test_codes_packed_again_are_the_same_bytes(source: Source, tmp_path: Path) -> None:
    """The builder's own packing, by which GPTQ and the rounding search write their files."""
    for kind, preset in (("Q4_0", "Q4_0"), ("Q4_K", "Q4_K_S")):
        tensor = read_gguf(quantise(source.floats, tmp_path / f"{kind}.gguf", preset)).tensors["blk.0.ffn_up.weight"]
        assert tensor.type == kind
        step, least = q4_grid(kind, tensor.raw.tobytes(), tensor.shape)
        safe = np.where(step == 0, 1, step)
        codes = np.where(step == 0, 0, np.rint((tensor.values() - least) / safe)).astype(np.int64)
        again = q4_bytes(kind, tensor.raw.tobytes(), codes)
        assert np.mean(np.frombuffer(again, np.uint8) == tensor.raw) > 0.999  # codes of a block of zeros are free
