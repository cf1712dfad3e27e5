"""`lint` is silent on healthy files of nine architectures and names every planted fault by class and place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from so8t_core.errors import InputError
from verification.commands.lint import lint
from verification.commands.lint_result import LintReport
from verification.commands.lint_terminal import lint_table, write_lint
from verification.fault_catalogue import edit as faults
from verification.fault_catalogue.models import FAMILIES, Baked, Pair, make_baked, make_pairs
from verification.gguf.reader import read_gguf
from verification.gguf.writer import Raw
from verification.reference.checkpoint import Checkpoint
from verification.weight_parity.expected import inventory

KINDS = ("F16", "Q8_0", "Q4_K_M")
# transformers 5 reads every qwen2 tokenizer.json with Qwen2's own splitting, llama.cpp the SentencePiece model beside
NOT_COMPARABLE = {"qwen2": {"token_ids", "chat_token_ids", "special_ids"}}


@pytest.fixture(scope="session")
def pairs(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return make_pairs(tmp_path_factory.mktemp("architectures"), tokenizer)


@pytest.fixture(scope="session")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Baked:
    return make_baked(tmp_path_factory.mktemp("baked"))


@pytest.fixture(scope="session")
def oblong(tmp_path_factory: pytest.TempPathFactory) -> Baked:
    return make_baked(tmp_path_factory.mktemp("oblong"), square=False)


def examine(baked: Baked, path: Path, *, adapter: bool = True) -> LintReport:
    more = {"base": baked.base, "adapter": baked.adapter} if adapter else {}
    return lint(path, reference=baked.reference, oracle=baked.files["F16"], **more)


def found(report: LintReport) -> dict[str, str]:
    """Failed checks and all they found, as one text a check."""
    return {
        check.name: "; ".join(f"{f.where}: {f.expected} / {f.found} ({f.cause})" for f in check.findings)
        for check in report.checks
        if check.status == "fail"
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_healthy_files_raise_no_alarm(pairs: dict[str, Pair], family: str, kind: str) -> None:
    pair = pairs[family]
    report = lint(pair.files[kind], reference=pair.reference, oracle=pair.files["F16"])
    assert {name: text for name, text in found(report).items() if name not in NOT_COMPARABLE.get(family, ())} == {}
    assert not [check.name for check in report.checks if check.status == "not evaluated"]
    assert {row.how for row in report.tensors} == {"bytes of the type's own rounding or quantiser"}
    assert {row.best for row in report.hypotheses} == {"expected"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_every_architecture_is_mapped_by_principle(pairs: dict[str, Pair], family: str) -> None:
    file = read_gguf(pairs[family].files["F16"])
    found = inventory(Checkpoint(pairs[family].reference), file)
    assert set(found.source_of) | set(found.computed) == set(file.tensors)
    assert found.unmapped == found.missing == found.extra == []


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_converters_metadata_alone_is_oracle_enough(pairs: dict[str, Pair], family: str) -> None:
    """llama3 and LongRoPE factors are written together with tensors, which a metadata-only conversion has none of."""
    report = lint(pairs[family].files["Q8_0"], reference=pairs[family].reference)
    assert found(report) == {}
    assert report.verdict == "pass"


@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_baked_file_passes_with_base_and_adapter(baked: Baked, oblong: Baked, kind: str) -> None:
    for family in (baked, oblong):
        report = examine(family, family.files[kind])
        assert report.verdict == "pass"
        assert found(report) == {}


def test_a_file_alone_is_held_against_itself(baked: Baked) -> None:
    report = lint(baked.files["Q4_K_M"])
    assert report.verdict == "pass"
    assert report.reference is None
    assert report.tensors == []


METADATA = [
    ({"llama.rope.freq_base": 10000.0}, "oracle_metadata", "llama.rope.freq_base: 500000 / 10000"),
    ({"llama.rope.freq_base": None}, "metadata", "llama.rope.freq_base: 500000 / 10000"),
    ({"llama.attention.layer_norm_rms_epsilon": 1e-5}, "metadata", "layer_norm_rms_epsilon: 1e-06 / 9.9"),
    ({"llama.attention.head_count_kv": 4}, "oracle_metadata", "llama.attention.head_count_kv: 2 / 4"),
    ({"llama.attention.head_count": 2}, "metadata", "llama.attention.head_count: 4 / 2"),
    ({"llama.context_length": 2048}, "metadata", "llama.context_length: 1024 / 2048"),
    ({"llama.attention.key_length": 32}, "metadata", "llama.attention.key_length: 64 / 32"),
    ({"llama.rope.dimension_count": 32}, "oracle_metadata", "llama.rope.dimension_count: 64 / 32"),
    ({"llama.feed_forward_length": 1024}, "metadata", "llama.feed_forward_length: 512 / 1024"),
    ({"llama.block_count": 2}, "metadata", "llama.block_count: 3 / 2"),
    ({"llama.vocab_size": 99}, "metadata", "llama.vocab_size"),
    ({"llama.rope.scaling.type": "linear"}, "oracle_metadata", "llama.rope.scaling.type: nothing / 'linear'"),
    ({"tokenizer.ggml.add_bos_token": False}, "added_specials", "llama.cpp does not add it (double or missing BOS)"),
    ({"tokenizer.ggml.add_eos_token": True}, "added_specials", "add_eos_token"),
    ({"tokenizer.ggml.eos_token_id": 77}, "special_ids", "tokenizer.ggml.eos_token_id: 2 / 77"),
    ({"tokenizer.ggml.bos_token_id": 99999}, "vocabulary", "tokenizer.ggml.bos_token_id: an id below"),
    ({"tokenizer.ggml.add_space_prefix": True}, "token_ids", "in llama.cpp"),
    ({"tokenizer.chat_template": None}, "chat_template", "(chat template missing)"),
    ({"tokenizer.chat_template": "{% for m in x %}"}, "chat_render", "TemplateSyntaxError"),
    ({"tokenizer.chat_template": "{{ messages[0]['content'] }}"}, "chat_render", "chat 'user', character 0"),
    ({"general.file_type": 15}, "file_type", "Q4_K_M (Q4_K for most weights) / F16"),
    ({"general.architecture": "mistral9"}, "loads", "mistral9"),
]


@pytest.mark.parametrize(("keys", "check", "text"), METADATA)
def test_a_wrong_key_is_named(baked: Baked, tmp_path: Path, keys: dict[str, Any], check: str, text: str) -> None:
    report = examine(baked, faults.set_metadata(baked.files["F16"], tmp_path / "f.gguf", keys))
    assert report.verdict == "fail"
    assert text in found(report)[check]


@pytest.mark.parametrize(
    ("family", "key", "value", "text"),
    [
        ("gemma2", "gemma2.attn_logit_softcapping", 30.0, "gemma2.attn_logit_softcapping: 50 / 30"),
        ("gemma2", "gemma2.final_logit_softcapping", None, "gemma2.final_logit_softcapping: 30 / nothing"),
        ("gemma2", "gemma2.attention.sliding_window", 512, "gemma2.attention.sliding_window: 256 / 512"),
        ("gemma3", "gemma3.rope.freq_base_swa", 1e6, "gemma3.rope.freq_base_swa: 10000 / 1000000"),
        ("olmo2", "olmo2.rope.scaling.factor", 4.0, "olmo2.rope.scaling.factor: 2 / 4"),
        ("qwen2", "qwen2.rope.scaling.type", "linear", "qwen2.rope.scaling.type: 'yarn' / 'linear'"),
        ("qwen2", "qwen2.rope.scaling.original_context_length", 512, "original_context_length: 256 / 512"),
        ("phi3", "phi3.rope.scaling.attn_factor", 1.0, "phi3.rope.scaling.attn_factor: 1.05409"),
        ("phi3", "phi3.rope.scaling.original_context_length", 1024, "original_context_length: 512 / 1024"),
        ("phi3", "phi3.attention.sliding_window", 100, "phi3.attention.sliding_window: 2047 / 100"),
        ("mistral", "llama.attention.key_length", 64, "llama.attention.key_length: 32 / 64"),
    ],
)
def test_each_familys_own_keys_are_held_against_config_json(
    pairs: dict[str, Pair], tmp_path: Path, family: str, key: str, value: Any, text: str
) -> None:
    """Both roads see it: config.json read directly, and the converter's own metadata."""
    pair = pairs[family]
    path = faults.set_metadata(pair.files["F16"], tmp_path / "f.gguf", {key: value})
    report = lint(path, reference=pair.reference, oracle=pair.files["F16"])
    assert text in found(report)["metadata"]
    assert text in found(report)["oracle_metadata"]


def test_a_theta_that_the_converter_drops_is_seen_in_config_json(pairs: dict[str, Pair], tmp_path: Path) -> None:
    """Gemma-2's converter writes no RoPE base: both files agree, and both are wrong."""
    pair = pairs["gemma2"]
    folder = Path(shutil.copytree(pair.reference, tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"]["rope_theta"] = 250000.0
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    report = lint(pair.files["F16"], reference=folder, oracle=pair.files["F16"])
    assert "gemma2.rope.freq_base: 250000 / 10000" in found(report)["metadata"]
    assert "oracle_metadata" not in found(report)


def test_phi3_without_its_name_tokenises_otherwise(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["phi3"]
    path = faults.set_metadata(pair.files["F16"], tmp_path / "f.gguf", {"general.name": "tiny"})
    report = lint(path, reference=pair.reference, oracle=pair.files["F16"])
    assert "of chat 'user'" in found(report)["chat_token_ids"]


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_missing_or_wrong_rope_factors_are_named(pairs: dict[str, Pair], tmp_path: Path, family: str) -> None:
    pair = pairs[family]
    name = "rope_freqs.weight" if family == "llama" else "rope_factors_long.weight"
    lost = faults.without_tensor(pair.files["Q8_0"], tmp_path / "lost.gguf", name)
    report = lint(lost, reference=pair.reference, oracle=pair.files["F16"])
    assert f"{name}: a tensor of the reference / missing" in found(report)["inventory"]
    changed = faults.edit_tensor(pair.files["Q8_0"], tmp_path / "f.gguf", name, np.ones_like)
    report = lint(changed, reference=pair.reference, oracle=pair.files["F16"])
    assert name in found(report)["weights"]


OUTPUT, V, Q, K = (f"blk.1.{name}.weight" for name in ("attn_output", "attn_v", "attn_q", "attn_k"))
Plant = Callable[[Path, Path, Baked], Path]


def _with(change: Callable[[np.ndarray, torch.Tensor], np.ndarray], name: str = OUTPUT) -> Plant:
    """Change a tensor's values with the help of the layer's R."""
    from verification.weight_parity.compare import rotations

    def plant(source: Path, target: Path, baked: Baked) -> Path:
        R = rotations(baked.adapter)["model.layers.1.self_attn.o_proj.weight"]
        return faults.edit_tensor(source, target, name, lambda w: change(w, R))

    return plant


def _turn(w: np.ndarray, R: torch.Tensor, *powers: int) -> np.ndarray:
    from verification.weight_parity.hypotheses import rotated

    for power in powers:
        w = rotated(w, R, transposed=power < 0)
    return w


REFERENCES = "the reference's weight"
WEIGHTS: dict[str, tuple[Plant, str, str]] = {
    "not rotated": (_with(lambda w, R: _turn(w, R, -1)), "hypotheses", f"{OUTPUT}: {REFERENCES} / not rotated"),
    "inverse": (_with(lambda w, R: _turn(w, R, -1, -1)), "hypotheses", f"{OUTPUT}: {REFERENCES} / rotated back"),
    "twice": (_with(lambda w, R: _turn(w, R, 1)), "hypotheses", f"{OUTPUT}: {REFERENCES} / rotated twice"),
    "wrong side": (
        _with(lambda w, R: _turn(_turn(w, R, -1).T.copy(), R, -1).T),
        "hypotheses",
        f"{OUTPUT}: {REFERENCES} / rotated on the wrong side (R @ W)",
    ),
    "transposed": (
        lambda s, t, b: faults.transposed(s, t, OUTPUT),
        "hypotheses",
        f"{OUTPUT}: {REFERENCES} / transposed",
    ),
    "o_proj of another layer": (
        lambda s, t, b: faults.swapped(s, t, "blk.0.attn_output.weight", "blk.2.attn_output.weight"),
        "hypotheses",
        f"blk.0.attn_output.weight: {REFERENCES} / the tensor of blk.2",
    ),
    "v_proj of another layer": (
        lambda s, t, b: faults.swapped(s, t, "blk.0.attn_v.weight", V),
        "hypotheses",
        f"{V}: {REFERENCES} / the tensor of blk.0",
    ),
    "q un-permuted": (
        lambda s, t, b: faults.unpermuted(s, t, Q, 64),
        "hypotheses",
        f"{Q}: {REFERENCES} / q/k rows not permuted",
    ),
    "k permuted twice": (
        lambda s, t, b: faults.permuted(s, t, K, 64),
        "hypotheses",
        f"{K}: {REFERENCES} / q/k rows permuted twice",
    ),
    "gate and up swapped": (
        lambda s, t, b: faults.swapped(s, t, "blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"),
        "hypotheses",
        f"blk.1.ffn_gate.weight: {REFERENCES} / ffn_up of the same layer",
    ),
    "norm gain off 1 %": (
        lambda s, t, b: faults.scaled(s, t, "blk.1.attn_norm.weight", 1.01),
        "weights",
        "(scaled by 1.01)",
    ),
    "norm + 1": (
        lambda s, t, b: faults.shifted(s, t, "blk.1.ffn_norm.weight", 1.0),
        "weights",
        "norm + 1 applied once too often",
    ),
    "tensor lost": (
        lambda s, t, b: faults.without_tensor(s, t, "blk.1.ffn_down.weight"),
        "inventory",
        "blk.1.ffn_down.weight: a tensor of the reference / missing",
    ),
    "tensor renamed": (
        lambda s, t, b: faults.renamed(s, t, "blk.1.ffn_down.weight", "blk.1.ffn_dawn.weight"),
        "inventory",
        "blk.1.ffn_dawn.weight: no such tensor",
    ),
    "untied head lost": (
        lambda s, t, b: faults.without_tensor(s, t, "output.weight"),
        "inventory",
        "output.weight: a tensor of the reference / missing",
    ),
    "flipped bit": (
        lambda s, t, b: faults.flipped_bit(s, t, "blk.1.ffn_up.weight", byte=21),
        "weights",
        "blk.1.ffn_up.weight",
    ),
    "one plane of one layer off by 0.2 rad": (
        lambda s, t, b: faults.rotated_plane(s, t, OUTPUT, 0.2, column=80),
        "weights",
        "channels 80..87",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", WEIGHTS)
def test_a_wrong_tensor_is_named_at_every_level(baked: Baked, tmp_path: Path, fault: str, kind: str) -> None:
    plant, check, text = WEIGHTS[fault]
    report = examine(baked, plant(baked.files[kind], tmp_path / "f.gguf", baked))
    assert report.verdict == "fail"
    assert text in found(report)[check]
    named = {
        f.where for c in report.checks if c.status == "fail" and c.name in ("weights", "hypotheses") for f in c.findings
    }
    assert len(named) <= 2, named  # the tensor itself, or the two that changed places


def test_the_base_in_place_of_the_reference_is_named(baked: Baked, tmp_path: Path) -> None:
    base, path = Checkpoint(baked.base), baked.files["Q4_K_M"]
    for layer in range(3):
        values = base[f"model.layers.{layer}.self_attn.o_proj.weight"]
        name, target = f"blk.{layer}.attn_output.weight", tmp_path / f"{layer}.gguf"
        path = faults.edit_tensor(path, target, name, lambda w, values=values: values)
    (check,) = [c for c in examine(baked, path).checks if c.name == "hypotheses"]
    assert [f.cause for f in check.findings] == ["the base's own weight (nothing baked)"] * 3
    assert found(examine(baked, path, adapter=False)).keys() == {"weights"}  # without a base only: it differs


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_rotation_is_named_where_o_proj_is_not_square(oblong: Baked, tmp_path: Path, kind: str) -> None:
    plant, check, text = WEIGHTS["not rotated"]
    report = examine(oblong, plant(oblong.files[kind], tmp_path / "f.gguf", oblong))
    assert text in found(report)[check]


@pytest.mark.parametrize("kind", KINDS)
def test_a_milliradian_in_one_plane_of_one_layer_is_refused_at_every_level(
    baked: Baked, tmp_path: Path, kind: str
) -> None:
    """The quantised bytes of a file whose other tensors come from the same quantiser allow no other weights."""
    W = Checkpoint(baked.reference)["model.layers.1.self_attn.o_proj.weight"]
    c, s = np.cos(1e-3), np.sin(1e-3)
    turned = W.astype(np.float64)
    turned[:, 80:82] = turned[:, 80:82] @ np.array([[c, -s], [s, c]])
    path = faults.edit_tensor(baked.files[kind], tmp_path / "f.gguf", OUTPUT, lambda w: turned.astype(np.float32))
    report = examine(baked, path)
    assert {f.where for check in report.checks if check.status == "fail" for f in check.findings} == {OUTPUT}


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@pytest.mark.parametrize(("by", "cause"), [(-1.0, "norm + 1 missing"), (1.0, "norm + 1 applied once too often")])
def test_gemmas_norm_without_its_one_is_named(
    pairs: dict[str, Pair], tmp_path: Path, family: str, by: float, cause: str
) -> None:
    pair = pairs[family]
    path = faults.shifted(pair.files["Q8_0"], tmp_path / "f.gguf", "blk.0.attn_norm.weight", by)
    report = lint(path, reference=pair.reference, oracle=pair.files["F16"])
    assert cause in found(report)["weights"]


def test_phi3s_fused_rows_in_another_order_are_named(pairs: dict[str, Pair], tmp_path: Path) -> None:
    pair = pairs["phi3"]

    def reorder(w: np.ndarray) -> np.ndarray:
        q, k, v = np.split(w, [256, 384])
        return np.concatenate([q, v, k])

    path = faults.edit_tensor(pair.files["Q4_K_M"], tmp_path / "f.gguf", "blk.0.attn_qkv.weight", reorder)
    text = found(lint(path, reference=pair.reference, oracle=pair.files["F16"]))["hypotheses"]
    assert "blk.0.attn_qkv.weight (k rows): the reference's weight / the v rows" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(baked: Baked, tmp_path: Path, value: float) -> None:
    path = faults.poisoned(baked.files["F16"], tmp_path / "f.gguf", "blk.0.ffn_up.weight", value)
    for report in (lint(path), examine(baked, path)):
        assert "blk.0.ffn_up.weight: finite weights / 1 NaN or Inf" in found(report)["finite_weights"]


def test_f16_overflow_is_named_whether_it_became_inf_or_was_clipped(baked: Baked, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(baked.reference, tmp_path / "hf"))
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"].view(-1)[7] = 1e5  # bfloat16 holds it, F16 does not
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    name = "blk.0.ffn_up.weight"
    for value, check in ((float("inf"), "finite_weights"), (65504.0, "saturated_weights")):
        path = faults.poisoned(baked.files["F16"], tmp_path / "f.gguf", name, value)
        report = lint(path, reference=folder, oracle=baked.files["F16"])
        assert name in found(report)[check]
        assert f"{name}: 99840 at [0, 7] within one rounding of F16" in found(report)["weights"]
        assert "F16 overflow" in found(report)["weights"]


def test_weights_that_became_zero_are_noted(baked: Baked, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(baked.reference, tmp_path / "hf"))
    state = load_file(folder / "model.safetensors")
    state["model.layers.0.mlp.up_proj.weight"] *= 1e-9
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    path = faults.scaled(baked.files["F16"], tmp_path / "f.gguf", "blk.0.ffn_up.weight", 1e-9)
    report = lint(path, reference=folder, oracle=baked.files["F16"])
    (check,) = [c for c in report.checks if c.name == "flushed_weights"]
    assert check.status == "note"
    assert check.findings[0].where == "blk.0.ffn_up.weight"


@pytest.mark.parametrize(("token", "kind"), [(1, 1), (-1, 1), (300, 3)])
def test_a_changed_token_type_is_named(baked: Baked, tmp_path: Path, token: int, kind: int) -> None:
    size = len(read_gguf(baked.files["F16"]).metadata["tokenizer.ggml.tokens"])
    path = faults.token_type(baked.files["F16"], tmp_path / "f.gguf", token, kind)
    text = found(examine(baked, path))["oracle_metadata"]
    assert f"tokenizer.ggml.token_type[{token % size}]" in text


def test_swapped_tokens_are_named(baked: Baked, tmp_path: Path) -> None:
    report = found(examine(baked, faults.swapped_tokens(baked.files["F16"], tmp_path / "f.gguf", 300, 301)))
    assert "tokenizer.ggml.tokens[300]" in report["oracle_metadata"]
    assert "2 items differ" in report["oracle_metadata"]


def test_an_end_of_turn_that_llama_cpp_does_not_know_is_named(baked: Baked, tmp_path: Path) -> None:
    """Its name is taken away, by which llama.cpp knows it; the template still ends answers with the token."""
    from verification.fault_catalogue.models import TURNS

    raw = Raw.read(baked.files["F16"])
    tokens = raw.keys["tokenizer.ggml.tokens"][1]
    number = tokens.index("<end_of_turn>")
    tokens[number] = "<over>"
    template = TURNS.replace("<end_of_turn>", "<over>")
    raw.keys["tokenizer.chat_template"] = (8, template)
    path = raw.write(tmp_path / "f.gguf")
    assert f"token {number} '<over>'" in found(lint(path))["end_of_turn"]
    assert f"token {number} '<end_of_turn>': an end of generation" in found(examine(baked, path))["stop_set"]


def test_layout_faults_are_named(baked: Baked, tmp_path: Path) -> None:
    report = lint(faults.padded(baked.files["Q8_0"], tmp_path / "f.gguf"))
    assert "data behind the last tensor" in found(report)["layout"]


@pytest.mark.parametrize("keep", [0, 3, 30, 5000, 500_000, -1])
def test_a_truncated_file_is_an_input_error_that_says_so(baked: Baked, tmp_path: Path, keep: int) -> None:
    with pytest.raises(InputError, match=r"f\.gguf.*(truncated|not a GGUF file)"):
        lint(faults.truncated(baked.files["Q8_0"], tmp_path / "f.gguf", keep), reference=baked.reference)


def _outcome(baked: Baked, path: Path) -> str:
    try:
        return examine(baked, path, adapter=False).verdict
    except InputError:
        return "refused"


def test_flipped_header_bits_never_end_in_a_traceback(baked: Baked, tmp_path: Path) -> None:
    """Any bit of the first kilobyte: a fault that is named, an input error, or a change that does not matter."""
    data = baked.files["Q8_0"].read_bytes()
    generator = np.random.default_rng(0)
    outcomes = set()
    for number in range(12):
        at, bit = int(generator.integers(0, 1000)), int(generator.integers(0, 8))
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
        outcomes.add(_outcome(baked, path))
    assert "fail" in outcomes
    assert "refused" in outcomes


def test_a_llama_cpp_that_aborts_is_a_finding(baked: Baked, tmp_path: Path) -> None:
    path = faults.set_metadata(baked.files["F16"], tmp_path / "f.gguf", {"llama.attention.head_count": 0})
    assert "a file that llama.cpp loads" in found(lint(path))["loads"]


def test_another_maker_within_the_types_bound_is_a_note(baked: Baked, tmp_path: Path) -> None:
    """A file from a BF16 checkpoint through other roundings, as an importance matrix gives: noted, not refused."""
    name = "blk.1.ffn_up.weight"
    generator = np.random.default_rng(0)
    path = baked.files["Q4_K_M"]
    for layer in range(3):
        for part in ("ffn_up", "ffn_gate", "ffn_down", "attn_output", "attn_q"):
            noise = lambda w: w + 0.1 * np.std(w) * 0.1 * generator.standard_normal(w.shape).astype(np.float32)  # noqa: E731
            target = tmp_path / f"{layer}{part}.gguf"
            path = faults.edit_tensor(path, target, f"blk.{layer}.{part}.weight", noise)
    report = examine(baked, path)
    (check,) = [c for c in report.checks if c.name == "other_maker"]
    assert check.status == "note"
    assert name in [f.where for f in check.findings]
    assert "hypotheses" not in found(report)


def test_no_converter_leaves_the_verdict_incomplete(
    baked: Baked, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SO8T_CONVERTER", str(tmp_path))
    report = lint(baked.files["Q8_0"], reference=baked.reference)
    assert report.verdict == "incomplete"
    (check,) = [c for c in report.checks if c.status == "not evaluated"]
    assert check.name == "oracle_metadata"
    assert "$SO8T_CONVERTER" in check.detail


def test_a_file_that_names_another_family_is_judged_by_the_conversion(baked: Baked, tmp_path: Path) -> None:
    path = faults.set_metadata(baked.files["F16"], tmp_path / "f.gguf", {"llama.expert_count": 8})
    report = examine(baked, path)
    assert report.verdict == "fail"
    assert "llama.expert_count" in found(report)["oracle_metadata"]
    assert not [check.name for check in report.checks if check.status == "not evaluated"]
    assert {row.drawer for row in report.tensors} == {"proven"}
    wrong = faults.transposed(path, tmp_path / "w.gguf", OUTPUT)
    assert "transposed" in found(examine(baked, wrong))["hypotheses"]


def test_an_adapter_without_a_reference_is_refused(baked: Baked) -> None:
    with pytest.raises(InputError, match="add --reference"):
        lint(baked.files["F16"], adapter=baked.adapter)


def text_of(report: LintReport, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    console.print(lint_table(report))
    return console.export_text()


def test_the_verdict_stands_first_and_every_fault_says_what_to_do(baked: Baked, tmp_path: Path) -> None:
    path = faults.transposed(baked.files["Q8_0"], tmp_path / "f.gguf", OUTPUT)
    shown = text_of(examine(baked, path), width=200)
    assert shown.startswith("FAIL: f.gguf (llama, Q8_0, 31 tensors)")
    assert "transposed" in shown
    assert "convert and quantise the reference again" in shown
    assert text_of(lint(baked.files["Q8_0"])).startswith("PASS: m-Q8_0.gguf")


def test_lint_json_holds_all_that_was_found(baked: Baked, tmp_path: Path) -> None:
    report = examine(baked, baked.files["Q8_0"])
    stored = LintReport.model_validate_json(write_lint(report, tmp_path / "out").read_text(encoding="utf-8"))
    assert stored == report
    assert len(stored.tensors) == stored.tensors_total == 31
    assert {row.name for row in stored.hypotheses} >= {OUTPUT, V, Q, K}
