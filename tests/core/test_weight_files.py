"""The weight files are those that transformers loads: each rule is held against transformers' own values."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from so8t_core import InputError
from so8t_core.weight_files import INDEX, SINGLE, weight_files

NORM = "model.norm.weight"  # its values say which file arrived


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One file; its final norm is 1 everywhere."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    directory = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def other(directory: Path, name: str, value: float, *, only: tuple[str, ...] = ()) -> None:
    """A copy of the weights, or of `only` some, whose final norm is `value`."""
    tensors = load_file(directory / SINGLE)
    tensors[NORM] = torch.full_like(tensors[NORM], value)
    save_file({k: v for k, v in tensors.items() if not only or k in only}, directory / name, metadata={"format": "pt"})


def index(directory: Path, files: dict[str, str], rest: str, name: str = INDEX) -> None:
    """An index of all tensors: `files` for some, `rest` for the others."""
    names = load_file(directory / SINGLE).keys()
    weight_map = {tensor: files.get(tensor, rest) for tensor in names}
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def sharded(directory: Path) -> None:
    """Two shards instead of the one file; the norm, 2 everywhere, in the second."""
    names = sorted(load_file(directory / SINGLE).keys() - {NORM})
    other(directory, "model-00001-of-00002.safetensors", 2, only=tuple(names))
    other(directory, "model-00002-of-00002.safetensors", 2, only=(NORM,))
    index(directory, {NORM: "model-00002-of-00002.safetensors"}, "model-00001-of-00002.safetensors")


def single_before_index(directory: Path) -> None:
    sharded(directory)


def index_alone(directory: Path) -> None:
    sharded(directory)
    (directory / SINGLE).unlink()


def stale_shard(directory: Path) -> None:
    sharded(directory)
    other(directory, "model-00003-of-00003.safetensors", 3)
    (directory / SINGLE).unlink()


def stale_beside_single(directory: Path) -> None:
    other(directory, "zzz.safetensors", 3)


def variant(directory: Path) -> None:
    other(directory, "model.fp16.safetensors", 3)
    index(directory, {}, "model.fp16.safetensors", "model.safetensors.index.fp16.json")


def twice(directory: Path) -> None:
    """The norm in both shards; the index names the first for it."""
    sharded(directory)
    names = tuple(load_file(directory / SINGLE))
    other(directory, "model-00001-of-00002.safetensors", 5, only=names)
    index(directory, {"lm_head.weight": "model-00002-of-00002.safetensors"}, "model-00001-of-00002.safetensors")
    other(directory, "model-00002-of-00002.safetensors", 6, only=("lm_head.weight", NORM))
    (directory / SINGLE).unlink()


def not_in_the_index(directory: Path) -> None:
    """A tensor that the index leaves out and a named file holds."""
    other(directory, "weights-a.safetensors", 7)
    weight_map = dict.fromkeys(load_file(directory / SINGLE).keys() - {NORM}, "weights-a.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / SINGLE).unlink()


def named_in_the_config(directory: Path) -> None:
    other(directory, "mine.safetensors", 8)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"transformers_weights": "mine.safetensors"}))


def pickled_beside(directory: Path) -> None:
    torch.save({"never": "read"}, directory / "pytorch_model.bin")


RULES = [
    (single_before_index, 1, "index.json is not used"),
    (index_alone, 2, ""),
    (stale_shard, 2, "no part of the model: model-00003-of-00003.safetensors"),
    (stale_beside_single, 1, "no part of the model: zzz.safetensors"),
    (variant, 1, "no part of the model: model.fp16.safetensors"),
    (twice, 6, "stands in several files"),
    (not_in_the_index, 7, ""),
    (named_in_the_config, 8, "no part of the model: model.safetensors"),
    (pickled_beside, 1, ""),
]


@pytest.mark.parametrize(("arrange", "value", "note"), RULES, ids=lambda x: getattr(x, "__name__", None))
def test_the_files_are_those_that_transformers_loads(
    checkpoint: Path, arrange: Callable[[Path], None], value: float, note: str
) -> None:
    arrange(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=False, dtype=torch.float32)
    found = weight_files(checkpoint)
    mine = {name: load_file(path)[name] for name, path in found.file_of.items()}
    assert model.model.norm.weight[0].item() == value
    assert mine.keys() == {k for k in model.state_dict() if "inv_freq" not in k}
    assert all(torch.equal(mine[name], tensor) for name, tensor in model.state_dict().items())
    assert (note in " ".join(found.notes)) if note else not found.notes


def outside(name: str) -> Callable[[Path], None]:
    def arrange(directory: Path) -> None:
        other(directory, "../outside.safetensors", 9)
        shard = name.replace("ABSOLUTE", str(directory.parent.resolve() / "outside.safetensors"))
        index(directory, {}, shard)
        (directory / SINGLE).unlink()

    return arrange


def link(target: str) -> Callable[[Path], None]:
    def arrange(directory: Path) -> None:
        other(directory, "../outside.safetensors", 9)
        (directory / SINGLE).unlink()
        (directory / SINGLE).symlink_to(target)

    return arrange


def written(text: str) -> Callable[[Path], None]:
    def arrange(directory: Path) -> None:
        (directory / SINGLE).unlink()
        (directory / INDEX).write_text(text)

    return arrange


def gone_shard(directory: Path) -> None:
    index_alone(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def lost_tensor(directory: Path) -> None:
    index_alone(directory)
    fields = json.loads((directory / INDEX).read_text())
    fields["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    (directory / INDEX).write_text(json.dumps(fields))


def pickled_only(directory: Path) -> None:
    (directory / SINGLE).rename(directory / "pytorch_model.bin")


def per_rank(directory: Path) -> None:
    other(directory, "shard-00001-model-00001-of-00001.safetensors", 3)


REFUSED = {
    "above": (outside("../outside.safetensors"), "outside the directory"),
    "above, by a detour": (outside("x/../../outside.safetensors"), "outside the directory"),
    "absolute": (outside("ABSOLUTE"), "outside the directory"),
    "link outside": (link("../outside.safetensors"), "is a link to .*outside the directory"),
    "link to itself": (link(SINGLE), "cannot be followed|holds no model.safetensors|are missing"),
    "missing shard": (gone_shard, "1 of 2 weight files are missing, first model-00002-of-00002"),
    "tensor in no file": (lost_tensor, "names model.layers.9.mlp.up_proj.weight, which no file holds"),
    "pickle in the index": (
        written('{"weight_map": {"a": "pytorch_model.bin"}}'),
        r"only \*.safetensors files are read",
    ),
    "name with NUL": (written('{"weight_map": {"a": "x\\u0000.safetensors"}}'), r"only \*.safetensors files are read"),
    "long name": (written(json.dumps({"weight_map": {"a": "x" * 300 + ".safetensors"}})), "only"),
    "no mapping": (written("[]"), "expected an object"),
    "no weight_map": (written('{"weight_map": {}}'), "has no weight_map"),
    "list as weight_map": (written('{"weight_map": ["a"]}'), "has no weight_map"),
    "null as a name": (written('{"weight_map": {"a": null, "b": "x.safetensors"}}'), "wanted file names"),
    "numbers as names": (written('{"weight_map": {"a": 3}}'), "wanted file names"),
    "deep": (written('{"weight_map": ' + '{"a":' * 50_000 + "1" + "}" * 50_001), "nested too deeply"),
    "a million entries": (
        written(json.dumps({"weight_map": {str(n): "model-1.safetensors" for n in range(1_000_000)}})),
        "names 1000000 tensors, at most",
    ),
    "not JSON": (written("{"), "is damaged"),
    "pickles only": (pickled_only, "only pytorch_model.bin, which is never unpickled here"),
    "nothing": (lambda directory: (directory / SINGLE).unlink(), "holds no model.safetensors"),
    "one rank's share": (per_rank, "one process's share"),
}


@pytest.mark.parametrize(("arrange", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_odd_files_are_refused_in_one_line(checkpoint: Path, arrange: Callable[[Path], None], message: str) -> None:
    arrange(checkpoint)
    with pytest.raises(InputError, match=message) as refusal:
        weight_files(checkpoint)
    assert len(str(refusal.value).splitlines()) == 1


def test_the_hubs_cache_keeps_its_files_behind_links(checkpoint: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(checkpoint, blobs)
    for name in os.listdir(blobs):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert weight_files(snapshot).names == (SINGLE,)
