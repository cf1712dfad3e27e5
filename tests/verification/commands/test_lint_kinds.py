"""`lint` of files that are no language model: recognised by keys and tensors, judged where possible, never faults."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from gguf_bytes import Value, with_keys
from gguf_bytes import parts as parts_of
from tiny_gguf import numbers, write_tiny

from so8t_core.errors import InputError
from verification.commands.lint import lint
from verification.commands.lint_result import LintReport
from verification.commands.lint_terminal import headline
from verification.commands.repository import candidates_of
from verification.engines.presets import add_key

WIDTH = 32


def write(path: Path, arch: str, keys: dict[str, object], shapes: dict[str, tuple[int, ...]]) -> Path:
    """A file by gguf-py's writer: keys by their Python type, tensors out of fixed numbers."""
    writer = GGUFWriter(path, arch)
    for key, value in keys.items():
        add_key(writer, key, value)
    for seed, (name, shape) in enumerate(shapes.items()):
        writer.add_tensor(name, numbers(int(np.prod(shape)), seed).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def projector(path: Path, *, blocks: int = 2, **keys: object) -> Path:
    said = {
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.vision.block_count": 2,
        "clip.vision.embedding_length": WIDTH,
    }
    shapes = {"v.patch_embd.weight": (WIDTH, 3, 4, 4), "mm.0.weight": (64, WIDTH), "mm.2.weight": (64, 64)}
    for block in range(blocks):
        shapes |= {f"v.blk.{block}.attn_{x}.weight": (WIDTH, WIDTH) for x in ("q", "k", "v", "out")}
        shapes[f"v.blk.{block}.ln1.weight"] = (WIDTH,)
    return write(path, "clip", said | keys, shapes)


def lora(path: Path, shapes: dict[str, tuple[int, ...]] | None = None, **keys: object) -> Path:
    pair = {"blk.0.attn_q.weight.lora_a": (4, WIDTH), "blk.0.attn_q.weight.lora_b": (WIDTH, 4)}
    embedding = {"token_embd.weight.lora_a": (65, 4), "token_embd.weight.lora_b": (WIDTH, 4)}
    said = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    return write(path, "llama", said | keys, pair | embedding if shapes is None else shapes)


def imatrix(path: Path) -> Path:
    shapes = {"blk.0.attn_q.weight.in_sum2": (1, WIDTH), "blk.0.attn_q.weight.counts": (1, 1)}
    file = write(path, "llama", {"general.type": "imatrix"}, shapes)
    parts = parts_of(file)
    for tensor in parts.tensors.values():
        values = np.abs(np.frombuffer(tensor.data, dtype=np.float32))
        tensor.data = (values + np.float32(1)).astype(np.float32).tobytes()
    return parts.write(file)


def vocabulary(path: Path) -> Path:
    parts = parts_of(write_tiny(path))
    parts.tensors.clear()
    parts.keys["tokenizer.ggml.pre"] = Value(8, "smollm")
    parts.keys["tokenizer.ggml.token_type"].value[:2] = [3, 3]
    return parts.write(path)


def bert(path: Path, **keys: object) -> Path:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"\u2581w{i}" for i in range(60))]
    said = {
        "bert.context_length": 64,
        "bert.embedding_length": WIDTH,
        "bert.feed_forward_length": 64,
        "bert.block_count": 1,
        "bert.attention.head_count": 4,
        "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.attention.causal": False,
        "bert.pooling_type": 1,
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [0] * len(tokens),
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.seperator_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(tokens), WIDTH),
        "position_embd.weight": (64, WIDTH),
        "token_types.weight": (2, WIDTH),
        "token_embd_norm.weight": (WIDTH,),
        "token_embd_norm.bias": (WIDTH,),
        "blk.0.ffn_up.weight": (64, WIDTH),
        "blk.0.ffn_up.bias": (64,),
        "blk.0.ffn_down.weight": (WIDTH, 64),
        "blk.0.ffn_down.bias": (WIDTH,),
    }
    for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
        shapes |= {f"blk.0.{part}.weight": (WIDTH, WIDTH), f"blk.0.{part}.bias": (WIDTH,)}
    for part in ("attn_output_norm", "layer_output_norm"):
        shapes |= {f"blk.0.{part}.weight": (WIDTH,), f"blk.0.{part}.bias": (WIDTH,)}
    return write(path, "bert", said | keys, shapes)


def reranker(path: Path) -> Path:
    return bert(path, **{"bert.pooling_type": 4})


def picture_model(path: Path) -> Path:
    shapes = {"double_blocks.0.img_attn.qkv.weight": (96, WIDTH), "img_in.weight": (WIDTH, 64)}
    return write(path, "flux", {}, shapes)


def whisper(path: Path) -> Path:
    return write(
        path, "whisper", {}, {"encoder.conv1.weight": (WIDTH, 80, 3), "decoder.token_embedding.weight": (64, WIDTH)}
    )


def control_vector(path: Path) -> Path:
    return write(
        path, "controlvector", {"controlvector.model_hint": "llama"}, {"direction.1": (WIDTH,), "direction.2": (WIDTH,)}
    )


KINDS: dict[Callable[[Path], Path], tuple[str, str]] = {
    projector: ("incomplete", "a projector"),
    lora: ("incomplete", "a LoRA adapter"),
    control_vector: ("incomplete", "a control vector"),
    imatrix: ("incomplete", "an importance matrix"),
    vocabulary: ("incomplete", "a vocabulary without weights"),
    bert: ("pass", "an embedding model (bert, pooling: mean)"),
    reranker: ("pass", "a reranker (bert)"),
    picture_model: ("incomplete", "no language model (architecture flux)"),
    whisper: ("incomplete", "no language model (architecture whisper)"),
}


def failed(report: LintReport) -> dict[str, str]:
    return {
        c.name: "; ".join(f"{f.where}: {f.found} ({f.cause})" for f in c.findings)
        for c in report.checks
        if c.status == "fail"
    }


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_what_a_file_is_stands_in_one_line_and_is_no_fault(make: Callable[[Path], Path], tmp_path: Path) -> None:
    report = lint(make(tmp_path / "looks-like-a-model-Q4_K_M.gguf"))
    verdict, noun = KINDS[make]
    assert failed(report) == {}
    assert (report.verdict, report.kind.startswith(noun)) == (verdict, True)
    assert noun in headline(report)
    said = [check for check in report.checks if check.name == "kind"]
    assert [noun in f"{check.detail} {check.findings}" for check in said] == [True]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_verify_refuses_what_has_no_logits_in_one_line(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "x.gguf")
    with pytest.raises(InputError, match="has no logits of a next token") as refused:
        candidates_of([path])
    assert "\n" not in str(refused.value)
    write_tiny(tmp_path / "model.gguf")
    found = candidates_of([tmp_path])
    assert [file.path.name for file in found.files] == ["model.gguf"]
    assert [KINDS[make][1] in note for note in found.notes] == [True]


def test_a_decoder_that_gives_vectors_is_an_embedding_model(tmp_path: Path) -> None:
    """Qwen3-Embedding is a decoder with a pooling type: its logits are never trained."""
    path = with_keys(write_tiny(tmp_path / "a.gguf"), tmp_path / "b.gguf", {"llama.pooling_type": Value(4, 3)})
    assert lint(path).kind == "an embedding model (llama, pooling: last token)"
    none = with_keys(path, tmp_path / "c.gguf", {"llama.pooling_type": Value(4, 0)})
    assert lint(none).kind == "a language model"


def test_a_damaged_number_is_found_in_every_kind(tmp_path: Path) -> None:
    for make in (projector, lora, picture_model, bert):
        parts = parts_of(make(tmp_path / "x.gguf"))
        tensor = next(reversed(parts.tensors.values()))
        tensor.data = struct.pack("<f", float("nan")) + tensor.data[4:]
        report = lint(parts.write(tmp_path / "x.gguf"))
        assert report.verdict == "fail"
        assert "1 NaN or Inf" in failed(report)["finite_weights"]


@pytest.mark.parametrize(
    ("keys", "change", "words"),
    [
        ({}, {"blk.0.attn_q.weight.lora_b": None}, "lora_a alone (half of a pair is missing)"),
        ({}, {"blk.0.attn_q.weight.lora_b": (WIDTH, 3)}, "lora_b [32, 3] (halves of two adapters)"),
        ({}, {"blk.0.ffn_up.weight": (4, 4)}, "blk.0.ffn_up.weight: another"),
        ({"adapter.lora.alpha": 0.0}, {}, "adapter.lora.alpha: 0 (the adapter does nothing)"),
        ({"adapter.type": "loha"}, {}, "adapter.type: 'loha'"),
    ],
)
def test_a_lora_is_held_to_its_pairs(
    keys: dict[str, object], change: dict[str, tuple[int, ...] | None], words: str, tmp_path: Path
) -> None:
    shapes = {"blk.0.attn_q.weight.lora_a": (4, WIDTH), "blk.0.attn_q.weight.lora_b": (WIDTH, 4)} | change
    report = lint(lora(tmp_path / "x.gguf", {name: shape for name, shape in shapes.items() if shape}, **keys))
    assert words in failed(report)["parts"]


def test_a_projector_is_held_to_the_encoders_it_declares(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    assert "1 of 2 blocks missing, first 1" in failed(lint(projector(path, blocks=1)))["parts"]
    audio = failed(lint(projector(path, **{"clip.has_audio_encoder": True})))["parts"]
    assert "clip.has_audio_encoder: 0 tensors of a.*" in audio
    none = failed(lint(projector(path, **{"clip.has_vision_encoder": False})))["parts"]
    assert "none declared" in none
    wide = failed(lint(projector(path, **{"clip.vision.embedding_length": 64})))["parts"]
    assert "v.blk.0.attn_q.weight: 32" in wide


def test_an_importance_matrix_of_either_form_is_judged(tmp_path: Path) -> None:
    name, values = b"blk.0.attn_q.weight", np.arange(WIDTH, dtype=np.float32)
    old = tmp_path / "old.dat"
    old.write_bytes(struct.pack("<ii", 1, len(name)) + name + struct.pack("<ii", 4, WIDTH) + values.tobytes())
    report = lint(old)
    assert (report.verdict, report.kind, report.tensors_total) == (
        "incomplete",
        "an importance matrix of the older form (.dat)",
        1,
    )
    unnamed = old.rename(tmp_path / "matrix")
    assert lint(unnamed).verdict == "incomplete"
    cut = tmp_path / "cut.dat"
    cut.write_bytes(unnamed.read_bytes()[:-8])
    assert "truncated" in failed(lint(cut))["parts"]
    new = parts_of(imatrix(tmp_path / "new.gguf"))
    del new.tensors["blk.0.attn_q.weight.counts"]
    assert "lacks its counts" in failed(lint(new.write(tmp_path / "new.gguf")))["parts"]


def test_a_pooling_type_that_nobody_knows_is_a_fault(tmp_path: Path) -> None:
    assert "bert.pooling_type: 9" in failed(lint(bert(tmp_path / "x.gguf", **{"bert.pooling_type": 9})))["parts"]
