"""A streamed reference gives the whole model's logits bit by bit, for every family, with an adapter, after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_ladder import LOOSE
from test_ladder import SMALL as SHORT
from verification_models import Family

from so8t_core.errors import InputError
from verification import verify
from verification.engines import huggingface, streamed
from verification.engines.huggingface import float32_bytes, hf_chunk, must_stream, open_reference
from verification.engines.streamed import StreamedModel
from verification.gate.policy import make_policy

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW: dict[str, Any] = {"sliding_window": 16}
TWO_KINDS: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **WINDOW}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 48,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "mistral": WINDOW,
    "qwen2": {},
    "qwen3": {},
    "phi3": {"original_max_position_embeddings": 48, "rope_parameters": LONGROPE, "tie_word_embeddings": False},
    "gemma": {"tie_word_embeddings": True},  # scaled embedding
    "gemma2": TWO_KINDS,  # soft-caps in attention and on the logits
    "gemma3_text": TWO_KINDS,  # two rotary tables
    "gemma3n_text": {  # inputs for each layer, keys and values shared by layers
        **TWO_KINDS,
        "intermediate_size": [96] * 3,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 1,
        "activation_sparsity_pattern": [0.0] * 3,
        "laurel_rank": 8,
    },
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 512},  # positions are an embedding too
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 32, "decoder_sparse_step": 1},  # experts: one tensor in memory
    "mixtral": EXPERTS,
    "gpt_oss": {**EXPERTS, **TWO_KINDS},
}


def save_family(name: str, folder: Path) -> Path:
    """A random model of a family, as save_pretrained writes it, in bfloat16 and several shards."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[0], **{**SMALL, **FAMILIES[name]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def passages(vocab: int = 96) -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, vocab, length) for length in (40, 12, 70, 40)]


def whole_logits(folder: Path, texts: list[Any]) -> list[Any]:
    return logits(open_reference(folder, stream=False), texts)


def logits(model: Any, texts: list[Any]) -> list[Any]:
    return [hf_chunk(model, tokens, first=1) for tokens in texts]


def assert_equal(wanted: list[Any], found: list[Any]) -> None:
    for own, other in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(own, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_logits_are_the_whole_models_bit_by_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, texts = save_family(name, tmp_path / "model"), passages()
    wanted = whole_logits(folder, texts)
    model = StreamedModel(folder)
    model.prepare(texts)
    assert_equal(wanted, logits(model, texts))
    monkeypatch.setattr(streamed, "WHOLE_HEAD", 0)  # a head that is read by slices
    monkeypatch.setattr(streamed, "SLICE", 32 * 64)
    model.forget()
    model.prepare(texts)
    for own, other in zip(wanted, logits(model, texts), strict=True):
        np.testing.assert_allclose(own, other, rtol=0, atol=64 * 2.0**-24 * np.abs(own).max())  # sums of 64 products


def test_a_weight_that_moved_by_one_rounding_is_seen(tmp_path: Path) -> None:
    folder, texts = save_family("llama", tmp_path / "model"), passages()
    wanted = whole_logits(folder, texts)
    path, name = next(
        (path, name)
        for path in sorted(folder.glob("*.safetensors"))
        for name in load_file(path)
        if name == "model.layers.1.self_attn.o_proj.weight"
    )
    tensors = load_file(path)
    tensors[name][3, 5] *= 1 + 2**-7
    save_file(tensors, path, metadata={"format": "pt"})
    found = logits(StreamedModel(folder), texts)
    assert all(not np.array_equal(own, other) for own, other in zip(wanted, found, strict=True))


class Killed(BaseException):
    """What no layer expects."""


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3n_text"])
def test_a_killed_run_goes_on_at_the_layer_it_had_reached(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, texts, keep = save_family(name, tmp_path / "model"), passages(), tmp_path / "keep"
    keep.mkdir()
    wanted = whole_logits(folder, texts)
    loaded: list[str] = []
    real = streamed._Shards.load

    def counted(self: Any, group: str) -> None:
        loaded.append(group)
        if len(loaded) == 4:  # what lies outside the layers, two layers, and the last one
            raise Killed
        real(self, group)

    monkeypatch.setattr(streamed._Shards, "load", counted)
    with pytest.raises(Killed):
        StreamedModel(folder, keep=keep).prepare(texts)
    kept = list(keep.iterdir())
    shares = name == "gemma3n_text"  # the last layer reads keys and values of the first
    assert len(kept) == (0 if shares else 1)
    if kept:
        with safe_open(str(kept[0]), framework="pt") as stored:
            assert stored.metadata() == {"layer": "2"}
    model = StreamedModel(folder, keep=keep)
    model.prepare(texts)
    assert_equal(wanted, logits(model, texts))
    layers = [group for group in loaded[5:] if group]
    assert len(layers) == (3 if shares else 1)
    assert list(keep.iterdir()) == []  # done: nothing to go on from


def test_hidden_states_of_other_texts_other_weights_or_a_damaged_file_are_not_gone_on_from(tmp_path: Path) -> None:
    folder, texts, keep = save_family("llama", tmp_path / "model"), passages(), tmp_path / "keep"
    keep.mkdir()
    wanted, model = whole_logits(folder, texts), StreamedModel(folder, keep=keep)
    run = streamed._LayerByLayer(model, texts, lambda done, total: None)
    other = streamed._LayerByLayer(model, texts[1:], lambda done, total: None)
    assert run._file() != other._file()
    run._file().write_bytes(b"half of a file")
    model.prepare(texts)
    assert_equal(wanted, logits(model, texts))
    before = run._file()
    next(folder.glob("*.safetensors")).touch()
    again = streamed._LayerByLayer(StreamedModel(folder, keep=keep), texts, lambda done, total: None)
    assert again._file() != before


def test_progress_counts_layers(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    StreamedModel(save_family("llama", tmp_path / "model")).prepare(passages(), lambda *step: told.append(step))
    assert told == [(0, 300), (100, 300), (200, 300), (300, 300)]


def test_base_and_adapter_stream_as_the_whole_model_with_its_adapter(family: Family) -> None:
    texts = passages(family.vocab)[:2]
    wanted = logits(open_reference(family.base, stream=False, adapter=family.adapter), texts)
    found = logits(open_reference(family.base, stream=True, adapter=family.adapter), texts)
    assert_equal(wanted, found)
    plain = logits(open_reference(family.base, stream=True), texts)
    assert not np.array_equal(plain[0], found[0])


def test_what_does_not_fit_is_streamed_and_what_fits_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_family("llama", tmp_path / "model")
    size = float32_bytes(folder)
    assert size == 4 * sum(p.numel() for p in open_reference(folder, stream=False).parameters())
    for free, streams in ((1.3 * size, True), (1.5 * size, False)):
        monkeypatch.setattr(huggingface, "free_memory", lambda free=free: free)
        assert must_stream(folder) is streams
        assert isinstance(open_reference(folder), StreamedModel) is streams


def test_a_checkpoint_that_lacks_a_layers_tensor_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_family("llama", tmp_path / "model")
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if "model.layers.1.mlp.up_proj.weight" in tensors:
            del tensors["model.layers.1.mlp.up_proj.weight"]
            save_file(tensors, path, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink()
    shards = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    save_file(shards, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is in no file"):
        StreamedModel(folder).prepare(passages())


def test_a_streamed_verification_has_the_same_verdict_and_digits(family: Family, tmp_path: Path) -> None:
    """Every stage: reference, bake and both controls, saved precision, the base's own damage."""
    reports = [
        verify(
            family.reference,
            [family.files["F16"]],
            base=family.base,
            adapter=family.adapter,
            policy=make_policy(LOOSE),
            work_dir=family.work,
            stream=stream,
            **SHORT,
        )
        for stream in (False, True)
    ]
    whole, layers = reports
    assert (layers.verdict, layers.divergences, layers.cells) == (whole.verdict, whole.divergences, whole.cells)
    assert layers.legs == whole.legs
    [note] = [note for note in layers.notes if note not in whole.notes]
    assert note.startswith("The reference was streamed, one decoder layer in memory at a time: its weights take 0.0 GB")
    assert [path.name for path in family.work.iterdir() if path.name.startswith(("so8t-baked", "hidden-"))] == []
