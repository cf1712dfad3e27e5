"""What a checkpoint must be before work starts: quantised weights, odd types and lost layers are said in one line."""

from __future__ import annotations

import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core_models import tiny_llama
from safetensors.torch import save_file

from so8t_core import InputError, SO8TConfig, attach, bake_checkpoint, load_adapter, save_adapter
from so8t_core.checkpoint_admission import admit_checkpoint
from so8t_core.safetensors_header import read_entries
from so8t_core.weight_files import INDEX, SINGLE


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("healthy") / "base"
    tiny_llama().save_pretrained(directory)
    return directory


@pytest.fixture
def checkpoint(healthy: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "base"
    directory.mkdir()
    for path in healthy.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def configured(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


QUANTISED = {
    "bitsandbytes 8": ({"load_in_8bit": True}, "quantization_config in config.json, method bitsandbytes"),
    "bitsandbytes 4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "method bitsandbytes"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "method gptq"),
    "awq": ({"quant_method": "awq", "bits": 4}, "method awq"),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "method fp8"),
    "mxfp4": ({"quant_method": "mxfp4"}, "method mxfp4"),
    "compressed-tensors": ({"quant_method": "compressed-tensors", "format": "nvfp4-pack"}, "method compressed-tensors"),
    "no method": ({"bits": 4}, "method not named"),
    "no mapping": ([1], "method"),
}


@pytest.mark.parametrize(("settings", "message"), QUANTISED.values(), ids=QUANTISED.keys())
@pytest.mark.parametrize("nested", [False, True])
def test_a_quantised_checkpoint_is_refused_with_key_method_and_remedy(
    checkpoint: Path, settings: Any, message: str, nested: bool
) -> None:
    fields = {"quantization_config": settings}
    configured(checkpoint, **({"text_config": fields} if nested else fields))
    with pytest.raises(InputError, match=f"{message}.*take the original checkpoint, or dequantise") as refusal:
        admit_checkpoint(checkpoint)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json"])
def test_a_quantisers_own_file_says_it_too(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text("{}")
    with pytest.raises(InputError, match=f"{name} beside the weights"):
        admit_checkpoint(checkpoint)


@pytest.mark.parametrize("value", [None, {}])
def test_an_empty_quantisation_is_none(checkpoint: Path, value: Any) -> None:
    configured(checkpoint, quantization_config=value)
    assert admit_checkpoint(checkpoint)[1] == []


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int8, torch.uint8])
def test_weights_of_another_kind_than_floats_are_refused(checkpoint: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file

    tensors = load_file(checkpoint / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(dtype)}, checkpoint / SINGLE)
    with pytest.raises(InputError, match=f"{name} is stored as .*not as a plain weight"):
        admit_checkpoint(checkpoint)
    save_file(tensors | {"model.position_ids": torch.arange(4)}, checkpoint / SINGLE)  # a buffer is none
    assert admit_checkpoint(checkpoint)[1] == []


def test_layers_for_several_tokens_are_compared_with_what_was_promised(checkpoint: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(checkpoint / SINGLE)
    configured(checkpoint, num_nextn_predict_layers=1)
    promised = admit_checkpoint(checkpoint)[1]
    assert len(promised) == 1
    assert "promises 1 layers" in promised[0]
    for extra in ("model.layers.9.eh_proj.weight", "mtp.fc.weight"):
        save_file(tensors | {extra: torch.ones(2, 2)}, checkpoint / SINGLE)
        configured(checkpoint, num_nextn_predict_layers=1)
        assert admit_checkpoint(checkpoint)[1] == []
        configured(checkpoint, num_nextn_predict_layers=0)
        (note,) = admit_checkpoint(checkpoint)[1]
        assert f"first {extra}" in note


def raw(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def tensors(**entries: Any) -> bytes:
    return json.dumps(entries).encode()


ODD = {
    "empty": b"",
    "half a length": b"\x01\x00",
    "length beyond the bound": raw(b"", length=1 << 40),
    "length beyond the file": raw(b"{}", length=1000),
    "negative length": raw(b"{}", length=(1 << 64) - 1),
    "no JSON": raw(b"{"),
    "a list": raw(b"[]"),
    "not UTF-8": raw(b'{"\xff": 1}'),
    "deep": raw(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "overlap": raw(tensors(a=entry(), b=entry(offsets=(2, 6))), bytes(6)),
    "gap": raw(tensors(a=entry(), b=entry(offsets=(8, 12))), bytes(12)),
    "reversed offsets": raw(tensors(a=entry(offsets=(4, 0))), bytes(4)),
    "beyond the end": raw(tensors(a=entry(offsets=(0, 4))), b""),
    "bytes left over": raw(tensors(a=entry()), bytes(40)),
    "wrong size": raw(tensors(a=entry(shape=(3,))), bytes(4)),
    "overflowing shape": raw(tensors(a=entry(shape=(1 << 62, 1 << 62))), bytes(4)),
    "negative shape": raw(tensors(a=entry(shape=(-1,))), bytes(4)),
    "unknown dtype": raw(tensors(a=entry(dtype="F12")), bytes(4)),
    "number as entry": raw(b'{"a": 1}'),
    "metadata of numbers": raw(b'{"__metadata__": {"a": 1}}'),
    "many dimensions": raw(tensors(a=entry(shape=(1,) * 100)), bytes(4)),
    "empty name": raw(json.dumps({"": entry()}).encode(), bytes(4)),
    "control characters": raw(json.dumps({"a\n\x1b[31m": entry()}).encode(), bytes(4)),
    "long name": raw(json.dumps({"a" * 10_000: entry()}).encode(), bytes(4)),
    "many tensors": raw(b'{"a": {}, ' + b",".join(b'"%d": {}' % n for n in range(300_000)) + b"}"),
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD.keys())
def test_a_damaged_safetensors_file_is_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"x\.safetensors") as refusal:
        read_entries(tmp_path / "x.safetensors")
    assert len(str(refusal.value).splitlines()) == 1
    assert len(str(refusal.value)) < 600


VALUES = (
    None,
    True,
    0,
    -1,
    1,
    7,
    8,
    28,
    2**31,
    2**63,
    2**64,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "F32",
    "F8_E4M3",
    "I64",
    "BF16",
    "../x",
    "\ud800",
    "a" * 1000,
    [],
    [[]],
    [1, 2],
    {},
    {"a": {}},
    "model.safetensors",
    "o_proj",
)


def changed(value: Any, rng: random.Random) -> Any:
    """The same JSON with one place changed: a value, a key, an entry taken out or put in twice."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        what = rng.random()
        if what < 0.6:
            return value | {key: changed(value[key], rng)}
        if what < 0.75:
            return {k: v for k, v in value.items() if k != key}
        return value | {str(rng.choice(VALUES)): value[key]}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], changed(value[at], rng), *value[at + rng.randrange(2) :]]
    return rng.choice(VALUES)


def bent(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut or doubled."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) or 1)
        what = rng.random()
        if what < 0.5 and out:
            out[at] = rng.randrange(256)
        elif what < 0.7:
            del out[at : at + rng.randint(1, 40)]
        elif what < 0.9:
            out[at:at] = out[at : at + rng.randint(1, 40)]
        else:
            del out[at:]
    return bytes(out)


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    what = rng.random()
    if what < 0.6:
        for _ in range(rng.randint(1, 3)):
            header = changed(header, rng)
        return raw(json.dumps(header).encode("utf-8", "surrogatepass"), rest)
    if what < 0.8:
        return raw(bent(data[8 : 8 + length], rng), rest)
    return bent(data[: 8 + length], rng) + rest


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.7:
        value = json.loads(data)
        for _ in range(rng.randint(1, 3)):
            value = changed(value, rng)
        return json.dumps(value).encode("utf-8", "surrogatepass")
    return bent(data, rng)


def fuzz(root: Path, count: int, seed: int) -> dict[str, int]:
    """Outcomes of `count` mutations of config.json, index, weights and adapter; anything else is raised."""
    model = tiny_llama()
    model.save_pretrained(root / "base", max_shard_size="20KB")
    attach(model, SO8TConfig(init_scale=0.1, lora={"r": 2, "target_modules": ["o_proj", "up_proj"]}))
    save_adapter(model, root / "adapter")
    shard = min(path.name for path in (root / "base").glob("*.safetensors"))
    seeds: list[tuple[str, Callable[[bytes, random.Random], bytes]]] = [
        (f"base/{shard}", mutated_safetensors),
        (f"base/{INDEX}", mutated_json),
        ("base/config.json", mutated_json),
        ("adapter/adapter_config.json", mutated_json),
        ("adapter/adapter_model.safetensors", mutated_safetensors),
    ]
    rng, plain = random.Random(seed), tiny_llama()
    outcome = dict.fromkeys(("taken", "refused"), 0)
    for number in range(count):
        name, mutate = seeds[number % len(seeds)]
        whole = (root / name).read_bytes()
        (root / name).unlink()
        (root / name).write_bytes(mutate(whole, rng))
        begin, said = time.process_time(), ""
        try:
            if name.startswith("base/"):
                admit_checkpoint(root / "base")
            if name.startswith("adapter/"):
                load_adapter(plain, root / "adapter")
                plain = tiny_llama()
            if not name.endswith("config.json") or name.startswith("adapter/"):
                bake_checkpoint(root / "base", root / "adapter", root / "out")
            outcome["taken"] += 1
        except InputError as error:
            said = str(error)
            outcome["refused"] += 1
        assert len(said.splitlines()) <= 2, said
        assert time.process_time() - begin < 5, (root / name).read_bytes()[:2000]
        (root / name).write_bytes(whole)
    return outcome


def test_mutated_checkpoints_and_adapters_are_taken_or_refused(tmp_path: Path) -> None:
    outcome = fuzz(tmp_path, 500, seed=21)
    assert outcome["refused"] > 200
    assert outcome["taken"] > 20


@pytest.mark.soak
def test_many_mutated_checkpoints_and_adapters_are_taken_or_refused(tmp_path: Path) -> None:
    fuzz(tmp_path, 20_000, seed=22)
